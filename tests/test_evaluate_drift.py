"""Slopes, both ends and intervals: against closed forms, and as often right as they say."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.stats

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
