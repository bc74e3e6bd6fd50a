"""Pictures of another size, and VBench's consistency, by their definitions and in float64: what tests compare with."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _linear(distance: Floats) -> Floats:
    return np.maximum(0, 1 - np.abs(distance))


def _cubic(distance: Floats) -> Floats:
    """Keys' kernel as torch has it, a = -0.75."""
    a, x = -0.75, np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _matrix(count: int, wanted: int, scale: float, cubic: bool) -> Floats:
    """From ``count`` samples to ``wanted``, whose kernels are as wide as a sample whatever the scale."""
    kernel, rows = (_cubic if cubic else _linear), np.zeros((wanted, count))
    for row in range(wanted):
        at = (row + 0.5) / scale - 0.5
        if not cubic:
            at = max(at, 0.0)
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            rows[row, min(max(tap, 0), count - 1)] += float(kernel(np.array(at - tap)))
    return rows


def resampled(picture: Floats, size: tuple[int, int], cubic: bool, scale: tuple[float, float] | None = None) -> Floats:
    """``[H, W, C]`` as ``[*size, C]``; ``scale`` where it is not that of the sizes."""
    height, width = picture.shape[:2]
    down, across = scale or (size[0] / height, size[1] / width)
    rows, columns = _matrix(height, size[0], down, cubic), _matrix(width, size[1], across, cubic)
    return np.einsum("ih,jw,hwc->ijc", rows, columns, picture)


def consistency(features: Floats) -> list[float]:
    """VBench's score of every frame but the first."""

    def likeness(one: Floats, other: Floats) -> float:
        return max(0.0, float(one @ other / math.sqrt(float(one @ one) * float(other @ other))))

    return [(likeness(before, now) + likeness(features[0], now)) / 2 for before, now in pairwise(features)]
