"""The live stream of a video that has its input in front: every picture once, whenever somebody begins to watch."""

from __future__ import annotations

import asyncio
import io
import re
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.serve import live as module
from pavdm_dist.serve import playlist as lists
from pavdm_dist.serve.live import Live
from pavdm_dist.serve.playlist import Playlist

CHUNKS, FRAMES, INPUT = 4, 5, 7


def _packets(file: str | io.BytesIO) -> list[tuple[int, bytes]]:
    with av.open(file) as container:
        stream = container.streams.video[0]
        found = [packet for packet in container.demux(stream) if packet.size]
        return [(round(packet.pts * packet.time_base * stream.average_rate), bytes(packet)) for packet in found]


async def _watched(output: Path, grow: Callable[[], bool], pieces: int) -> bytes:
    """What a viewer gets of a video that grows by a call of ``grow`` after so many pieces, till that gives False."""
    over, data, count = False, b"", 0
    stream = Live().stream(str(output), lambda: over)
    waits = asyncio.ensure_future(anext(stream, b""))
    while True:
        done, _ = await asyncio.wait([waits], timeout=0.05)
        if not done or (count and count % pieces == 0):
            over = over or not grow()
        if not done:
            continue
        if not (piece := waits.result()):
            return data
        data, count = data + piece, count + 1
        waits = asyncio.ensure_future(anext(stream, b""))


@pytest.mark.parametrize("pieces", [1, 2, 100])
@pytest.mark.parametrize("input_frames", [0, INPUT])
def test_every_picture_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, input_frames: int
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    rng, output = np.random.default_rng(0), tmp_path / "video.mp4"
    frames = rng.integers(0, 255, (INPUT + CHUNKS * FRAMES, 32, 48, 3), dtype=np.uint8)
    writer = SegmentWriter(output, 24, 32, 48, chunks_per_segment=1)
    steps = iter(range(-1 if input_frames else 0, CHUNKS + 1))

    def grow() -> bool:
        step = next(steps)
        if step < 0:
            writer.write_input(iter(frames[:INPUT]))
        elif step < CHUNKS:
            writer.write_chunk(step, frames[INPUT + step * FRAMES :][:FRAMES])
        else:
            writer.finish()
        return step < CHUNKS

    seen = asyncio.run(_watched(output, grow, pieces))
    assert len(_packets(str(output))) == input_frames + CHUNKS * FRAMES
    assert _packets(io.BytesIO(seen)) == _packets(str(output))


def test_the_input_is_a_segment_of_its_own_that_comes_first(tmp_path: Path) -> None:
    output = tmp_path / "video.mp4"
    writer, playlist = SegmentWriter(output, 24, 32, 48, chunks_per_segment=1), Playlist(str(output))
    assert not playlist.look() and playlist.next(-1, short=True) is None
    writer.write_input([np.zeros((32, 48, 3), np.uint8)])
    assert playlist.look() and not playlist.look()
    first = playlist.next(-1, short=False)
    assert first is not None and (first.behind, Path(first.path).name) == (0, "input.mp4")
    assert playlist.next(0, short=True) is None
    writer.write_chunk(0, np.zeros((2, 32, 48, 3), np.uint8))
    assert playlist.look() and playlist.next(-1, short=False) == first
    second = playlist.next(0, short=False)
    assert second is not None and second.behind == 1 and Path(second.path).is_file()


@pytest.mark.parametrize("ends", ["complete", "incomplete"])
@pytest.mark.parametrize("marks", [True, False])
def test_a_viewer_goes_on_with_a_video_whose_writer_was_stopped_within_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, marks: bool
) -> None:
    """The next one drops what it leaves of the group. Without the mark that says so, as of before, frames may miss."""
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    rng, output = np.random.default_rng(0), tmp_path / "video.mp4"
    chunks = rng.integers(0, 255, (9, FRAMES, 32, 48, 3), dtype=np.uint8)
    writer = SegmentWriter(output, 24, 32, 48, chunks_per_segment=3)
    playlist = Path(writer.playlist)

    def stop() -> None:
        for index in range(5):
            writer.write_chunk(index, chunks[index])
        assert "segment-000003-000004.mp4" in str(writer.abort() and playlist.read_text())
        if not marks:
            playlist.write_text(re.sub("#.*\n", "", playlist.read_text()))

    def go_on() -> None:
        again = SegmentWriter(output, 24, 32, 48, chunks_per_segment=3, resume=True)
        assert again.next_chunk == 3
        for index in range(3, 9):
            again.write_chunk(index, chunks[index])

    def finish() -> None:
        SegmentWriter(output, 24, 32, 48, chunks_per_segment=3, resume=True).finish()

    steps = iter([stop, go_on, finish] if ends == "complete" else [stop])

    def grow() -> bool:
        step = next(steps, None)
        if step is not None:
            step()
        return step not in (None, finish)

    seen = _packets(io.BytesIO(asyncio.run(_watched(output, grow, 100))))
    if ends == "incomplete":
        assert len(seen) == 5 * FRAMES, "all that there is"
    elif marks:
        assert seen == _packets(str(output)) and len(seen) == 9 * FRAMES
    else:  # without chunk 5 at most
        assert 8 * FRAMES <= len(seen) <= 9 * FRAMES and [at for at, _ in seen] == list(range(len(seen)))


def test_a_look_reads_what_is_new_however_long_the_video_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "video.mp4.parts" / "playlist.ffconcat", list[int]()

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            read.append(len(data))
            return data

    def entry(chunk: int) -> str:
        return f"file segment-{chunk:06d}-{chunk:06d}.mp4\nduration 0.708333\n"

    monkeypatch.setattr(lists, "open_read", lambda path: Counted(Path(path).read_bytes()))
    path.parent.mkdir()
    text = "ffconcat version 1.0\n" + "".join(map(entry, range(5000)))
    path.write_text(text)
    playlist = Playlist(str(tmp_path / "video.mp4"))
    assert playlist.look() and playlist.next(4999, short=False) is not None and sum(read) == len(text)
    read.clear()
    assert not any(playlist.look() for _ in range(10)) and sum(read) == 10 * len(entry(0))
    read.clear()
    path.write_text(text + entry(5000))
    assert playlist.look() and playlist.next(5000, short=False) is not None and sum(read) == 2 * len(entry(0))
    # What is no longer as it was is read anew.
    path.write_text("ffconcat version 1.0\n" + entry(0) + entry(7).replace("7.mp4", "8.mp4"))
    assert playlist.look() and playlist.next(5000, short=False) is None
    assert (found := playlist.next(7, short=False)) is not None and found.behind == 9


def test_files_are_looked_at_once_for_all_viewers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    output, viewers, asked = tmp_path / "video.mp4", 30, list[float]()
    writer = SegmentWriter(output, 24, 32, 48, chunks_per_segment=1)
    over = False

    def is_over() -> bool:
        asked.append(time.monotonic())
        return over

    async def watch(live: Live) -> bytes:
        return b"".join([data async for data in live.stream(str(output), is_over)])

    async def all_watch() -> tuple[list[bytes], bytes]:
        nonlocal over
        live = Live()
        watching = [asyncio.ensure_future(watch(live)) for _ in range(viewers)]
        for index in range(2):
            await asyncio.sleep(0.2)
            writer.write_chunk(index, np.zeros((2, 32, 48, 3), np.uint8))
        over = True
        seen = await asyncio.gather(*watching)
        # One that comes when it is over looks for itself: a video that failed may be tried again.
        before = len(asked)
        last = await watch(live)
        assert len(asked) > before
        await asyncio.sleep(0.1)
        assert len(asked) == before + 1, "nobody watches any more"
        return seen, last

    seen, last = asyncio.run(all_watch())
    assert set(seen) == {last} and len(_packets(io.BytesIO(last))) == 4
    assert len(asked) <= 2 + (asked[-1] - asked[0]) / 0.02


def test_a_folder_that_is_away_for_a_while_ends_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    output, asked = tmp_path / "video.mp4", list[int]()
    SegmentWriter(output, 24, 32, 48, chunks_per_segment=1).write_chunk(0, np.zeros((2, 32, 48, 3), np.uint8))

    def is_over() -> bool:
        asked.append(1)
        if len(asked) < 4:
            raise OSError("stale file handle")
        return True

    async def watch() -> bytes:
        return b"".join([data async for data in Live().stream(str(output), is_over)])

    assert len(_packets(io.BytesIO(asyncio.run(asyncio.wait_for(watch(), 30))))) == 2


def test_a_slow_viewer_gets_the_rest_though_a_later_one_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    output, over = tmp_path / "video.mp4", False
    writer = SegmentWriter(output, 24, 32, 48, chunks_per_segment=1)
    writer.write_chunk(0, np.zeros((2, 32, 48, 3), np.uint8))

    async def watch() -> tuple[bytes, bytes]:
        nonlocal over
        live = Live()
        slow = live.stream(str(output), lambda: over)
        seen = await anext(slow)
        writer.write_chunk(1, np.zeros((2, 32, 48, 3), np.uint8))
        writer.finish()
        over = True
        while not all(video.over for video in live._videos.values()):
            await asyncio.sleep(0.01)
        quick = b"".join([data async for data in live.stream(str(output), lambda: over)])
        return seen + b"".join([data async for data in slow]), quick

    slow, quick = asyncio.run(asyncio.wait_for(watch(), 30))
    assert _packets(io.BytesIO(slow)) == _packets(io.BytesIO(quick)) and len(_packets(io.BytesIO(slow))) == 4
