"""What a run shows: its log, trackers, the loss on held-out clips, a profile, and what it would take."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from training import TINY, start, write_clips
from videos import numbered, write_video
from wan_models import WAN, trainable_folder

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import ConfigError
from pavdm_dist.merging import load_config
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.forecast import forecast
from pavdm_dist.train.loss import BANDS
from pavdm_dist.train.metrics import Interval, Shown, by_kind, per_level
from pavdm_dist.train.prepared import video_data
from pavdm_dist.train.settings import TrainConfig
from pavdm_dist.train.trainer import Trainer


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> LatentClips:
    return LatentClips(write_clips(tmp_path_factory.mktemp("clips"), 6))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_a_line_of_the_log_is_about_all_steps_since_the_last(tmp_path: Path, clips: LatentClips) -> None:
    words = [*TINY, "data.still_share=0.3", f"run_dir={tmp_path / 'each'}"]
    each = start(load_config(TrainConfig, None, words), clips)
    assert each.run(time.monotonic() + 100)
    words = [*TINY, "data.still_share=0.3", "log_every_steps=4", f"run_dir={tmp_path / 'four'}", "peak_tflops=0.001"]
    four = start(load_config(TrainConfig, None, words), clips)
    assert four.run(time.monotonic() + 100)
    single, pooled = lines(tmp_path / "each"), lines(tmp_path / "four")
    assert [line["step"] for line in pooled] == [4, 8] and len(single) == 8
    for number, line in enumerate(pooled):
        part = single[4 * number : 4 * number + 4]
        assert line["loss"] == pytest.approx(sum(one["loss"] for one in part) / 4)
        assert line["grad_norm"] == pytest.approx(sum(one["grad_norm"] for one in part) / 4)
        found = [(kind, loss) for one in part for kind, loss in one["kinds"].items()]
        assert line["kinds"] == pytest.approx(by_kind(found))
        assert {name.split()[0] for name in line["kinds"]} <= {"full", "growing", "draining", "still"}
        assert line["tokens_per_second"] > 0 and line["tflops"] > 0
        assert line["share_of_peak"] == pytest.approx(line["tflops"] / 0.001)


def test_errors_per_level_are_pooled_by_frames() -> None:
    zeros = [0.0] * BANDS
    one = torch.tensor([1.0, 6.0, *zeros[1:], 3.0, *zeros[1:]])
    two = torch.tensor([2.0, 2.0, *zeros[1:], 1.0, *zeros[1:]])
    shown = {
        "grad_norm": None, "kind": "full", "causal": False, "frames": 2, "size": (8, 8), "lr": 0.1, "samples": 1,
        "tokens": 4, "flop": 1.0, "loading_seconds": 0.0,
    }  # fmt: skip
    interval = Interval(torch.device("cpu"))
    for values in (one, two):
        interval.add(Shown(values=values, **shown))  # type: ignore[arg-type]
    line = interval.line()
    assert line["per_level"] == [2.0, None, None, None, None] == per_level(one + two)
    assert line["loss"] == 1.5 and line["grad_norm"] is None and "share_of_peak" not in line


def test_tensorboard_is_told_what_the_log_is_told(tmp_path: Path, clips: LatentClips) -> None:
    pytest.importorskip("tensorboardX")
    words = [*TINY, "trackers=[tensorboard]", "optimizer.total_steps=2", f"run_dir={tmp_path}"]
    start(load_config(TrainConfig, None, words), clips).run(time.monotonic() + 100)
    (file,) = (tmp_path / "tensorboard").glob("events*")
    content = file.read_bytes()
    assert all(name in content for name in (b"loss", b"grad_norm", b"tokens_per_second", b"kinds/"))


def test_wandb_gets_numbers_by_name(tmp_path: Path, clips: LatentClips, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            told.append((step, numbers))

        def finish(self) -> None:
            told.append("finished")

    fake.init = lambda **given: told.append(given) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    words = [*TINY, "trackers=[wandb]", "optimizer.total_steps=2", f"run_dir={tmp_path}"]
    trainer = start(load_config(TrainConfig, None, words), clips)
    trainer.run(time.monotonic() + 100)
    began, first, second, last = told
    assert began["dir"] == str(tmp_path) and began["config"]["optimizer"]["total_steps"] == 2
    assert (first[0], second[0], last) == (1, 2, "finished")
    assert first[1]["loss"] == lines(tmp_path)[0]["loss"] and all(isinstance(v, float) for v in first[1].values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["trackers=[mlflow]"], r"trackers=\[mlflow\]: must be of tensorboard, wandb"),
        (["trackers=[wandb]"], r"trackers=\[wandb\] needs wandb: pip install wandb, or leave it out"),
        (["profile_steps=[3]"], r"profile_steps=\[3\]: must be \[first step, number of steps\]"),
        (["peak_tflops=0"], r"peak_tflops=0\.0: must be above 0"),
        (["validation.batches=0"], r"validation\.batches=0: must be 1 or more"),
    ],
)
def test_what_cannot_be_shown_is_said_first(more: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else there(name))
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config(TrainConfig, None, [*TINY, *more]), 1)


def test_a_profile_is_of_the_steps_that_were_asked_for(tmp_path: Path, clips: LatentClips) -> None:
    words = [*TINY, "profile_steps=[2, 2]", "optimizer.total_steps=6", f"run_dir={tmp_path}"]
    start(load_config(TrainConfig, None, words), clips).run(time.monotonic() + 100)
    (trace,) = (tmp_path / "profile").glob("*.json")
    assert trace.name == "steps-0000002-0000003-rank0.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any(str(name).startswith("aten::") for name in names), sorted(map(str, names))
    assert "aten::" in trace.with_suffix(".txt").read_text()


# --- held-out clips --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    videos = tmp_path_factory.mktemp("videos")
    for number in range(4):
        write_video(videos / f"{number}.mp4", numbered(32, 48, 48), 24)
        (videos / f"{number}.txt").write_text("a red three")
    output = tmp_path_factory.mktemp("data") / "set"
    prepare_command(PrepareConfig([str(videos)], str(output), str(model), ["32x32x8@24"], scene_cuts=False))
    return output


def video_config(prepared: Path, model: Path, run_dir: Path, *more: str) -> TrainConfig:
    width = Checkpoint.open(model).shape.spec.text_dim
    words = [*TINY, f"data.folder={prepared}", f"data.model={model}", f"model.caption_channels={width}"]
    return load_config(TrainConfig, None, [*words, "data.prefetch=0", f"run_dir={run_dir}", *more])


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_validation_looks_at_the_same_windows_of_clips_that_are_not_trained_on(
    stage: int, prepared: Path, model: Path, tmp_path: Path
) -> None:
    more = ["validation.every_steps=2", "validation.batches=3", "validation.clips=2", "optimizer.total_steps=6"]
    more += [f"zero.stage={stage}", "optimizer.name=adamw"]
    batches, parts = video_data(config := video_config(prepared, model, tmp_path, *more))
    assert batches.held_out is not None
    trained = {name for step in range(6) for name in batches.batch(step, 0, 1).ids}
    held = {name for step in range(6) for name in batches.held_out.batch(step, 0, 1).ids}
    assert len(trained) == len(held) == 2 and not trained & held
    trainer = Trainer(config, batches, parts)
    assert trainer.validation is not None
    first = trainer.validation.line(trainer.engine)
    assert trainer.validation.line(trainer.engine) == first, "the same every time"
    assert trainer.run(time.monotonic() + 100)
    found = [line for line in lines(tmp_path) if "validation" in line]
    assert [line["step"] for line in found] == [2, 4, 6]
    assert all(math.isfinite(line["validation"]["loss"]) for line in found)
    assert found[-1]["validation"]["loss"] != first["validation"]["loss"]
    trainer.engine.destroy()
    # Looking changes nothing in training.
    plain = video_config(prepared, model, tmp_path / "plain", *more, "validation.every_steps=0")
    alone = Trainer(plain, *video_data(plain))
    assert alone.run(time.monotonic() + 100)
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert [line["loss"] for line in lines(tmp_path / "plain")] == losses
    alone.engine.destroy()


def test_held_out_clips_that_are_not_there_are_said(
    prepared: Path, model: Path, tmp_path: Path, clips: LatentClips
) -> None:
    with pytest.raises(ConfigError, match=r"validation\.clips=9: no bucket has more clips, the largest has 4"):
        video_data(video_config(prepared, model, tmp_path, "validation.clips=9"))
    config = load_config(TrainConfig, None, [*TINY, "validation.every_steps=2", f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"validation\.every_steps=2: no clips are held out"):
        start(config, clips)


# --- what it would take ----------------------------------------------------------------------------------


def test_a_dry_run_counts_what_a_trainer_holds(tmp_path: Path, clips: LatentClips) -> None:
    folder = trainable_folder(tmp_path / "model", replace(WAN, text_len=16))
    for stage, precision in ((0, "float32"), (1, "float32"), (3, "bfloat16")):
        words = [*TINY, f"model.pretrained={folder}", "optimizer.name=adamw", f"zero.stage={stage}"]
        words += [f"zero.precision={precision}", f"run_dir={tmp_path / str(stage)}", "data.batch_size=4"]
        config = load_config(TrainConfig, None, words)
        one, two = forecast(config, 1)["memory_gib"], forecast(config, 2)["memory_gib"]
        sharded = {"optimizer"} if stage else set()
        sharded |= {"weights", "gradients"} if stage == 3 else set()
        for name in ("weights", "gradients", "optimizer"):
            assert two[name] == pytest.approx(one[name] / (2 if name in sharded else 1))
        trainer = start(config, clips)
        numbers = sum(value.numel() for value in trainer.engine.module.transformer.parameters()) if stage < 3 else None
        if numbers is not None:
            assert one["weights"] * 2**30 == 4 * numbers and one["optimizer"] * 2**30 == 12 * numbers
        trainer.engine.destroy()


def test_a_dry_run_knows_what_is_kept_for_the_backward_pass(
    tmp_path: Path, clips: LatentClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what the trainer's own forward pass keeps, of the largest window."""
    monkeypatch.setattr("pavdm_dist.train.forecast._DIGIT_CELLS", (4, 4))  # as the clips here
    folder = trainable_folder(tmp_path / "model", replace(WAN, text_len=16))
    shares = ["objective.full_share=1", "objective.growing_share=0", "objective.causal_share=0"]
    words = [*TINY, *shares, f"model.pretrained={folder}", "optimizer.name=adamw"]
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
    assert found["processes"] == 2 and found["memory_gib"]["together"] > 0
    assert not (tmp_path / "run").exists()
