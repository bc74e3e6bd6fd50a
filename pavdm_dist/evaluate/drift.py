"""From a measure per chunk to what is said of it: slope over time with its interval, both ends, the least chunk."""

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
# Values that differ by no more than this, of the largest of them, are one: means of a chunk's frames are rounded.
_RESOLUTION = 32 * float(np.finfo(np.float64).eps)
# Values that the bootstrap holds at a time, however long the video is: eight megabytes an array.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Drift:
    """One measure over one video.

    Attributes:
        mean: over chunks, each by its frames.
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


def drift_of(
    times: Sequence[float],
    values: Sequence[float | None],
    resamples: int,
    seed: int,
    frames: Sequence[int] | None = None,
) -> Drift | None:
    """What a measure did over a video; None where no chunk has it.

    The slope's interval comes from a bootstrap of residuals in blocks, since neighbouring chunks resemble each other:
    blocks are of cube root of n chunks, and may run over the end (circular), so that every chunk is drawn as often.
    Of a measure that never changes, to rounding, slope and interval are exactly 0.

    Args:
        times: where each chunk begins, seconds.
        values: of each chunk; None where there was nothing to measure.
        resamples: of the bootstrap.
        seed: of its drawings.
        frames: of each chunk: the last one of a video may be a short rest, which says less; None = all alike.
    """
    weights = [1] * len(times) if frames is None else frames
    known = [row for row in zip(times, values, weights, strict=True) if row[1] is not None]
    if not known:
        return None
    at, found, weight = np.array(known, dtype=np.float64).T
    count = len(found)
    if np.ptp(found) <= _RESOLUTION * np.abs(found).max():
        # The slope would be that of rounding errors, and so would be whether its interval holds zero.
        value, around = float(found[0]), 0.0 if count >= LEAST_CHUNKS else None
        return Drift(value, 0.0 if count > 1 else None, around, around, value, value, value, float(at[0]))
    edge = max(1, round(END_SHARE * count))
    low = high = None
    minutes = at / 60
    slope = float(_slope(minutes, found[None], weight)[0])
    if count >= LEAST_CHUNKS:
        low, high = _interval(minutes, found, weight, slope, resamples, seed)
    least = int(found.argmin())
    return Drift(
        _mean(found, weight), slope, low, high,
        _mean(found[:edge], weight[:edge]), _mean(found[-edge:], weight[-edge:]), float(found[least]), float(at[least]),
    )  # fmt: skip


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean of independent values, such as one number per video: Student's.

    A bootstrap of few values is too narrow: of six it holds the truth in 86 % of cases. None where there is one value
    alone, or SciPy is not installed.
    """
    found = np.array(values, dtype=np.float64)
    half = _students(len(found))
    if half is None:
        return None, None
    middle, half = float(found.mean()), half * float(found.std(ddof=1)) / math.sqrt(len(found))
    return middle - half, middle + half


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None, float | None]:
    """Mean second over mean first of pairs, such as two numbers per video, and its 95 % interval (to first order)."""
    first, second = np.array(pairs, dtype=np.float64).T
    if not first.mean():
        return None, None, None
    ratio = float(second.mean() / first.mean())
    half = _students(len(first))
    if half is None:
        return ratio, None, None
    half *= float((second - ratio * first).std(ddof=1)) / abs(float(first.mean())) / math.sqrt(len(first))
    return ratio, ratio - half, ratio + half


def _students(count: int) -> float | None:
    """Half a 95 % interval of a mean of so many values, in standard errors."""
    try:
        from scipy.stats import t
    except ImportError:
        return None
    return float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) if count > 1 else None


def _mean(values: Floats, weight: Floats) -> float:
    return float(np.average(values, weights=weight))


def _slope(x: Floats, rows: Floats, weight: Floats) -> Floats:
    centred = (x - np.average(x, weights=weight)) * weight
    return (rows - rows.mean(1, keepdims=True)) @ centred / (centred @ x)


def _interval(x: Floats, y: Floats, weight: Floats, slope: float, resamples: int, seed: int) -> tuple[float, float]:
    count = len(y)
    residuals = y - _mean(y, weight) - slope * (x - _mean(x, weight))
    # A line takes two degrees of freedom out of the residuals.
    residuals = residuals * math.sqrt(count / (count - 2))
    block = max(1, round(count ** (1 / 3)))
    blocks = -(-count // block)
    rng, at_once = np.random.default_rng(seed), max(1, _AT_ONCE // count)
    slopes = list[Floats]()
    for begin in range(0, resamples, at_once):
        starts = rng.integers(count, size=(min(at_once, resamples - begin), blocks))
        drawn = (starts[:, :, None] + np.arange(block)) % count
        noise = residuals[drawn.reshape(len(starts), -1)[:, :count]]
        slopes.append(_slope(x, noise, weight))
    edge = (1 - CONFIDENCE) / 2
    low, high = np.quantile(slope + np.concatenate(slopes), [edge, 1 - edge])
    return float(low), float(high)
