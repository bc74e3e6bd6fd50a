"""Batches that are loaded while the one before is trained on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from pavdm_dist.errors import ConfigError

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Loads steps ahead of their use, in a thread; iterating gives ``load(first)``, ``load(first + 1)``, ...

    Use it as a context manager or call :meth:`close`; leaving waits for the load under way.

    Args:
        load: batch of a step; what it raises is raised where that step is asked for, and ends the iteration.
        first: step to begin with.
        depth: batches that wait at most, 1 or more.
    """

    def __init__(self, load: Callable[[int], T], first: int = 0, depth: int = 2) -> None:
        if depth < 1:
            raise ConfigError(f"depth={depth}: must be at least 1")
        self._load = load
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(first,), name="pavdm-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended or self._stop.is_set():
            raise StopIteration
        item, error = self._ready.get()
        self._room.release()
        if error is not None:
            self._ended = True
            raise error
        return item  # type: ignore[return-value]  # None is what a load may give

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; harmless when called twice."""
        self._stop.set()
        self._room.release()
        self._thread.join()

    def _run(self, step: int) -> None:
        while True:
            self._room.acquire()
            if self._stop.is_set():
                return
            try:
                self._ready.put((self._load(step), None))
            except BaseException as error:  # the consumer's to handle, whatever it is
                self._ready.put((None, error))
                return
            step += 1
