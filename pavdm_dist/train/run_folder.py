"""The folder of a run: that all its processes see the same one, and that no other run writes there."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pavdm_dist.errors import ConfigError
from pavdm_dist.io.lock import FOLDER_LOCK, OutputLock, clear_locks
from pavdm_dist.io.lockfile import read_lock
from pavdm_dist.train.ranks import World, several_tasks
from pavdm_dist.train.save_writing import SHARED_S, clear_unfinished
from pavdm_dist.train.train_settings import TrainConfig

FIELD = "run_dir"
CHECKPOINTS = "checkpoints"
_TOKEN = ".seen-by-all-"
# Behind it comes the token of the owner who wrote it: one that stood still, and wakes when another has taken its run
# over, asks nobody of that one's.
_STOP = ".pavdm-stop-"
# Another process may have the lock in its hands for an instant, and puts it back.
_PATIENCE_S = 1.0

# Says what keeps this process from writing into the folder; None where nothing.
Guard = Callable[[], str | None]


@dataclass(frozen=True)
class Owned:
    """A run's folder, as its owner has it; ``token`` tells the owner from all before and after."""

    guard: Guard
    token: str


def target_of(config: TrainConfig) -> Path:
    """Where the run's model is exported to."""
    return Path(config.export or Path(config.run_dir) / "model")


def check_free(run_dir: str | Path) -> None:
    """Refuses a folder that another run is writing; waits for a sign of life of one on another machine.

    Raises:
        ConfigError: naming the other run.
    """
    try:
        clear_locks([run_dir], FIELD)
    except ConfigError as error:
        raise ConfigError(f"{error}{several_tasks()}") from error


@contextmanager
def owned(run_dir: str | Path) -> Iterator[Owned]:
    """Makes the folder and keeps other runs out of it while the block runs; for one process of a run.

    Raises:
        ConfigError: another run is writing it, or it cannot be made.
    """
    is_new = not Path(run_dir).exists()
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        lock = OutputLock.acquire(run_dir, FIELD)
    except ConfigError as error:
        raise ConfigError(f"{error}{several_tasks()}") from error
    except OSError as error:
        raise ConfigError(f"{FIELD}={run_dir}: cannot be written: {error.strerror or error}") from error

    def guard() -> str | None:
        try:
            lock.check()
        except OSError as error:
            return f"{FIELD}={run_dir}: {error}"
        return None

    try:
        clear_unfinished(Path(run_dir) / CHECKPOINTS)
        for left in (*Path(run_dir).glob(f"{_TOKEN}*"), *Path(run_dir).glob(f"{_STOP}*")):
            left.unlink(missing_ok=True)
        yield Owned(guard, lock.token)
    finally:
        with suppress(OSError):  # the next owner clears it, too
            _stop_of(run_dir, lock.token).unlink()
        lock.release()
        if is_new:
            with suppress(OSError):  # there is something in it, as there should be
                Path(run_dir).rmdir()


def owner_of(run_dir: str | Path) -> str | None:
    """What tells an owner's lock from all others; None where nobody owns the folder.

    Raises:
        OSError: the lock cannot be read.
    """
    found = read_lock(str(Path(run_dir) / FOLDER_LOCK))
    return None if found is None or found.owner is None else found.owner.token


def guard_for(run_dir: str | Path, owner: str | None) -> Guard:
    """The guard of a process that writes for another one, which owns the folder.

    Args:
        run_dir: which.
        owner: its token.
    """

    def guard() -> str | None:
        end, found, said = time.monotonic() + _PATIENCE_S, None, ""
        while True:
            try:
                found = owner_of(run_dir)
                said = f"{FIELD}={run_dir}: the process that owned it is gone, or another run took it over"
            except OSError as error:  # a share may be away for a moment
                said = f"{FIELD}={run_dir}: its lock cannot be read: {error}"
            if found is not None and found == owner:
                return None
            if found is not None or time.monotonic() > end:
                return said
            time.sleep(_PATIENCE_S / 20)

    return guard


def ask_to_stop(run_dir: str | Path, owner: str) -> None:
    """Asks the processes that train in a folder for this owner to end after their step.

    Args:
        run_dir: which.
        owner: its token.

    Raises:
        OSError: nothing can be written there.
    """
    _stop_of(run_dir, owner).touch()


def asked_to_stop(run_dir: str | Path, owner: str) -> bool:
    """Whether this owner has asked those who train for it to end; not where that cannot be seen in this moment."""
    return os.path.exists(_stop_of(run_dir, owner))


def _stop_of(run_dir: str | Path, owner: str) -> Path:
    return Path(run_dir) / f"{_STOP}{owner}"


@contextmanager
def owned_together(run_dir: str | Path, world: World) -> Iterator[Guard]:
    """As :func:`owned`, by the first process; every process must call it.

    Raises:
        ConfigError: on every process.
    """
    fault: str | None = None
    guard: Guard = _nothing
    with ExitStack() as stack:
        if world.first:
            try:
                guard = stack.enter_context(owned(run_dir)).guard
            except ConfigError as error:
                fault = str(error)
        if faults := world.faults(fault):
            raise ConfigError(faults[0])
        yield guard


def check_shared(config: TrainConfig, world: World) -> None:
    """Refuses folders that not all processes see; every process must call it, the first one owns ``run_dir``.

    The first process writes a token that all others must find. What it reads from folders the others must have, too.

    Raises:
        ConfigError: naming the folder, the machine that lacks it, and where a relative path led there.
    """
    run_dir, token = Path(config.run_dir), ""
    if world.first:
        token = f"{_TOKEN}{uuid.uuid4().hex}"
        (run_dir / token).touch()
    named = [
        *(("data.folder", folder) for folder in config.data.folder),
        ("data.model", config.data.model),
        ("codec.folder", config.codec.folder),
        ("model.pretrained", config.model.pretrained),
    ]
    there = [(name, path) for name, path in named if path is not None and Path(path).exists()]
    theirs: Any = world.gather((platform.node(), token, there))[0]
    first, token, expected = theirs
    fault = None
    if not _appears(run_dir / token):
        fault = f"{FIELD}={run_dir}: {_here(run_dir)} does not show what process 0 on {first} wrote there"
    for name, path in expected:
        if fault is None and (name, path) not in there:
            fault = f"{name}={path}: {_here(Path(path))} is not there, as it is for process 0 on {first}"
    faults = world.faults(fault and f"{fault}; it must be a folder that all machines share, under the same path")
    if world.first:
        with suppress(OSError):
            (run_dir / token).unlink()
    if faults:
        raise ConfigError(faults[0])


def _here(path: Path) -> str:
    return f"{path.absolute()} on {platform.node()}"


def _appears(path: Path) -> bool:
    """A share may be late to show what another machine wrote."""
    end = time.monotonic() + SHARED_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _nothing() -> None:
    return None
