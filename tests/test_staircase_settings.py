"""Students of few levels from a model folder to an mp4: its own levels and context, what is refused, going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from interrupting import interrupted, render

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.plan import plan_report
from pavdm_dist.config import ClusterConfig, PlanConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.latents import read_latents
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.sampler import sample
from pavdm_dist.planning.memory import StageMemory
from pavdm_dist.request import VideoRequest
from pavdm_dist.sampling import SamplingParams
from pavdm_dist.streams import build_stream

LEVELS = [1, 0.9375, 0.8333333134651184, 0.625]
SAMPLING = {
    "num_inference_steps": 4, "window_chunks": 4, "latent_chunk_size": 2, "context_chunks": 5, "anchor_chunks": 1,
    "context": "cached", "step": "renoise", "levels": LEVELS, "guidance_scale": 1.0, "height": 32, "width": 48,
    "fps": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("student"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "sampling": SAMPLING}))
    return folder


def params_of(model: Path, **chosen: Any) -> SamplingParams:
    return SamplingParams.resolve(Checkpoint.open(model), **chosen)


def test_a_model_says_how_it_is_sampled(model: Path) -> None:
    params = params_of(model)
    assert params.schedule.levels == (0.0, *reversed(LEVELS)) and params.span == 6
    plan = params.plan(7)
    assert (plan.context, plan.anchor_chunks, plan.context_chunks) == ("cached", 1, 5)
    assert build_stream(VideoRequest("a red three", 0, 9), 0, params, Checkpoint.open(model)).step == "renoise"


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"guidance_scale": 3.0}, r"guidance_scale=3: step=renoise is for models that were distilled"),
        (
            {"num_inference_steps": 8},
            r"num_inference_steps=8: the model knows 4 levels alone; use",
        ),
        ({"time_shift": 5.0}, r"time_shift=5: the model has levels of its own; leave it out"),
        ({"latent_chunk_size": 4}, r"latent_chunk_size=4: the model was distilled with chunks of 2; use"),
        ({"mode": "causal", "allow_untrained_causal": True}, r"mode=causal: with context=cached .* use mode=window"),
        ({"mode": "displaced"}, r"mode=displaced: with context=cached .* use mode=window"),
        ({"mode": "displaced", "context": "joint", "anchor_chunks": 0}, r"mode=displaced: step=renoise gives"),
        ({"context": "joint"}, r"anchor_chunks=1: context=joint keeps none; set context=cached"),
        ({"context_chunks": 2}, r"context_chunks=2: with context=cached .* use 4 or more"),
        ({"start": "chunk"}, r"context=cached: start=chunk gives chunks that left no keys; set start=noise"),
        ({"step": "heun"}, r"step='heun': must be euler or renoise"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(model: Path, chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        params_of(model, **chosen)
    assert "\n" not in str(refusal.value)


def test_a_picture_to_begin_with_is_refused(model: Path) -> None:
    picture = torch.zeros(32, 48, 3, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="image: with context=cached videos begin from text alone"):
        build_stream(VideoRequest("a", 0, 9, image=picture), 0, params_of(model), Checkpoint.open(model))


@pytest.mark.parametrize("levels", [[1.0, 0.5], [0.5, 0.6, 0.4, 0.1]])
def test_levels_of_another_kind_are_refused(model: Path, levels: list[float]) -> None:
    with pytest.raises(ConfigError, match="levels"):
        params_of(model, levels=levels)


def test_fresh_noise_in_mode_causal(model: Path) -> None:
    """The step rule knows nothing of attention."""
    checkpoint = Checkpoint.open(model)
    few = {"context": "joint", "anchor_chunks": 0, "context_chunks": 1, "allow_untrained_causal": True}
    streams = [
        build_stream(VideoRequest("a red three", 0, 29), 0, params_of(model, mode=mode, **few), checkpoint)
        for mode in ("window", "causal")
    ]
    found = [list(sample(stream.window(), StreamDenoiser(checkpoint.backbone, stream))) for stream in streams]
    for window, causal in zip(*found, strict=True):
        assert causal.latents.isfinite().all() and not torch.equal(window.latents, causal.latents)


def test_an_interrupted_video_goes_on_to_the_bit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its file alone, past the chunk where anchors and recent chunks part."""
    settings = {"num_frames": 77, "save_latents": True, "chunks_per_segment": 2}
    render(model, tmp_path / "whole.mp4", **settings)
    interrupted(model, tmp_path / "other.mp4", monkeypatch, 8, **settings)
    state = tmp_path / "other.mp4.parts" / "state.safetensors"
    assert state.exists() and b"point.left.0." in state.read_bytes()[:100_000]
    render(model, tmp_path / "other.mp4", **settings)
    whole, other = (read_latents(tmp_path / f"{name}.safetensors") for name in ("whole", "other"))
    assert torch.equal(whole, other)


def test_the_plan_counts_what_is_kept(model: Path) -> None:
    config = PlanConfig(model=str(model), num_frames=77, cluster=ClusterConfig(devices=4))
    report = plan_report(config)
    assert report["window_latents"] == 12 and report["levels"] == [*(round(level, 6) for level in LEVELS), 0.0]
    assert report["latent_evaluations"] == 2 * (4 * 10 + 9) and report["model_calls"] == 13
    assert report["cluster"]["choice"]["mode"] == "window"
    shape = Checkpoint.open(model).shape
    plain, cached = (StageMemory(shape, torch.float32, 1, 2, 4, (4, 6), kept) for kept in (0, 7))
    pairs = sum(shape.kv_values(shape.grid(14, 4, 6), block) for block in range(shape.spec.num_blocks))
    read = 3 * 14 * shape.grid(1, 4, 6).tokens_per_frame * shape.spec.hidden_size
    blocks = (0, shape.spec.num_blocks)
    assert cached.bytes("window", blocks, 2) - plain.bytes("window", blocks, 2) == 4 * (2 * pairs + read)
