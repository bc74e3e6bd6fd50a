"""Whether a pool's folder can be written at all: a disk that is full is no shot's fault."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pavdm_dist.farm.tree import Tree

logger = logging.getLogger(__name__)

# Between two looks, at most; from the second on, at least.
LONGEST_WAIT_S, _LEAST_WAIT_S = 60.0, 1.0
# Bytes.
LEAST_ROOM, _MOST_ROOM = 8 * 2**20, 2**34


class Outage:
    """On from a shot that cannot be written, where there is no room for others either, until there is. Any thread may
    ask; a look takes as long as the disk does.

    How much a shot needs nobody knows (a state may be gigabytes): where there was room and still none could be written,
    twice as much is looked for the next time, until one is done.

    Args:
        tree: whose room it is (:meth:`~pavdm_dist.farm.tree.Tree.try_room`).
        first_s: from the first look to the second; later ones come at growing distances.
        clock: seconds, monotonic (tests give their own).
    """

    def __init__(self, tree: Tree, first_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._tree, self._first_s, self._clock = tree, first_s, clock
        self._turn = threading.Lock()
        self._since: float | None = None
        self._wait_s, self._until, self._room = 0.0, 0.0, LEAST_ROOM

    @property
    def is_on(self) -> bool:
        """Whether nothing can be written."""
        return self._since is not None

    def begins(self, error: str) -> bool:
        """A shot could not be written: whether nothing can be, so that it is not to blame."""
        with self._turn:
            if self.is_on:
                return True
            if self._fault() is None:
                self._room = min(2 * self._room, _MOST_ROOM)
            else:
                self._since, self._wait_s = self._clock(), self._first_s
                self._until = self._since + self._wait_s
                said = "%s cannot be written (%s): nothing is begun until it can, the next look is in %.0f s"
                logger.warning(said, self._tree.root, error, self._wait_s)
            return self.is_on

    def done(self) -> None:
        """A shot is: it had the room that it needed."""
        with self._turn:
            self._room = LEAST_ROOM

    def look(self) -> bool:
        """Looks again where it is time to; whether shots may be begun again."""
        with self._turn:
            if self._since is None or self._clock() < self._until:
                return False
            fault, now = self._fault(), self._clock()
            if fault is None:
                logger.info("%s can be written again, after %.0f s", self._tree.root, now - self._since)
                self._since = None
                return True
            self._wait_s = min(max(2 * self._wait_s, _LEAST_WAIT_S), max(self._first_s, LONGEST_WAIT_S))
            self._until = now + self._wait_s
            said = "%s cannot be written for %.0f s (%s): the next look is in %.0f s"
            logger.warning(said, self._tree.root, now - self._since, fault, self._wait_s)
            return False

    def _fault(self) -> Exception | None:
        try:
            self._tree.try_room(self._room)
        except Exception as error:  # stores that are away have errors of kinds of their own
            return error
        return None
