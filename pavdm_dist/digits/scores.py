"""Per-chunk scores of a video of the embedded world, and their summaries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.digits.judge import Floats, Judge, Reading, on_torus
from pavdm_dist.digits.law import Motion, bouncing, drifting, stretches
from pavdm_dist.digits.prompts import AskedDigit
from pavdm_dist.digits.settings import SIZE

SPAN = 0.5  # seconds over which speed is measured
LINE_FRAMES = 9  # frames of which a straight path is asked
SECTOR = math.pi / 8  # directions are 45 degrees apart
# A bouncing digit keeps to the law: px, share of its speed, and way from the axes.
LAW_ERROR, LAW_SPEED, OFF_AXIS = 1.0, 0.2, math.pi / 18
STILL = 0.05  # mean absolute difference of pixels, 0..255, below which two stretches are the same


@dataclass(frozen=True)
class ChunkScore:
    """What one chunk shows, of what was asked.

    Shares lie in 0..1; None where there was nothing to judge.

    Attributes:
        digit: share of digits, over frames in which none covers another, read as the prompted class.
        colour: share of frames that show exactly the prompted colours.
        count: share of frames that show the prompted number of digits.
        speed_ratio: measured over prompted speed, mean over digits; of bouncing ones that of the law's path.
        direction: share of drifting digits that go the prompted way to within 22.5 degrees.
        trajectory_error: distance of the digits' middles from a straight path over 9 frames, px, root mean square.
        law_error: distance of the digits' middles from the nearest path that the world's law allows, over at most 20
            frames (:mod:`~pavdm_dist.digits.law`), px, root mean square, mean over digits.
        bounce: share of bouncing digits that go as the law says: to within a pixel on one straight way that the
            frame's borders reflect, at the prompted speed to within a fifth, 10 degrees or more from the axes (the
            world's are 20 from them).
        followed: share of the digits' stretches of about 20 frames that show enough of their way for ``law_error`` and
            ``bounce``, which say nothing of the others.
        frozen: the prompted speed would have moved the picture, which stays the same.
        empty: a frame without any ink.
        duplicated: the same frames as the chunk before.
    """

    digit: float | None
    colour: float
    count: float
    speed_ratio: float | None
    direction: float | None
    trajectory_error: float | None
    law_error: float | None
    bounce: float | None
    followed: float
    frozen: bool
    empty: bool
    duplicated: bool


def score_chunks(
    judge: Judge, frames: NDArray[np.uint8], asked: Sequence[AskedDigit], fps: float, chunk_frames: int = 20
) -> list[ChunkScore]:
    """Scores of each ``chunk_frames`` of ``frames [t, size, size, 3]``; a shorter rest at the end is left out.

    Raises:
        ConfigError: frames the judge cannot read.
    """
    scores = []
    before: NDArray[np.uint8] | None = None
    for start in range(0, len(frames) - chunk_frames + 1, chunk_frames):
        part = frames[start : start + chunk_frames]
        scores.append(score_chunk(judge, part, before, asked, fps))
        before = part
    return scores


def summarise(scores: Iterable[ChunkScore]) -> dict[str, float | None]:
    """Mean of every score over chunks, without those that say None; flags become shares."""
    rows = [asdict(score) for score in scores]
    means: dict[str, float | None] = {}
    for name in ChunkScore.__dataclass_fields__:
        values = [float(row[name]) for row in rows if row[name] is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


def score_chunk(
    judge: Judge,
    frames: NDArray[np.uint8],
    before: NDArray[np.uint8] | None,
    asked: Sequence[AskedDigit],
    fps: float,
) -> ChunkScore:
    """Scores of one chunk ``[t, size, size, 3]``; ``before`` are the frames of the one before it, if any.

    Raises:
        ConfigError: frames the judge cannot read.
    """
    reading = judge.read(frames, asked)
    right = reading.numbers == np.array([digit.number for digit in asked])
    ratios, directions, errors = [], list[float](), []
    law_errors, bounces = list[float](), list[float]()
    span = max(1, round(SPAN * fps))
    followed = 0
    for column, digit in enumerate(asked):
        path = reading.centres[:, column]
        moves = displacements(path, span, judge.world.size)
        motions = _motions(reading, column, digit, judge.world.size)
        followed += len(motions)
        # Where a digit turns round, half a second's way ends nearer than it is long: the law knows the turn.
        speeds = [math.hypot(*motion.velocity) * fps / digit.speed for motion in motions]
        if motions:
            law_errors.append(float(np.mean([motion.error for motion in motions])))
        if digit.angle is None and motions:
            ratios.append(float(np.median(speeds)))
            bounces.append(float(np.mean([_bounces(*one) for one in zip(motions, speeds, strict=True)])))
        elif len(moves):
            ratios.append(float(np.median(np.linalg.norm(moves, axis=1))) / (span / fps) / digit.speed)
        if len(moves) and digit.angle is not None:
            went = math.atan2(*moves.mean(0))
            directions.append(abs(math.remainder(went - digit.angle, 2 * math.pi)) <= SECTOR)
        errors += line_errors(path, judge.world.size)
    colours = reading.seen.all(1) & (reading.strangers == 0)
    shown = reading.seen.sum(1) + reading.strangers
    seconds = len(frames) / fps
    moves_at_all = max(digit.speed for digit in asked) * seconds > 2
    return ChunkScore(
        digit=_mean(right[~reading.covered]),
        colour=float(colours.mean()),
        count=float((shown == len(asked)).mean()),
        speed_ratio=_mean(ratios),
        direction=_mean(directions),
        trajectory_error=float(np.median(errors)) if errors else None,
        law_error=_mean(law_errors),
        bounce=_mean(bounces),
        followed=followed / (len(asked) * len(list(stretches(len(frames))))),
        frozen=moves_at_all and bool(_difference(frames[1:], frames[:-1]) < STILL),
        empty=bool((shown == 0).any()),
        duplicated=before is not None and bool(_difference(frames, before) < STILL),
    )


def _motions(reading: Reading, column: int, digit: AskedDigit, size: int) -> list[Motion]:
    """The law's path in every stretch of a chunk; frames in which a digit covers another are left out."""
    path, reach = reading.centres[:, column].copy(), reading.reach[:, column]
    path[reading.covered[:, column]] = np.nan
    parts = stretches(len(path))
    if digit.angle is not None:
        found = [drifting(path[part], size) for part in parts]
    else:
        found = [bouncing(path[part], reach[part], size) for part in parts]
    return [motion for motion in found if motion is not None]


def _bounces(motion: Motion, speed: float) -> bool:
    diagonal = math.atan2(*map(abs, motion.velocity))
    return motion.error <= LAW_ERROR and abs(speed - 1) <= LAW_SPEED and OFF_AXIS <= diagonal <= math.pi / 2 - OFF_AXIS


def displacements(path: Floats, span: int, size: int = SIZE) -> Floats:
    """Moves ``[n, 2]`` over ``span`` frames of a path ``[t, 2]`` on the torus, summed step by step; gaps left out."""
    steps = on_torus(np.diff(path, axis=0), size)
    moves = [steps[i : i + span].sum(0) for i in range(len(steps) - span + 1)]
    found = [move for move in moves if not np.isnan(move).any()]
    return np.array(found).reshape(-1, 2)


def line_errors(path: Floats, size: int = SIZE) -> list[float]:
    """Distance of every ``LINE_FRAMES`` frames of a path from their best straight line in time, px, root mean square.

    The median over a chunk ignores the few stretches in which a bouncing digit turns round.
    """
    time = np.arange(LINE_FRAMES) - (LINE_FRAMES - 1) / 2
    errors = []
    for start in range(len(path) - LINE_FRAMES + 1):
        part = path[start : start + LINE_FRAMES]
        if np.isnan(part).any():
            continue
        unrolled = np.concatenate([[[0.0, 0.0]], np.cumsum(on_torus(np.diff(part, axis=0), size), axis=0)])
        centred = unrolled - unrolled.mean(0)
        slope = (time[:, None] * centred).sum(0) / (time**2).sum()
        errors.append(float(np.sqrt(((centred - time[:, None] * slope) ** 2).sum(1).mean())))
    return errors


def _difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


def _mean(values: NDArray[np.bool_] | list[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
