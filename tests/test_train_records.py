"""What a run shows: its log, trackers, the loss on held-out clips, a profile."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from training import TINY, start, write_clips
from videos import numbered, write_video

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import ConfigError, EngineError, MediaError
from pavdm_dist.train import save_writing, sheets
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.interval import Interval, Shown, by_kind, per_level
from pavdm_dist.train.loss import BANDS
from pavdm_dist.train.prepared import video_data
from pavdm_dist.train.profiling import Profiler
from pavdm_dist.train.ranks import World
from pavdm_dist.train.run_log import Records
from pavdm_dist.train.sequence import SequenceGroup
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.train.validation import Validation
from pavdm_dist.values.merging import load_config


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


def test_a_slice_leaves_no_step_out_of_the_log(tmp_path: Path, clips: LatentClips) -> None:
    words = [*TINY, "log_every_steps=4", f"run_dir={tmp_path}"]
    for last in (3, 6):
        trainer = start(load_config(TrainConfig, None, words), clips)
        trainer.asked = lambda trainer=trainer, last=last: trainer.step == last  # type: ignore[misc]
        trainer.run(time.monotonic() + 100)
    assert [line["step"] for line in lines(tmp_path)] == [3, 4, 6]


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    records = Records(tmp_path, [], {})
    records.write(1, {"loss": 1.0})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    records.write(3, {"loss": 3.0})
    whole = ['{"step": 1, "loss": 1.0}', '{"step": 2, "lo', '{"step": 3, "loss": 3.0}']
    assert (tmp_path / "log.jsonl").read_text() == "".join(f"{line}\n" for line in whole)


def test_what_is_no_step_is_no_time_of_steps(
    tmp_path: Path, clips: LatentClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second of this clock; looking at held-out clips, sheets, saves and traces take a hundred."""
    now, pauses = [0.0], list[str]()
    monkeypatch.setattr("pavdm_dist.train.interval.time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def slow(seconds: float, name: str, call: Any) -> Any:
        def called(*given: Any, **more: Any) -> Any:
            now[0] += seconds
            pauses.append(name)
            return call(*given, **more)

        return called

    monkeypatch.setattr(Trainer, "train_step", slow(1, "step", Trainer.train_step))
    monkeypatch.setattr(save_writing, "save", slow(100, "save", save_writing.save))
    monkeypatch.setattr(sheets, "draw_sheet", slow(100, "sheet", lambda *given: None))
    monkeypatch.setattr(Profiler, "_write", slow(100, "profile", lambda *given: None))
    monkeypatch.setattr(Validation, "line", slow(100, "validation", lambda *given: {"validation": {"loss": 1.0}}))
    words = [*TINY, "log_every_steps=2", "keep_every_steps=1", "sheet_every_seconds=1e-9", "profile_steps=[3, 1]"]
    trainer = start(load_config(TrainConfig, None, [*words, "validation.batches=1", f"run_dir={tmp_path}"]), clips)
    trainer.config.validation.every_steps = 3
    trainer.validation = Validation(trainer.batches, 1, trainer.world, trainer.sequence)
    assert trainer.run(time.monotonic() + 100)
    assert set(pauses) == {"step", "save", "sheet", "profile", "validation"}
    found = [line["seconds_per_step"] for line in lines(tmp_path) if "seconds_per_step" in line]
    assert found == pytest.approx([1.0] * 4)


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
    for total in (2, 3):
        words = [*TINY, "trackers=[wandb]", f"optimizer.total_steps={total}", f"run_dir={tmp_path}"]
        start(load_config(TrainConfig, None, words), clips).run(time.monotonic() + 100)
    began, first, second, last, again, third, end = told
    assert began["dir"] == str(tmp_path) and began["config"]["optimizer"]["total_steps"] == 2
    assert (first[0], second[0], last, third[0], end) == (1, 2, "finished", 3, "finished")
    assert first[1]["loss"] == lines(tmp_path)[0]["loss"] and all(isinstance(v, float) for v in first[1].values())
    # A run that goes on is the same one there, although its first slice ended well.
    assert began["id"] == again["id"] and began["resume"] == again["resume"] == "allow"


@pytest.mark.parametrize("where", ["start", "step", "end"])
def test_a_tracker_that_fails_does_not_end_the_run(
    where: str, tmp_path: Path, clips: LatentClips, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(place: str) -> Any:
        def call(*given: Any) -> None:
            if place == where:
                raise RuntimeError("no such server")

        return call

    def made(folder: Path, settings: Any) -> Any:
        failing("start")()
        return failing("step"), failing("end")

    monkeypatch.setattr("pavdm_dist.train.run_log._tensorboard", made)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    words = [*TINY, "trackers=[tensorboard]", "optimizer.total_steps=2", f"run_dir={tmp_path}"]
    assert start(load_config(TrainConfig, None, words), clips).run(time.monotonic() + 100)
    assert len(lines(tmp_path)) == 2 and "no such server" in caplog.text


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


def test_a_slice_that_ends_in_a_profile_writes_it_and_the_next_goes_on(tmp_path: Path, clips: LatentClips) -> None:
    words = [*TINY, "profile_steps=[2, 4]", f"run_dir={tmp_path}"]
    for total in (4, 8):
        config = load_config(TrainConfig, None, [*words, f"optimizer.total_steps={total}"])
        start(config, clips).run(time.monotonic() + 100)
    names = sorted(path.stem for path in (tmp_path / "profile").glob("*.json"))
    assert names == ["steps-0000002-0000003-rank0", "steps-0000004-0000005-rank0"]
    for name in names:
        assert "aten::" in (tmp_path / "profile" / f"{name}.txt").read_text()


def test_a_profile_that_saw_no_whole_step_is_none(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, (2, 4), 0)
    profiler.close()
    profiler.before(1)
    profiler.before(3)
    profiler.close()
    profiler.close()
    assert not (tmp_path / "profile").exists()


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


@dataclass(frozen=True)
class TwoProcesses(World):
    """This one and another, as far as they tell each other of faults."""

    others: tuple[str | None, ...] = ()

    def told(self, *wishes: bool) -> list[bool]:
        return [wish or any(self.others) for wish in wishes]

    def gather(self, value: object) -> list[object]:
        return [value, *self.others]


@pytest.mark.parametrize(
    ("mine", "other", "error", "said"),
    [
        (None, "MediaError: gone", EngineError, r"process 1 cannot load validation batch 0 \(MediaError: gone\)"),
        (MediaError("clip 3 is torn"), None, MediaError, "clip 3 is torn"),
    ],
)
def test_a_held_out_clip_that_cannot_be_read_ends_every_process_with_a_sentence(
    mine: Exception | None, other: str | None, error: type[Exception], said: str, tmp_path: Path, clips: LatentClips
) -> None:
    trainer = start(load_config(TrainConfig, None, [*TINY, f"run_dir={tmp_path}"]), clips)

    class Held:
        def batch(self, step: int, rank: int, size: int) -> Any:
            if mine is not None:
                raise mine
            return trainer.batches.batch(step, rank, size)

    world = TwoProcesses(0, 2, others=(other,))
    validation = Validation(Held(), 1, world, SequenceGroup(world, 1))  # type: ignore[arg-type]
    with pytest.raises(error, match=said):
        validation.line(trainer.engine)
    assert trainer.engine.module.training, "training could go on"
