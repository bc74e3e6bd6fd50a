"""Shared fixtures: one Ray cluster a session, one thread per process so that bits are comparable."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Idle workers import torch before an actor asks for it: actors are ready seconds earlier.
os.environ.setdefault("RAY_preload_python_modules", "torch")
# Not as Ray's runtime environment: workers that are started in advance do not serve jobs that have one.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
)

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under ``pytest -n N --dist loadgroup`` a file's tests share a process, and so its fixtures.

    All files that use the cluster share one, too, for there is one cluster.
    """
    if config.pluginmanager.hasplugin("xdist"):
        on_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
        for item in items:
            item.add_marker(pytest.mark.xdist_group("ray" if item.path in on_ray else item.path.stem))


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """The command line sets the package's logger up for its process; the next test finds it as it was."""
    package = logging.getLogger("pavdm_dist")
    before = (package.handlers, package.level, package.propagate)
    yield
    package.handlers, package.level, package.propagate = before


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
    )
    yield
    ray.shutdown()
