"""A video as it grows, for any number of viewers: read from its files, whoever renders it and on whatever machine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial

from anyio.to_thread import run_sync

from pavdm_dist.errors import MediaError
from pavdm_dist.io.parts import parts_folder
from pavdm_dist.io.segments import INPUT
from pavdm_dist.io.storage import exists, is_remote, join, list_names
from pavdm_dist.serve.fragments import fragments

_SEGMENT = re.compile(r"segment-(\d{6,})-(\d{6,})\.mp4")
# How often files are looked at for a new segment; stores that charge by the look less often.
LOOK_S, LOOK_REMOTE_S = 0.1, 2.0


def segments(output: str, from_chunk: int = -1) -> list[tuple[int, str]]:
    """Closed segments of an unfinished video that follow each other: the chunk behind each, its path.

    Args:
        output: the mp4 that it becomes.
        from_chunk: that the first one begins with; -1 = with the input, where the video has it in front of its chunks.
            That is written before any chunk is: a listing that has chunks without it shows that there is none.
    """
    parts, due = parts_folder(output), max(0, from_chunk)
    names = list_names(parts)
    found = [(0, join(parts, INPUT))] if from_chunk < 0 and INPUT in names else []
    for name in names:
        match = _SEGMENT.fullmatch(name)
        if match is not None and int(match[1]) == due:
            due = int(match[2]) + 1
            found.append((due, join(parts, name)))
    return found


async def live(output: str, is_over: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Bytes of a fragmented mp4: what there is of a video at once, the rest as its segments are closed.

    It ends with the video; one that ends before it is complete ends the stream there.

    Args:
        output: the mp4 that it becomes.
        is_over: whether nothing will follow: it is complete, or will never be. Asked in a thread.
    """
    wait = LOOK_REMOTE_S if is_remote(output) else LOOK_S
    chunk, before, frames = -1, 0, 0  # the next chunk, frames before it, frames that were sent
    while True:
        # Asked before the files are looked at: what is closed after that is found in the next round.
        over = await run_sync(is_over)
        # The parts go when a video is complete: what cannot be read of them is in the mp4.
        with suppress(OSError, MediaError):
            for behind, path in await run_sync(segments, output, chunk):
                async for data, count in _in_thread(partial(fragments, path, frames, frames - before, not frames)):
                    frames += count
                    yield data
                chunk, before = behind, frames
        if over:
            break
        await asyncio.sleep(wait)
    if await run_sync(exists, output):
        with suppress(OSError):
            async for data, _ in _in_thread(partial(fragments, output, frames, frames, not frames)):
                yield data


async def _in_thread(make: Callable[[], Iterator[tuple[bytes, int]]]) -> AsyncIterator[tuple[bytes, int]]:
    """A generator of files and codecs, stepped in threads, so that the server goes on meanwhile."""
    pieces = make()
    while (piece := await run_sync(next, pieces, None)) is not None:
        yield piece
