"""What went wrong in an actor, in words: the cause first, its echoes not at all."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pavdm_dist.engine.events import GangLost, Place
from pavdm_dist.errors import EngineError, PAVDMError, VideoError

logger = logging.getLogger(__name__)

# How long others' reports and answers are awaited after the first failure, so that the cause is named, not its echo.
ANSWER_S = 2.0


def control_results(
    refs: list[Any], timeout: float, who: str, what: str, given_up: Callable[[], bool] = lambda: False
) -> list[Any]:
    """Results of control calls on actors that are coming up or ending.

    Raises:
        PAVDMError: what an actor raised on purpose.
        GangLost: an actor's death, a fault in it (whose traceback is logged; it may be the echo of another's death), or
            it did not do ``what`` within ``timeout`` seconds.
        EngineError: ``given_up`` turned true.
    """
    import ray

    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            done, awaited = ray.wait(refs, num_returns=len(refs), timeout=min(1.0, timeout))
            ray.get(done)  # raises what one of them raised, though others are still at it
            if not awaited:
                return ray.get(refs)
            if given_up():
                raise EngineError("the engine is closed")
        raise GangLost(f"{who} did not {what} within {timeout:g} s")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PAVDMError) and not isinstance(error.cause, EngineError):
            raise error.cause from error
        logger.error("%s failed:\n%s", who, error)
        raise GangLost(f"{who} failed: {last_line(error)}") from error
    except ray.exceptions.RayError as error:
        raise GangLost(f"an actor did not come up: {last_line(error)}") from error


def lost(loops: Sequence[Any], places: Sequence[Place], seen: BaseException | None = None) -> GangLost:
    """The loss, named after the stage that failed first: a dead actor before a stage whose neighbour died.

    Args:
        loops: running calls of the stages, in their order; at least one has ended, or a stage is out of reach.
        places: of each.
        seen: what was noticed.
    """
    import ray

    ended, _ = ray.wait(list(loops), num_returns=len(loops), timeout=ANSWER_S)
    died: list[GangLost] = []
    failed: list[GangLost] = []
    for rank, loop in enumerate(loops):
        if loop not in ended:
            continue
        try:
            ray.get(loop)
            failed.append(_loss(places, rank, "failed", "its loop ended early"))
        except ray.exceptions.RayTaskError as error:
            logger.error("stage %d failed:\n%s", rank, error)
            echo = isinstance(error.cause, EngineError)
            loss = _loss(places, rank, "failed", last_line(error), is_fault=not echo)
            failed.insert(len(failed) if echo else 0, loss)
        except ray.exceptions.RayError as error:
            died.append(_loss(places, rank, "died", last_line(error)))
    for loss in (*died, *failed):
        return loss
    cause = "nothing was said of why" if seen is None else last_line(seen)
    return GangLost(
        f"a stage, or the cluster, is out of reach although no stage is known to have ended: {cause}", cause=cause
    )


def frozen(stages: Sequence[Any], places: Sequence[Place], what: str, limit: float) -> GangLost:
    """The loss when nothing moves: names the stage that does not answer."""
    import ray

    answers = [stage.where.remote() for stage in stages]
    there, _ = ray.wait(answers, num_returns=len(answers), timeout=ANSWER_S)
    for rank, answer in enumerate(answers):
        if answer not in there:
            return _loss(places, rank, "does not answer", f"{what} (link_timeout_s={limit:g})")
    return GangLost(
        f"{what} although all stages answer; link_timeout_s={limit:g} must exceed the slowest unit", cause=what
    )


def _loss(places: Sequence[Place], rank: int, what: str, cause: str, is_fault: bool = False) -> GangLost:
    where = f"stage {rank} of {len(places)} ({places[rank]})"
    return GangLost(f"{where} {what}: {cause}", rank, places[rank], cause, is_fault)


def log_tail(place: Place | None, lines: int = 10) -> str:
    """Where an actor's log is, and how it ends where this machine has it; empty where nothing is known."""
    if place is None or not place.log:
        return ""
    try:
        text = Path(place.log).read_text(errors="replace").strip().splitlines()[-lines:]
    except OSError:
        return f"{place.log} on node {place.node}"
    return "\n".join([f"{place.log}:", *(f"    {line}" for line in text)]) if text else f"{place.log} (empty)"


def video_error(error: Any, what: str) -> PAVDMError:
    """What one video is told of a fault in an actor; the traceback goes to the log."""
    if isinstance(error.cause, VideoError):
        return VideoError(f"{what}: {error.cause}")
    if isinstance(error.cause, PAVDMError):
        return error.cause
    logger.error("%s:\n%s", what, error)
    return VideoError(f"{what}: {last_line(error)}")


def last_line(error: BaseException) -> str:
    """The last line of an error's text, which of a remote traceback is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^pavdm_dist\.errors\.\w+: ", "", lines[-1]) if lines else type(error).__name__
