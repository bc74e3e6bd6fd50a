"""Shared fixtures: one Ray cluster a session, one thread per process so that bits are comparable."""

from __future__ import annotations

import ast
import faulthandler
import gc
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Idle workers import torch before an actor asks for it: actors are ready seconds earlier.
os.environ.setdefault("RAY_preload_python_modules", "torch")
# Ray's workers are nice by 15: beside the other processes of `-n N` they got a thirtieth of a core, and time ran out.
os.environ.setdefault("RAY_worker_niceness", "0")
# Hundreds of processes are started here; each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Not as Ray's runtime environment: workers that are started in advance do not serve jobs that have one.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
)

import pytest
import torch
from devices_under_test import asks_for_gpus, chosen

sys.dont_write_bytecode = False
torch.set_num_threads(1)

# A shell's background jobs ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Tests compare bits of CPUs; without `-m gpu` a GPU is not seen, so that no default takes it."""
    if not asks_for_gpus(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu: torch sees no GPU here; without it these tests run on the CPU")
    if hasattr(config, "workerinput"):
        config.stash[_STACKS] = _stacks(config.workerinput).open("w")
        faulthandler.enable(config.stash[_STACKS])


def pytest_unconfigure(config: pytest.Config) -> None:
    if _STACKS in config.stash:
        faulthandler.disable()
        config.stash[_STACKS].close()
        _stacks(config.workerinput).unlink()  # type: ignore[attr-defined]


# Where every thread was when a process of ``-n N`` ended, or shortly before a timeout ended it: what it says itself,
# pytest-timeout's stacks too, goes nowhere.
_STACKS = pytest.StashKey[TextIO]()


def _stacks(worker: dict[str, str]) -> Path:
    return Path(tempfile.gettempdir()) / f"stacks-{worker['testrunuid']}-{worker['workerid']}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if _STACKS not in item.config.stash:
        return (yield)
    marker = item.get_closest_marker("timeout")
    limit = marker.args[0] if marker else float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(max(limit - 2, 1), file=item.config.stash[_STACKS])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report: pytest.TestReport) -> None:
    stacks = _stacks(report.node.workerinput)
    if stacks.exists():
        report.sections.append(("Where its threads were", stacks.read_text()))
        stacks.unlink()


def pytest_report_header(config: pytest.Config) -> str:
    return f"device under test: {chosen(config.option.markexpr)}"


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """What tests marked `gpu` look at: a GPU with `-m gpu`, the CPU in every other run."""
    return chosen(pytestconfig.option.markexpr)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under ``pytest -n N`` a file's tests share a process, and so its fixtures; all tests on Ray share one cluster.
    All files that fork programs share the server that forks them, whose imports take seconds.

    Not by xdist's own groups: version 3.8 writes them into a field that pytest 9 has no more, and says nothing.
    """
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            test = nodeid.removeprefix(f"{file}::").partition("[")[0]
            if test in _on_ray(config.rootpath / file):
                return "on Ray"
            return "forking" if _forks(config.rootpath / file) else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no process has it before it when the others are through.

    Those on Ray, which share a process, then those that fork, which share one too, then files that start processes of
    their own.
    """

    def place(item: pytest.Item) -> int:
        if item.name.partition("[")[0] in _on_ray(item.path):
            return 0
        if _forks(item.path):
            return 1
        return 2 if "subprocess" in _imports(item.path) else 3

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Looks for garbage take a fifteenth of the tests' time with Python's own thresholds: nearly all objects stay, so
    that what importing left behind is not looked for either."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)
        gc.enable()


@cache
def _top_of(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text()).body


@cache
def _imports(file: Path) -> frozenset[str | None]:
    """Modules that a file names at its top."""
    found: set[str | None] = set()
    for node in _top_of(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return frozenset(found)


def _forks(file: Path) -> bool:
    """Whether a file forks programs, or trains, which needs the same imports."""
    return bool(_imports(file) & {"forked", "training", "test_zero"})


@cache
def _on_ray(file: Path) -> frozenset[str]:
    """Functions of a file that ask for the cluster, or for a fixture that does: whoever schedules knows names alone."""
    functions = [node for node in _top_of(file) if isinstance(node, ast.FunctionDef)]
    asked = {function.name: {argument.arg for argument in function.args.args} for function in functions}
    found = {"ray_cluster"}
    while more := {name for name, arguments in asked.items() if name not in found and arguments & found}:
        found |= more
    return frozenset(found)


@pytest.fixture(autouse=True)
def _restore_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line sets the package's logger up for its process; every test finds it as an import leaves it, also
    behind a command that a fixture of a module or of the session ran."""
    _reset_logging()
    for module, hook in ((sys, "excepthook"), (threading, "excepthook"), (sys, "unraisablehook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))
    yield
    _reset_logging()


def _reset_logging() -> None:
    package = logging.getLogger("pavdm_dist")
    package.handlers, package.propagate = [], True
    package.setLevel(logging.NOTSET)  # forgets, too, what its children remember of the level between


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster with eight logical CPUs, whatever the machine has."""
    import ray

    ray.init(
        address="local",  # whatever else runs on this machine
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
