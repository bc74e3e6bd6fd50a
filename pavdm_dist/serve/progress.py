"""How far a video is that is rendered here, and what has happened since the server was started."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


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
