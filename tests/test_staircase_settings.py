"""Students of few levels from a model folder to an mp4: its own levels and context, what is refused, going on."""

from __future__ import annotations

import json
import logging
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
from pavdm_dist.method.recovery import mixing_layers
from pavdm_dist.method.sampler import sample
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.planning.memory import StageMemory
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream
from pavdm_dist.request.video_request import VideoRequest

LEVELS = [1, 0.9375, 0.8333333134651184, 0.625]
SAMPLING = {
    "num_inference_steps": 4, "window_chunks": 4, "latent_chunk_size": 2, "context_chunks": 5, "anchor_chunks": 1,
    "context": "cached", "step": "renoise", "levels": LEVELS, "guidance_scale": 1.0, "height": 32, "width": 48,
    "fps": 16,
}  # fmt: skip
LONG = {"num_frames": 77, "save_latents": True, "chunks_per_segment": 2}


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
        ({"step": "heun"}, r"step=heun: must be euler or renoise"),
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


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    output = tmp_path_factory.mktemp("whole") / "whole.mp4"
    render(model, output, **LONG)
    return read_latents(output.with_suffix(".safetensors"))


@pytest.mark.parametrize(
    ("recovery", "held", "chunk"), [("keys", b"point.left.0.", 8), ("replay", b"point.clean.0", 8), ("none", b"", 1)]
)
def test_an_interrupted_video_goes_on_to_the_bit(
    recovery: str,
    held: bytes,
    chunk: int,
    model: Path,
    whole: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From its file alone, past the chunk where anchors and recent chunks part; or from where nothing is needed."""
    settings, output = {**LONG, "recovery": recovery}, tmp_path / "other.mp4"
    interrupted(model, output, monkeypatch, 8, **settings)
    state = (tmp_path / "other.mp4.parts" / "state.safetensors").read_bytes()[:100_000]
    assert held in state and all(name in held or name not in state for name in (b"point.left.", b"point.clean."))
    assert rb"{\"version\": %d, " % (3 if recovery == "replay" else 2) in state
    with caplog.at_level(logging.INFO):
        render(model, output, **settings)
    assert f"goes on at chunk {chunk}" in caplog.text
    assert torch.equal(whole, read_latents(tmp_path / "other.safetensors"))


def test_another_recovery_goes_on_with_what_is_there(
    model: Path, whole: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is nothing that a video's bits depend on; keys are kept where the latents for more are gone."""
    output = tmp_path / "other.mp4"
    interrupted(model, output, monkeypatch, 6, **LONG)
    interrupted(model, output, monkeypatch, 2, **LONG, recovery="replay")
    assert b"point.left.0." in (tmp_path / "other.mp4.parts" / "state.safetensors").read_bytes()[:100_000]
    render(model, output, **LONG, recovery="none")
    assert torch.equal(whole, read_latents(tmp_path / "other.safetensors"))
    made = output.stat().st_mtime_ns
    render(model, output, **LONG, recovery="replay")
    assert output.stat().st_mtime_ns == made, "it is complete, and left alone"


def test_context_in_the_window_needs_nothing_kept(model: Path) -> None:
    config = PlanConfig(model=str(model), recovery="none", context="joint", anchor_chunks=0, context_chunks=1)
    with pytest.raises(ConfigError, match=r"recovery=none: is for context=cached; with context=joint .* leave it out"):
        plan_report(config)
    with pytest.raises(ConfigError, match="recovery='some': must be keys, replay or none"):
        PAVDMPipeline(Checkpoint.open(model), recovery="some")  # type: ignore[arg-type]


def test_the_plan_counts_what_recovery_keeps(model: Path) -> None:
    """Keys and values of six chunks, latents of as many chunks as blocks reach back, or nothing."""
    shape = Checkpoint.open(model).shape
    pairs = sum(shape.kv_values(shape.grid(2, 4, 6), block) for block in range(shape.spec.num_blocks))
    layers = mixing_layers(shape, (4, 4, 6))
    latents = 4 * 2 * 4 * 6 * 4  # bytes of a chunk: four channels, two latents of 4 by 6
    assert shape.spec.latent_channels == 4 and layers > 1
    calls = 1 + 5 * layers
    for recovery, (kept, shift, again) in {
        "keys": (6 * 4 * pairs, 4 * pairs, 0), "replay": (calls * latents, 0, calls), "none": (0, 0, 0)
    }.items():  # fmt: skip
        found = plan_report(PlanConfig(model=str(model), recovery=recovery))["recovery"]  # type: ignore[arg-type]
        assert found["by"] == recovery and found["clean_calls_to_go_on"] == again
        assert found["main_memory_gib_per_video"] == pytest.approx(kept / 2**30, rel=0.01)
        assert found["gib_per_shift_from_stages"] == pytest.approx(shift / 2**30, rel=0.01)
    joint = PlanConfig(model=str(model), context="joint", anchor_chunks=0, context_chunks=1)
    assert "recovery" not in plan_report(joint)


def test_the_plan_counts_what_is_kept(model: Path) -> None:
    config = PlanConfig(model=str(model), num_frames=77, cluster=ClusterConfig(devices=4))
    report = plan_report(config)
    assert report["window_latents"] == 12 and report["levels"] == [*(round(level, 6) for level in LEVELS), 0.0]
    assert report["latent_evaluations"] == 2 * (4 * 10 + 9) and report["model_calls"] == 13 + 9  # those of clean chunks
    assert report["cluster"]["choice"]["mode"] == "window"
    shape = Checkpoint.open(model).shape
    plain, cached = (StageMemory(shape, torch.float32, 1, 2, 4, (4, 6), kept) for kept in (0, 7))
    pairs = sum(shape.kv_values(shape.grid(14, 4, 6), block) for block in range(shape.spec.num_blocks))
    read = 3 * 14 * shape.grid(1, 4, 6).tokens_per_frame * shape.spec.hidden_size
    blocks = (0, shape.spec.num_blocks)
    assert cached.bytes("window", blocks, 2) - plain.bytes("window", blocks, 2) == 4 * (2 * pairs + read)
