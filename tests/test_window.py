"""The state of one stream: birth noise, given latents, the Euler step, memory and snapshots."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import A, B, CountedNoise, endless, given_latents, legal_plans, many
from test_schedule import B_TABLE
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.window import CleanChunk, Window, chunk_noise, row_levels


def make(plan: WindowPlan, time_shift: float = 1.0, noise: Callable[[int], Tensor] | None = None) -> Window:
    schedule = NoiseSchedule(plan.num_inference_steps, time_shift)
    return Window(plan, schedule, noise or CountedNoise(plan), given_latents(plan))


def step(window: Window, row: PlanRow) -> tuple[CleanChunk, ...]:
    """One row under a velocity that mixes all frames of the window."""
    x, levels = window.inputs(row)
    return window.update(row, x.mean(dim=2, keepdim=True) - x * levels[:, None, :, None, None])


# --- noise -----------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_chunk_alone() -> None:
    shape = (4, 5, 8, 8)
    first = chunk_noise(3, 11, shape)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    chunk_noise(3, 10, shape)
    assert torch.equal(chunk_noise(3, 11, shape), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.float32 and first.shape == shape
    # (seed, index) pairs whose digits run together the same way, and negative or huge seeds, are all different.
    pairs = [(3, 11), (31, 1), (3, 1), (1, 3), (-3, 11), (2**80, 11), (2**80 + 1, 11), (0, 0)]
    draws = [chunk_noise(seed, index, shape) for seed, index in pairs]
    correlation = torch.corrcoef(torch.stack([draw.flatten() for draw in draws]))
    assert (correlation - torch.eye(len(pairs))).abs().max() < 0.15


def test_noise_has_unit_variance() -> None:
    draws = torch.stack([chunk_noise(5, index, (4, 5, 16, 16)) for index in range(40)])
    assert abs(draws.mean().item()) < 0.01
    assert draws.var().item() == pytest.approx(1, abs=0.01)


# --- what the model sees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(5))
def test_levels_of_all_35_frames_of_config_b(stage: int) -> None:
    window = make(B)
    levels = window.levels(B.row(25 + stage))
    assert levels.shape == (35,) and levels.dtype == torch.float32
    assert torch.equal(levels[:5], torch.zeros(5))
    expected = torch.tensor(B_TABLE[stage]).repeat_interleave(5)
    torch.testing.assert_close(levels[5:] * 1000, expected, atol=5e-3, rtol=0)


def test_time_shift_leaves_the_context_clean_and_the_newborn_pure_noise() -> None:
    levels = make(B, time_shift=3.69466).levels(B.row(25))
    assert torch.equal(levels[:5], torch.zeros(5)) and torch.equal(levels[-5:], torch.ones(5))
    linear = make(B).levels(B.row(25))
    torch.testing.assert_close(levels, 3.69466 * linear / (1 + 2.69466 * linear), atol=1e-7, rtol=0)


@given(legal_plans())
@many(60)
def test_inputs_are_context_then_chunks(plan: WindowPlan) -> None:
    window = make(plan, 1.7)
    size = plan.latent_chunk_size
    emitted: dict[int, Tensor] = {k: v for k, v in given_latents(plan).items() if k < 0}
    for row in plan.rows():
        x, levels = window.inputs(row)
        assert x.shape == (1, 2, size * len(row.window), 2, 3) and levels.shape == (1, size * len(row.window))
        assert x.dtype == levels.dtype == torch.float32
        assert torch.equal(levels[0], row_levels(row, NoiseSchedule(plan.num_inference_steps, 1.7).levels, size))
        parts = dict(zip(row.window, x[0].split(size, dim=1), strict=True))
        # The context is the finished latents themselves, and a newborn is its own noise.
        assert all(torch.equal(parts[k], emitted[k]) for k in row.context)
        assert all(torch.equal(parts[k], chunk_noise(0, k, (2, size, 2, 3))) for k in row.born)
        for clean in step(window, row):
            emitted[clean.index] = clean.latents.clone()
    assert window.row == plan.num_rows


@given(legal_plans(), st.floats(0.2, 5))
@many(60)
def test_a_clip_enters_at_the_staircase(plan: WindowPlan, time_shift: float) -> None:
    plan = replace(plan, start="clip")
    window, clean = make(plan, time_shift), given_latents(plan)
    row = plan.row(0)
    x, levels = window.inputs(row)
    for index, part, level in zip(
        row.window, x[0].split(plan.latent_chunk_size, 1), levels[0, :: plan.latent_chunk_size], strict=True
    ):
        eps = chunk_noise(0, max(index, 0), tuple(part.shape))
        if index < plan.given_clip:
            torch.testing.assert_close(part, (1 - level) * clean[index] + level * eps, atol=1e-6, rtol=0)
        if index < 0:
            assert torch.equal(part, clean[index])
    slots = levels[0, :: plan.latent_chunk_size][len(row.context) :]
    linear = torch.arange(1, len(row.chunks) + 1) / plan.window_chunks
    torch.testing.assert_close(slots, time_shift * linear / (1 + (time_shift - 1) * linear), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_given_latents_of_any_precision_are_used_as_float32(dtype: torch.dtype) -> None:
    plan = replace(B, num_chunks=2)
    given = {index: latents.to(dtype) for index, latents in given_latents(plan).items()}
    x, _ = Window(plan, NoiseSchedule(30), CountedNoise(plan), given).inputs(plan.row(0))
    assert x.dtype == torch.float32 and torch.equal(x[0, :, :5], given[-1].float())


# --- the step --------------------------------------------------------------------------------------------


@given(legal_plans(), st.floats(0.2, 5))
@many(60)
def test_the_euler_step_moves_noisy_chunks_only(plan: WindowPlan, time_shift: float) -> None:
    window, size = make(plan, time_shift), plan.latent_chunk_size
    for row in plan.rows():
        x, levels = window.inputs(row)
        velocity = torch.randn(x.shape, generator=torch.Generator().manual_seed(row.index))
        below = replace(row, steps_left=tuple(left - 1 for left in row.steps_left))
        expected = x + velocity * (levels - window.levels(below))[:, None, :, None, None]
        clean = window.update(row, velocity)
        after = window.snapshot().latents
        kept = {k: part for k, part in zip(row.window, expected[0].split(size, 1), strict=True) if k in after}
        for index, part in kept.items():
            torch.testing.assert_close(after[index], part, atol=1e-6, rtol=1e-6)
        assert tuple(chunk.index for chunk in clean) == row.emits == row.chunks[: len(clean)]
        if clean:
            assert row.steps_left[0] == 1 and len(clean) == 1
            torch.testing.assert_close(clean[0].latents, expected[0].split(size, 1)[len(row.context)])


@pytest.mark.parametrize("wrong", [0, 2])
def test_rows_must_be_applied_in_order(wrong: int) -> None:
    window = make(B)
    step(window, B.row(0))
    x, _ = window.inputs(B.row(1))
    with pytest.raises(ValueError, match=f"row {wrong} applied to a window that is at row 1"):
        window.update(B.row(wrong), x)


# --- memory ----------------------------------------------------------------------------------------------


@given(legal_plans())
@many(100)
def test_only_what_a_later_row_reads_is_kept(plan: WindowPlan) -> None:
    window = make(plan)
    for row in plan.rows():
        step(window, row)
        held = set(window.snapshot().latents)
        assert len(held) <= plan.window_chunks + plan.context_chunks
        if row.index + 1 < plan.num_rows:
            following = plan.row(row.index + 1)
            assert held == set(following.window) - set(following.born)


@pytest.mark.parametrize("plan", [replace(A, num_chunks=None), endless(B), endless(replace(B, start="clip"))])
def test_memory_of_an_endless_stream_is_constant(plan: WindowPlan) -> None:
    window, sizes = make(plan), []
    for row in islice(plan.rows(), 400):
        step(window, row)
        sizes.append(sum(latents.untyped_storage().nbytes() for latents in window._latents.values()))
    assert max(sizes[50:]) == max(sizes[-50:])
    assert max(sizes) <= (plan.window_chunks + plan.context_chunks) * 2 * plan.latent_chunk_size * 6 * 4


# --- snapshots -------------------------------------------------------------------------------------------


@given(legal_plans(), st.data())
@many(100)
def test_a_restored_window_goes_on_bit_for_bit(plan: WindowPlan, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, plan.num_rows - 1), label="snapshot before row")
    window = make(plan, 2.0)
    for row in islice(plan.rows(), cut):
        step(window, row)
    snapshot = window.snapshot()
    assert snapshot.row == cut
    frozen = {index: latents.clone() for index, latents in snapshot.latents.items()}

    # Scribbling on a snapshot leaves the window alone; the window going on leaves the snapshot alone.
    for latents in window.snapshot().latents.values():
        latents.fill_(torch.nan)
    expected = [step(window, row) for row in plan.rows(cut)]
    assert all(torch.equal(snapshot.latents[index], latents) for index, latents in frozen.items())
    noise = CountedNoise(plan)
    restored = Window.restore(snapshot, plan, NoiseSchedule(plan.num_inference_steps, 2.0), noise)
    for latents in snapshot.latents.values():
        latents.fill_(torch.nan)
    actual = [step(restored, row) for row in plan.rows(restored.row)]
    assert noise.drawn == [index for row in plan.rows(cut) for index in row.born]
    for one, two in zip(expected, actual, strict=True):
        assert [clean.index for clean in one] == [clean.index for clean in two]
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(one, two, strict=True))


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "indices", "needed"),
    [
        ({"start": "noise"}, [-1], []),
        ({"start": "chunk"}, [], [-1]),
        ({"start": "chunk", "context_chunks": 2}, [-2, -1], [-1]),
        ({"start": "clip"}, [-1, 0, 1, 2, 3], [-1, 0, 1, 2, 3, 4]),
        ({"start": "clip", "context_chunks": 0}, [-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    ],
)
def test_a_start_must_be_given_exactly_its_latents(change: dict, indices: list[int], needed: list[int]) -> None:
    plan = replace(B, **change)
    latents = {index: torch.zeros(2, 5, 2, 3) for index in indices}
    message = f"start={plan.start} needs latents of chunks {needed}, got {indices}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        Window(plan, NoiseSchedule(30), CountedNoise(plan), latents)


def test_levels_and_plan_must_agree_on_the_steps() -> None:
    with pytest.raises(ConfigError, match="num_inference_steps=60 of the levels differs from 30 of the plan"):
        Window(B, NoiseSchedule(60), CountedNoise(B), given_latents(B))
