"""Which video every worker is reading, noted on disk, so that one that ends its reader has a name.

A decoder that crashes, and a system that is out of memory, end a process without a word. Each worker has a file that
names the video it reads, and takes it away when it is done, whatever came of it. A file that is left is of a worker
that was ended in the middle: by the video, or together with its run. So such a video is looked at once more, alone, in
a process that nothing else depends on.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pavdm_dist.data.workers import follow_parent, safely_started
from pavdm_dist.errors import EngineError
from pavdm_dist.io.storage import remove

T = TypeVar("T")

NOTES = "reading"


@contextmanager
def reading(output: Path, video: str) -> Iterator[None]:
    """Notes that this process is reading a video."""
    note = output / NOTES / f"{platform.node()}-{os.getpid()}.txt"
    note.parent.mkdir(exist_ok=True)
    note.write_text(video, encoding="utf-8")
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def left_behind(output: Path) -> list[str]:
    """Videos whose readers were ended in the middle, each once; no reader may be at work."""
    notes = sorted((output / NOTES).glob("*.txt"))
    return sorted({name for note in notes if (name := note.read_text(encoding="utf-8", errors="replace"))})


def forget(output: Path) -> None:
    """Removes all notes."""
    remove(output / NOTES)


def survived(function: Callable[..., T], *arguments: Any) -> T | None:
    """What a function returns in a process of its own; None where it ended that process.

    ``function`` must be importable by name. What it raises is raised here.

    Raises:
        EngineError: no such process can be started.
    """
    with safely_started():
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), follow_parent)
    try:
        with safely_started():
            pool.submit(os.getpid).result()
    except BrokenProcessPool as error:  # says nothing of the function
        pool.shutdown()
        raise EngineError("no process of its own can be started to read a video alone; run again to go on") from error
    try:
        return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        return None
    finally:
        pool.shutdown()
