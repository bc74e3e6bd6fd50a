"""Costs are measured once per model, shape and device, and the cut follows them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, tiny_checkpoint, tiny_model, tiny_stream
from previews import tiny_decoder

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.base import Costs, FrameInfo
from pavdm_dist.models.kv_cache import ChunkMemory, DisplacedMemory
from pavdm_dist.planning import costs
from pavdm_dist.planning.forecast import useful_stages
from pavdm_dist.planning.partition import layer_split
from pavdm_dist.request.sampling import SamplingParams

INFO = FrameInfo(32, 48, 24)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pavdm_dist" / "costs"


PLAN = WindowPlan(6, 3, 2, 1)


def test_measured_once_per_shape(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, str]] = []
    measure = costs.measure_costs

    def counting(model: Any, stream: Stream, *rest: Any) -> Costs:
        calls.append((stream.plan.latent_chunk_size, stream.mode))
        return measure(model, stream, *rest)

    monkeypatch.setattr(costs, "measure_costs", counting)
    first = costs.profiled_costs(tiny_model(), PLAN, (4, 6), INFO, 1)
    assert len(first.blocks) == 2 * TINY.depth and first.blocks[:2] * TINY.depth == first.blocks
    assert min(*first.blocks, first.embed, first.head) > 0
    # Neither the length of the video nor its start matters.
    assert costs.profiled_costs(tiny_model(), replace(PLAN, num_chunks=9, start="chunk"), (4, 6), INFO, 1) == first
    assert calls == [(2, "window")]
    costs.profiled_costs(tiny_model(), replace(PLAN, latent_chunk_size=3), (4, 6), INFO, 1)
    costs.profiled_costs(tiny_model(config=replace(TINY, hidden_size=64)), PLAN, (4, 6), INFO, 1)
    costs.profiled_costs(tiny_model(), PLAN, (4, 6), INFO, 1, mode="causal")
    assert calls == [(2, "window"), (3, "window"), (2, "window"), (2, "causal")]
    for file in cache.iterdir():
        file.write_text("{")
    assert costs.profiled_costs(tiny_model(), PLAN, (4, 6), INFO, 1).blocks[0] > 0  # damaged: measured again
    assert calls[4:] == [(2, "window")]
    assert not list(cache.glob("*.tmp"))


def test_a_block_behind_clean_chunks_is_timed_whole() -> None:
    found = costs.profiled_costs(tiny_model(), replace(PLAN, block_chunks=3), (4, 6), INFO, 1)
    assert min(*found.blocks, found.embed, found.head) > 0


@pytest.mark.parametrize("mode", ["causal", "displaced"])
def test_several_chunks_are_timed_together(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, model = list[int](), tiny_model()
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda x, *rest: (frames.append(x.shape[2]), embed(x, *rest))[1])
    costs.measure_costs(model, replace(tiny_stream(mode=mode), chunks_per_unit=2), repeats=1)
    assert frames == [2 if mode == "causal" else 8, 4, 2] * 2


@pytest.mark.parametrize(("mode", "frames"), [("causal", [4, 6, 8]), ("displaced", [8, 8, 8])])
def test_what_is_timed_attends_to_what_a_running_video_has_left(
    mode: Mode, frames: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    kind = {"causal": ChunkMemory, "displaced": DisplacedMemory}[mode]
    attend = kind.attend

    def counting(memory: Any, block: int, *rest: Any) -> Any:
        found = attend(memory, block, *rest)
        if block == 1:
            seen.append(found[0].shape[-2])
        return found

    monkeypatch.setattr(kind, "attend", counting)
    costs.measure_costs(tiny_model(), tiny_stream(mode=mode), repeats=1)
    # Of one row: the clean chunk, or the whole window, and three chunks of two frames; the first row is not timed.
    assert seen == [2 if mode == "causal" else 8, *frames] * 2


def test_the_cut_follows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    params = SamplingParams.resolve(checkpoint)
    times = {"blocks": {"spatial": 3.0, "temporal": 1.0, "embed": 0.0, "head": 0.0}, "decode": {"seconds": 24.0}}
    monkeypatch.setattr(costs, "kept", lambda kind, facts, measure: times[kind])
    options = EngineOptions(2, balance="measured", cpus_per_decoder=1)
    assert layer_split(checkpoint, params, options) == [(0, 2), (2, 4)]
    # A chunk is decoded once in two rows of two branches: six seconds of the last stage a unit.
    assert layer_split(checkpoint, params, replace(options, cpus_per_decoder=0)) == [(0, 3), (3, 4)]
    times["blocks"]["spatial"] = 0.1
    assert layer_split(checkpoint, params, options) == [(0, 2), (2, 4)]
    times["blocks"]["head"] = 1.0
    assert layer_split(checkpoint, params, options) == [(0, 3), (3, 4)]


def test_decoding_is_timed_too(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    free = {"spatial": 1e-9, "temporal": 1e-9, "embed": 0.0, "head": 0.0}
    kept = costs.kept
    monkeypatch.setattr(costs, "kept", lambda kind, *rest: free if kind == "blocks" else kept(kind, *rest))
    split = layer_split(checkpoint, SamplingParams.resolve(checkpoint), EngineOptions(2, balance="measured"))
    assert split == [(0, 3), (3, 4)]
    (file,) = cache.iterdir()
    assert 1e-5 < json.loads(file.read_text())["found"]["seconds"] < 10


def test_the_cut_counts_what_makes_the_frames(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codec, or what stands in for it in previews, which is timed apart."""
    model = tiny_checkpoint(tmp_path / "model")
    checkpoint = Checkpoint.open(model)
    params, options, file = SamplingParams.resolve(checkpoint), EngineOptions(2), str(tiny_decoder(model))
    assert layer_split(checkpoint, params, options) == [(0, 3), (3, 4)], "the codec weighs as much as the blocks"
    assert layer_split(checkpoint, params, options, "rgb") == [(0, 2), (2, 4)]
    codec, tiny, colours = (
        costs.estimated_decode(FrameMaker(checkpoint.vae, preview=preview), 2, (4, 6))
        for preview in (None, file, "rgb")
    )
    assert colours == 0 < tiny < codec
    free = {"spatial": 1e-9, "temporal": 1e-9, "embed": 0.0, "head": 0.0}
    kept = costs.kept
    monkeypatch.setattr(costs, "kept", lambda kind, *rest: free if kind == "blocks" else kept(kind, *rest))
    for preview in (None, file):
        layer_split(checkpoint, params, replace(options, balance="measured"), preview)
    facts = [json.loads(one.read_text())["facts"] for one in cache.iterdir()]
    made = sorted(fact.get("preview", "") for fact in facts)
    assert made == ["", FrameMaker(checkpoint.vae, preview=file).preview_identity], "of the codec all is as it was"


def test_what_cannot_be_measured_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="balance=guessed: must be estimated or measured"):
        EngineOptions(2, balance="guessed")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    options = EngineOptions(2, balance="measured", gpus_per_stage=1)
    with pytest.raises(ConfigError, match="balance=measured: this process has no GPU"):
        layer_split(checkpoint, SamplingParams.resolve(checkpoint), options)


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert costs.kept("blocks", {"a": 1}, lambda: {"b": 2}) == {"b": 2}
    assert "the measured costs cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("mode", "guidance", "streams", "useful"),
    [("window", 3.0, 2, 4), ("window", 1.0, 2, 2), ("causal", 3.0, 1, 12), ("causal", 1.0, 3, 18)],
)
def test_as_many_stages_are_useful_as_units_are_under_way(
    mode: str, guidance: float, streams: int, useful: int
) -> None:
    params = SamplingParams.resolve(Checkpoint.open(), mode=mode, guidance_scale=guidance)
    assert useful_stages(params, streams) == useful
    if mode == "window":  # clean chunks have calls of their own, one ahead of a window's
        cached = replace(params, context="cached", window_chunks=4, num_inference_steps=4, context_chunks=4)
        assert useful_stages(cached, streams) == 2 * useful


@pytest.mark.parametrize("chosen", [{"mode": "casual"}, {"mode": "displaced", "displaced": {"adaptive": 0.1}}])
def test_modes_that_do_not_exist_are_refused(chosen: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"mode='casual': must be window, causal or displaced|displaced=\{'adaptive'"):
        SamplingParams.resolve(Checkpoint.open(), **chosen)
