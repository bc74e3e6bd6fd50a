"""Shared fixtures: one Ray cluster a session, one thread per process so that bits are comparable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Idle workers import torch before an actor asks for it: actors are ready seconds earlier.
os.environ.setdefault("RAY_preload_python_modules", "torch")

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Tests compare bits of CPUs; without `-m gpu` a GPU is not seen, so that no default takes it."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster with eight logical CPUs, whatever the machine has."""
    import ray

    ray.init(
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent.parent)}},
    )
    yield
    ray.shutdown()
