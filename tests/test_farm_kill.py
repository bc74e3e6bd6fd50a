"""Nodes, actors and the farm itself killed at random. ``tests/test_nodes.py`` has a short form of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from farm_kills import Plan, Trial, cluster_of_nodes, drawn
from helpers import tiny_checkpoint


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_shots_outlive_nodes_actors_and_the_farm(tmp_path: Path) -> None:
    with cluster_of_nodes(nodes=3, cpus=2) as nodes:
        model = tiny_checkpoint(tmp_path / "model")
        trial = Trial(model, tmp_path, Plan(100, drawn(100, kills=8, drivers=2, seed=0)), nodes)
        trial.run()
    assert trial.statuses == [-9, -9, 101] and len(trial.struck) == 10
    assert set(trial.struck) == {"an actor", "a node", "the farm"}
