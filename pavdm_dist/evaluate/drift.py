"""From a measure per chunk to what is said of it: slope over time with its interval, both ends, the worst moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Of a video at either end, as HeliosBench compares them.
END_SHARE = 0.15
CONFIDENCE = 0.95
# Fewer chunks say nothing of a slope's uncertainty.
LEAST_CHUNKS = 8


@dataclass(frozen=True)
class Drift:
    """One measure over one video.

    Attributes:
        mean: over chunks.
        slope: least-squares change per minute; None with one chunk.
        low, high: 95 % interval of the slope; None where there are fewer than ``LEAST_CHUNKS`` chunks.
        first, last: mean of the first and last 15 % of the chunks.
        minimum: of the least chunk.
        minimum_at: where it begins, seconds.
    """

    mean: float
    slope: float | None
    low: float | None
    high: float | None
    first: float
    last: float
    minimum: float
    minimum_at: float

    @property
    def between_ends(self) -> float:
        """HeliosBench's drift: |first 15 % - last 15 %|."""
        return abs(self.first - self.last)

    @property
    def holds(self) -> bool | None:
        """Whether the slope's interval holds zero; None where there is no interval."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


def drift_of(times: Sequence[float], values: Sequence[float | None], resamples: int, seed: int) -> Drift | None:
    """What a measure did over a video; None where no chunk has it.

    The slope's interval comes from a bootstrap of residuals in blocks, since neighbouring chunks resemble each other:
    blocks are of cube root of n chunks, and may run over the end (circular), so that every chunk is drawn as often.

    Args:
        times: where each chunk begins, seconds.
        values: of each chunk; None where there was nothing to measure.
        resamples: of the bootstrap.
        seed: of its drawings.
    """
    known = [(time, value) for time, value in zip(times, values, strict=True) if value is not None]
    if not known:
        return None
    at, found = np.array(known, dtype=np.float64).T
    count = len(found)
    edge = max(1, round(END_SHARE * count))
    low = high = slope = None
    if count > 1:
        minutes = at / 60
        slope = _slope(minutes, found[None])[0]
        if count >= LEAST_CHUNKS:
            low, high = _interval(minutes, found, slope, resamples, seed)
    least = int(found.argmin())
    return Drift(
        float(found.mean()), None if slope is None else float(slope), low, high,
        float(found[:edge].mean()), float(found[-edge:].mean()), float(found[least]), float(at[least]),
    )  # fmt: skip


def mean_interval(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of independent values, such as one number per video."""
    found = np.array(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(found), size=(resamples, len(found)))
    return _middle(found[drawn].mean(1))


def _slope(x: Floats, rows: Floats) -> Floats:
    centred = x - x.mean()
    return (rows - rows.mean(1, keepdims=True)) @ centred / (centred @ centred)


def _interval(x: Floats, y: Floats, slope: float, resamples: int, seed: int) -> tuple[float, float]:
    count = len(y)
    residuals = y - y.mean() - slope * (x - x.mean())
    # A line takes two degrees of freedom out of the residuals.
    residuals = residuals * math.sqrt(count / (count - 2))
    block = max(1, round(count ** (1 / 3)))
    blocks = -(-count // block)
    starts = np.random.default_rng(seed).integers(count, size=(resamples, blocks))
    drawn = (starts[:, :, None] + np.arange(block)) % count
    noise = residuals[drawn.reshape(resamples, -1)[:, :count]]
    return _middle(slope + _slope(x, noise))


def _middle(drawn: Floats) -> tuple[float, float]:
    edge = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [edge, 1 - edge])
    return float(low), float(high)
