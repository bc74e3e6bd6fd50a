"""The planner: stages where one video must be fast or the model does not fit, plain replicas where they win."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.cli import main
from pavdm_dist.config import ClusterConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.planner import GIB, Setup, choose, report
from pavdm_dist.requests import SamplingParams

SMALL = ClusterConfig(devices=8, tflops=0.02)


def planned(cluster: ClusterConfig, chunks: int = 20, **chosen: object) -> tuple[Setup, list[Setup], str]:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, **chosen)
    return choose(checkpoint, params, params.plan(chunks), cluster)


def test_one_video_takes_stages() -> None:
    best, setups, why = planned(SMALL)
    assert (best.mode, best.replicas, best.num_stages) == ("causal", 1, 8)
    assert "8 stages are" in why
    window = {setup.num_stages: setup for setup in setups if setup.mode == "window"}
    # The published method cannot fill two stages with one guided video: 2 P / (P + 1) at most.
    assert window[1].seconds / window[2].seconds <= 4 / 3
    assert window[8].seconds / best.seconds > 2


def test_many_videos_take_replicas() -> None:
    best, _, why = planned(replace(SMALL, videos=16))
    assert (best.replicas, best.num_stages) == (8, 1)
    assert "plain replicas" in why


def test_a_model_that_does_not_fit_is_split() -> None:
    alone = planned(replace(SMALL, videos=16), mode="causal")[1][0]
    assert alone.num_stages == 1
    best, _, why = planned(replace(SMALL, videos=16, memory_gib=0.9 * alone.memory_gib[0]), mode="causal")
    assert best.num_stages > 1
    assert "does not fit one device" in why
    with pytest.raises(ConfigError, match=r"cluster.memory_gib=1e-05: the leanest set-up .* needs .* GiB"):
        planned(replace(SMALL, memory_gib=1e-5))


def test_memory_holds_at_least_the_weights_once() -> None:
    model = Checkpoint.open("embedded").backbone
    weights = 4 * sum(value.numel() for value in model.state_dict().values())
    for setup in planned(SMALL, mode="causal")[1]:
        assert sum(setup.memory_gib) * GIB > weights * 0.95  # text caption tables stay outside
        assert max(setup.memory_gib) <= planned(SMALL, mode="causal")[1][0].memory_gib[0]


def test_a_stage_needs_about_the_memory_that_is_predicted() -> None:
    """Weights and kept keys and values are counted in a real stage's tensors."""
    from pavdm_dist.denoiser import StreamDenoiser
    from pavdm_dist.requests import VideoRequest, build_stream

    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, mode="displaced", num_inference_steps=6)
    stream = build_stream(VideoRequest("a red three drifting up", 0, 300), 0, params, checkpoint)
    denoiser, window = StreamDenoiser(checkpoint.backbone, stream), stream.window()
    for row in stream.plan.rows():
        if row.index == 9:
            break
        x, levels = window.inputs(row)
        velocity = [denoiser(x, levels, row, branch) for branch in range(stream.branches)]
        window.update(row, velocity[0])
    kept = 0
    for memory in denoiser._memories:
        kept += sum(4 * t.numel() for kept in memory._pairs.values() for pair in kept.values() for t in pair)
        kept += sum(4 * t.numel() for kept in memory._turned.values() for _, t in kept.values())
    blocks, dim = checkpoint.backbone.spec.num_blocks, checkpoint.backbone.spec.hidden_size
    assert kept == 4 * 3 * 2 * 35 * 16 * dim * (blocks // 2)


def test_costs_are_those_of_the_rows() -> None:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, guidance_scale=1.0)
    plan = params.plan(4)
    (one, *_), cluster = planned(SMALL, 4, guidance_scale=1.0)[1], SMALL
    with torch.device("meta"):
        model = STDiT3(checkpoint.transformer_config)
    from pavdm_dist.engine.partition import estimate_costs

    flop = sum(
        estimate_costs(model.spec, model.grid(5 * len(row.window), 8, 8), model.spec.text_len).stage(0, 8)
        for row in plan.rows()
    )
    assert one.mode == "window" and one.num_stages == 1
    assert one.seconds == pytest.approx(flop / (cluster.tflops * 1e12))


@pytest.mark.parametrize("videos", [1, 3])
def test_the_prediction_is_what_the_simulator_says(videos: int) -> None:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint)
    cluster = ClusterConfig(devices=4, tflops=0.02, videos=videos, link_latency_ms=0.01)
    found = report(checkpoint, params, params.plan(60), cluster)["choice"]
    assert found["simulated_utilisation"] == pytest.approx(found["utilisation"], rel=0.08)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("cluster.devices=0", "cluster.devices=0: at least 1"),
        ("cluster.videos=0", "cluster.videos=0: at least 1"),
        ("cluster.tflops=0", "cluster.tflops=0: must be above 0"),
        ("cluster.link_latency_ms=-1", "cluster.link_latency_ms=-1: must be 0 or more"),
        ("cluster.chart=a.txt", "cluster.chart=a.txt: must end in .png"),
        ("cluster.gpus=8", "no such key 'gpus'"),
    ],
)
def test_impossible_clusters_are_one_sentence(word: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "seconds=5", "cluster.devices=2", word]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_prints_the_choice_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "plan.png"
    words = ["plan", "seconds=10", "cluster.devices=4", "cluster.tflops=0.02", "cluster.price_per_device_hour=2"]
    assert main([*words, f"cluster.chart={chart}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cluster"]
    assert found["choice"]["num_stages"] == 4
    assert found["choice"]["cost"] == pytest.approx(2 * found["choice"]["device_hours"], abs=1e-4)
    assert {row["mode"] for row in found["considered"]} == {"window", "causal"}
    with Image.open(chart) as picture:
        assert picture.size[0] > 1000
