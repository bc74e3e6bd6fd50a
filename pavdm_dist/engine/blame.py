"""What went wrong in an actor, in words: the cause first, its echoes not at all."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pavdm_dist.engine.events import DECODER_STAGE, GangLost, Place
from pavdm_dist.engine.watchdog import Pauses
from pavdm_dist.errors import EngineError, PAVDMError, VideoError

logger = logging.getLogger(__name__)

# How long others' reports and answers are awaited after the first failure, so that the cause is named, not its echo.
ANSWER_S = 2.0
# Between two looks at actors that are coming up or ending.
LOOK_S = 1.0


@dataclass(frozen=True)
class Actor:
    """One of a gang, as people are told of it: its name, a stage's rank, and where it is, as far as that is known."""

    name: str
    rank: int | None = None
    place: Place | None = None

    def __str__(self) -> str:
        return self.name if self.place is None else f"{self.name} ({self.place})"

    def loss(self, what: str, cause: str, is_fault: bool = False) -> GangLost:
        """That it cannot go on: what it does, and why."""
        return GangLost(f"{self} {what}: {cause}", self.rank, self.place, cause, is_fault, self.stage)

    @property
    def stage(self) -> int | str | None:
        """What logs have as its stage."""
        return DECODER_STAGE if self.name == DECODER else self.rank


DECODER = "the decode actor"


def stage_actors(count: int, places: Sequence[Place] = ()) -> list[Actor]:
    """The stages of a gang, in their order; ``places``: of all of them, once they are up."""
    known = places if len(places) == count else [None] * count
    return [Actor(f"stage {rank} of {count}", rank, place) for rank, place in enumerate(known)]


def control_results(
    refs: list[Any],
    timeout: float,
    actors: Sequence[Actor],
    what: str,
    given_up: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """Results of control calls on actors that are coming up or ending.

    Args:
        refs: one of each of ``actors``.
        timeout: seconds.
        actors: who was called.
        what: they are to do, in words.
        given_up: asked while they are at it; true ends that.

    Raises:
        PAVDMError: what an actor raised on purpose.
        GangLost: an actor's death, a fault in it (whose traceback is logged; it may be the echo of another's death), or
            it did not do ``what`` within ``timeout`` seconds.
        EngineError: ``given_up`` turned true.
    """
    import ray

    end, awaited, pauses = time.monotonic() + timeout, list(refs), Pauses(timeout, LOOK_S + ANSWER_S)
    while True:
        if pauses.stood_still():
            end = time.monotonic() + timeout
        if time.monotonic() >= end:
            break
        done, awaited = ray.wait(refs, num_returns=len(refs), timeout=min(LOOK_S, timeout))
        for actor, ref in zip(actors, refs, strict=True):
            if ref in done:  # one may have failed, though others are still at it
                _check_done(ref, actor, what)
        if not awaited:
            return ray.get(refs)
        if given_up():
            raise EngineError("the engine is closed")
    late = [actor for actor, ref in zip(actors, refs, strict=True) if ref in awaited]
    others = f", nor of {', '.join(actor.name for actor in late[1:])}" if late[1:] else ""
    raise late[0].loss(f"did not {what} within {timeout:g} s", f"nothing was heard of it{others}")


def _check_done(ref: Any, actor: Actor, what: str) -> None:
    """Raises what the actor raised, or that it is dead."""
    import ray

    try:
        ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PAVDMError) and not isinstance(error.cause, EngineError):
            raise error.cause from error
        logger.error("%s failed:\n%s", actor, error, extra={"stage": actor.stage})
        raise actor.loss("failed", last_line(error)) from error
    except ray.exceptions.RayError as error:
        raise actor.loss(f"died, it was to {what}", last_line(error)) from error


def lost(loops: Sequence[Any], places: Sequence[Place], seen: BaseException | None = None) -> GangLost:
    """The loss, named after the stage that failed first: a dead actor before a stage whose neighbour died.

    Args:
        loops: running calls of the stages, in their order; at least one has ended, or a stage is out of reach.
        places: of each.
        seen: what was noticed.
    """
    import ray

    actors = stage_actors(len(loops), places)
    ended, _ = ray.wait(list(loops), num_returns=len(loops), timeout=ANSWER_S)
    died: list[GangLost] = []
    failed: list[GangLost] = []
    for rank, loop in enumerate(loops):
        if loop not in ended:
            continue
        try:
            ray.get(loop)
            failed.append(actors[rank].loss("failed", "its loop ended early"))
        except ray.exceptions.RayTaskError as error:
            logger.error("stage %d failed:\n%s", rank, error, extra={"stage": rank})
            echo = isinstance(error.cause, EngineError)
            loss = actors[rank].loss("failed", last_line(error), is_fault=not echo)
            failed.insert(len(failed) if echo else 0, loss)
        except ray.exceptions.RayError as error:
            died.append(actors[rank].loss("died", last_line(error)))
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
    for actor, answer in zip(stage_actors(len(stages), places), answers, strict=True):
        if answer not in there:
            return actor.loss("does not answer", f"{what} (link_timeout_s={limit:g})")
    return GangLost(
        f"{what} although all stages answer; link_timeout_s={limit:g} must exceed the slowest unit", cause=what
    )


def log_tail(place: Place | None, lines: int = 10) -> str:
    """Where an actor's log is, and how it ends where this machine has it; empty where nothing is known."""
    if place is None or not place.log:
        return ""
    try:
        text = Path(place.log).read_text(errors="replace").strip().splitlines()[-lines:]
    except OSError:
        return f"{place.log} on node {place.node}"
    return "\n".join([f"{place.log}:", *(f"    {line}" for line in text)]) if text else f"{place.log} (empty)"


def log_note(place: Place | None) -> str:
    """:func:`log_tail` as what follows a sentence in a log; empty where nothing is known."""
    tail = log_tail(place)
    return f"; its log: {tail}" if tail else ""


def video_error(error: Any, what: str, video: int, stage: int | str) -> PAVDMError:
    """What one video is told of a fault in an actor; the traceback goes to the log, with the video and the stage."""
    if isinstance(error.cause, VideoError):
        return VideoError(f"{what}: {error.cause}")
    if isinstance(error.cause, PAVDMError):
        return error.cause
    logger.error("%s:\n%s", what, error, extra={"video": video, "stage": stage})
    return VideoError(f"{what}: {last_line(error)}")


def last_line(error: BaseException) -> str:
    """The last line of an error's text, which of a remote traceback is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^pavdm_dist\.errors\.\w+: ", "", lines[-1]) if lines else type(error).__name__
