"""Every launcher runs the same loop: local processes, torchrun on several nodes, Ray Train; and what ends a run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Program
from safetensors import safe_open
from safetensors.torch import save_file
from training import TINY, environments, launch, prepare_run, processes_of, start, write_clips

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.train import training_data
from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import ConfigError, EngineError
from pavdm_dist.train.checks import check_settings, memory_advice
from pavdm_dist.train.ranks import free_port, join_world
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEPS = 6
SETTINGS = [
    *TINY,
    "data.batch_size=4",
    "data.still_batch_size=4",
    "optimizer.name=adamw",
    "zero.stage=2",
    f"optimizer.total_steps={STEPS}",
    "max_seconds=100",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a codec and cached clips."""
    return prepare_run(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


def words(run_dir: Path, *settings: str) -> list[str]:
    return ["train", *SETTINGS, f"run_dir={run_dir}", f"codec.folder={run_dir / 'vae'}", *settings]


def alone() -> dict[str, str]:
    """The environment of somebody's shell: no launcher's variables."""
    path = ":".join(entry for entry in sys.path if entry)
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process' environment without a launcher's variables."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def pavdm(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pavdm_dist", *arguments]
    return subprocess.run(command, env=alone(), capture_output=True, text=True, timeout=150, check=False)


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    config = load_config(TrainConfig, None, [*SETTINGS, f"run_dir={tmp_path_factory.mktemp('one')}"])
    trainer = start(config, LatentClips(prepared / "clips"))
    return [trainer.train_step()["loss"] for _ in range(STEPS)]


@pytest.mark.slow  # tests/test_train_parallel.py has the losses, and below they are stopped by a signal
@pytest.mark.timeout(180)
def test_two_local_processes_train_and_export(run_dir: Path, expected: list[float]) -> None:
    done = pavdm(words(run_dir, "launch.processes=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run_dir) == pytest.approx(expected, abs=1e-4)
    assert Checkpoint.open(run_dir / "model").backbone.config.depth == 1


@pytest.mark.timeout(180)
def test_torchrun_on_two_nodes(run_dir: Path, expected: list[float]) -> None:
    port = free_port()
    nodes = [
        Program(
            ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
             "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "pavdm_dist", *words(run_dir)],
            alone(),
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=150)[0] for node in nodes]
    for node, output in zip(nodes, outputs, strict=True):
        assert node.returncode == 0, output[-4000:]
    assert losses(run_dir) == pytest.approx(expected, abs=1e-4)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("more", "number", "code", "said"),
    [
        ([], signal.SIGTERM, 0, "slice over, run again"),
        pytest.param([], signal.SIGINT, 130, "interrupted: saved at step", marks=pytest.mark.slow),
        (["launch.processes=2"], signal.SIGTERM, 2, "stopped by SIGTERM"),
        # tests/test_train_signals.py has it do what SIGTERM does.
        pytest.param([], signal.SIGHUP, 0, "slice over, run again", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_well(run_dir: Path, more: list[str], number: int, code: int, said: str) -> None:
    process = Program(["-m", "pavdm_dist", *words(run_dir, "optimizer.total_steps=100000", *more)], alone())
    while not (run_dir / "log.jsonl").exists() and process.returncode is None:
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == code and said in output
    step = int((run_dir / "checkpoints" / "latest").read_text()[4:])
    assert len(losses(run_dir)) == step > 0
    assert Checkpoint.open(run_dir / "model").backbone.config.depth == 1


@pytest.mark.timeout(180)
def test_processes_of_a_command_that_is_killed_save_and_end(run_dir: Path) -> None:
    process = Program(
        ["-m", "pavdm_dist", *words(run_dir, "optimizer.total_steps=100000", "launch.processes=2")], alone()
    )
    while not (run_dir / "log.jsonl").exists() and process.returncode is None:
        time.sleep(0.1)
    process.kill()
    end = time.monotonic() + 60  # before their slice is over
    while list(run_dir.glob(".pavdm-lock*")):
        assert time.monotonic() < end, "they train on unattended"
        time.sleep(0.1)
    step = int((run_dir / "checkpoints" / "latest").read_text()[4:])
    assert len(losses(run_dir)) == step > 0
    assert Checkpoint.open(run_dir / "model").backbone.config.depth == 1


def test_the_provider_reaches_other_processes_by_name() -> None:
    assert pickle.loads(pickle.dumps(training_data)) is training_data


@pytest.mark.usefixtures("shell")
def test_bad_settings_start_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(run_dir, "launch.processes=3")) == 2
    assert capsys.readouterr().err.count("data.batch_size=4 does not divide among 3 processes: use 3 or 6") == 1
    assert cli.main(words(run_dir, "launch.processes=2", "launch.ray_workers=2")) == 2
    assert "choose one of the two" in capsys.readouterr().err
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("shell")
def test_a_loss_that_is_no_number_ends_every_process_and_names_the_clips(run_dir: Path) -> None:
    shard = run_dir / "clips" / "clips-00000.safetensors"
    with safe_open(shard, framework="pt") as reader:
        latents, meta = reader.get_tensor("latents"), reader.metadata()
    assert cli.main(words(run_dir, "optimizer.total_steps=2")) == 0
    spoilt = latents.clone()
    spoilt[7] = torch.nan
    save_file({"latents": spoilt}, shard, metadata=meta)
    prompt = json.loads(meta["prompts"])[7]
    processes = processes_of(["-m", "pavdm_dist", *words(run_dir, "optimizer.total_steps=60")])
    said = [process.communicate(timeout=150)[0] for process in processes]
    assert all(process.returncode == 2 for process in processes)
    assert all("the loss is no number at step" in text for text in said) and prompt in "".join(said)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step0000002"


def test_a_full_memory_says_what_frees_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = LatentClips(write_clips(tmp_path / "clips", 6))
    trainer = start(load_config(TrainConfig, None, [*TINY, f"run_dir={tmp_path}"]), clips)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.engine, "backward", full)
    with pytest.raises(EngineError, match=r"full at step 0.*recompute.*accumulation=2.*name=adamw"):
        trainer.train_step()


@pytest.mark.parametrize(
    ("chosen", "size", "advised"),
    [
        ([], 1, ["zero.recompute=every:1", "optimizer.accumulation=2", "optimizer.name=adamw zero.stage=1"]),
        (["optimizer.name=adamw", "data.batch_size=16", "data.still_batch_size=16", "optimizer.accumulation=2"], 8,
         ["zero.recompute=every:1", "zero.stage=1"]),
        (["optimizer.name=adamw", "zero.stage=3", "zero.offload=all", "zero.recompute=every:1"], 1,
         ["optimizer.accumulation=2"]),
    ],
)  # fmt: skip
def test_what_is_advised_is_allowed(chosen: list[str], size: int, advised: list[str]) -> None:
    config = load_config(TrainConfig, None, [*TINY, *chosen])
    said = memory_advice(config, 3, size).partition("is kept: ")[2]
    for words_of, idea in zip(said.split("; "), advised, strict=False):
        assert words_of.startswith(idea)
    for idea in advised:
        assert idea in said
        parts = idea.split()
        check_settings(load_config(TrainConfig, None, [*TINY, *chosen, *parts]), size)


FAULT_PROGRAM = """
import sys
import time
from pathlib import Path
from training import start
from pavdm_dist.values.merging import load_config
from pavdm_dist.errors import MediaError
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.validation import Validation
from pavdm_dist.digits.cache import LatentClips
class Broken:
    def __init__(self, batches, step):
        self.batches, self.step = batches, step
    def __getattr__(self, name):
        return getattr(self.batches, name)
    def batch(self, step, rank, size):
        if step == self.step and rank == 1:
            raise MediaError("videos/7.mp4: cannot be read")
        return self.batches.batch(step, rank, size)
trainer = start(load_config(TrainConfig, None, sys.argv[3:]), LatentClips(Path(sys.argv[2]) / "clips"))
if sys.argv[1] == "step 2":
    trainer.batches = Broken(trainer.batches, 2)
else:
    trainer.config.validation.every_steps = 2
    trainer.validation = Validation(Broken(trainer.batches, 0), 1, trainer.world, trainer.sequence)
try:
    trainer.run(time.monotonic() + 100)
except Exception as error:
    print(trainer.world.rank, type(error).__name__, error, "at", trainer.step)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", ["step 2", "validation batch 0"])
def test_a_batch_that_one_process_cannot_load_saves_and_ends_all_with_a_sentence(what: str, run_dir: Path) -> None:
    one, two = launch(["-c", FAULT_PROGRAM, what, str(run_dir), *SETTINGS, f"run_dir={run_dir}"], timeout=100)
    assert f"0 EngineError process 1 cannot load {what} (MediaError: videos/7.mp4: cannot be read) at 2" in one
    assert "1 MediaError videos/7.mp4: cannot be read at 2" in two
    assert (run_dir / "checkpoints" / "latest").read_text() == "step0000002", "the weights are sound"


@pytest.mark.timeout(120)
def test_what_the_first_process_refuses_ends_all_with_its_sentence(run_dir: Path) -> None:
    processes = processes_of(["-m", "pavdm_dist", *words(run_dir, "data.num_latents=8")])
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert all(process.returncode == 2 for process in processes)
    assert all("was made with another num_latents" in text and "Traceback" not in text for text in said), said


def test_a_launcher_that_sets_half_of_its_variables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="MASTER_PORT is not set although WORLD_SIZE=2"):
        join_world()


LEAVING_PROGRAM = """
import atexit
import torch
# What is registered first runs last.
atexit.register(lambda: print("in the group:", torch.distributed.is_initialized()))
from pavdm_dist.train.ranks import join_world
print("mean", float(join_world().mean(torch.tensor(3.0))))
"""


@pytest.mark.timeout(120)
def test_processes_leave_the_group_before_the_interpreter_ends() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", LEAVING_PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)
        for environment in environments(2)
    ]
    for process in processes:
        text, _ = process.communicate(timeout=100)
        assert process.returncode == 0
        assert "mean 3.0" in text and "in the group: False" in text


SHEETS_PROGRAM = """
import sys
from pathlib import Path
from training import start
from pavdm_dist.values.merging import load_config
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.digits.cache import LatentClips
run = Path(sys.argv[1])
for stage in range(4):
    config = load_config(TrainConfig, None, [*sys.argv[2:], f"zero.stage={stage}", f"run_dir={run / str(stage)}"])
    trainer = start(config, LatentClips(run / "clips"), run / "vae", ("a red three drifting",))
    trainer.train_step()
    trainer.sheet()
    trainer.train_step()
    trainer.engine.destroy()
"""


@pytest.mark.timeout(200)
def test_sheets_are_drawn_under_every_stage_and_no_process_hangs(run_dir: Path) -> None:
    launch(["-c", SHEETS_PROGRAM, str(run_dir), *SETTINGS], timeout=180)
    sheets = [(run_dir / str(stage) / "sheets" / "step0000001.png").read_bytes() for stage in range(4)]
    assert all(len(sheet) > 100 for sheet in sheets)


RAY_PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
import psutil
import ray
from pavdm_dist.cli import main

run, kill = Path(sys.argv[1]), sys.argv[2]
ray.init(num_cpus=2, include_dashboard=False)

def shoot():
    while not (run / "checkpoints" / "latest").exists():
        time.sleep(0.05)
    if kill.isdecimal():
        return os.kill(os.getpid(), int(kill))
    named = [(process, " ".join(process.cmdline())) for process in psutil.process_iter()]
    group = [process for process, name in named if name.startswith("ray::RayTrainWorker")]
    group[-1].kill()
    print("killed one of", len(group), flush=True)

if kill != "leave":
    threading.Thread(target=shoot, daemon=True).start()
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kill", ["kill", "leave"])
def test_ray_train_gives_the_same_losses_also_after_a_worker_was_killed(
    run_dir: Path, expected: list[float], kill: str
) -> None:
    more = ["launch.ray_workers=2", "checkpoint_every_seconds=0", "max_seconds=200"]
    command = [sys.executable, "-c", RAY_PROGRAM, str(run_dir), kill, *words(run_dir, *more)]
    done = subprocess.run(command, env=alone(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ("killed" in done.stdout) == (kill == "kill")
    by_step: dict[int, Any] = {}
    for line in map(json.loads, (run_dir / "log.jsonl").read_text().splitlines()):
        assert by_step.setdefault(line["step"], line["loss"]) == line["loss"], "done again: the same to the bit"
    assert [by_step[step] for step in sorted(by_step)] == pytest.approx(expected, abs=1e-4)
    assert Checkpoint.open(run_dir / "model").backbone.config.depth == 1


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ray_train_ends_at_a_signal_with_a_checkpoint_and_the_model(run_dir: Path) -> None:
    more = ["launch.ray_workers=1", "checkpoint_every_seconds=0", "optimizer.total_steps=100000"]
    command = [sys.executable, "-c", RAY_PROGRAM, str(run_dir), str(int(signal.SIGINT)), *words(run_dir, *more)]
    done = subprocess.run(command, env=alone(), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 130, done.stdout[-3000:] + done.stderr[-3000:]
    where = f"saved in {run_dir / 'checkpoints'}, weights in {run_dir / 'model'}; run again to go on"
    assert f"pavdm: interrupted: {where}" in done.stderr and "Traceback" not in done.stderr
    steps = json.loads((run_dir / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step{steps:07d}" and steps < 100000
    assert Checkpoint.open(run_dir / "model").backbone.config.depth == 1
    assert not list(run_dir.glob(".pavdm-*"))
