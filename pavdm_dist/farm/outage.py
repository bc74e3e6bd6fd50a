"""Whether what a pool's shots are written to can be written at all: a disk that is full is no shot's fault."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pavdm_dist.farm.waiting import Entry

logger = logging.getLogger(__name__)

# Between two attempts, at most; from the second on, at least.
LONGEST_WAIT_S, _LEAST_WAIT_S = 60.0, 1.0


class Outage:
    """On from the first shot that cannot be written until one can. Meanwhile one at a time is tried, after a wait that
    grows. Not guarded against several threads.

    A shot is to blame when others could be written since it could not the last time: those that begun if it had not
    been, else those that had a chunk, for where none of these has room a lock still may.

    Args:
        root: the folder, in logs.
        first_s: the first wait.
        clock: seconds, monotonic (tests give their own).
    """

    def __init__(self, root: str, first_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._first_s, self._clock = root, first_s, clock
        self._since: float | None = None
        self._wait_s, self._until = 0.0, 0.0
        self._tried = ""  # the shot that is
        self._needs_chunk = False
        self._well = {False: 0, True: 0}  # how often a shot was begun, or had a chunk, and how often it had a chunk

    @property
    def is_on(self) -> bool:
        """Whether nothing could be written last."""
        return self._since is not None

    @property
    def lets(self) -> bool:
        """Whether a shot may be begun now."""
        return not self.is_on or (not self._tried and self._clock() >= self._until)

    @property
    def left_s(self) -> float:
        """Seconds until the next one may be, at least."""
        return max(0.0, self._until - self._clock()) if self.is_on else 0.0

    def gives(self, entry: Entry) -> None:
        """A shot is in a renderer's hands."""
        if self.is_on:
            self._tried = entry.shot.id

    def well(self, entry: Entry, has_chunk: bool) -> None:
        """A shot was begun, or something of its video is written."""
        for of_chunks in (False, True) if has_chunk else (False,):
            self._well[of_chunks] += 1
            if entry.unwritten is not None and entry.unwritten[0] == of_chunks:  # what it did itself proves nothing
                entry.unwritten = (of_chunks, entry.unwritten[1] + 1)
        if self._since is not None and (has_chunk or not self._needs_chunk):
            logger.info("%s can be written again, after %.0f s", self._root, self._clock() - self._since)
            self._since, self._tried, self._needs_chunk = None, "", False

    def failed(self, entry: Entry, was_begun: bool, error: str) -> bool:
        """A shot could not be written; whether it is to blame, for which nobody else waits."""
        is_to_blame = entry.unwritten is not None and self._well[entry.unwritten[0]] > entry.unwritten[1]
        entry.unwritten = (was_begun, self._well[was_begun])
        was_tried = self._tried == entry.shot.id
        self.ended(entry)
        if is_to_blame:
            return True
        self._needs_chunk = self._needs_chunk or was_begun
        now = self._clock()
        if self._since is None:
            self._since, self._wait_s, still = now, self._first_s, ""
        elif was_tried:
            longest = max(self._first_s, LONGEST_WAIT_S)
            self._wait_s = min(max(2 * self._wait_s, _LEAST_WAIT_S), longest)
            still = f" for {now - self._since:.0f} s"
        else:  # it was begun before
            return False
        self._until = now + self._wait_s
        said = "%s cannot be written%s (shot %s: %s); nothing is begun, and tried again in %.0f s"
        logger.warning(said, self._root, still, entry.shot.id, error, self._wait_s)
        return False

    def ended(self, entry: Entry) -> None:
        """A shot is in nobody's hands any more; if it said nothing of the folder, another may be tried."""
        if self._tried == entry.shot.id:
            self._tried = ""
