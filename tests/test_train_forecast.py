"""What a run would take, told before it starts: against what a trainer really holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import TINY, start, write_clips
from wan_models import WAN, trainable_folder

from pavdm_dist import cli
from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.dry_run import forecast
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.zero import whole_shape
from pavdm_dist.values.merging import load_config


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> LatentClips:
    return LatentClips(write_clips(tmp_path_factory.mktemp("clips"), 6))


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")]
)
def test_a_dry_run_counts_what_a_trainer_holds(stage: int, precision: str, tmp_path: Path, clips: LatentClips) -> None:
    """Masters, moments and average are those that DeepSpeed and the average really hold after a step."""
    folder = trainable_folder(tmp_path / "model", replace(WAN, text_len=16))
    words = [*TINY, f"model.pretrained={folder}", "optimizer.name=adamw", f"zero.stage={stage}"]
    words += [f"zero.precision={precision}", f"run_dir={tmp_path / 'run'}", "data.batch_size=4"]
    config = load_config(TrainConfig, None, words)
    one, two = forecast(config, 1)["memory_gib"], forecast(config, 2)["memory_gib"]
    sharded = [name for name, least in (("optimizer", 1), ("gradients", 2), ("weights", 3)) if stage >= least]
    for name in ("weights", "gradients", "optimizer"):
        assert two[name] == pytest.approx(one[name] / (2 if name in sharded else 1))
    trainer = start(config, clips)
    trainer.train_step()
    module, around = trainer.engine.module, trainer.engine.optimizer
    every, counted = (
        sum(whole_shape(value).numel() for value in part.parameters()) for part in (module, module.transformer)
    )
    state = getattr(around, "optimizer", around).state
    # What is stepped: the weights themselves, which are counted as such, or masters of their own.
    weights = {value.untyped_storage().data_ptr() for value in module.parameters()}
    masters = [value for value in state if value.untyped_storage().data_ptr() not in weights]
    moments = [value for one in state.values() for value in one.values() if torch.is_tensor(value) and value.ndim]
    average = [part for _, part in trainer.average.parts.values()]
    held = bytes_of([*masters, *moments, *average]) / every
    assert one["optimizer"] * 2**30 / counted == pytest.approx(held, rel=0.01)
    if stage < 3:
        assert one["weights"] * 2**30 / counted == pytest.approx(bytes_of(module.parameters()) / every, rel=0.01)
    trainer.engine.destroy()


def test_a_dry_run_tells_of_the_bucket_that_needs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"64x64x8@24": 10, "32x32x8@24": 10, "32x48x8@24": 0}
    index = {"buckets": [{"bucket": name, "clips": clips} for name, clips in sizes.items()]}
    monkeypatch.setattr("pavdm_dist.train.dry_run.read_index", lambda folder: index)

    def told(*more: str) -> Any:
        config = load_config(TrainConfig, None, [*TINY, "data.folder=[set]", "data.batch_size=2", *more])
        return forecast(config, 2)

    kept = "kept for the backward pass"
    plain, small = told(), told("data.batch_sizes={32x32x8@24: 4}")
    assert plain["data"] == "set"
    assert plain["window"] == "8 latents of 8x8 cells, 1 at a time in a process"
    assert small == plain, "four times the cells, half as many samples"
    many = told("data.batch_sizes={32x32x8@24: 40}")
    assert many["window"] == "8 latents of 4x4 cells, 20 at a time in a process"
    assert many["memory_gib"][kept] == pytest.approx(5 * plain["memory_gib"][kept], rel=0.01)
    assert many["tflop_per_step"] > 2 * plain["tflop_per_step"]
    assert told("data.batch_sizes={32x48x8@24: 400}") == plain, "a bucket without clips gives no batch"
    index["buckets"].append({"bucket": "32x32x1@24", "clips": 5})
    with pytest.raises(ConfigError, match=r"full_share=1\.0 .* 10 chunks only, clips of bucket 64x64x8@24 have 8"):
        told("objective.full_share=1", "objective.growing_share=0", "objective.context_chunks=7")
    pictures = "data.batch_sizes={64x64x8@24: 1, 32x32x8@24: 1, 32x32x1@24: %d}"
    told("sequence_parallel=2", "model.num_heads=2", pictures % 2)
    for size, nearest in ((1, "2"), (3, "2 or 4")):
        with pytest.raises(
            ConfigError,
            match=rf"batch_sizes={{32x32x1@24: {size}}} with sequence_parallel=2: pictures .*: use {nearest}$",
        ):
            told("sequence_parallel=2", "model.num_heads=2", pictures % size)


def test_a_dry_run_knows_what_is_kept_for_the_backward_pass(tmp_path: Path, clips: LatentClips) -> None:
    """Against what the trainer's own forward pass keeps, of the largest window."""
    folder = trainable_folder(tmp_path / "model", replace(WAN, text_len=16))
    shares = ["objective.full_share=1", "objective.growing_share=0", "objective.causal_share=0"]
    cells = ["world.size=32", "world.cell=2"]  # 4x4, as the clips here
    words = [*TINY, *shares, *cells, f"model.pretrained={folder}", "optimizer.name=adamw"]
    kept, told = {}, {}
    for recompute in ("none", "every:2", "every:1"):
        chosen = [f"zero.recompute={recompute}", f"run_dir={tmp_path / recompute}"]
        config = load_config(TrainConfig, None, [*words, *chosen])
        expected = forecast(config, 1)
        trainer = start(config, clips)
        batch = trainer.batches.batch(0, 0, 1)
        found: dict[int, torch.UntypedStorage] = {}

        def count(tensor: torch.Tensor, found: dict[int, torch.UntypedStorage] = found) -> torch.Tensor:
            base = tensor if tensor._base is None else tensor._base
            if not isinstance(base, torch.nn.Parameter):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            given = (batch.text, batch.dropped, batch.info, batch.chunk_causal, batch.window)
            trainer.engine.module(batch.x, batch.levels, *given)
        kept[recompute] = sum(storage.nbytes() for storage in found.values())
        told[recompute] = expected["memory_gib"]["kept for the backward pass"] * 2**30
    one = (kept["none"] - kept["every:1"]) / 3  # while a block is computed again, its insides are there, too
    for recompute, size in kept.items():
        most = size if recompute == "none" else size + one
        assert 0.7 * most < told[recompute] < 1.4 * most, recompute
    assert kept["every:1"] < kept["every:2"] < kept["none"]


def test_a_dry_run_is_printed_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--dry-run", *TINY, f"run_dir={tmp_path / 'run'}", "peak_tflops=100", "launch.processes=2"]
    assert cli.main(words) == 0
    assert "memory_gib" in (text := capsys.readouterr().out) and "seconds_per_step" in text
    assert cli.main([*words, "--json", "zero.stage=1", "optimizer.name=adamw"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"] == "moving digits, made here (data.folder is not set)"
    assert found["processes"] == 2 and found["memory_gib"]["together"] > 0
    assert not (tmp_path / "run").exists()
