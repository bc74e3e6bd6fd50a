"""Published runs of distilled students: every call, what clean passes leave, rows, steps to the bit, latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rolling_cases import facts_of, folders, opened, plan_of, relative, stream_of
from torch import Tensor

from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.microbatches import WHOLE, MicroBatches
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import PlanRow
from pavdm_dist.method.window import predicted
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.clean_memory import CleanMemory

FORWARD, FINAL = 5e-6, 1e-5
RUNS = [folder for folder in folders("*") if "num_chunks" in facts_of(folder)]


@pytest.fixture(params=RUNS, ids=lambda path: path.name)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    return facts_of(request.param), opened(request.param, tmp_path), tmp_path


def test_published_runs(run: tuple[dict[str, Any], dict[str, Tensor], Path]) -> None:
    """Every call's input and output, what clean passes leave, and the latents."""
    facts, tensors, folder = run
    stream = stream_of(facts, tensors)
    denoise, size = StreamDenoiser(load_backbone(folder), stream), stream.plan.latent_chunk_size
    memory = denoise._memories[0]
    assert isinstance(memory, CleanMemory)

    def checked(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        velocity, noisy = denoise(x, levels, row, branch), slice(len(row.context) * size, None)
        expected = tensors[f"row.{row.index:02}.x"], tensors[f"row.{row.index:02}.flow"]
        for found, value in zip((x[0, :, noisy], -velocity[0, :, noisy]), expected, strict=True):
            assert relative(found, value) < FORWARD
        for (chunk, block), pair in memory.state().items():
            for kind, part in zip("kv", pair, strict=True):
                value = tensors.get(f"cache.{chunk:02}.{block}.{kind}")
                assert value is None or relative(part[0].transpose(0, 1).flatten(1), value) < FORWARD
        return velocity

    chunks = list(sample(stream.window(), checked))
    assert relative(torch.cat([chunk.latents for chunk in chunks], dim=1), tensors["final"]) < FINAL


def test_rows_of_published_runs(run: tuple[dict[str, Any], dict[str, Tensor], Path]) -> None:
    """Chunks, their steps, what is read and where it lies; clean passes that are needed, no other."""
    facts, _, _ = run
    plan, size = plan_of(facts), facts["latent"]["chunk"]
    batches = MicroBatches(plan, "window")
    assert plan.num_rows == len(facts["rows"])
    passes = []
    for row, expected in zip(plan.rows(), facts["rows"], strict=True):
        assert list(row.chunks) == expected["chunks"]
        assert [plan.num_inference_steps - left for left in row.steps_left] == expected["step_index"]
        read = plan.reads(row)
        assert list(read) == [one["chunk"] for one in expected["context"]]
        places = [*(one["first_frame"] for one in expected["context"]), expected["first_frame"]]
        assert [place - places[0] for place in places] == [size * slot for slot in range(len(read) + 1)]
        parts = batches.parts(row.index)
        assert parts[-1] == (WHOLE, False)
        passes += [(chunk, list(plan.reads(row, chunk))) for chunk, is_clean in parts if is_clean]
    needed = [one for one in facts["clean"] if one.get("needed", one["chunk"] < plan.num_born - 1)]
    assert passes == [(one["chunk"], [seen["chunk"] for seen in one["context"]]) for one in needed]


def test_steps_of_published_runs_to_the_bit(run: tuple[dict[str, Any], dict[str, Tensor], Path]) -> None:
    """From their own flows: x0, and the next call's input."""
    facts, tensors, _ = run
    stream = stream_of(facts, tensors)
    window, size = stream.window(), stream.plan.latent_chunk_size
    for row in stream.plan.rows():
        x, flow = tensors[f"row.{row.index:02}.x"], tensors[f"row.{row.index:02}.flow"]
        assert torch.equal(window.joined(row, row.chunks)[0], x)
        levels = window.levels(row)[len(row.context) * size :: size].tolist()
        parts = zip(x.split(size, dim=1), flow.split(size, dim=1), levels, strict=True)
        x0 = torch.cat([predicted(part, -out, level) for part, out, level in parts], dim=1)
        assert torch.equal(x0, tensors[f"row.{row.index:02}.x0"])
        window.update(row, -flow[None])
