"""The objective: METHOD's training oracles (levels, mask, shift, lengths), on rows of the plan that samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.window import row_levels
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.train.batch import draw_kind
from pavdm_dist.train.loss import noised, velocity_loss
from pavdm_dist.train.objective import (
    Objective,
    TrainedMethod,
    TrainingWindow,
    WindowKind,
    draw_levels,
    draw_window,
    window_levels,
)
from pavdm_dist.values.merging import load_config

OFFICIAL = Objective()  # T = 30, W = 6, c = 5, one context chunk
CLIP_CHUNKS = 8


def draws(objective: Objective = OFFICIAL, count: int = 600) -> list[TrainingWindow]:
    rng = np.random.default_rng(0)
    return [draw_window(rng, objective, CLIP_CHUNKS) for _ in range(count)]


def full_window(stage: int = 2) -> TrainingWindow:
    plan = WindowPlan(30, 6, 5, 1, "chunk", num_chunks=20)
    return TrainingWindow(plan.row(30 + stage), 1, causal=False)


@pytest.mark.parametrize("time_shift", [1.0, 2.5])
def test_without_shift_the_levels_are_those_the_sampler_shows_the_model(time_shift: float) -> None:
    objective = Objective(time_shift=time_shift)
    for window in draws(objective, 100):
        levels = window_levels(window, objective, torch.zeros(2))
        expected = row_levels(window.row, objective.schedule.levels, 5)
        assert torch.equal(levels, expected.expand(2, -1))


def test_windows_have_every_length_and_lie_inside_the_clip() -> None:
    lengths, texts, without_context = set(), 0, 0
    for window in draws():
        assert 0 <= window.offset <= CLIP_CHUNKS - window.num_chunks
        lengths.add(window.num_chunks)
        if not window.row.context:
            without_context += 1
            assert window.offset == 0, "a window from text alone is the start of a video"
        texts += window.row.window[0] == 0 and not window.row.context
    assert lengths == {1, 2, 3, 4, 5, 6, 7}
    assert texts == without_context
    assert 0.30 < texts / 600 < 0.42
    full = [window for window in draws() if window.num_chunks == 7 and window.row.context == (0,)]
    assert {window.offset for window in full} == {1}, "no video begins where a window is in the middle of one"
    assert {window.offset for window in draws() if window.row.context == (-1,)} >= {0, 1}, "a clip may begin one"


def test_kinds_of_windows_come_in_the_asked_shares() -> None:
    full = drain = causal = 0
    for window in draws():
        levels = window.row.steps_left
        full += len(levels) == 6 and bool(window.row.context)
        drain += levels[-1] <= 25 and len(levels) < 6
        causal += window.causal
    assert full / 600 == pytest.approx(0.45, abs=0.06)
    assert drain / 600 == pytest.approx(0.1, abs=0.04)
    assert causal / 600 == pytest.approx(0.5, abs=0.06)


def test_a_full_window_has_one_level_per_chunk_and_zero() -> None:
    levels = window_levels(full_window(), OFFICIAL, torch.tensor([0.3, -0.7]))
    for row, shift in zip(levels, (0.3, -0.7), strict=True):
        assert row[:5].eq(0).all()
        assert len(row.unique()) == 7
        steps = (row[5::5] * 30 - shift).tolist()
        assert steps == pytest.approx([3, 8, 13, 18, 23, 28], abs=1e-4), "one shift moves all chunks of a sample"


def test_the_shift_has_the_published_deviation() -> None:
    shifts = OFFICIAL.shift_scale * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    moved = 1000 * (window_levels(full_window(), OFFICIAL, shifts)[:, -1] - 28 / 30)
    assert moved.std().item() == pytest.approx(1000 / 30 * 0.4, rel=0.05)


def test_levels_stay_between_clean_and_pure_noise() -> None:
    levels = window_levels(full_window(0), OFFICIAL, torch.tensor([50.0, -50.0]))
    assert levels[0, 5:].eq(1).all() and levels[1].eq(0).all()


def test_a_zero_model_loses_two_per_element() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(8, 4, 35, 8, 8, generator=generator)
    window = full_window()
    levels = window_levels(window, OFFICIAL, torch.zeros(8))
    _, target = noised(clean, levels, 5, OFFICIAL.context_noise, generator)
    loss, sums, counts = velocity_loss(torch.zeros_like(target), target, levels, 5)
    assert loss.item() == pytest.approx(2.0, rel=0.01)
    assert (sums / counts).tolist() == pytest.approx([2.0] * 5, rel=0.03)


def test_loss_and_gradient_ignore_the_clean_context() -> None:
    generator = torch.Generator().manual_seed(1)
    velocity = torch.randn(2, 4, 35, 2, 2, generator=generator, requires_grad=True)
    target = torch.randn(2, 4, 35, 2, 2, generator=generator)
    levels = window_levels(full_window(), OFFICIAL, torch.zeros(2))
    loss, *_ = velocity_loss(velocity, target, levels, 5)
    loss.backward()
    assert velocity.grad is not None
    assert velocity.grad[:, :, :5].eq(0).all() and velocity.grad[:, :, 5:].ne(0).all()
    spoilt = target.clone()
    spoilt[:, :, :5] = 1e6
    assert torch.equal(velocity_loss(velocity, spoilt, levels, 5)[0], loss)


def test_noising_is_the_straight_path_and_context_noise_stays_small_under_label_zero() -> None:
    clean = torch.randn(2, 4, 35, 2, 2, generator=torch.Generator().manual_seed(2))
    window, shifts = full_window(), torch.tensor([0.1, -0.2])
    levels = window_levels(window, OFFICIAL, shifts)
    x, velocity = noised(clean, levels, 5, OFFICIAL.context_noise, torch.Generator().manual_seed(3))
    t = levels[:, None, :, None, None]
    torch.testing.assert_close((x + t * velocity)[:, :, 5:], clean[:, :, 5:])
    strayed = (x - clean)[:, :, :5]
    assert 0 < strayed.abs().max() <= 0.1 * (clean - velocity)[:, :, :5].abs().max()
    quiet = Objective(context_noise=0.0)
    x, _ = noised(clean, levels, 5, quiet.context_noise, torch.Generator().manual_seed(3))
    assert torch.equal(x[:, :, :5], clean[:, :, :5])


def test_bands_add_up_and_say_where_no_frame_fell() -> None:
    _, sums, counts = velocity_loss(torch.zeros(1, 1, 5, 1, 1), torch.ones(1, 1, 5, 1, 1), torch.ones(1, 5), 0)
    assert counts.tolist() == sums.tolist() == [0, 0, 0, 0, 5]


def levels_of(pattern: str, size: int = 4000, **changes: object) -> torch.Tensor:
    objective = replace(OFFICIAL, pattern=pattern, **changes)  # type: ignore[arg-type]
    return draw_levels(full_window(), objective, size, torch.Generator().manual_seed(0))


def test_linear_levels_are_evenly_spaced_up_to_noise_whatever_the_chunks() -> None:
    levels = levels_of("linear", 2)
    assert torch.equal(levels[0], levels[1]) and levels[0, :5].eq(0).all()
    torch.testing.assert_close(levels[0, 5:], torch.arange(1, 31) / 30)
    # What c = 1, S = 1 samples with: the staircase whose chunks are single frames.
    plan = WindowPlan(30, 30, 1, 1, "chunk", num_chunks=60)
    assert torch.equal(levels[0, 4:], row_levels(plan.row(30), NoiseSchedule(30).levels, 1))


def test_variance_moves_frames_and_shift_moves_samples() -> None:
    grid = torch.arange(1, 31) / 30
    moved = (levels_of("linear-variance") - levels_of("linear"))[:, 10:30]
    assert moved.std().item() == pytest.approx(0.1 / 30, rel=0.02)
    assert torch.corrcoef(moved.T)[0, 1].abs() < 0.06, "every frame for itself"
    both = levels_of("linear-variance-shift")[:, 10:30] - grid[5:25]
    assert both.std().item() == pytest.approx((0.1**2 + 0.4**2) ** 0.5 / 30, rel=0.02)
    assert torch.corrcoef(both.T)[0, 1] > 0.9, "the shift is shared"
    clamped = levels_of("linear-variance-shift", variance_scale=30.0)
    assert clamped.min() == 0 and clamped.max() == 1


def test_random_levels_are_uniform_and_independent_per_chunk() -> None:
    levels = levels_of("random")[:, 5:].unflatten(1, (6, 5))
    assert levels.eq(levels[..., :1]).all()
    chunks = levels[..., 0]
    assert chunks.mean().item() == pytest.approx(0.5, abs=0.01) and chunks.std().item() == pytest.approx(
        12**-0.5, rel=0.02
    )
    assert torch.corrcoef(chunks.T).sub(torch.eye(6)).abs().max() < 0.06


@pytest.mark.parametrize("pattern", ["linear", "linear-shift"])
def test_the_time_shift_of_a_bucket_bends_every_pattern(pattern: str) -> None:
    objective = replace(OFFICIAL, pattern=pattern, time_shift=None, shift_scale=0.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"objective\.time_shift=null"):
        _ = objective.schedule
    window = full_window()
    bent = draw_levels(window, objective.at_size(240, 426), 3, torch.Generator())
    plain = draw_levels(window, replace(objective, time_shift=1.0), 3, torch.Generator())
    r = 3.6947  # METHOD: 240x426, 119 frames, 35 latents
    torch.testing.assert_close(bent, r * plain / (1 + (r - 1) * plain), atol=1e-4, rtol=1e-4)


def test_a_mixture_draws_its_kinds_by_share_and_refuses_what_cannot_be() -> None:
    objective = load_config(
        Objective, None, ["mixture=[{share: 3, num_inference_steps: 12, window_chunks: 4}, {pattern: random}]"]
    )
    kinds = objective.kinds()
    assert [(share, kind.num_inference_steps, kind.pattern) for share, kind in kinds] == [
        (0.75, 12, "linear-shift"),
        (0.25, 30, "random"),
    ]
    rng = np.random.default_rng(0)
    drawn = [draw_kind(kinds, rng).num_inference_steps for _ in range(1000)]
    assert drawn.count(12) == pytest.approx(750, abs=50)
    for text, message in (
        ("{window_chunks: 7}", "window_chunks=7 does not divide num_inference_steps=30"),
        ("{share: 0}", r"objective\.mixture\[0\]\.share=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(Objective, None, [f"mixture=[{text}]"]).kinds()


@pytest.mark.parametrize("clip_chunks", [1, 2, 4])
def test_short_clips_train_the_ends_of_the_staircase(clip_chunks: int) -> None:
    rng = np.random.default_rng(0)
    windows = [draw_window(rng, OFFICIAL, clip_chunks) for _ in range(300)]
    assert max(window.num_chunks + window.offset for window in windows) == clip_chunks
    sampled = {
        (row.steps_left, len(row.context))
        for start in ("noise", "chunk")
        for row in WindowPlan(30, 6, 5, 1, start, num_chunks=24).rows()  # type: ignore[arg-type]
    } | {(row.steps_left, len(row.context)) for row in WindowPlan(30, 6, 5, 1, "noise", num_chunks=1).rows()}
    assert {(window.row.steps_left, len(window.row.context)) for window in windows} <= sampled
    with pytest.raises(ConfigError, match=r"full_share=1\.0 asks for windows of 7 chunks only, .* 35 latents or more"):
        draw_window(rng, replace(OFFICIAL, full_share=1.0, growing_share=0.0), clip_chunks)


def test_samples_of_a_batch_have_rows_of_their_own_of_one_shift() -> None:
    for window in draws(OFFICIAL, 60):
        assert all(row.window == window.row.window and row.context == window.row.context for row in window.rows)
        assert [row.index % 5 for row in window.rows] == [0, 1, 2, 3, 4] and window.row in window.rows
        quiet = replace(OFFICIAL, shift_scale=0.0)
        levels = draw_levels(window, quiet, 64, torch.Generator().manual_seed(0))
        sampled = {row_levels(row, quiet.schedule.levels, 5).numpy().tobytes() for row in window.rows}
        found = {row.numpy().tobytes() for row in levels}
        assert found == sampled, "every row is met, and no other"


def test_a_batch_averages_over_levels() -> None:
    """Were all samples in one row, the mean level would move from batch to batch by more than five times as much."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(50)]
    means = torch.stack([draw_levels(full_window_of_rows(), OFFICIAL, 64, seeded).mean() for seeded in generators])
    one_row = torch.stack([window_levels(full_window(n % 5), OFFICIAL, torch.zeros(64)).mean() for n in range(50)])
    assert means.std() < 0.2 * one_row.std()


def full_window_of_rows() -> TrainingWindow:
    plan = WindowPlan(30, 6, 5, 1, "chunk", num_chunks=20)
    return TrainingWindow(plan.row(32), 1, False, "full", tuple(plan.row(30 + step) for step in range(5)))


@pytest.mark.parametrize("method", ["replacement", "replacement-noise", "autoregressive"])
def test_windows_of_the_baselines_are_rows_of_the_plans_they_are_sampled_by(method: TrainedMethod) -> None:
    chunks = 1 if method == "autoregressive" else 6
    ends = {"full_share": 0.5, "growing_share": 0.5 if chunks == 1 else 0.3}
    objective = Objective(method=method, window_chunks=chunks, shift_scale=0.0, **ends)  # type: ignore[arg-type]
    params = {"method": method, "num_inference_steps": 30, "window_chunks": chunks, "latent_chunk_size": 5}
    sampled = {
        (row.steps_left, len(row.context))
        for last in range(chunks)
        for start in ("noise", "chunk")
        for row in SamplingParams.resolve(Checkpoint.open("embedded"), **params, context_chunks=1, start=start)
        .plan(3 * chunks + last)
        .rows()
    }
    seen, grids, generator = set(), set(), torch.Generator().manual_seed(0)
    for window in draws(objective):
        levels = draw_levels(window, objective, 4, generator)
        noisy = levels[:, len(window.row.context) * 5 :]
        assert (noisy == noisy[:, :1]).all(), "one level a sample"
        context = levels[:, : len(window.row.context) * 5]
        told = noisy[:, :1] if method == "replacement-noise" else torch.zeros(4, 1)
        assert torch.equal(context, told.expand_as(context))
        seen |= {(row.steps_left, len(row.context)) for row in window.rows}
        grids |= set(noisy[:, 0].tolist())
        assert 0 <= window.offset <= CLIP_CHUNKS - window.num_chunks
        assert window.row.context or window.offset == 0
    assert seen == sampled, "all of them, and no others"
    assert grids == set(objective.schedule.levels[1:])
    for clip_chunks in range(1, chunks + 1):  # short clips are short videos
        drawn = [draw_window(np.random.default_rng(n), objective, clip_chunks) for n in range(20)]
        assert all(window.num_chunks + window.offset <= clip_chunks for window in drawn)


def test_noised_context_has_the_level_that_is_told() -> None:
    objective = Objective(method="replacement-noise")
    assert objective.noise_of_context == 0 and Objective().noise_of_context == 0.1
    window = next(window for window in draws(objective) if window.row.context)
    levels = draw_levels(window, objective, 64, torch.Generator().manual_seed(0))
    context = len(window.row.context) * 5
    clean = torch.randn(64, 4, levels.shape[1], 2, 2, generator=torch.Generator().manual_seed(1))
    x, target = noised(clean, levels, context, objective.noise_of_context, torch.Generator().manual_seed(2))
    t = levels[:, None, :, None, None]
    assert (x - (1 - t) * clean - t * (clean - target)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "autoregressive"}, "window_chunks=6: method=autoregressive makes one chunk after another"),
        ({"method": "autoregressive", "window_chunks": 1}, r"together they must be 1"),
        ({"window_chunks": 1}, r"growing_share=0\.45: .*=pavdm with window_chunks=1 do not drain; .* 2 or more"),
        (
            {"full_share": 0.5, "growing_share": 0.4, "mixture": [WindowKind(), WindowKind(window_chunks=1)]},
            r"objective\.full_share=0\.5 and growing_share=0\.4: .* must be 1, or window_chunks 2 or more",
        ),
        ({"time_shift": -1.0}, r"^objective\.time_shift=-1\.0: must be a finite number above 0"),
        ({"window_chunks": 7}, r"^objective\.window_chunks=7 does not divide"),
        ({"method": "replacement", "pattern": "random"}, "use objective.pattern=linear-shift"),
        ({"method": "replacement", "context_chunks": 0}, "goes on from clean chunks; use 1 or more"),
    ],
)
def test_windows_that_a_method_does_not_have_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Objective(**settings).kinds()


@pytest.mark.parametrize("method", ["pavdm", "replacement", "autoregressive"])
@pytest.mark.parametrize("context", [0, 1, 2])
def test_clips_that_pass_the_check_hold_every_window_that_is_drawn(method: TrainedMethod, context: int) -> None:
    for shares in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)):
        for window_chunks in (1,) if method == "autoregressive" else (1, 3):
            objective = Objective(
                6, window_chunks, 2, context, method=method, full_share=shares[0], growing_share=shares[1]
            )
            if method != "pavdm" and not context:
                continue
            objective.check()
            for clip_chunks in range(7):
                rng, drawn = np.random.default_rng(0), []
                try:
                    objective.check_clips("the test", 2 * clip_chunks)
                except ConfigError:
                    assert clip_chunks < (window_chunks + context if shares[0] == 1 else 1)
                    continue
                drawn = [draw_window(rng, objective, clip_chunks) for _ in range(40)]
                assert all(window.num_chunks + window.offset <= clip_chunks for window in drawn)
