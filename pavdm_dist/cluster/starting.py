"""A Ray of this process' own: in a folder that it can use, on loopback only; and where workers import from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pavdm_dist.errors import EngineError

# Object store of a cluster this process starts for itself: only finished chunks and frames pass through it.
LOCAL_OBJECT_STORE_BYTES = 400 * 2**20
# Of the name of a socket, on Linux; and what Ray adds to its folder: session_DATE_TIME_PID/sockets/plasma_store.
_SOCKET_BYTES, _ADDED_BYTES = 107, 68
# Where a cluster is put when the usual place cannot be used.
_ELSEWHERE = ("/tmp", "/var/tmp")


@contextmanager
def settings_of_own() -> Iterator[dict[str, Any]]:
    """What ``ray.init`` is given for a cluster of this process' own, which listens on loopback only.

    Ray has this for machines whose firewall asks about every open port, and maps any address of loopback that it is
    given to the machine's own. Its processes read the variable; this one has read it when Ray was imported.

    Raises:
        EngineError: there is no folder for it.
    """
    import ray

    name, constants = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray._private.ray_constants
    before, cluster = os.environ.get(name), constants.ENABLE_RAY_CLUSTER
    folder = folder_of_own()
    os.environ[name], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield {
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }
    finally:
        constants.ENABLE_RAY_CLUSTER = cluster
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def folder_of_own() -> str:
    """A folder for Ray's sockets and logs: where Ray puts them by itself if it can, else a short one.

    Batch systems give every job a temporary folder whose name is longer than that of a socket may be.

    Raises:
        EngineError: naming the variable that says where, and what is wrong with it.
    """
    asked = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    usual = Path(os.environ[asked] if asked else "/tmp") / "ray"
    why = _unfit(usual)
    if why is None:
        return str(usual)
    mine = f"ray-{os.getuid()}"  # somebody else's may lie there
    elsewhere = [Path(place) / name for place in _ELSEWHERE for name in ("ray", mine)]
    found = next((folder for folder in elsewhere if _unfit(folder) is None), None)
    if asked == "RAY_TMPDIR" or found is None:
        advice = f"RAY_TMPDIR={found.parent}" if found else "RAY_TMPDIR to a short folder that can be written"
        raise EngineError(f"{asked or 'TMPDIR'}={usual.parent}: Ray cannot be started there, {why}; set {advice}")
    return str(found)


def _unfit(folder: Path) -> str | None:
    """Why Ray cannot have its sockets and logs in a folder, which is made if it can be; None where it can."""
    if not folder.is_absolute():
        return "it is no absolute path"
    room = _SOCKET_BYTES - _ADDED_BYTES - len(os.fsencode(folder))
    if room < 0:
        return f"its name is {-room} bytes too long for sockets"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        return f"{folder} is a file"
    except NotADirectoryError:
        return f"a part of {folder} is a file"
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"there is no right to write in {folder}"


class _Paths(list[str]):
    """Folders that Ray's workers import from, without one of them."""

    def __init__(self, without: str) -> None:
        super().__init__()
        self._without = without

    def extend(self, folders: Iterable[str]) -> None:
        super().extend(folder for folder in folders if folder != self._without)


def workers_paths() -> Any:
    """Ray's settings of a job whose workers import from the current folder only where this process does.

    Ray puts the driver's current folder first among the places that its workers import from: a script there that is
    named like some library would be run in every actor.
    """
    from ray.job_config import JobConfig

    config = JobConfig()
    if not imports_from(os.getcwd()):
        config._py_driver_sys_path = _Paths(os.getcwd())  # Ray asks nobody, and adds it to what it finds here
    return config


def imports_from(folder: str) -> bool:
    """Whether this process imports from a folder."""
    return any(os.path.realpath(entry or os.getcwd()) == os.path.realpath(folder) for entry in sys.path)


@contextmanager
def importing_alike() -> Iterator[None]:
    """Python processes that are started inside import from the current folder only where this one does.

    With ``-c``, as multiprocessing has it, and with ``-m`` Python looks there first, and would run a script there that
    is named like some library.
    """
    name = "PYTHONSAFEPATH"
    if name in os.environ or imports_from(os.getcwd()):
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
