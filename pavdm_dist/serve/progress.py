"""How far the videos are that are rendered here, and what has happened since the server was started."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from pavdm_dist.farm.desk import Ended
from pavdm_dist.request.outputs import VideoChunk

# Chunks by which a video's pace is told.
_PACE = 16


@dataclass
class Progress:
    """What is known of a video while it is rendered here.

    Attributes:
        chunks: finished ones, of this and earlier tries.
        row: of the window's plan that comes next, where a chunk was given last.
        seconds: wall-clock seconds of the newest chunks.
        prompts: ``(first chunk, text)`` of what was changed on the way.
        last: when the newest chunk came; monotonic.
    """

    chunks: int
    row: int = 0
    seconds: list[float] = field(default_factory=list)
    prompts: tuple[tuple[int, str], ...] = ()
    last: float = field(default_factory=time.monotonic)


@dataclass
class Counts:
    """What has happened since the server was started."""

    asked: int = 0
    refused: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    chunks: int = 0
    frames: int = 0
    prompts: int = 0
    first_chunk_s: float | None = None  # from the newest video's request to its first chunk


class Followed:
    """The videos of a server's pool, as it tells of them. Called from any thread.

    Attributes:
        counts: of all since it was made.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self._turn = threading.Lock()
        self._progress: dict[str, Progress] = {}
        self._asked_at: dict[str, float] = {}  # of those that have given no chunk yet

    def get(self, id: str) -> Progress | None:
        """Of a video that is being rendered."""
        return self._progress.get(id)

    def under_way(self) -> dict[str, Progress]:
        """All that are being rendered."""
        with self._turn:
            return dict(self._progress)

    def asked(self, id: str) -> None:
        """Somebody waits for its first chunk from now on."""
        with self._turn:
            self._asked_at[id] = time.monotonic()
            self.counts.asked += 1

    def begun(self, id: str, chunk: int) -> None:
        """It is rendered from ``chunk`` on."""
        with self._turn:
            self._progress[id] = Progress(chunk)

    def grew(self, id: str, chunk: VideoChunk) -> None:
        """A chunk is written."""
        now = time.monotonic()
        with self._turn:
            progress = self._progress[id]
            progress.chunks = chunk.index + 1
            progress.seconds.append(now - progress.last)
            del progress.seconds[:-_PACE]
            progress.last = now
            if chunk.resume is not None:
                progress.row, progress.prompts = chunk.resume.snapshot.row, chunk.resume.prompts
            if (asked := self._asked_at.pop(id, None)) is not None:
                self.counts.first_chunk_s = now - asked
            self.counts.chunks += 1
            self.counts.frames += int(chunk.frames.shape[0])

    def ended(self, id: str, ended: Ended) -> None:
        """It is not rendered any more, for good or for now."""
        with self._turn:
            self._progress.pop(id, None)
            self.counts.done += ended.how == "done"
            self.counts.failed += ended.how == "failed"
            self.counts.retried += ended.how == "again"
            if ended.how in ("done", "failed", "cancelled"):
                self._asked_at.pop(id, None)
