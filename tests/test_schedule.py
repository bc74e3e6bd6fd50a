"""Levels and the window plan: the paper's numbers for its configurations, and every legal plan against Algorithm 1."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, islice, pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plans import A, B, M, endless, legal_plans, many, simulate

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.levels import NoiseSchedule, shift_time, time_shift_ratio
from pavdm_dist.method.schedule import WindowPlan

# Config B, thousandths, per chunk at rows 0 .. 4 between two shifts.
B_TABLE = [
    [166.67, 333.33, 500, 666.67, 833.33, 1000],
    [133.33, 300, 466.67, 633.33, 800, 966.67],
    [100, 266.67, 433.33, 600, 766.67, 933.33],
    [66.67, 233.33, 400, 566.67, 733.33, 900],
    [33.33, 200, 366.67, 533.33, 700, 866.67],
]


def thousandths(plan: WindowPlan, n: int, time_shift: float = 1.0) -> list[float]:
    """Levels x 1000 of a row's context and chunks, one per chunk."""
    levels = NoiseSchedule(plan.num_inference_steps, time_shift).levels
    row = plan.row(n)
    return [0.0] * len(row.context) + [1000 * levels[left] for left in row.steps_left]


# --- levels ----------------------------------------------------------------------------------------------


def test_level_table_of_config_a() -> None:
    assert thousandths(A, 29) == pytest.approx([1000 * (j + 1) / 30 for j in range(30)], abs=1e-4)
    assert all(A.row(n).steps_left == tuple(range(1, 31)) for n in range(29, 84))


def test_level_table_of_config_b() -> None:
    for stage, expected in enumerate(B_TABLE):
        assert thousandths(B, 25 + stage) == pytest.approx([0, *expected], abs=5e-3)
        assert thousandths(B, 200 + stage) == thousandths(B, 25 + stage)
    for slot in range(6):
        seen = {round(row[slot + 1], 2) for row in (thousandths(B, 25 + s) for s in range(5))}
        assert len(seen) == 5
    union = {left for s in range(5) for left in B.row(25 + s).steps_left}
    assert union == set(range(1, 31))


@pytest.mark.parametrize(("plan", "full"), [(A, 29), (B, 25), (M, 45)], ids="ABM")
def test_full_window_levels_are_the_formula(plan: WindowPlan, full: int) -> None:
    """t(s, j) = ((j + 1) S - s) / T, to the last bit of a float32."""
    shift, steps = plan.steps_per_shift, plan.num_inference_steps
    levels = NoiseSchedule(steps).levels
    for s in range(shift):
        row = plan.row(full + s)
        expected = [np.float32(((j + 1) * shift - s) / steps) for j in range(plan.window_chunks)]
        assert [levels[left] for left in row.steps_left] == expected


@given(steps=st.integers(1, 1000), ratio=st.floats(0.05, 40))
@many(100)
def test_levels_are_distinct_float32_from_0_to_1(steps: int, ratio: float) -> None:
    levels = NoiseSchedule(steps, ratio).levels
    assert len(levels) == steps + 1
    assert levels[0] == 0.0 and levels[-1] == 1.0
    assert all(a < b for a, b in pairwise(levels))
    assert all(float(np.float32(level)) == level for level in levels)
    # A chunk's life adds up to the whole way, also in the float32 in which it is taken.
    drops = [np.float32(levels[j]) - np.float32(levels[j - 1]) for j in range(steps, 0, -1)]
    assert math.fsum(drops) == pytest.approx(1, abs=1e-6)
    assert list(accumulate(drops, np.add))[-1] == pytest.approx(1, abs=1e-6 * math.sqrt(steps))


def test_time_shift_of_the_published_setting() -> None:
    ratio = time_shift_ratio(240, 426, 35)
    assert ratio == pytest.approx(3.69466, abs=1e-5)
    grid = [1000 * level for level in NoiseSchedule(30, ratio).levels]
    assert grid[0] == 0.0 and grid[30] == 1000.0
    assert grid[1:6] == pytest.approx([113.0, 208.8, 291.0, 362.4, 424.9], abs=0.05)
    assert grid[28:30] == pytest.approx([981.0, 990.8], abs=0.05)
    assert (grid[1] - grid[0]) / 1000 == pytest.approx(0.113, abs=5e-4)
    assert (grid[30] - grid[29]) / 1000 == pytest.approx(0.0092, abs=5e-5)


def test_time_shift_ratio_is_one_for_a_single_512_pixel_image() -> None:
    assert time_shift_ratio(512, 512, 1) == 1.0
    assert time_shift_ratio(1024, 1024, 1) == pytest.approx(2)
    assert time_shift_ratio(512, 512, 9) == pytest.approx(3)
    assert time_shift_ratio(240, 426, 35, scale=0.5) == pytest.approx(3.69466 / 2, abs=1e-5)


@given(t=st.floats(0, 1), ratio=st.floats(0.05, 40))
@many(200)
def test_time_shift_keeps_the_ends_and_is_undone_by_its_inverse(t: float, ratio: float) -> None:
    assert shift_time(0.0, ratio) == 0.0
    assert shift_time(1.0, ratio) == pytest.approx(1, abs=1e-12)
    assert shift_time(t, 1.0) == t
    assert shift_time(shift_time(t, ratio), 1 / ratio) == pytest.approx(t, abs=1e-12)


@given(legal_plans(), st.floats(0.1, 10))
@many(100)
def test_shifting_the_window_lands_on_the_next_slot(plan: WindowPlan, ratio: float) -> None:
    """The level after the last row of a slot is the level of the slot below at its first row, exactly."""
    levels = NoiseSchedule(plan.num_inference_steps, ratio).levels
    shift, full = plan.steps_per_shift, endless(plan)
    first = plan.num_inference_steps  # the window is full from here on
    before, after = full.row(first + shift - 1), full.row(first + shift)
    targets = [levels[left - 1] for left in before.steps_left]
    assert targets[0] == 0.0
    assert targets[1:] == [levels[left] for left in after.steps_left[:-1]]


# --- rows ------------------------------------------------------------------------------------------------


@given(legal_plans())
@many(400)
def test_rows_are_those_of_a_pushed_and_popped_queue(plan: WindowPlan) -> None:
    rows = list(plan.rows())
    assert rows == list(simulate(plan))
    assert len(rows) == plan.num_rows
    assert [plan.row(n) for n in range(plan.num_rows)][::-1] == rows[::-1]


@given(legal_plans())
@many(200)
def test_every_row_is_a_staircase(plan: WindowPlan) -> None:
    shift, steps = plan.steps_per_shift, plan.num_inference_steps
    for row in plan.rows():
        assert row.window == tuple(range(row.window[0], row.window[-1] + 1))
        assert 1 <= len(row.chunks) <= min(plan.window_chunks, plan.num_born)
        assert all(b - a == shift for a, b in pairwise(row.steps_left))
        levels = [Fraction(left, steps) for left in row.steps_left]
        assert all(b - a == Fraction(shift, steps) for a, b in pairwise(levels))
        assert 1 <= row.steps_left[0] <= row.steps_left[-1] <= steps
        # Context is what came just before, clean, never more than was given or has been finished.
        assert all(-plan.given_context <= index < row.chunks[0] for index in row.context)
        assert len(row.context) == min(plan.context_chunks, plan.given_context + row.chunks[0])


@given(legal_plans())
@many(200)
def test_a_chunk_lives_for_its_entry_steps(plan: WindowPlan) -> None:
    rows = list(plan.rows())
    updates = Counter(index for row in rows for index in row.chunks)
    emitted = [chunk for row in rows for chunk in row.emits]
    assert emitted == list(range(plan.num_chunks or 0))
    for index in range(plan.num_born):
        chunk = plan.chunk(index)
        born = [row.index for row in rows if index in row.born]
        assert born == ([chunk.birth] if chunk.birth >= 0 else [])
        assert chunk.init == ("noise" if chunk.birth >= 0 else "clip")
        assert chunk.entry_steps == plan.num_inference_steps + min(chunk.birth, 0)
        kept = index < (plan.num_chunks or 0)
        assert chunk.role == ("emit" if kept else "discard")
        assert updates[index] == (chunk.entry_steps if kept else len(rows) - max(chunk.birth, 0))
    for beyond in (plan.num_born, -1):
        with pytest.raises(IndexError):
            plan.chunk(beyond)
    for beyond in (plan.num_rows, -1):
        with pytest.raises(IndexError):
            plan.row(beyond)


@given(legal_plans(), st.integers(0, 30))
@many(100)
def test_an_endless_plan_can_be_stopped_at_the_chunks_born(plan: WindowPlan, stop_row: int) -> None:
    """Up to the stop nothing shows whether the plan has an end; afterwards the window drains."""
    plan = replace(plan, end="drain")
    born = stop_row // plan.steps_per_shift + plan.given_clip + 1
    stopped = replace(plan, num_chunks=born)
    assert list(islice(stopped.rows(), stop_row + 1)) == list(islice(endless(plan).rows(), stop_row + 1))
    assert not any(row.born for row in stopped.rows(stop_row + 1))
    assert list(stopped.rows(stop_row)) == list(islice(stopped.rows(), stop_row, None))


def test_an_endless_plan_knows_any_row_but_no_length() -> None:
    row = endless(B).row(5 * 10**9 + 2)
    assert row.chunks == tuple(range(10**9 - 5, 10**9 + 1)) and row.context == (10**9 - 6,)
    assert row.steps_left == (3, 8, 13, 18, 23, 28)
    for field in ("num_rows", "num_born", "latent_evaluations"):
        with pytest.raises(ConfigError, match="num_chunks"):
            getattr(endless(B), field)


def test_window_trace_of_config_b() -> None:
    trace = {
        0: [0, 1000], 4: [0, 866.7], 5: [0, 833.3, 1000], 24: [0, 200, 366.7, 533.3, 700, 866.7],
        25: [0, 166.7, 333.3, 500, 666.7, 833.3, 1000], 29: [0, 33.3, 200, 366.7, 533.3, 700, 866.7],
        -25: [0, 166.7, 333.3, 500, 666.7, 833.3], -5: [0, 166.7], -1: [0, 33.3],
    }  # fmt: skip
    for n, expected in trace.items():
        assert thousandths(B, n % B.num_rows) == pytest.approx(expected, abs=0.05)
    assert thousandths(B, 30) == thousandths(B, 25)


# --- counts ----------------------------------------------------------------------------------------------


def short(plan: WindowPlan, chunks: int) -> WindowPlan:
    return replace(plan, num_chunks=chunks)


@pytest.mark.parametrize(
    ("plan", "calls"),
    [
        (B, 445), (short(B, 23), 140), (short(B, 6), 55), (short(B, 3), 40), (short(B, 2), 35), (short(B, 1), 30),
        (short(M, 23), 160), (M, 465), (A, 113),
        (WindowPlan(60, 6, 5, 1, "chunk", num_chunks=84), 890),
        (WindowPlan(30, 10, 1, 0, num_chunks=84), 279),
        (WindowPlan(30, 30, 3, 0, num_chunks=84), 113),
        (WindowPlan(30, 30, 1, 0, "clip", "cut", num_chunks=90), 90),
    ],
)  # fmt: skip
def test_call_counts(plan: WindowPlan, calls: int) -> None:
    assert plan.num_rows == calls == sum(1 for _ in plan.rows())


@given(legal_plans())
@many(200)
def test_calls_are_the_closed_form(plan: WindowPlan) -> None:
    shift, chunks = plan.steps_per_shift, plan.num_chunks or 0
    grow = 0 if plan.start == "clip" else plan.window_chunks - 1
    assert plan.num_rows == shift * (grow + chunks)
    assert plan.num_born == chunks + (plan.window_chunks - 1) * (plan.end == "cut")
    first = next(row.index for row in plan.rows() if 0 in row.emits) + 1
    assert plan.first_chunk_after_calls == first == (shift if plan.start == "clip" else plan.num_inference_steps)


def test_first_chunk_latency() -> None:
    assert [p.first_chunk_after_calls for p in (A, B, M)] == [30, 30, 50]
    assert WindowPlan(60, 6, 5).first_chunk_after_calls == 60
    assert replace(B, start="clip").first_chunk_after_calls == 5
    assert [row.index + 1 for row in B.rows() if row.emits] == list(range(30, 446, 5))


def test_a_new_prompt_governs_after_thirty_calls_of_config_b() -> None:
    """From the first call of a chunk to its last, six chunks (of 17 frames each) leave: 4.25 s at 24 fps."""
    birth = B.chunk(40).birth
    life = [B.row(n) for n in range(birth, birth + 30)]
    assert life[-1].emits == (40,)
    assert sum(len(row.emits) for row in life) * 17 == 102
    assert 102 / 24 == 4.25


@pytest.mark.parametrize(("chunks", "full"), [(84, 395), (23, 90), (6, 5)])
def test_window_size_histogram_of_config_b(chunks: int, full: int) -> None:
    plan = short(B, chunks)
    sizes = [len(row.window) * plan.latent_chunk_size for row in plan.rows()]
    assert Counter(sizes) == {10: 10, 15: 10, 20: 10, 25: 10, 30: 10, 35: full}
    assert sizes[:25] == sorted(sizes[:25]) and sizes[24] < 35 == sizes[25]
    assert sizes[-25:] == sorted(sizes[-25:], reverse=True) and sizes[-25] < 35 == sizes[-26]
    assert max(row.index for row in plan.rows() if row.born) == plan.num_rows - 30


@pytest.mark.parametrize(
    ("plan", "evaluations", "per_latent"),
    [
        (B, 14825, 35.30), (short(B, 23), 4150, 36.09), (short(B, 6), 1175, 39.17), (short(M, 89), 24700, 55.51),
    ],
)  # fmt: skip
def test_latent_evaluations(plan: WindowPlan, evaluations: int, per_latent: float) -> None:
    assert plan.latent_evaluations == evaluations
    generated = (plan.num_chunks or 0) * plan.latent_chunk_size
    assert evaluations / generated == pytest.approx(per_latent, abs=5e-3)


def test_latent_evaluations_to_the_first_chunk_and_per_chunk_after() -> None:
    cost = [len(row.window) * 5 for row in B.rows()]
    assert sum(cost[:30]) == 675
    assert {sum(cost[n : n + 5]) for n in range(30, 420, 5)} == {175}


@given(legal_plans())
@many(200)
def test_cost_is_the_sum_over_rows_and_context_adds_its_share(plan: WindowPlan) -> None:
    sizes = [len(row.window) * plan.latent_chunk_size for row in plan.rows()]
    assert plan.latent_evaluations == sum(sizes)
    bare = replace(plan, context_chunks=0, start="noise" if plan.start == "chunk" else plan.start)
    assert [row.chunks for row in bare.rows()] == [row.chunks for row in plan.rows()]
    context = sum(len(row.context) for row in plan.rows()) * plan.latent_chunk_size
    assert plan.latent_evaluations - bare.latent_evaluations == context
    if plan.context_chunks == 1 and plan.given_context == 1:
        assert context == plan.latent_chunk_size * plan.num_rows


# --- limits and mistakes ---------------------------------------------------------------------------------


def test_a_window_of_one_chunk_is_chunk_by_chunk() -> None:
    plan = WindowPlan(7, 1, 4, 1, num_chunks=3)
    assert plan.num_rows == 21
    assert [row.chunks for row in plan.rows()] == [(k,) for k in range(3) for _ in range(7)]
    assert [row.context for row in plan.rows()] == [()] * 7 + [(0,)] * 7 + [(1,)] * 7


@given(legal_plans(max_shift=1))
@many(50)
def test_one_step_per_shift_finishes_a_chunk_at_every_full_row(plan: WindowPlan) -> None:
    full = [row for row in plan.rows() if len(row.chunks) == plan.window_chunks]
    assert all(row.steps_left == tuple(range(1, plan.window_chunks + 1)) for row in full)
    assert all(row.emits == row.chunks[:1] and row.born == row.chunks[-1:] for row in full)


@given(steps=st.integers(1, 120), width=st.integers(1, 150))
@many(300)
def test_an_impossible_window_names_the_nearest_legal_values(steps: int, width: int) -> None:
    assume(steps % width)
    with pytest.raises(ConfigError) as caught:
        WindowPlan(steps, width, 5)
    message = str(caught.value)
    assert message.startswith(f"window_chunks={width} does not divide num_inference_steps={steps}: ")
    widths, lengths = message.split(": ")[1].split(", or ")
    divisors = [d for d in range(1, steps + 1) if steps % d == 0]
    nearest = [d for d in divisors if d < width][-1:] + [d for d in divisors if d > width][:1]
    assert [int(n) for n in re.findall(r"\d+", widths)] == nearest
    below, above = steps // width * width, (steps // width + 1) * width
    assert [int(n) for n in re.findall(r"\d+", lengths)] == [n for n in (below, above) if n > 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0: at least 1"),
        ({"window_chunks": 0}, "window_chunks=0: at least 1"),
        ({"window_chunks": -6}, "window_chunks=-6: at least 1"),
        ({"latent_chunk_size": 0}, "latent_chunk_size=0: at least 1"),
        ({"context_chunks": -1}, "context_chunks=-1: 0 or more"),
        ({"num_chunks": 0}, "num_chunks=0: at least 1"),
        ({"start": "video"}, "start='video': must be noise, chunk or clip"),
        ({"end": "stop"}, "end='stop': must be drain or cut"),
        ({"start": "chunk", "context_chunks": 0}, "start=chunk needs context_chunks of at least 1"),
    ],
)
def test_impossible_plans_name_the_field(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(B, **change)


@pytest.mark.parametrize(
    ("steps", "ratio", "field"),
    [
        (0, 1.0, "num_inference_steps=0"), (30, 0.0, "time_shift=0.0"),
        (30, -2.0, "time_shift=-2.0"), (30, math.nan, "time_shift=nan"),
    ],
)  # fmt: skip
def test_impossible_levels_name_the_field(steps: int, ratio: float, field: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(field)):
        NoiseSchedule(steps, ratio)
