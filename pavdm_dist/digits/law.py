"""The world's law of motion, fitted to a path that was read from pixels.

Drifting digits go at constant velocity on the torus; the ink of bouncing ones is reflected at the frame's borders
(:func:`~pavdm_dist.digits.world.positions`). A generated digit's start and velocity are nobody's to know, so both are
fitted, and what is left is how far its path is from any that the law allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.digits.judge import Floats, on_torus
from pavdm_dist.digits.settings import SIZE

# Frames that one law is fitted to: at the size and speeds of the shipped world a digit is reflected at most once along
# each axis in them.
STRETCH = 20
# Fewer known frames say little.
_LEAST = 9
# Ink is read to the pixel, and so are the borders at which it turns.
_WALL_ERROR = 1.0


@dataclass(frozen=True)
class Motion:
    """The path of the law that is nearest to one that was read.

    Attributes:
        error: root mean square of the distance between the two, px.
        velocity: (y, x), px per frame, before any reflection.
    """

    error: float
    velocity: tuple[float, float]


def stretches(length: int) -> Iterator[slice]:
    """Parts of a chunk, each of at most ``STRETCH`` frames and of about as many as the others."""
    parts = max(1, math.ceil(length / STRETCH))
    for part in range(parts):
        yield slice(length * part // parts, length * (part + 1) // parts)


def drifting(path: Floats, size: int = SIZE) -> Motion | None:
    """The best constant velocity on the torus.

    Args:
        path: (y, x) ``[t, 2]``, px; NaN where it is not known.
        size: of the frame, px.

    Returns:
        None where too few frames are known.
    """
    times = np.flatnonzero(~np.isnan(path).any(1))
    if len(times) < _LEAST:
        return None
    steps = on_torus(np.diff(path[times], axis=0), size)
    unrolled = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    found = [_fit(times, unrolled[:, axis], None, size) for axis in (0, 1)]
    return _motion(found, len(times))


def bouncing(path: Floats, reach: Floats, size: int = SIZE) -> Motion | None:
    """The best constant velocity that the frame's borders reflect.

    Args:
        path: (y, x) ``[t, 2]`` of the ink's middle, px; NaN where it is not known.
        reach: how far the ink goes from its middle, ``[t, 4]``: up, left, down, right, px.
        size: of the frame, px.

    Returns:
        None where too few frames are known.
    """
    times = np.flatnonzero(~np.isnan(path).any(1))
    if len(times) < _LEAST:
        return None
    up, left, down, right = np.median(reach[times], axis=0)
    borders = ((up, size - down), (left, size - right))
    found = [
        min((_fit(times, path[times, axis], wall, size) for wall in (None, *borders[axis])), key=lambda fit: fit[0])
        for axis in (0, 1)
    ]
    return _motion(found, len(times))


def _motion(found: list[tuple[float, float]], count: int) -> Motion:
    (rows, down), (columns, right) = found
    return Motion(math.sqrt((rows + columns) / count), (down, right))


def _fit(times: NDArray[np.int64], places: Floats, wall: float | None, size: int) -> tuple[float, float]:
    """Squares that the best path along one axis leaves, and its velocity; infinite where none turns at ``wall``."""
    ones = np.ones(len(times))
    if wall is None:
        return _solved(np.stack([ones, times], axis=1), places)[:2]
    best = (math.inf, 0.0)
    # A turn before the second or after the last but one frame would leave a side without a velocity of its own.
    for turn in range(2, len(times) - 1):
        # Behind the turn the path is mirrored at the wall: p = 2 wall - (a + v t).
        after = np.arange(len(times)) >= turn
        sign = np.where(after, -1.0, 1.0)
        mirrored = np.stack([sign, sign * times], axis=1)
        left, velocity, found = _solved(np.column_stack([mirrored, 2.0 * after]), places)
        place = float(found[2])
        if abs(place - wall) > _WALL_ERROR:
            place = float(np.clip(place, wall - _WALL_ERROR, wall + _WALL_ERROR))
            left, velocity, found = _solved(mirrored, places - 2 * place * after)
        # It is there at the moment it turns, and comes from inside the frame.
        towards = velocity < 0 if wall < size / 2 else velocity > 0
        reached = (place - found[0]) / velocity if velocity else math.inf
        if left < best[0] and towards and times[turn - 1] - 0.5 <= reached <= times[turn] + 0.5:
            best = (left, velocity)
    return best


def _solved(matrix: Floats, places: Floats) -> tuple[float, float, Floats]:
    """Least squares: what is left, the velocity, and all that was found."""
    found: Floats = np.linalg.lstsq(matrix, places, rcond=None)[0].astype(np.float64)
    return float(((matrix @ found - places) ** 2).sum()), float(found[1]), found
