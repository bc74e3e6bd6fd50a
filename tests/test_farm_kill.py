"""Nodes, actors and the farm itself killed at random: every shot complete or failed with a reason, none made twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from farms import farm_config, latents_of, packets_of, run_farm
from helpers import tiny_checkpoint

from pavdm_dist.errors import FailedVideosError
from pavdm_dist.farm.tree import Tree

SCRIPT = Path(__file__).parent / "farm_kills.py"


def _trial(tmp_path: Path, **chosen: int) -> dict[str, Any]:
    model = tiny_checkpoint(tmp_path / "model")
    words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(model), str(tmp_path), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "farm.log").read_text()[-5000:]
    report = json.loads(done.stdout.splitlines()[-1])
    _check(tmp_path, model, chosen["shots"])
    return report


def _check(folder: Path, model: Path, shots: int) -> None:
    tree = Tree(str(folder / "out"))
    asked = [shot.id for shot in tree.shots()]
    assert len(asked) == shots
    states = {id: tree.state(id) for id in asked}
    failed = {id: state.failure for id, state in states.items() if state.standing == "failed"}
    assert {state.standing for state in states.values()} == {"done", "failed"}
    assert [failure.kind for failure in failed.values() if failure is not None] == ["input"], failed
    with pytest.raises(FailedVideosError, match="1 of"):  # an undisturbed one, in one process
        run_farm(farm_config(model, save_latents=True), folder / "kills.jsonl", folder / "alone")
    assert latents_of(folder / "out") == latents_of(folder / "alone")
    for video in (folder / "alone").glob("shots/*/video.mp4"):
        mine = folder / "out" / video.relative_to(folder / "alone")
        assert packets_of(mine) == packets_of(video)
        assert not list(mine.parent.glob("*.parts"))
    made: Counter[str] = Counter()
    for log in (folder / "out/logs").glob("*.jsonl"):
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            made[entry.get("shot")] += entry["message"].endswith(": done")
    made.pop(None, None)  # type: ignore[call-overload]
    assert max(made.values()) == 1, "rendered twice"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_shots_outlive_nodes_actors_and_the_farm(tmp_path: Path) -> None:
    report = _trial(tmp_path, shots=100, kills=8, drivers=2, seed=0)
    assert report["statuses"] == [-9, -9, 101] and len(report["struck"]) == 10
    assert {"a node", "the farm"} < {one["what"] for one in report["struck"]}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_few_shots_outlive_a_node_an_actor_and_the_farm(tmp_path: Path) -> None:
    report = _trial(tmp_path, shots=12, kills=2, drivers=1, seed=3)
    assert report["statuses"] == [-9, 101]
