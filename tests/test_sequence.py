"""Processes that share every window compute what one process computes; so do recomputed activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_zero import SETTINGS, SHARD_ALL, apart, plain_torch
from test_zero import run as run_cases
from training import launch, start, write_clips

from pavdm_dist.config import load_config
from pavdm_dist.errors import ConfigError
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config
from pavdm_dist.train.batches import WorldBatches
from pavdm_dist.train.config import TrainConfig
from pavdm_dist.train.data import LatentClips
from pavdm_dist.train.processes import World
from pavdm_dist.train.sequence import share_windows

# Chunks of three frames: windows of two processes need padding half of the time, of four nearly always.
ODD = ["objective.latent_chunk_size=3", "objective.text_share=0.5", "model.num_heads=4", "data.still_share=0.2"]
STEPS = 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 6)


@pytest.fixture(scope="module")
def plain(clips: Path) -> dict[str, Any]:
    return plain_torch(LatentClips(clips), [*SETTINGS, *ODD], STEPS)


@pytest.mark.timeout(240)
def test_two_processes_share_windows(clips: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    shared = [*ODD, "sequence_parallel=2", SHARD_ALL]
    cases: dict[str, Any] = {
        f"stage{stage}": {"settings": [*shared, f"zero.stage={stage}"], "steps": STEPS} for stage in (0, 1, 3)
    }
    again = ["zero.stage=3", "zero.checkpoint_activations=true"]
    cases["recomputed"] = {"settings": [*shared, *again], "steps": STEPS}
    cases["recomputed alone"] = {"settings": [*ODD, SHARD_ALL, *again], "steps": STEPS}
    found, _ = run_cases(tmp_path, clips, cases)
    for name, case in found.items():
        assert case["loss"] == pytest.approx(plain["loss"], abs=1e-5), name
        assert apart(case["weights"], plain["weights"]) < 1e-4, name
        if name != "stage0":
            assert case["grad_norm"] == pytest.approx(plain["grad_norm"], abs=1e-4), name
    numbers = sum(value.numel() for value in plain["weights"].values())
    assert found["stage1"]["optimizer_bytes"] < 8 * numbers * 0.51, "ZeRO shards over all processes"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_four_processes_share_windows_by_twos_and_by_fours(clips: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        f"shared{size}": {"settings": [*ODD, f"sequence_parallel={size}", "zero.stage=2"], "steps": STEPS}
        for size in (2, 4)
    }
    found = run_cases(tmp_path, clips, cases, size=4)[0]
    for case in found.values():
        assert case["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert apart(case["weights"], plain["weights"]) < 1e-4


PROGRAM = """
import sys, torch
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config
from pavdm_dist.train.processes import join_world
from pavdm_dist.train.sequence import share_windows

world, frames, each = join_world(), 7, 4
found = {}
for causal in (None, 2):
    torch.manual_seed(0)
    model = STDiT3(STDiT3Config(depth=2, hidden_size=32, num_heads=4, caption_channels=16, model_max_length=4))
    model.double()
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value, std=0.2)
    x, text = torch.randn(2, 4, frames, 4, 6).double(), torch.randn(2, 4, 16).double()
    levels, target = torch.rand(2, frames), torch.randn(2, 8, frames, 4, 6).double()
    info = FrameInfo(32, 48, 24)
    out = model(x, levels, text, info, None, causal)
    (out * target).sum().backward()
    whole = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    share_windows(model, world, 2)
    first = world.rank * each
    mine, last = slice(first, first + each), min(first + each, frames)
    pad = lambda value, ends: torch.nn.functional.pad(value, ends)
    part = model(pad(x, (0, 0, 0, 0, 0, 1))[:, :, mine], pad(levels, (0, 1))[:, mine], text, info, None, causal, first,
                 frames)
    real = last - first
    (part[:, :, :real] * target[:, :, first:last]).sum().backward()
    apart = float((part[:, :, :real] - out[:, :, first:last]).abs().max() / out.abs().max())
    for name, value in whole.items():
        grad = dict(model.named_parameters())[name].grad
        torch.distributed.all_reduce(grad)
        apart = max(apart, float((grad - value).abs().max() / value.abs().max().clamp(min=1e-6)))
    found[causal] = apart
print("APART", max(found.values()), flush=True)
"""


@pytest.mark.timeout(120)
def test_output_and_gradients_are_those_of_the_whole_window_in_float64() -> None:
    for output in launch(["-c", PROGRAM], timeout=100):
        assert float(output.split("APART")[1]) < 1e-12, output


def test_heads_that_do_not_divide_are_refused() -> None:
    model = STDiT3(STDiT3Config(depth=1, hidden_size=32, num_heads=4, caption_channels=16, model_max_length=4))
    with pytest.raises(ConfigError, match=r"sequence_parallel=3 does not divide .* 4 attention heads: use 1 or 2"):
        share_windows(model, World(0, 6), 3)


def test_recomputed_activations_change_nothing(clips: Path, tmp_path: Path) -> None:
    cached = LatentClips(clips)

    def losses(*more: str) -> list[float]:
        trainer = start(load_config(TrainConfig, None, [*SETTINGS, f"run_dir={tmp_path / more[0]}", *more]), cached)
        return [trainer.train_step()["loss"] for _ in range(5)]

    assert losses("zero.checkpoint_activations=true") == losses("zero.checkpoint_activations=false")


def test_parts_of_a_window_are_its_frames_and_padding(clips: Path) -> None:
    config = load_config(TrainConfig, None, [*SETTINGS, *ODD])
    batch = WorldBatches(LatentClips(clips), config.objective, config.data, 0).batch(3, 0, 1)
    frames = batch.x.shape[2]
    parts = [batch.frames_part(place, 4) for place in range(4)]
    assert len({part.x.shape for part in parts}) == 1
    assert torch.equal(torch.cat([part.x for part in parts], dim=2)[:, :, :frames], batch.x)
    assert torch.cat([part.levels for part in parts], dim=1)[:, frames:].eq(1).all()
    assert [part.first_frame for part in parts] == [place * parts[0].x.shape[2] for place in range(4)]
    assert [part.window_frames for part in parts] == [frames] * 4
