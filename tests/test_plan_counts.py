"""`pavdm plan` counts the calls that a run makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint

from pavdm_dist import PAVDMPipeline, VideoRequest
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.plan import plan_report
from pavdm_dist.commands.resolve import sampling_params
from pavdm_dist.config import DisplacedConfig, PlanConfig
from pavdm_dist.method.microbatches import MicroBatches
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.planning.forecast import calls_of

CAUSAL = {"mode": "causal", "allow_untrained_causal": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Latent frames of every call of the model."""
    frames, embed = list[int](), STDiT3.embed

    def counted(self: STDiT3, x: torch.Tensor, *more: Any) -> Any:
        frames.append(x.shape[2])
        return embed(self, x, *more)

    monkeypatch.setattr(STDiT3, "embed", counted)
    return frames


@pytest.mark.parametrize(
    ("settings", "calls_per_chunk"),
    [
        ({}, 2),
        (CAUSAL, 7),  # two steps of three chunks, and the clean one
        ({**CAUSAL, "chunks_per_unit": 3}, 3),
        ({"mode": "displaced", "displaced": DisplacedConfig(None)}, 7),
        ({"mode": "displaced", "displaced": DisplacedConfig(4, context_refresh="step")}, (1 + 4 + 4 + 4) / 2),
        ({"context": "cached", "context_chunks": 3, "anchor_chunks": 1}, 3),
        ({"window_chunks": 6, "partitions": 3, "lookahead": True}, 6),
        ({"method": "replacement", "end": "cut", "context_chunks": 2}, 2),
        ({"method": "autoregressive", "window_chunks": None}, 6),
    ],
)
def test_what_is_planned_is_what_is_called(
    settings: dict[str, Any], calls_per_chunk: float, model: Path, seen: list[int]
) -> None:
    words: dict[str, Any] = {
        "num_inference_steps": 6, "window_chunks": 3, "latent_chunk_size": 2, "guidance_scale": 1.0, "num_frames": 53
    }  # fmt: skip
    config = PlanConfig(model=str(model), **{**words, **settings})
    report = plan_report(config)
    pipeline = PAVDMPipeline.from_pretrained(model, device="cpu")
    first = chunks = 0
    for _ in pipeline.iter_chunks([VideoRequest("a red three", 0, 53)], sampling_params(config, pipeline.checkpoint)):
        first, chunks = first or len(seen), chunks + 1
    assert (report["chunks"], report["model_calls"]) == (chunks, len(seen))
    assert report["latent_evaluations"] == sum(seen)
    assert 0 < report["first_chunk_after_calls"] <= first  # it is given out where the row ends
    assert report["calls_per_chunk"] == calls_per_chunk


@pytest.mark.parametrize("chunks", [1, 2, 7, 40])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**CAUSAL, "chunks_per_unit": 2},
        {"mode": "displaced"},
        {"context": "cached", "context_chunks": 4, "anchor_chunks": 1},
        {"window_chunks": 6, "partitions": 3, "lookahead": True},
        {"method": "replacement", "context_chunks": 2},
    ],
)
def test_shifts_that_are_alike_are_counted_once(settings: dict[str, Any], chunks: int, model: Path) -> None:
    words: dict[str, Any] = {"num_inference_steps": 6, "window_chunks": 3, "latent_chunk_size": 2, **settings}
    config = PlanConfig(model=str(model), **words)
    params = sampling_params(config, Checkpoint.open(model))
    plan = params.plan(chunks)
    batches = MicroBatches(plan, params.mode, 0, params.displaced, chunks_per_unit=params.chunks_per_unit)
    parts = [(row, part) for row in plan.rows() for part, _ in batches.parts(row.index)]
    latents = sum(len(batches.held(row, part)) for row, part in parts) * plan.latent_chunk_size
    found = calls_of(params, plan)
    assert (found.calls, found.latents) == (len(parts), latents)
