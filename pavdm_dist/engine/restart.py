"""How often, after what wait and on how many stages a lost gang is followed by another."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pavdm_dist.engine.blame import log_tail
from pavdm_dist.engine.events import GangLost
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.ray_gang import RayGang
from pavdm_dist.errors import EngineError, ResourcesError
from pavdm_dist.redaction import hide_secrets

logger = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 60.0
RETRY_S = 2.0
# Shortest wait for what a lost gang held to be free again.
SETTLING_S = 5.0

# Makes a gang of so many stages, stamped with a generation, that waits so many seconds for resources others hold.
MakeGang = Callable[[int, int, float], RayGang]


class Restarts:
    """The budget of an engine.

    Args:
        options: how many restarts, after what wait.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._in_a_row, self._faults = 0, 0
        self._went_on = False

    def went_on(self) -> None:
        """A shift was finished: what comes now is another story."""
        self._in_a_row, self._went_on = 0, True

    def delay(self, loss: GangLost) -> float:
        """Seconds to wait before the next gang.

        Raises:
            EngineError: the budget is spent, or a fault would only come again: which actor, where, why and where its
                log is; how that ends is a note of the exception (``__notes__``), and in the log.
        """
        allowed = self._options.max_restarts
        self._in_a_row += 1
        self._faults += loss.is_fault
        tail = log_tail(loss.place)
        if tail:
            logger.warning("the log of what was lost: %s", tail, extra={"stage": loss.stage})
        if loss.is_fault and not self._went_on:  # before anything was finished: it is in what was asked for
            raise _with_log(loss, tail)
        if max(self._in_a_row, self._faults) > allowed:
            where = f"; its log: {loss.place.log} on node {loss.place.node}" if loss.place and loss.place.log else ""
            raise _with_log(EngineError(f"{loss}; max_restarts={allowed} is spent{where}"), tail) from loss
        self._went_on = False
        wait = min(self._options.restart_backoff_s * 2 ** (self._in_a_row - 1), LONGEST_BACKOFF_S)
        said = "%s; restart %d of %d in %.0f s"
        logger.warning(said, loss, self._in_a_row, allowed, wait, extra={"stage": loss.stage})
        return wait


def _with_log(error: EngineError, tail: str) -> EngineError:
    """With the log's end as a note, which tracebacks show; the message stays one sentence, as the command line, farms
    and records want it."""
    if tail:
        error.add_note(hide_secrets(tail))
    return error


def rebuilt(make: MakeGang, stages: range, generation: int, wait_s: float, given_up: Callable[[], bool]) -> RayGang:
    """A gang of as many of ``stages`` as there is room for, the most where what was lost comes back within ``wait_s``.

    Raises:
        ResourcesError: not even the fewest have room.
        GangLost: an actor did not come up.
        EngineError: ``given_up`` turned true.
    """
    wanted = stages[-1]
    end = time.monotonic() + wait_s
    while True:
        try:
            return make(wanted, generation, max(SETTLING_S, end - time.monotonic()))
        except ResourcesError as error:
            if given_up():
                raise EngineError("the engine is closed") from error
            if time.monotonic() < end:
                time.sleep(RETRY_S)
                continue
            if wanted == stages[0]:
                raise
            wanted -= 1
            logger.warning("%s; going on with %d stage(s)", error, wanted)
