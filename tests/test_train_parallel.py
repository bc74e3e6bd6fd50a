"""Two training processes take the steps one would take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import TINY, write_clips

from pavdm_dist.config import TrainConfig, load_config
from pavdm_dist.train.data import LatentClips
from pavdm_dist.train.loop import Trainer

STEPS = 6
SETTINGS = [
    *TINY,
    "data.batch_size=4",
    "data.still_steps=3",
    "data.still_batch_size=6",
    "optimizer.lr=0.001",
    f"optimizer.total_steps={STEPS}",
]
PROGRAM = """
import sys
from pathlib import Path
from pavdm_dist.config import TrainConfig, load_config
from pavdm_dist.train.data import LatentClips
from pavdm_dist.train.loop import Trainer
run = Path(sys.argv[1])
config = load_config(TrainConfig, None, sys.argv[2:])
trainer = Trainer(config, run / "vae", LatentClips(run / "clips"))
assert trainer.run(float("inf"))
"""


def launch(arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Two processes, set up as torchrun does."""
    from pavdm_dist.train.backend import _free_port

    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(_free_port())}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**shared, "MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_clips(tmp_path / "run" / "clips", 4)
    return tmp_path / "run"


@pytest.mark.timeout(180)
def test_two_processes_train_as_one_and_leave_one_checkpoint(run: Path) -> None:
    processes = launch(["-c", PROGRAM, str(run), *SETTINGS, f"run_dir={run}"])
    outputs = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len((run / "log.jsonl").read_text().splitlines()) == STEPS

    clips = LatentClips(run / "clips")
    alone = Trainer(load_config(TrainConfig, None, [*SETTINGS, f"run_dir={run / 'alone'}"]), run, clips)
    before = {name: value.detach().clone() for name, value in alone.engine.module.named_parameters()}
    for _ in range(STEPS):
        alone.train_step()
    together = Trainer(load_config(TrainConfig, None, [*SETTINGS, f"run_dir={run}", "resume=must"]), run, clips)
    assert together.step == STEPS
    expected = dict(alone.engine.module.named_parameters())
    for name, value in together.engine.module.named_parameters():
        # Means of halves round differently, which Muon's bfloat16 products enlarge.
        for got, want in ((value, expected[name]), (together.average.values[name], alone.average.values[name])):
            moved = (want - before[name]).norm()
            assert moved > 0 and (got - want).norm() < 0.05 * moved, name


@pytest.mark.timeout(180)
def test_a_batch_that_does_not_divide_is_refused_by_every_process(run: Path) -> None:
    arguments = ["-m", "pavdm_dist", "train", *SETTINGS, "data.still_batch_size=5", f"run_dir={run}"]
    processes = launch(arguments)
    for process in processes:
        output = process.communicate(timeout=150)[0]
        assert process.returncode == 2
        assert "data.still_batch_size=5 does not divide among 2 processes: use a multiple of 2." in output
    assert not (run / "checkpoints").exists()
