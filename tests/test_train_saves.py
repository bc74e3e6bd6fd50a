"""Training goes on where it stopped: to the bit under every ZeRO stage, after kills, on other numbers of processes."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_zero import PROGRAM, SETTINGS, SHARD_ALL, apart
from test_zero import run as run_cases
from training import launch, processes_of, start, write_clips
from wan_models import WAN, trainable_folder

from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import CheckpointError, ConfigError, EngineError
from pavdm_dist.train import save_reading, save_writing
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 6)


def stage(number: int, *settings: str) -> list[str]:
    return [f"zero.stage={number}", SHARD_ALL, *settings]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Per stage: ten steps, and five steps, a checkpoint, and five more in a new trainer."""
    folder = tmp_path_factory.mktemp("halves")
    cases: dict[str, Any] = {}
    for number in range(4):
        again = stage(number, f"run_dir={folder / f'first{number}'}", "resume=must")
        cases[f"whole{number}"] = {"settings": stage(number), "steps": 10}
        cases[f"first{number}"] = {"settings": stage(number), "steps": 5, "save": True}
        cases[f"second{number}"] = {"settings": again, "steps": 5}
    return folder, run_cases(folder, clips, cases)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", range(4))
def test_five_and_five_steps_are_ten_to_the_bit(halves: tuple[Path, list[dict[str, Any]]], number: int) -> None:
    found = halves[1][0]
    whole, first, second = (found[f"{name}{number}"] for name in ("whole", "first", "second"))
    assert second["first_step"] == 5
    assert first["loss"] + second["loss"] == whole["loss"]
    for part in ("weights", "average"):
        assert all(torch.equal(second[part][name], value) for name, value in whole[part].items())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_one_process_goes_on_with_what_two_began(
    halves: tuple[Path, list[dict[str, Any]]], clips: Path, tmp_path: Path, number: int
) -> None:
    folder, (found, _) = halves
    shutil.copytree(folder / f"first{number}", tmp_path / "run")
    settings = [*SETTINGS, *stage(number), f"run_dir={tmp_path / 'run'}", "resume=must"]
    trainer = start(load_config(TrainConfig, None, settings), LatentClips(clips))
    assert trainer.step == 5
    assert apart(trainer.whole_weights(), found[f"first{number}"]["average"]) == 0
    losses = [trainer.train_step()["loss"] for _ in range(5)]
    assert losses == pytest.approx(found[f"whole{number}"]["loss"][5:], abs=1e-5)
    assert apart(trainer.whole_weights(), found[f"whole{number}"]["average"]) < 1e-4
    trainer.save()  # in the ordinary form again, and complete
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.suffix != ".py")
    assert names == ["latest", "step0000005", "step0000010"]
    once_more = start(load_config(TrainConfig, None, settings), LatentClips(clips))
    assert once_more.step == 10 and apart(once_more.whole_weights(False), trainer.whole_weights(False)) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_process_goes_on_with_low_rank_changes_that_two_began(clips: Path, tmp_path: Path) -> None:
    """Their checkpoints do not hold the weights that stay as they are."""
    model = trainable_folder(tmp_path / "model", replace(WAN, text_len=16))
    low_rank = [f"model.pretrained={model}", "model.lora.rank=2"]
    cases: dict[str, Any] = {}
    for number in range(4):
        cases[f"first{number}"] = {"settings": stage(number, *low_rank), "steps": 3, "save": True}
        cases[f"whole{number}"] = {"settings": stage(number, *low_rank), "steps": 5}
    found, _ = run_cases(tmp_path, clips, cases)
    for number in range(4):
        folder = tmp_path / f"first{number}"
        settings = [*SETTINGS, *stage(number, *low_rank), f"run_dir={folder}", "resume=must"]
        trainer = start(load_config(TrainConfig, None, settings), LatentClips(clips))
        assert trainer.step == 3
        losses = [trainer.train_step()["loss"] for _ in range(2)]
        assert losses == pytest.approx(found[f"whole{number}"]["loss"][3:], abs=1e-5)
        trained = {name for name in found[f"first{number}"]["weights"] if ".lora_" in name}
        weights, expected = trainer.whole_weights(False, frozen=False), found[f"whole{number}"]["weights"]
        assert weights.keys() == trained
        assert apart(weights, {name: expected[name] for name in trained}) < 1e-4
        trainer.engine.destroy()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_four_processes_go_on_with_what_two_began(
    halves: tuple[Path, list[dict[str, Any]]], clips: Path, tmp_path: Path
) -> None:
    folder, (found, _) = halves
    cases = {}
    for number in (1, 3):
        shutil.copytree(folder / f"first{number}", tmp_path / f"four{number}")
        cases[f"four{number}"] = {"settings": stage(number, "resume=must"), "steps": 5}
    four = run_cases(tmp_path, clips, cases, size=4)[0]
    for number in (1, 3):
        assert four[f"four{number}"]["first_step"] == 5
        assert four[f"four{number}"]["loss"] == pytest.approx(found[f"whole{number}"]["loss"][5:], abs=1e-5)


def test_another_stage_is_refused_by_name(
    halves: tuple[Path, list[dict[str, Any]]], clips: Path, tmp_path: Path
) -> None:
    settings = [*SETTINGS, *stage(3), f"run_dir={halves[0] / 'first1'}"]
    with pytest.raises(ConfigError, match=r"trained with zero\.stage=1, this run has 3: .*model\.pretrained"):
        start(load_config(TrainConfig, None, settings), LatentClips(clips))


@pytest.mark.parametrize("number", [0, 3])
def test_code_in_a_checkpoint_is_not_run(
    halves: tuple[Path, list[dict[str, Any]]], clips: Path, tmp_path: Path, number: int
) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "mark"),)

    run_dir = tmp_path / "run"
    shutil.copytree(halves[0] / f"first{number}", run_dir)
    (folder,) = (run_dir / "checkpoints").glob("step*")
    file = next(folder.glob("*model_states.pt"))
    torch.save({**torch.load(file, weights_only=False), "code": Code()}, file)
    manifest = json.loads((folder / save_reading.MANIFEST).read_text())
    manifest["files"][file.name] = save_reading.fingerprint(file)
    (folder / save_reading.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="no checkpoint is whole; the newest is step0000005"):
        start(load_config(TrainConfig, None, [*SETTINGS, *stage(number), f"run_dir={run_dir}"]), LatentClips(clips))
    assert not (tmp_path / "mark").exists()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("where", "number"), [("in a save", 2), ("in a step", 1)])
def test_a_killed_process_ends_the_others_and_costs_no_more_than_the_steps_since(
    halves: tuple[Path, list[dict[str, Any]]], clips: Path, tmp_path: Path, where: str, number: int
) -> None:
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, *stage(number), f"run_dir={run_dir}"]
    case = {"run": {"settings": settings, "steps": 5, "save": True, "die": where}}
    processes = processes_of([PROGRAM, str(tmp_path), str(clips), json.dumps(case)])
    began = time.monotonic()
    codes = [process.communicate(timeout=120) and process.returncode for process in processes]
    assert codes[1] == -9 and codes[0] not in (0, None) and time.monotonic() - began < 100
    checkpoints = run_dir / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step0000005"
    assert (checkpoints / "step0000006.partial").exists() == (where == "in a save")
    case = {"run": {"settings": [*settings, "resume=must"], "steps": 5, "save": True}}
    launch([PROGRAM, str(tmp_path), str(clips), json.dumps(case)])
    found, whole = torch.load(tmp_path / "rank0.pt")["run"], halves[1][0][f"whole{number}"]
    assert found["loss"] == whole["loss"][5:]
    assert all(torch.equal(found["average"][name], value) for name, value in whole["average"].items())
    assert not list(checkpoints.glob("*.partial")), "what the kill left behind is gone"


def one(folder: Path, clips: Path, *settings: str) -> Trainer:
    return start(load_config(TrainConfig, None, [*SETTINGS, f"run_dir={folder}", *settings]), LatentClips(clips))


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    tmp_path: Path, clips: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = one(tmp_path, clips)
    for _ in range(2):
        trainer.train_step()
        trainer.save()
    newest = tmp_path / "checkpoints" / "step0000002"
    file = next(newest.glob("*model_states.pt"))
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "lose":
        next(newest.glob("average-*")).unlink()
    else:
        (newest / "complete.json").write_text("{")
    again = one(tmp_path, clips)
    assert again.step == 1 and "step0000002 is passed over" in caplog.text
    again.train_step()
    again.save()  # in place of the damaged one
    assert one(tmp_path, clips).step == 2
    for path in (tmp_path / "checkpoints").glob("step*/complete.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole; the newest is step0000002"):
        one(tmp_path, clips)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latest", b"\xff\xfe"),
        ("latest", None),
        ("step0000002/complete.json", b"[]"),
        ("step0000002/complete.json", {"identity": None}),
        ("step0000002/complete.json", {"layout": {"zero_stage": 0, "processes": 1, "shards": 1}}),
        ("step0000002/complete.json", {"files": []}),
    ],
    ids=["no text", "a folder", "no object", "no identity", "another version", "no files"],
)
def test_small_files_that_were_damaged_are_passed_over_with_the_reason(
    tmp_path: Path, clips: Path, name: str, content: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = one(tmp_path, clips)
    for _ in range(2):
        trainer.train_step()
        trainer.save()
    file = tmp_path / "checkpoints" / name
    if isinstance(content, dict):
        file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
    elif content is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(content)
    again = one(tmp_path, clips)
    assert again.step == (2 if name == "latest" else 1)
    assert f"{name.partition('/')[0]} is passed over: " in caplog.text and "is missing or broken" in caplog.text
    again.train_step()
    again.save()
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step{again.step:07d}"
    assert one(tmp_path, clips).step == again.step


def test_the_last_ones_and_round_numbers_are_kept(tmp_path: Path, clips: Path) -> None:
    trainer = one(tmp_path, clips, "keep_last=2", "keep_every_steps=3")
    for _ in range(8):
        trainer.train_step()
        trainer.save()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step*"))
    assert kept == ["step0000003", "step0000006", "step0000007", "step0000008"]


def test_round_numbers_are_kept_by_a_run_that_saves_by_the_clock(tmp_path: Path, clips: Path) -> None:
    one(tmp_path, clips, "keep_last=1", "keep_every_steps=3", "optimizer.total_steps=8").run(time.monotonic() + 100)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step*"))
    assert kept == ["step0000003", "step0000006", "step0000008"]


def test_what_was_passed_over_does_not_push_out_what_is_whole(tmp_path: Path, clips: Path) -> None:
    trainer = one(tmp_path, clips, "keep_last=2")
    for _ in range(3):
        trainer.train_step()
        trainer.save()
    (tmp_path / "checkpoints" / "step0000003" / "complete.json").unlink()
    (tmp_path / "checkpoints" / "step0000001-universal").mkdir()
    trainer = one(tmp_path, clips, "keep_last=2")
    assert trainer.step == 2
    save_writing.save(
        trainer.engine, trainer.average, tmp_path / "checkpoints", 2, trainer.identity, trainer.layout,
        trainer.world, 2,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step*")) == ["step0000002"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_gradient_that_is_no_number_reaches_neither_weights_nor_checkpoints(
    tmp_path: Path, clips: Path, number: int
) -> None:
    trainer = one(tmp_path, clips, f"zero.stage={number}")
    trainer.train_step()
    trainer.save()
    before = trainer.whole_weights(averaged=False)
    spoil = trainer.engine.module.transformer.final_layer.linear.weight.register_hook(lambda g: g * torch.nan)
    with pytest.raises(EngineError, match=r"the gradient is no number at step 1 .* the last checkpoint is kept"):
        trainer.train_step()
    spoil.remove()
    assert apart(trainer.whole_weights(averaged=False), before) == 0
    assert one(tmp_path, clips, f"zero.stage={number}").train_step()["loss"] > 0
