"""The reference loop against what can be computed without it: known velocities, known limits, known causes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from helpers import reference_chunks, tiny_model, tiny_stream
from hypothesis import given
from hypothesis import strategies as st
from plans import A, B, CountedNoise, M, given_latents, legal_plans, many
from torch import Tensor

from pavdm_dist.method.denoiser import ModelDenoiser
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.sampler import CONDITIONAL, UNCONDITIONAL, Denoiser, guide, num_branches, sample
from pavdm_dist.method.schedule import PlanRow, Start, WindowPlan
from pavdm_dist.method.window import CleanChunk, Window, WindowSnapshot, chunk_noise


def mixing(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
    """A velocity to which every frame of the window, its level, its place and the branch matter."""
    places = torch.linspace(-1, 1, x.shape[2])[None, None, :, None, None]
    mean = (x * (1 + places)).mean(dim=2, keepdim=True)
    return torch.tanh(x * (1 + branch) + mean) - levels[:, None, :, None, None] * places


def run(
    plan: WindowPlan, denoise: Denoiser = mixing, *, shift: float = 1.7, noise: Callable | None = None, g: float = 1.0
) -> list[Tensor]:
    """The plan's chunks, checked to come in order."""
    schedule = NoiseSchedule(plan.num_inference_steps, shift)
    window = Window(plan, schedule, noise or CountedNoise(plan), given_latents(plan))
    chunks = list(sample(window, denoise, g))
    assert [chunk.index for chunk in chunks] == list(range(plan.num_chunks or 0))
    return [chunk.latents for chunk in chunks]


def same(one: list[Tensor], two: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(one, two, strict=True)]


def noise_of(plan: WindowPlan, index: int) -> Tensor:
    return chunk_noise(0, index, (2, plan.latent_chunk_size, 2, 3))


# --- known velocities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.69466])
@pytest.mark.parametrize("plan", [replace(A, num_chunks=40), replace(B, num_chunks=12), replace(M, num_chunks=3)])
def test_constant_velocity_adds_one_to_the_birth_noise(plan: WindowPlan, shift: float) -> None:
    chunks = run(plan, lambda x, levels, row, branch: torch.ones_like(x), shift=shift)
    for index, latents in enumerate(chunks):
        assert (latents - (noise_of(plan, index) + 1)).abs().max() < 2e-6


def test_constant_velocity_from_a_clip() -> None:
    """Config A, fixed start: output i < 30 is (1 - l) x_i + l eps_i + l with l = (i + 1) / 30."""
    plan = replace(A, start="clip", end="cut", num_chunks=40)
    clip = given_latents(plan)
    for index, latents in enumerate(run(plan, lambda x, levels, row, branch: torch.ones_like(x), shift=1.0)):
        level = min(index + 1, 30) / 30
        real = clip[index] if index in clip else torch.zeros_like(latents)
        expected = (1 - level) * real + level * noise_of(plan, index) + level
        assert (latents - expected).abs().max() < 2e-6


@given(legal_plans(), st.floats(0.2, 5))
@many(60)
def test_a_perfect_model_lands_on_its_target(plan: WindowPlan, shift: float) -> None:
    """v = (x* - z) / t reaches x* in any plan, also in one step (T = W)."""

    def target(index: int) -> Tensor:
        return chunk_noise(99, index, (2, plan.latent_chunk_size, 2, 3))

    def perfect(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        goal = torch.cat([target(index) for index in row.window], dim=1).unsqueeze(0)
        return (goal - x) / levels.clamp(min=1e-6)[:, None, :, None, None]

    for index, latents in enumerate(run(plan, perfect, shift=shift)):
        assert (latents - target(index)).abs().max() < 1e-6


@given(legal_plans())
@many(60)
def test_the_exact_flow_lands_on_its_target(plan: WindowPlan) -> None:
    """v = x0 - eps is constant along a chunk's path, so any number of Euler steps is exact."""
    clip = given_latents(plan)

    def target(index: int) -> Tensor:
        return clip[index] if index in clip else chunk_noise(99, index, (2, plan.latent_chunk_size, 2, 3))

    def flow(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        return torch.cat([target(k) - noise_of(plan, max(k, 0)) for k in row.window], dim=1).unsqueeze(0)

    for index, latents in enumerate(run(plan, flow)):
        assert (latents - target(index)).abs().max() < 5e-6


# --- what is called and drawn ----------------------------------------------------------------------------


@given(legal_plans(), st.sampled_from([1.0, 0.0, 7.0]))
@many(60)
def test_the_model_is_called_once_per_row_and_branch(plan: WindowPlan, scale: float) -> None:
    calls: list[tuple[int, int]] = []
    rows: list[tuple[PlanRow, int]] = []

    def counted(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        assert x.shape[2] == levels.shape[1] == len(row.window) * plan.latent_chunk_size
        calls.append((row.index, branch))
        return torch.zeros_like(x)

    window = Window(plan, NoiseSchedule(plan.num_inference_steps), CountedNoise(plan), given_latents(plan))
    chunks = sample(window, counted, scale, callback=lambda row, window, _: rows.append((row, window.row)))
    for chunk in chunks:
        # A chunk is handed over at once: after T calls from noise, after S from a clip, then one every S.
        assert len(calls) == num_branches(scale) * (plan.first_chunk_after_calls + chunk.index * plan.steps_per_shift)
    assert calls == [(n, branch) for n in range(plan.num_rows) for branch in range(num_branches(scale))]
    assert rows == [(row, row.index + 1) for row in plan.rows()]


@given(legal_plans())
@many(100)
def test_noise_economy(plan: WindowPlan) -> None:
    """Exactly the chunks that are born draw noise, once each, in birth order; K of them when draining."""
    noise = CountedNoise(plan)
    run(plan, noise=noise)
    assert noise.drawn == list(range(plan.num_born))
    if plan.end == "drain":
        assert len(noise.drawn) == plan.num_chunks


def test_noise_economy_of_config_b() -> None:
    plan = replace(B, num_chunks=60 // 5 - 1)
    noise = CountedNoise(plan)
    run(plan, noise=noise)
    assert noise.drawn == list(range(11))


# --- guidance --------------------------------------------------------------------------------------------


def test_guidance_is_the_null_branch_plus_g_times_the_difference() -> None:
    plan = replace(B, num_chunks=3)

    def blended(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        null = mixing(x, levels, row, UNCONDITIONAL)
        return null + 7.0 * (mixing(x, levels, row, CONDITIONAL) - null)

    assert all(same(run(plan, g=7.0), run(plan, blended)))
    conditional, null = torch.tensor([3.0]), torch.tensor([1.0])
    assert [guide([conditional, null], g).item() for g in (0.0, 1.0, 7.0)] == [1.0, 3.0, 15.0]
    assert guide([conditional], 1.0) is conditional
    assert num_branches(1.0) == num_branches(1) == 1 and num_branches(0.0) == num_branches(1.5) == 2


# --- limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 8])
def test_one_chunk_without_context_is_an_ordinary_sampler(steps: int) -> None:
    """c = F, no context, K = 1: the plain T-step Euler loop, bit for bit, at one level for all frames."""
    plan = WindowPlan(steps, 1, 6, context_chunks=0, num_chunks=1)
    levels = NoiseSchedule(steps, 1.7).levels
    z = chunk_noise(0, 0, (2, 6, 2, 3)).unsqueeze(0)
    for j in range(steps, 0, -1):
        z = z + mixing(z, torch.full((1, 6), levels[j]), plan.row(0), 0) * (levels[j] - levels[j - 1])
    assert torch.equal(run(plan)[0], z[0])


@pytest.mark.parametrize("start", ["noise", "chunk", "clip"])
def test_a_window_of_one_chunk_is_autoregression_on_the_clean_chunk(start: Start) -> None:
    """W = 1, S = T: replacement without noise, one chunk after the other."""
    plan = WindowPlan(5, 1, 3, context_chunks=1, start=start, num_chunks=3)
    levels = NoiseSchedule(5, 1.7).levels
    context = given_latents(plan).get(-1, torch.zeros(2, 0, 2, 3))
    expected = []
    for index in range(3):
        z, clean = noise_of(plan, index), context.shape[1]
        for j in range(5, 0, -1):
            x = torch.cat([context, z], dim=1).unsqueeze(0)
            t = torch.tensor([[0.0] * clean + [levels[j]] * 3])
            z = z + mixing(x, t, plan.row(0), 0)[0, :, clean:] * (levels[j] - levels[j - 1])
        expected.append(z)
        context = z
    assert all(same(run(plan), expected))


@given(legal_plans(), st.integers(1, 6))
@many(60)
def test_the_length_matters_only_to_the_last_chunks(plan: WindowPlan, more: int) -> None:
    """A chunk knows the chunks born before it is clean: all but the last W - 1 are those of a longer video."""
    assert plan.num_chunks is not None
    longer = run(replace(plan, num_chunks=plan.num_chunks + more))
    settled = max(0, plan.num_chunks - plan.window_chunks + 1)
    assert same(run(plan)[:settled], longer[:settled]) == [True] * settled


@given(legal_plans(max_chunks=10))
@many(60)
def test_cut_discards_chunks_that_were_at_work(plan: WindowPlan) -> None:
    """Births go on to the end; the discarded chunks shape the last W - 1 outputs and no others."""
    assert plan.num_chunks is not None
    cut, drain = run(replace(plan, end="cut")), run(replace(plan, end="drain"))
    noise, kept = CountedNoise(plan), plan.num_chunks
    other = run(replace(plan, end="cut"), noise=lambda k: noise(k if k < kept else k + 1000))
    settled = max(0, kept - plan.window_chunks + 1)
    touched = [index >= settled for index in range(kept)]
    assert [not equal for equal in same(cut, other)] == [not equal for equal in same(cut, drain)] == touched


@given(legal_plans(max_window=8, max_chunks=4), st.sampled_from([1.0, 3.0]))
@many(40)
def test_a_video_shorter_than_the_window_is_complete(plan: WindowPlan, scale: float) -> None:
    plan = replace(plan, end="drain", num_chunks=min(plan.num_chunks or 1, plan.window_chunks))
    seen: list[int] = []

    def watched(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        seen.append(len(row.chunks))
        return mixing(x, levels, row, branch)

    chunks = run(plan, watched, g=scale)
    assert len(chunks) == plan.num_chunks and max(seen) <= (plan.num_chunks or 0)
    assert all(torch.isfinite(latents).all() for latents in chunks)


# --- independence ----------------------------------------------------------------------------------------


@given(legal_plans(), st.sampled_from([1.0, 3.0]))
@many(60)
def test_the_context_velocity_is_never_used(plan: WindowPlan, scale: float) -> None:
    def poisoned(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        velocity = mixing(x, levels, row, branch)
        velocity[:, :, : len(row.context) * plan.latent_chunk_size] = torch.nan
        return velocity

    assert all(same(run(plan, poisoned, g=scale), run(plan, g=scale)))


@given(legal_plans(), legal_plans())
@many(30)
def test_streams_in_one_process_do_not_touch_each_other(one: WindowPlan, two: WindowPlan) -> None:
    """Two interleaved videos, with the global generator disturbed in between, equal each of them alone."""

    def start(plan: WindowPlan) -> Iterator[CleanChunk]:
        schedule = NoiseSchedule(plan.num_inference_steps, 1.7)
        return sample(Window(plan, schedule, CountedNoise(plan), given_latents(plan)), mixing)

    first, second = start(one), start(two)
    together: tuple[list[Tensor], list[Tensor]] = ([], [])
    for turn in range(max(one.num_chunks or 0, two.num_chunks or 0)):
        for stream, out in zip((first, second), together, strict=True):
            out += [chunk.latents for chunk in islice(stream, 1)]
            torch.randn(turn + 1)
    assert all(same(together[0], run(one)) + same(together[1], run(two)))


def test_another_seed_is_another_video() -> None:
    plan = replace(B, num_chunks=2)
    assert not any(same(run(plan), run(plan, noise=CountedNoise(plan, seed=1))))


# --- interruption ----------------------------------------------------------------------------------------


@given(legal_plans(max_window=5, max_shift=4, max_chunks=6), st.data())
@many(60)
def test_a_run_resumed_at_any_row_is_the_uninterrupted_run(plan: WindowPlan, data: st.DataObject) -> None:
    schedule = NoiseSchedule(plan.num_inference_steps, 1.7)
    stop = data.draw(st.integers(1, plan.num_rows), label="stopped after this many rows")
    snapshots: list[WindowSnapshot] = []

    def save(row: PlanRow, window: Window, _: object) -> None:
        if window.row == stop:
            snapshots.append(window.snapshot())

    window = Window(plan, schedule, CountedNoise(plan), given_latents(plan))
    chunks = {chunk.index: chunk.latents for chunk in sample(window, mixing, 3.0, save)}
    restored = Window.restore(snapshots[0], plan, schedule, CountedNoise(plan))
    rest = {chunk.index: chunk.latents for chunk in sample(restored, mixing, 3.0)}
    assert sorted(rest) == [chunk for row in plan.rows(stop) for chunk in row.emits]
    assert all(torch.equal(rest[index], chunks[index]) for index in rest)


@pytest.mark.parametrize("changes", [{}, {"start": "clip", "end": "cut", "context_chunks": 2}, {"num_chunks": 2}])
def test_the_backbone_resumes_bit_for_bit_at_every_row(changes: dict) -> None:
    """With the real model, two prompts and guidance: all that is remembered beside the latents is recomputed."""
    model, stream = tiny_model(), tiny_stream(**changes)
    snapshots: list[WindowSnapshot] = []
    denoise = ModelDenoiser(model, stream)

    def save(row: PlanRow, window: Window, _: object) -> None:
        snapshots.append(window.snapshot())

    run = sample(stream.window(), denoise, stream.guidance_scale, save)
    expected = {chunk.index: chunk.latents for chunk in run}
    for snapshot in snapshots:
        rest = reference_chunks(model, replace(stream, resume=ResumePoint(snapshot)))
        assert [chunk.index for chunk in rest] == sorted(expected)[len(expected) - len(rest) :]
        assert all(torch.equal(chunk.latents, expected[chunk.index]) for chunk in rest)
    assert len(snapshots) == stream.plan.num_rows


def test_the_backbone_never_sees_its_own_output_on_the_context() -> None:
    model, stream = tiny_model(), tiny_stream(start="chunk")
    denoise = ModelDenoiser(model, stream)

    def poisoned(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        velocity = denoise(x, levels, row, branch).clone()
        velocity[:, :, : len(row.context) * stream.plan.latent_chunk_size] = torch.nan
        return velocity

    chunks = [chunk.latents for chunk in sample(stream.window(), poisoned, stream.guidance_scale)]
    assert all(same(chunks, [chunk.latents for chunk in reference_chunks(model, stream)]))
