"""The PA-VDM objective and the training loop, with real DeepSpeed on one CPU process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pavdm_dist.config import TrainConfig, load_config
from pavdm_dist.errors import ConfigError
from pavdm_dist.schedule import NoiseSchedule, WindowPlan
from pavdm_dist.train.loss import Objective, TrainingWindow, draw_window, noised, velocity_loss, window_levels

# --- the objective ------------------------------------------------------------------------------------------

PAPER = Objective(num_inference_steps=30, window_chunks=6, latent_chunk_size=5, context_chunks=1)


@given(st.integers(0, 10_000), st.sampled_from([0, 1]))
@settings(max_examples=200, deadline=None)
def test_windows_are_rows_of_real_plans(seed: int, context: int) -> None:
    objective = Objective(num_inference_steps=30, window_chunks=6, latent_chunk_size=5, context_chunks=context)
    window = draw_window(np.random.default_rng(seed), objective, clip_chunks=8)
    row = window.row
    assert 1 <= len(row.chunks) <= 6
    assert 0 <= window.offset <= 8 - len(row.window)
    left = np.array(row.steps_left)
    assert ((left >= 1) & (left <= 30)).all()
    assert (np.diff(left) == 5).all()
    if not row.context and context:
        # Only a video made from text alone has windows without context, and they lie at its start.
        assert row.window[0] == window.offset == 0
    if len(row.chunks) < 6 and row.chunks[0] > 0:
        assert left[-1] <= 25, "a draining window has no newborn"


def test_all_kinds_of_windows_occur_in_their_shares() -> None:
    rng = np.random.default_rng(0)
    windows = [draw_window(rng, PAPER, 8) for _ in range(3000)]
    full = np.mean([len(w.row.chunks) == 6 and len(w.row.context) == 1 for w in windows])
    without_context = [w for w in windows if not w.row.context]
    assert 0.55 < full < 0.75
    assert 0.1 < len(without_context) / 3000 < 0.2
    assert all(w.offset == 0 and w.row.chunks[0] == 0 for w in without_context)
    assert {w.offset for w in windows if w.row.context and len(w.row.chunks) == 6} == {0, 1}
    assert 0.45 < np.mean([w.causal for w in windows]) < 0.55
    lengths = {len(w.row.chunks) for w in windows}
    assert lengths == {1, 2, 3, 4, 5, 6}


def test_levels_equal_the_sampling_plan_when_nothing_shifts() -> None:
    plan = WindowPlan(30, 6, 5, 1, start="chunk", num_chunks=24)
    for shift in (1.0, 3.69466):
        objective = Objective(time_shift=shift)
        schedule = NoiseSchedule(30, shift)
        for n in (0, 4, 24, 25, 29, 60):
            window = TrainingWindow(plan.row(n), 0, causal=False)
            levels = window_levels(window, objective, torch.zeros(2))
            expected = [0.0] * 5 + [schedule.levels[j] for j in plan.row(n).steps_left for _ in range(5)]
            assert levels.tolist() == [expected] * 2


def test_linear_shift_is_one_shift_per_sample() -> None:
    window = TrainingWindow(WindowPlan(30, 6, 5, 1, start="chunk", num_chunks=24).row(32), 0, causal=False)
    shifts = 0.4 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    levels = window_levels(window, PAPER, shifts)
    assert levels.shape == (4000, 35)
    assert {len(set(row)) for row in levels[:50].tolist()} == {7}  # six chunks and the clean context
    assert (levels[:, :5] == 0).all()
    moved = levels[:, 5] - window_levels(window, PAPER, torch.zeros(1))[0, 5]
    assert moved.std().item() * 1000 == pytest.approx(1000 / 30 * 0.4, rel=0.05)
    for chunk in range(2, 7):
        assert torch.allclose(levels[:, 5 * chunk] - levels[:, 5], torch.tensor((chunk - 1) / 6), atol=1e-6)


def test_extreme_shifts_stay_levels() -> None:
    window = TrainingWindow(WindowPlan(30, 6, 5, 1, start="chunk", num_chunks=24).row(30), 0, causal=False)
    levels = window_levels(window, PAPER, torch.tensor([-40.0, 40.0]))
    assert levels[0].max() == 0
    assert levels[1, 5:].min() == 1


def test_noising_is_the_forward_process_and_zero_model_loss_is_two() -> None:
    window = TrainingWindow(WindowPlan(30, 6, 5, 1, start="chunk", num_chunks=24).row(30), 0, causal=False)
    clean = torch.randn(16, 4, 35, 8, 8, generator=torch.Generator().manual_seed(1))
    levels = window_levels(window, PAPER, torch.zeros(16))
    quiet = Objective(context_noise=0.0)
    x, target = noised(clean, levels, window, quiet, torch.Generator().manual_seed(2))
    t = levels[:, None, :, None, None]
    noise = clean - target
    assert torch.allclose(x, (1 - t) * clean + t * noise, atol=1e-6)
    assert torch.equal(x[:, :, :5], clean[:, :, :5])
    loss, per_level = velocity_loss(torch.zeros_like(target), target, levels, 5)
    assert loss.item() == pytest.approx(2.0, rel=0.02)
    assert torch.allclose(per_level, torch.tensor(2.0), rtol=0.1)
    # A perfect model's velocity carries any level to the clean latents.
    assert torch.allclose(x + t * target, clean, atol=1e-5)
    noisy, _ = noised(clean, levels, window, Objective(context_noise=0.5), torch.Generator().manual_seed(2))
    assert torch.equal(noisy[:, :, 5:], x[:, :, 5:])
    assert not torch.equal(noisy[:, :, :5], x[:, :, :5])


def test_loss_ignores_the_context() -> None:
    target = torch.randn(2, 4, 35, 4, 4)
    levels = torch.rand(2, 35)
    velocity = torch.randn(2, 4, 35, 4, 4, requires_grad=True)
    loss, _ = velocity_loss(velocity, target, levels, 5)
    loss.backward()
    assert (velocity.grad[:, :, :5] == 0).all()
    assert (velocity.grad[:, :, 5:] != 0).all()
    spoilt = target.clone()
    spoilt[:, :, :5] = torch.nan
    assert velocity_loss(velocity, spoilt, levels, 5)[0] == loss


# --- the loop -----------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A tiny run whose codec and cached clips are already there."""
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    config = load_config(
        TrainConfig,
        None,
        [
            f"run_dir={tmp_path / 'run'}", f"codec.folder={checkpoint / 'vae'}", "threads=1", "seed=3",
            "data.clips=8", "data.num_latents=8", "data.batch_size=2",
            "model.depth=1", "model.hidden_size=32", "model.num_heads=2", "model.caption_channels=16",
            "model.text_depth=1", "objective.num_inference_steps=6", "objective.window_chunks=3",
            "objective.latent_chunk_size=2", "optimizer.total_steps=10", "optimizer.warmup_steps=2",
            "log_every_steps=1", "max_seconds=60",
        ],
    )  # fmt: skip
    clips = tmp_path / "run" / "clips"
    clips.mkdir(parents=True)
    latents = torch.randn(8, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    prompts = ["a red three drifting up", "a blue seven bouncing fast"] * 4
    save_file({"latents": latents}, clips / "clips-00000.safetensors", metadata={"prompts": json.dumps(prompts)})
    return config


def _trainer(config: TrainConfig):
    from pavdm_dist.train.data import LatentClips
    from pavdm_dist.train.loop import Trainer

    return Trainer(config, Path(config.codec.folder), LatentClips(Path(config.run_dir) / "clips"))


@pytest.mark.timeout(120)
def test_resume_is_bit_equal_and_nothing_is_compiled(config: TrainConfig, tmp_path: Path, monkeypatch) -> None:
    extensions = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    whole = _trainer(config)
    losses = [whole.train_step()["loss"] for _ in range(10)]
    assert losses[0] == pytest.approx(2.0, rel=0.2)
    config.run_dir = str(tmp_path / "again")
    os.makedirs(config.run_dir)
    (tmp_path / "again" / "clips").symlink_to(tmp_path / "run" / "clips")
    first = _trainer(config)
    halves = [first.train_step()["loss"] for _ in range(5)]
    first.save()
    second = _trainer(config)
    assert second.step == 5
    halves += [second.train_step()["loss"] for _ in range(5)]
    assert halves == losses
    for name, value in whole.average.values.items():
        assert torch.equal(value, second.average.values[name]), name
    assert not extensions.exists() or not list(extensions.iterdir())


@pytest.mark.timeout(120)
def test_a_torn_save_leaves_the_last_whole_checkpoint(config: TrainConfig, monkeypatch) -> None:
    trainer = _trainer(config)
    trainer.train_step()
    trainer.save()
    root = Path(config.run_dir) / "checkpoints"
    trainer.train_step()

    def torn(*args: object, **kwargs: object) -> None:
        (root / f"{kwargs['tag']}").mkdir()
        (root / f"{kwargs['tag']}" / "mp_rank_00_model_states.pt").write_bytes(b"torn")
        raise OSError("disk full")

    monkeypatch.setattr(trainer.engine, "save_checkpoint", torn)
    with pytest.raises(OSError, match="disk full"):
        trainer.save()
    assert (root / "latest").read_text() == "step0000001"
    again = _trainer(config)
    assert again.step == 1
    again.train_step()
    again.save()
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step0000001", "step0000002"]


@pytest.mark.timeout(120)
def test_what_a_run_refuses(config: TrainConfig) -> None:
    config.resume = "must"
    with pytest.raises(ConfigError, match=r"resume=must.*holds no checkpoint"):
        _trainer(config)
    config.resume = "auto"
    trainer = _trainer(config)
    trainer.save()
    config.resume = "never"
    with pytest.raises(ConfigError, match=r"resume=never"):
        _trainer(config)
    config.resume = "auto"
    config.objective.shift_scale = 0.1
    with pytest.raises(ConfigError, match=r"objective.shift_scale=0.4, this run has 0.1"):
        _trainer(config)


@pytest.mark.timeout(120)
def test_the_command_trains_exports_and_the_export_samples(config: TrainConfig, tmp_path: Path) -> None:
    from pavdm_dist.io.metadata import weights_identity
    from pavdm_dist.pipeline import PAVDMPipeline
    from pavdm_dist.train.loop import train_command
    from pavdm_dist.train.world import WORLD_SETTINGS

    identity = {"world": WORLD_SETTINGS, "num_latents": 8, "codec": weights_identity(config.codec.folder)}
    (Path(config.run_dir) / "clips" / "identity.json").write_text(json.dumps(identity))
    config.data.clips = 8
    train_command(config)
    log = [json.loads(line) for line in (Path(config.run_dir) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 11))
    assert log[0]["lr"] == pytest.approx(5e-4)
    assert log[-1]["lr"] < 1e-4
    pipeline = PAVDMPipeline.from_pretrained(Path(config.run_dir) / "model")
    assert pipeline.params().window_chunks == 3
    frames = pipeline("a red three drifting up", num_frames=13, height=64, width=64, output_type="np").frames[0]
    assert frames.shape == (13, 64, 64, 3)


def test_prompt_dropout_is_the_null_text_the_sampler_uses(config: TrainConfig) -> None:
    from pavdm_dist.train.loop import INFO, _build

    torch.manual_seed(0)
    model = _build(config, 4).eval()
    torch.nn.init.normal_(model.transformer.final_layer.linear.weight, std=0.1)
    for block in (*model.transformer.spatial_blocks, *model.transformer.temporal_blocks):
        torch.nn.init.normal_(block.cross_attn.proj.weight, std=0.1)
    x, levels = torch.randn(2, 4, 4, 8, 8), torch.rand(2, 4)
    prompts = ["a red three drifting up", "a blue seven bouncing fast"]
    with torch.no_grad():
        both = model(x, levels, prompts, [False, True], None)
        null = model.transformer(x[1:], levels[1:], model.transformer.null_text()[None], INFO)
        told = model.transformer(x[:1], levels[:1], model.text_encoder.encode(prompts[0])[None], INFO)
    assert torch.allclose(both[1:], null, atol=1e-5)
    assert torch.allclose(both[:1], told, atol=1e-5)
    assert not torch.allclose(both[:1], model(x[:1], levels[:1], [prompts[1]], [False], None), atol=1e-3)


@pytest.mark.timeout(120)
def test_clip_cache_goes_on_and_refuses_another_codec(tmp_path: Path) -> None:
    from pavdm_dist.train import data

    codec = tiny_checkpoint(tmp_path / "tiny") / "vae"
    assert not data.cache_clips(codec, tmp_path / "clips", 64, 3, max_seconds=-1)
    assert data.cache_clips(codec, tmp_path / "clips", 32, 3, max_seconds=60)
    clips = data.LatentClips(tmp_path / "clips")
    assert clips.latents.shape == (32, 4, 3, 8, 8)
    assert len(clips.prompts) == 32
    from pavdm_dist.codecs.wan import WanCodec
    from pavdm_dist.train.world import render, sample_scene, scene_prompt

    scene = sample_scene(np.random.default_rng((3, 5)))
    assert clips.prompts[5] == scene_prompt(scene)
    streamed = WanCodec.from_pretrained(codec).encode(torch.from_numpy(render(scene, 0, 9)))
    assert torch.allclose(clips.latents[5].float(), streamed, atol=5e-3)
    with pytest.raises(ConfigError, match=r"another num_latents"):
        data.cache_clips(codec, tmp_path / "clips", 32, 4, max_seconds=60)
