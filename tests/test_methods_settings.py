"""Methods that PA-VDM is compared with, from settings to what they cost and the files they leave."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from interrupting import interrupted, render

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.plan import plan_report
from pavdm_dist.commands.resolve import plain_cost, say_cost, say_what_to_expect
from pavdm_dist.config import ClusterConfig, PlanConfig, SampleConfig, validate_sample
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.latents import read_latents
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.window import Held
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.planning.costs import _stream, measure_costs
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream
from pavdm_dist.request.video_request import VideoRequest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def params_of(model: Path, **chosen: Any) -> SamplingParams:
    return SamplingParams.resolve(Checkpoint.open(model), **chosen)


def test_methods_are_plans(model: Path) -> None:
    pavdm, blocks, noisy = (params_of(model, method=name) for name in ("pavdm", "replacement", "replacement-noise"))
    assert pavdm == params_of(model) and pavdm.plan(7) == WindowPlan(6, 3, 2, 1, num_chunks=7)
    assert blocks.plan(7) == noisy.plan(7) == replace(pavdm.plan(7), block_chunks=3)
    assert (blocks.context_follows, noisy.context_follows) == (False, True)
    single = params_of(model, method="autoregressive")
    assert single.plan(7) == WindowPlan(6, 1, 2, 1, num_chunks=7)
    fifo = params_of(model, method="fifo", window_chunks=6)
    assert (fifo.partitions, fifo.lookahead, fifo.context_chunks) == (3, True, 1)
    wide = params_of(model, method="fifo", window_chunks=24, num_inference_steps=24)
    assert (wide.partitions, wide.context_chunks) == (4, 3), "the published number"
    parts = params_of(model, method="fifo", lookahead=False)
    assert (parts.partitions, parts.lookahead, parts.context_chunks) == (3, False, 1)
    checkpoint = Checkpoint.open(model)
    stream = build_stream(VideoRequest("a red three", 0, 9), 0, noisy, checkpoint)
    assert stream.held == Held(follows=True) and stream.plan.block_chunks == 3
    # T need not be a multiple of W.
    assert params_of(model, method="replacement", num_inference_steps=5).plan(3).num_rows == 5
    validate_sample(SampleConfig(prompt="x", method="replacement", num_inference_steps=5, window_chunks=3))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"method": "rolling"}, "method='rolling': must be pavdm, replacement, replacement-noise, fifo or autoreg"),
        ({"method": "autoregressive", "window_chunks": 3}, "window_chunks=3: method=autoregressive makes one chunk"),
        (
            {"method": "fifo"},
            "window_chunks=3: method=fifo looks at halves, .* use window_chunks=2 or 4, or",
        ),
        ({"method": "fifo", "lookahead": True}, "window_chunks=3 has no halves; use window_chunks 2 or 4"),
        ({"method": "fifo", "window_chunks": "6"}, "window_chunks='6': must be a whole number"),
        ({"method": "fifo", "partitions": 1, "lookahead": False}, "are method=pavdm; use partitions=2 or more"),
        ({"method": "replacement", "partitions": 3}, "partitions=3: chunks of a block have one level"),
        ({"method": "replacement", "context_chunks": 0}, "context_chunks=0: method=replacement goes on from clean"),
        ({"method": "replacement", "context_chunks": 0, "window_chunks": 1}, "context_chunks=0: method=replacement"),
        ({"method": "autoregressive", "context_chunks": 0}, "context_chunks=0: method=autoregressive goes on from"),
        (
            {"method": "replacement-noise", "window_chunks": 1, "mode": "displaced"},
            "mode=displaced: method=replacement-noise noises context to each step's level.*use mode=window",
        ),
        (
            {"method": "replacement-noise", "window_chunks": 1, "context": "cached"},
            "context=cached: method=replacement-noise noises.*use context=joint",
        ),
        ({"method": "replacement-noise", "context_noise": 0.1}, "context_noise=0.1: method=replacement-noise noises"),
        ({"method": "replacement", "mode": "displaced"}, "mode=displaced: blocks of 3 chunks"),
        (
            {"method": "replacement", "mode": "causal", "allow_untrained_causal": True},
            "mode=causal: blocks of 3 chunks",
        ),
    ],
)
def test_what_is_another_method_is_refused(model: Path, chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        params_of(model, **chosen)
    assert "\n" not in str(refusal.value)


def test_costs_are_printed_beside_the_published_plan(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint.open(model)
    plain = params_of(model).plan(12)
    for method, calls, latents in (
        ("replacement", 4 * 6, 6 * 2 * (3 + 3 * 4)), ("autoregressive", 12 * 6, 6 * 2 * (1 + 11 * 2))
    ):  # fmt: skip
        chosen: dict[str, Any] = {"model": str(model), "num_frames": 93, "method": method}
        config = PlanConfig(**chosen, cluster=ClusterConfig(devices=2))
        report = plan_report(config)
        assert (report["chunks"], report["model_calls"], report["latent_evaluations"]) == (12, calls, latents)
        assert report["calls_per_chunk"] == calls / 12 and report["sampling"]["method"] == method
        assert report["plain_plan"] == {"model_calls": 28, "latent_evaluations": plain.latent_evaluations}
        assert report["cluster"]["choice"]["mode"] == "window"
        params = params_of(model, method=method)
        with caplog.at_level(logging.INFO):
            say_cost(params, params.plan(12), checkpoint)
        assert caplog.records[-1].getMessage() == (
            f"method={method}, partitions=1, lookahead=false: {calls} model calls and {latents} latent evaluations a"
            f" video and guidance branch; method=pavdm in whole windows 28 and {plain.latent_evaluations}"
        )


def test_the_published_plan_has_the_models_own_context(model: Path) -> None:
    """Lookahead has more of it; and where such a window is not legal nothing is said."""
    checkpoint = Checkpoint.open(model)
    wide = params_of(model, method="fifo", window_chunks=6, num_inference_steps=6, partitions=1)
    assert wide.context_chunks == 3
    plain = params_of(model, window_chunks=6, num_inference_steps=6).plan(12)
    assert plain_cost(wide, wide.plan(12), checkpoint)["latent_evaluations"] == plain.latent_evaluations
    cached = params_of(model, method="autoregressive", context="cached", context_chunks=1, guidance_scale=1.0)
    assert plain_cost(cached, cached.plan(12), checkpoint) == {}


def test_blocks_are_timed(model: Path) -> None:
    shape = Checkpoint.open(model).backbone
    plan = params_of(model, method="replacement", context_chunks=2).plan(9)
    stream = _stream(shape, plan, (4, 4, 6), FrameInfo(32, 48, 24), "window", 1)
    assert all(seconds > 0 for seconds in measure_costs(shape, stream, repeats=1).blocks)


def test_what_to_expect_depends_on_the_levels_of_a_window(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tiny model met clean frames beside noisy ones, as blocks and single chunks have them."""
    checkpoint = Checkpoint.open(model)
    assert checkpoint.level_support == "mixed-trained"
    for method in ("pavdm", "replacement", "replacement-noise", "autoregressive"):
        caplog.clear()
        say_what_to_expect(params_of(model, method=method), checkpoint)
        assert [record.getMessage()[:30] for record in caplog.records] == (
            ["the model was trained with cle"] if method == "pavdm" else []
        )


def test_a_video_by_replacement_goes_on_in_the_middle_of_a_block(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_frames": 45, "save_latents": True, "chunks_per_segment": 2, "method": "replacement-noise"}
    render(model, tmp_path / "whole.mp4", **settings)
    interrupted(model, tmp_path / "other.mp4", monkeypatch, 4, **settings)
    render(model, tmp_path / "other.mp4", **settings)
    whole, other = (read_latents(tmp_path / f"{name}.safetensors") for name in ("whole", "other"))
    assert torch.equal(whole, other)
    assert json.loads((tmp_path / "whole.json").read_text())["extra"]["sampling"]["method"] == "replacement-noise"
