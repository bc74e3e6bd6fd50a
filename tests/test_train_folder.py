"""The folder of a training run: one that all processes share, that one run writes, and whose disk may be full."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError
from test_train_launch import LAUNCHER, alone
from test_zero import SETTINGS, SHARD_ALL
from training import TINY, Program, prepare_run, processes_of, start, write_clips

from pavdm_dist import cli
from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import EngineError
from pavdm_dist.io.lock import FOLDER_LOCK
from pavdm_dist.train import run_folder, save_writing
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of somebody's shell: no launcher's variables."""
    for name in (*LAUNCHER, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 6)


def one(folder: Path, clips: Path, *settings: str) -> Trainer:
    return start(load_config(TrainConfig, None, [*SETTINGS, f"run_dir={folder}", *settings]), LatentClips(clips))


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- shared -----------------------------------------------------------------------------------------------------

SHARED = """
import os, sys
from pavdm_dist.cli import main
from pavdm_dist.train import run_folder
run_folder.SHARED_S = 0.5
os.chdir(os.path.join(sys.argv[1], os.environ["RANK"]))
sys.exit(main(["train", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(
    ("settings", "lacks"),
    [
        (["run_dir=run"], r"run_dir=run: \S+/1/run on \S+ does not show what process 0 on \S+ wrote there"),
        (["run_dir={shared}", "codec.folder=vae"], r"codec.folder=vae: \S+/1/vae on \S+ is not there, as it is for"),
    ],
)
def test_folders_that_processes_do_not_share_are_named_in_the_first_seconds(
    settings: list[str], lacks: str, tmp_path: Path
) -> None:
    """Two machines' worth: the same relative path, in two folders."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    (tmp_path / "0" / "vae").mkdir()
    words = [word.format(shared=tmp_path / "shared") for word in settings]
    more = ["data.batch_size=4", "data.still_batch_size=4", "optimizer.name=adamw"]
    processes = processes_of(["-c", SHARED, str(tmp_path), *TINY, *more, *words])
    for process in processes:
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 2 and "Traceback" not in said, said
        assert re.search(f"pavdm: {lacks}.*; it must be a folder that all machines share, under the same path", said), (
            said
        )
    assert not [name for name in tree(tmp_path) if "seen-by-all" in name or "lock" in name or "checkpoints" in name]


def test_a_checkpoint_whose_parts_the_first_process_does_not_see_is_none(
    tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_writing, "SHARED_S", 0.3)
    trainer = one(tmp_path, clips)
    trainer.train_step()
    trainer.save()
    trainer.train_step()
    write = trainer.average.save

    def elsewhere(folder: Path, rank: int, size: int) -> None:
        (tmp_path / "elsewhere").mkdir()
        write(tmp_path / "elsewhere", rank, size)

    monkeypatch.setattr(trainer.average, "save", elsewhere)
    with pytest.raises(EngineError, match=r"step0000002\.partial lacks the files of process 0; run_dir must be"):
        trainer.save()
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step0000001"


# --- owned ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a codec and cached clips."""
    return prepare_run(tmp_path_factory.mktemp("prepared"))


def words(run_dir: Path, *settings: str) -> list[str]:
    return [
        "train",
        *TINY,
        "data.still_batch_size=4",
        f"run_dir={run_dir}",
        f"codec.folder={run_dir / 'vae'}",
        *settings,
    ]


def test_a_second_run_in_the_folder_is_refused_while_the_first_one_lives(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(prepared, run_dir)
    left = run_dir / "checkpoints" / "step0000007.partial"
    foreign = run_dir / "checkpoints" / "step-by-step.partial"
    for folder in (left, foreign):
        folder.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    first = Program(["-m", "pavdm_dist", *words(run_dir, "optimizer.total_steps=100000")], environment)
    while not (run_dir / "log.jsonl").exists():
        time.sleep(0.1)
    assert not left.exists() and foreign.exists(), "what a run that was killed had not finished is gone, no more"
    for more in ([], ["launch.processes=2"], ["launch.ray_workers=1"]):
        monkeypatch.setenv("SLURM_NTASKS", "2")
        assert cli.main(words(run_dir, *more)) == 2
        said = capsys.readouterr().err
        assert f"pavdm: run_dir={run_dir} is being written by process " in said and "on this machine" in said
        assert "SLURM_NTASKS=2: to train in several processes, launch with torchrun" in said
    first.kill()
    first.communicate(timeout=60)
    steps = [json.loads(line)["step"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    # Nobody has to clean up after a kill.
    assert cli.main(words(run_dir, f"optimizer.total_steps={steps[-1] + 1}")) == 0
    assert not (run_dir / FOLDER_LOCK).exists()


def test_a_run_whose_folder_was_taken_over_writes_nothing_more(tmp_path: Path, clips: Path) -> None:
    with run_folder.owned(tmp_path) as mine:
        config = load_config(TrainConfig, None, [*SETTINGS, f"run_dir={tmp_path}"])
        trainer = start(config, LatentClips(clips))
        trainer.guard = mine.guard
        trainer.train_step()
        trainer.save()
        trainer.train_step()
        lock = tmp_path / FOLDER_LOCK
        lock.write_text(lock.read_text().replace('"token": "', '"token": "other'))
        time.sleep(1.1)  # the lock is read once a second
        with pytest.raises(EngineError, match=r"run_dir=\S+: another process took it over.*; nothing more is written"):
            trainer.save()
    assert lock.exists(), "it is the other's"
    assert tree(tmp_path / "checkpoints")[0].startswith("latest")
    assert not list((tmp_path / "checkpoints").glob("step0000002*"))


def test_who_writes_for_the_owner_writes_while_he_owns_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_PATIENCE_S", 0.1)
    with run_folder.owned(tmp_path) as mine:
        guard = run_folder.guard_for(tmp_path, mine.token)
        assert guard() is None
    gone = f"run_dir={tmp_path}: the process that owned it is gone, or another run took it over"
    assert guard() == gone
    with run_folder.owned(tmp_path):
        assert guard() == gone
    assert run_folder.guard_for(tmp_path, None)() == gone


def test_a_wish_to_stop_is_of_one_run(tmp_path: Path) -> None:
    run_folder.ask_to_stop(tmp_path, "gone")  # by a run that lost power
    with run_folder.owned(tmp_path) as mine:
        assert tree(tmp_path) == [FOLDER_LOCK] and not run_folder.asked_to_stop(tmp_path, mine.token)
        run_folder.ask_to_stop(tmp_path, mine.token)
        assert run_folder.asked_to_stop(tmp_path, mine.token)
    assert tree(tmp_path) == []


def test_who_slept_through_a_takeover_stops_nobody(tmp_path: Path) -> None:
    """It stood still, another took its folder over and trains there; then it wakes, hears a signal and ends."""
    with run_folder.owned(tmp_path) as slept:
        (tmp_path / FOLDER_LOCK).unlink()  # as it is after three minutes without a sign of life
        with run_folder.owned(tmp_path) as mine:
            assert slept.guard() is None, "it has not looked yet"
            run_folder.ask_to_stop(tmp_path, slept.token)
            assert not run_folder.asked_to_stop(tmp_path, mine.token)
            run_folder.ask_to_stop(tmp_path, mine.token)
            assert run_folder.asked_to_stop(tmp_path, mine.token)
            (tmp_path / "kept").touch()
    assert tree(tmp_path) == ["kept"]


# --- full -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_is_a_sentence_and_leaves_nothing(tmp_path: Path, clips: Path) -> None:
    trainer = one(tmp_path, clips)
    trainer.train_step()
    trainer.save()
    trainer.train_step()
    before, limits = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(EngineError) as refused:
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = str(refused.value)
    assert "the checkpoint of step 2 cannot be written: File too large (about " in said and " MB are free)" in said
    assert "the last one, step0000001, is kept; make room and run again to go on" in said
    assert tree(tmp_path) == before
    trainer.save()  # room was made
    assert one(tmp_path, clips).step == 2


FULL = """
import resource, sys
from pathlib import Path
from training import start
from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import EngineError
from pavdm_dist.values.merging import load_config
from pavdm_dist.train.train_settings import TrainConfig
trainer = start(load_config(TrainConfig, None, sys.argv[2:]), LatentClips(Path(sys.argv[1])))
trainer.train_step()
trainer.save()
trainer.train_step()
if trainer.world.rank == 1:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
try:
    trainer.save()
except EngineError as error:
    print(trainer.world.rank, error)
if trainer.world.rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
trainer.save()
print("saved", trainer.saved)
"""


@pytest.mark.parametrize("stage", [1, 3])
def test_one_process_that_cannot_write_ends_the_save_of_all(tmp_path: Path, clips: Path, stage: int) -> None:
    settings = [*SETTINGS, f"zero.stage={stage}", SHARD_ALL, f"run_dir={tmp_path}"]
    for process in processes_of(["-c", FULL, str(clips), *settings]):
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 0 and "Traceback" not in said, said
        assert "the checkpoint of step 2 cannot be written: File too large" in said and "saved 2" in said, said


def test_a_log_that_cannot_be_written_ends_no_run_and_an_export_is_a_sentence(
    tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = one(tmp_path, clips)
    (tmp_path / "log.jsonl").mkdir()
    trainer.train_step(trainer.load())
    trainer._log()
    assert "step 1 is not logged: [Errno 21] Is a directory" in caplog.text
    for fault in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):

        def full(*_: object, fault: Exception = fault) -> None:
            raise fault

        monkeypatch.setattr("pavdm_dist.train.trainer.export_model", full)
        with pytest.raises(
            EngineError, match=r"export=\S+model: cannot be written: .*No space left on device; the check"
        ):
            trainer.export(tmp_path / "model")


@pytest.mark.slow
def test_a_run_that_cannot_go_on_says_so_without_a_traceback(prepared: Path, tmp_path: Path) -> None:
    """Also where torchrun, which this command starts, would add one."""
    run_dir = tmp_path / "run"
    shutil.copytree(prepared, run_dir)
    settings = words(run_dir, "optimizer.name=adamw", "zero.stage=1", "launch.processes=2")
    for more, status, said in (
        (["optimizer.total_steps=2"], 0, "all steps done"),
        (["optimizer.total_steps=4", "seed=7"], 2, "was trained with run.seed=0, this run has 7"),
    ):
        command = [sys.executable, "-m", "pavdm_dist", *settings, *more]
        done = subprocess.run(command, env=alone(), capture_output=True, text=True, timeout=100)
        assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr, done.stderr
