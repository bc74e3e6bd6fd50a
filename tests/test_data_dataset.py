"""The order of batches, property by property, and loading ahead."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pavdm_dist.data.dataset import BatchOrder
from pavdm_dist.data.prefetch import Prefetch
from pavdm_dist.errors import ConfigError

BUCKETS = st.lists(st.tuples(st.integers(0, 23), st.integers(1, 9)), min_size=1, max_size=4).filter(
    lambda buckets: any(count for count, _ in buckets)
)


def rows(order: BatchOrder, buckets: int, steps: int) -> list[list[int]]:
    """Each bucket's clips in the order in which ``steps`` batches give them."""
    found: list[list[int]] = [[] for _ in range(buckets)]
    for step in range(steps):
        bucket, clips = order.batch(step)
        found[bucket] += clips
    return found


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.integers(0, 2**40))
def test_every_clip_once_in_every_pass_over_its_bucket(buckets: list[tuple[int, int]], seed: int) -> None:
    counts, sizes = [count for count, _ in buckets], [size for _, size in buckets]
    order = BatchOrder(counts, sizes, seed)
    for count, clips in zip(counts, rows(order, len(counts), 80), strict=True):
        assert count or not clips
        passes = [clips[i : i + count] for i in range(0, len(clips), count)] if count else []
        assert all(sorted(one) == list(range(count)) for one in passes[:-1])
        assert all(len(set(one)) == len(one) for one in passes[-1:])


@settings(max_examples=40, deadline=None)
@given(BUCKETS, st.integers(0, 99), st.randoms(use_true_random=False))
def test_a_step_is_the_whole_position(buckets: list[tuple[int, int]], seed: int, chance: random.Random) -> None:
    counts, sizes = [count for count, _ in buckets], [size for _, size in buckets]
    unbroken = BatchOrder(counts, sizes, seed)
    expected = [unbroken.batch(step) for step in range(50)]
    steps = list(range(50))
    chance.shuffle(steps)
    resumed = BatchOrder(counts, sizes, seed)
    assert {step: resumed.batch(step) for step in steps} == dict(enumerate(expected))
    assert all(len(clips) == sizes[bucket] for bucket, clips in expected)


def test_buckets_take_turns_in_proportion_to_their_clips() -> None:
    order = BatchOrder([600, 200, 0, 8], [4, 4, 4, 8], 0)
    drawn = Counter(order.batch(step)[0] for step in range(201 * 5))
    assert drawn == {0: 750, 1: 250, 3: 5}
    first, second = ([order.batch(step)[0] for step in range(start, start + 201)] for start in (0, 201))
    assert first != second and sorted(first) == sorted(second)
    assert 1 in first[:20], "mixed, not one bucket after the other"


@pytest.mark.parametrize(
    ("counts", "sizes"), [([10_000, 1], [64, 64]), ([6000, 96], [64, 64]), ([40, 3, 0], [4, 7, 2]), ([5], [64])]
)
def test_small_buckets_come_in_proportion_too(counts: list[int], sizes: list[int]) -> None:
    order, steps = BatchOrder(counts, sizes, 0), 70 * 160
    seen, clips = Counter[int](), dict[int, list[int]]()
    for step in range(steps):
        bucket, numbers_of = order.batch(step)
        seen[bucket] += len(numbers_of)
        clips.setdefault(bucket, []).extend(numbers_of)
    for bucket, count in enumerate(counts):
        share = count / sum(counts)
        assert seen[bucket] == pytest.approx(share * sum(seen.values()), rel=0.01, abs=2 * sizes[bucket])
        whole = clips.get(bucket, [])[: seen[bucket] // max(count, 1) * count]
        assert Counter(whole) == dict.fromkeys(range(count), len(whole) // max(count, 1)), "every clip once a pass"


def test_seeds_and_passes_differ() -> None:
    once, other = BatchOrder([50], [50], 0), BatchOrder([50], [50], 1)
    assert len({tuple(order.batch(step)[1]) for order in (once, other) for step in range(3)}) == 6


def test_a_batch_larger_than_its_bucket_spans_passes() -> None:
    bucket, clips = BatchOrder([3], [7], 0).batch(0)
    assert bucket == 0 and Counter(clips[:6]) == {0: 2, 1: 2, 2: 2} and len(clips) == 7


def test_a_far_step_costs_no_more_than_a_near_one() -> None:
    order = BatchOrder([100_000, 1000], [8, 4], 0)
    order.batch(10**9)
    began = time.process_time()
    for step in range(10**9, 10**9 + 200):
        order.batch(step)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("counts", "sizes", "seed", "sentence"),
    [
        ([4], [1, 1], 0, r"batch_sizes=\[1, 1\]: 1 buckets need as many entries"),
        ([4, 4], [1, 0], 0, r"batch_sizes=\[1, 0\]: must be at least 1 each"),
        ([0, 0], [1, 1], 0, r"counts=\[0, 0\]: there is no clip to train on"),
        ([4], [1], -1, "seed=-1: must be 0 or more"),
    ],
)
def test_impossible_orders(counts: list[int], sizes: list[int], seed: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        BatchOrder(counts, sizes, seed)


def test_prefetch_gives_steps_in_order_and_stays_ahead_by_its_depth() -> None:
    loaded: list[int] = []

    def load(step: int) -> int:
        loaded.append(step)
        return step * step

    with Prefetch(load, first=3, depth=2) as batches:
        assert [next(batches) for _ in range(4)] == [9, 16, 25, 36]
        deadline = time.monotonic() + 10
        while loaded[-1] < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert loaded == list(range(3, 9)), "four taken, two wait"
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_hands_a_failure_to_whoever_asks_for_that_step() -> None:
    def load(step: int) -> int:
        if step == 2:
            raise ConfigError("clip 2 is gone")
        return step

    with Prefetch(load, depth=8) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        with pytest.raises(ConfigError, match="clip 2 is gone"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)
    with pytest.raises(ConfigError, match="depth=0: must be at least 1"):
        Prefetch(load, depth=0)


def test_prefetch_leaves_no_thread() -> None:
    before = threading.active_count()
    batches = Prefetch(lambda step: step)
    next(batches)
    batches.close()
    batches.close()
    assert threading.active_count() == before
