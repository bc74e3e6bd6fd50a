"""Two training processes take the steps one would take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training import TINY, launch, processes_of, start, write_clips

from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config

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
from training import start
from pavdm_dist.values.merging import load_config
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.digits.cache import LatentClips
config = load_config(TrainConfig, None, sys.argv[2:])
trainer = start(config, LatentClips(Path(sys.argv[1]) / "clips"))
assert trainer.run(float("inf"))
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_clips(tmp_path / "run" / "clips", 4)
    return tmp_path / "run"


@pytest.mark.timeout(180)
def test_two_processes_train_as_one_and_leave_one_checkpoint(run: Path) -> None:
    launch(["-c", PROGRAM, str(run), *SETTINGS, f"run_dir={run}"])
    assert len((run / "log.jsonl").read_text().splitlines()) == STEPS

    clips = LatentClips(run / "clips")
    alone = start(load_config(TrainConfig, None, [*SETTINGS, f"run_dir={run / 'alone'}"]), clips)
    before = {name: value.detach().clone() for name, value in alone.engine.module.named_parameters()}
    losses = [alone.train_step()["loss"] for _ in range(STEPS)]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-3)
    together = start(load_config(TrainConfig, None, [*SETTINGS, f"run_dir={run}", "resume=must"]), clips)
    assert together.step == STEPS
    # Means of halves round differently, and Muon lifts a matrix whose gradient is mostly rounding to full size: a
    # branch that is still silent may differ, the model as a whole must not.
    for averaged in (False, True):
        got, want = together.whole_weights(averaged), alone.whole_weights(averaged)
        apart = sum(float((got[name] - want[name]).square().sum()) for name in before)
        moved = sum(float((want[name] - before[name]).square().sum()) for name in before)
        assert moved > 0 and apart**0.5 < 0.03 * moved**0.5


@pytest.mark.timeout(180)
def test_a_batch_that_does_not_divide_is_refused_by_every_process(run: Path) -> None:
    arguments = ["-m", "pavdm_dist", "train", *SETTINGS, "data.still_batch_size=5", f"run_dir={run}"]
    processes = processes_of(arguments)
    for process in processes:
        output = process.communicate(timeout=150)[0]
        assert process.returncode == 2
        assert "data.still_batch_size=5 does not divide among 2 processes: use 4 or 6" in output
    assert not (run / "checkpoints").exists()
