"""Shots that wait for a renderer: the most urgent first, those that failed by no fault of their own after a while."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pavdm_dist.farm.shot import Shot

# A shot that is to be rendered alone is passed over so long by renderers that have others in hand.
ALONE_WAIT_S = 60.0


@dataclass(order=True, slots=True)
class Entry:
    """A shot in the queue.

    Attributes:
        rank: what it is sorted by.
        shot: it.
        attempts: how often a renderer was lost with it, or it stood still.
        not_before: of the clock.
    """

    rank: tuple[int, int]
    shot: Shot = field(compare=False)
    attempts: int = field(default=0, compare=False)
    not_before: float = field(default=0.0, compare=False)


class Waiting:
    """A queue by priority, then by arrival. Not guarded against several threads.

    Args:
        clock: seconds, monotonic (tests give their own).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ready: list[Entry] = []
        self._later: list[tuple[float, Entry]] = []
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._ready) + len(self._later)

    @property
    def ready(self) -> int:
        """How many could be begun now."""
        self._ripen()
        return len(self._ready)

    def add(self, shot: Shot) -> None:
        """Puts a new shot behind those of its priority."""
        self._arrived += 1
        heapq.heappush(self._ready, Entry((-shot.priority, self._arrived), shot))

    def put_back(self, entry: Entry, wait_s: float) -> None:
        """A shot that is to be begun again, in its old place, but not before so many seconds."""
        entry.not_before = self._clock() + wait_s
        heapq.heappush(self._later, (entry.not_before, entry))

    def take(self, alone: bool = True) -> Entry | None:
        """The first one that may be begun; None where there is none now.

        Args:
            alone: it would be with nothing else. One with which a renderer was lost is given out so only: when it
                happens again, it is known whose fault it is.
        """
        self._ripen()
        passed: list[Entry] = []
        try:
            while self._ready:
                entry = heapq.heappop(self._ready)
                if alone or not entry.attempts:
                    return entry
                passed.append(entry)
                if self._clock() - entry.not_before > ALONE_WAIT_S:
                    return None
            return None
        finally:
            for entry in passed:
                heapq.heappush(self._ready, entry)

    def drop(self, ids: set[str]) -> list[Shot]:
        """Takes shots out; which of them were here."""
        dropped = [entry.shot for entry in (*self._ready, *(late for _, late in self._later)) if entry.shot.id in ids]
        if dropped:
            self._ready = [entry for entry in self._ready if entry.shot.id not in ids]
            self._later = [late for late in self._later if late[1].shot.id not in ids]
            heapq.heapify(self._ready)
            heapq.heapify(self._later)
        return dropped

    def _ripen(self) -> None:
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            heapq.heappush(self._ready, heapq.heappop(self._later)[1])
