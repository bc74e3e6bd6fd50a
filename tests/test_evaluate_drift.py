"""Slopes, both ends and intervals: against closed forms, and as often right as they say."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
import scipy.stats

from pavdm_dist.evaluate import drift as drifts
from pavdm_dist.evaluate.drift import drift_of, mean_interval, ratio_interval


def test_a_line_is_found_and_its_ends() -> None:
    times = [float(i) for i in range(60)]
    drift = drift_of(times, [1 + 0.5 * time / 60 for time in times], 500, 0)
    assert drift is not None and drift.slope == pytest.approx(0.5) and drift.low == pytest.approx(0.5)
    assert drift.first == pytest.approx(1 + 0.5 * 4 / 60) and drift.last == pytest.approx(1 + 0.5 * 55 / 60)
    assert drift.between_ends == pytest.approx(0.5 * 51 / 60) and not drift.holds
    assert (drift.minimum, drift.minimum_at) == (1.0, 0.0)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 series without drift, white and with memory, the 95 % interval holds zero in most."""
    times = [float(i) for i in range(60)]
    for memory, least in ((0.0, 0.9), (0.4, 0.8)):
        held = 0
        for seed in range(200):
            noise = np.random.default_rng(seed).normal(size=60)
            for i in range(1, 60):
                noise[i] += memory * noise[i - 1]
            drift = drift_of(times, noise.tolist(), 200, seed)
            assert drift is not None
            held += bool(drift.holds)
        assert least <= held / 200 <= 0.99


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 12.345678, 0.999, 1 / 3, -1e-9])
@pytest.mark.parametrize("count", [10, 20, 37, 60])
@pytest.mark.parametrize("rounding", [0, 8])
def test_what_never_changes_holds(value: float, count: int, rounding: int) -> None:
    """Not by the sign of a rounding error, also where a chunk's mean is itself rounded."""
    errors = np.random.default_rng(0).integers(0, rounding + 1, count) * np.finfo(float).eps
    times, values = [float(i) for i in range(count)], (value * (1 + errors)).tolist()
    drift = drift_of(times, values, 200, 0, [24] * (count - 1) + [3])
    assert drift is not None and (drift.slope, drift.low, drift.high, drift.holds) == (0, 0, 0, True)
    assert drift.mean == drift.first == drift.last == drift.minimum == values[0] and drift.between_ends == 0


def test_the_least_change_that_is_one_counts() -> None:
    times = [float(i) for i in range(20)]
    drift = drift_of(times, [1 + 1e-12 * time for time in times], 200, 0)
    assert drift is not None and drift.slope == pytest.approx(6e-11, rel=1e-3) and not drift.holds
    short = drift_of(times[:2], [0.1, 0.1], 200, 0)
    assert short is not None and (short.slope, short.low, short.holds) == (0, None, None)


def test_the_bootstrap_draws_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [float(i) for i in range(60)]
    values = np.random.default_rng(1).normal(3, 0.2, 60).tolist()
    at_once = drift_of(times, values, 2000, 5, [24] * 59 + [3])
    for rows in (8, 64, 1999):
        monkeypatch.setattr(drifts, "_AT_ONCE", rows * 60 + 1)
        in_parts = drift_of(times, values, 2000, 5, [24] * 59 + [3])
        assert at_once is not None and in_parts is not None
        assert (in_parts.low, in_parts.high) == pytest.approx((at_once.low, at_once.high), rel=1e-12)


def test_the_bootstrap_holds_no_more_for_longer_videos() -> None:
    tracemalloc.start()
    try:
        values = np.random.default_rng(0).normal(size=7200).tolist()
        drift_of([float(i) for i in range(7200)], values, 1000, 0)
        assert tracemalloc.get_traced_memory()[1] < 48 * 2**20, "all at once would take 170 MiB"
    finally:
        tracemalloc.stop()


def test_what_was_not_measured_is_left_out() -> None:
    assert drift_of([0.0, 1.0], [None, None], 100, 0) is None
    drift = drift_of([0.0, 1.0, 2.0], [None, 3.0, None], 100, 0)
    assert drift is not None and (drift.mean, drift.slope, drift.holds) == (3.0, None, None)
    short = drift_of([0.0, 60.0], [1.0, 2.0], 100, 0)
    assert short is not None and short.slope == pytest.approx(1) and short.low is None


def test_a_short_rest_counts_by_its_frames() -> None:
    times, lengths = [0.0, 1.0, 2.0, 3.0], [24, 24, 24, 3]
    values = [1.0, 2.0, 3.0, 40.0]
    drift = drift_of(times, values, 100, 0, lengths)
    frames = np.repeat(values, lengths)
    assert drift is not None and drift.mean == pytest.approx(frames.mean())
    slope = np.polyfit(np.repeat(times, lengths) / 60, frames, 1)[0]
    assert drift.slope == pytest.approx(slope), "as of every frame by itself"
    assert drift.minimum == 1 and drift.last == 40


@pytest.mark.parametrize("count", [2, 3, 6, 32])
def test_intervals_over_few_videos_hold_the_truth_as_often_as_they_say(count: int) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(1000, count))
    held = sum(low <= 0 <= high for low, high in map(mean_interval, drawn))
    assert 930 <= held <= 970
    assert mean_interval(drawn[0]) == pytest.approx(scipy.stats.ttest_1samp(drawn[0], 0).confidence_interval(0.95))
    pairs = rng.normal(1, 0.1, (1000, count, 2))
    intervals = [ratio_interval(own)[1:] for own in pairs]
    assert 930 <= sum(low <= 1 <= high for low, high in intervals) <= 970


def test_of_one_video_or_without_scipy_there_is_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mean_interval([1.0]) == (None, None) and ratio_interval([(2.0, 1.0)]) == (0.5, None, None)
    assert ratio_interval([(1.0, 1.0), (-1.0, 1.0)]) == (None, None, None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert mean_interval([1.0, 2.0]) == (None, None) and ratio_interval([(1.0, 1.0), (1.0, 3.0)]) == (2.0, None, None)
