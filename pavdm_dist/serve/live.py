"""A video as it grows, for any number of viewers: read from its files, whoever renders it and on whatever machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from anyio.to_thread import run_sync

from pavdm_dist.errors import MediaError
from pavdm_dist.io.storage import exists, is_remote
from pavdm_dist.serve.fragments import fragments
from pavdm_dist.serve.playlist import Playlist

logger = logging.getLogger(__name__)

# How often files are looked at for a new segment; stores that charge by the look less often.
LOOK_S, LOOK_REMOTE_S = 0.1, 2.0
# Until a segment is tried again that could not be read.
_AGAIN_S = 1.0


class Live:
    """The videos that are watched. Used in one event loop."""

    def __init__(self) -> None:
        self._videos: dict[str, _Video] = {}

    async def stream(self, output: str, is_over: Callable[[], bool]) -> AsyncIterator[bytes]:
        """Bytes of a fragmented mp4: what there is of a video at once, the rest as its segments are closed.

        Of an unfinished video these are whole groups of chunks: what a writer has left of one that it did not fill is
        made anew with the rest of it. The stream ends with the video; one that ends before it is complete ends it with
        all that there is.

        Args:
            output: the mp4 that it becomes.
            is_over: whether nothing will follow: it is complete, or will never be. Asked in a thread, once for all
                viewers of this output.
        """
        chunk, before, frames = -1, 0, 0  # the next chunk, frames before it, frames that were sent
        with self._watched(output, is_over) as video:
            while True:
                # Asked before the segments are: what comes after that is told of, and found in the next round.
                over, news = video.over, video.news
                try:
                    while (segment := video.playlist.next(chunk, short=over)) is not None:
                        pieces = partial(fragments, segment.path, frames, frames - before, not frames)
                        async for data, count in _in_thread(pieces):
                            frames += count
                            yield data
                        chunk, before = segment.behind, frames
                    patience = None
                except (OSError, MediaError):
                    # The parts go when a video is complete: what cannot be read of them is in the mp4.
                    patience = _AGAIN_S
                if over:
                    break
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), patience)
        try:
            if await run_sync(exists, output):
                async for data, _ in _in_thread(partial(fragments, output, frames, frames, not frames)):
                    yield data
        except (OSError, MediaError) as error:
            logger.warning("a live stream ends early: %s", error)

    @contextmanager
    def _watched(self, output: str, is_over: Callable[[], bool]) -> Iterator[_Video]:
        """A video that is looked at until its last viewer has gone."""
        video = self._videos.get(output)
        if video is None or video.over:  # which one that failed need not be any more
            video = self._videos[output] = _Video(output, is_over)
        video.viewers += 1
        try:
            yield video
        finally:
            video.viewers -= 1
            if not video.viewers:
                video.leave()
                if self._videos.get(output) is video:  # those who came when it was over have another
                    del self._videos[output]


class _Video:
    """One that is watched: its files are looked at once, however many viewers it has.

    Attributes:
        viewers: how many.
        playlist: what there is of it.
        over: nothing will be added to that.
        news: is set once there is more than there was, or it is over; another one follows it.
    """

    def __init__(self, output: str, is_over: Callable[[], bool]) -> None:
        self.viewers, self.over, self.news = 0, False, asyncio.Event()
        self.playlist = Playlist(output)
        self._is_over, self._wait = is_over, LOOK_REMOTE_S if is_remote(output) else LOOK_S
        self._task = asyncio.create_task(self._follow())

    def leave(self) -> None:
        """Looks no more."""
        self._task.cancel()

    async def _follow(self) -> None:
        failed = False
        while not self.over:
            try:
                self.over, is_news = await run_sync(self._look)
                failed = False
            except Exception as error:  # a disk or a store that is away may come back
                if not failed:
                    logger.warning("a video that is watched cannot be looked at: %s: %s", type(error).__name__, error)
                failed, is_news = True, False
            if is_news or self.over:
                self.news, told = asyncio.Event(), self.news
                told.set()
            await asyncio.sleep(self._wait)

    def _look(self) -> tuple[bool, bool]:
        # In this order: of one that is over, all is found that there is.
        over = self._is_over()
        return over, self.playlist.look()


async def _in_thread(make: Callable[[], Iterator[tuple[bytes, int]]]) -> AsyncIterator[tuple[bytes, int]]:
    """A generator of files and codecs, stepped in threads, so that the server goes on meanwhile."""
    pieces = make()
    while (piece := await run_sync(next, pieces, None)) is not None:
        yield piece
