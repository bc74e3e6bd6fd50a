"""Who is writing a video: a lock file in its parts folder, made by exclusive creation, which every share knows.

It names host, process and the process' start time. A lock whose process has ended is taken over; whether a process of
another host has ended cannot be seen from here, so such a lock is refused with the sentence how to remove it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
import uuid
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from pavdm_dist.errors import ConfigError
from pavdm_dist.fields import json_value
from pavdm_dist.io import storage

# Locks of ended processes on their way out.
STALE_NAMES = re.compile(rf"{re.escape(storage.LOCK_NAME)}\.[0-9a-f]{{8}}\.stale")
# A lock that is being written is empty for an instant.
_PATIENCE_S = 1.0


class OutputLock:
    """Held from :meth:`acquire` to :meth:`release`, or until the object is dropped or the process ends.

    In a remote store it is best effort: two processes that begin in the same moment may both succeed.
    """

    def __init__(self, path: str, token: str) -> None:
        self._release = weakref.finalize(self, _remove_own, path, token, os.getpid())

    @classmethod
    def acquire(cls, output: str | Path) -> OutputLock:
        """Locks a video's output; makes the parts folder.

        Raises:
            ConfigError: another live process, or this one, is writing it; or a process of another host may be.
        """
        path = _path(output)
        token = uuid.uuid4().hex
        mine = {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid()), "token": token}
        while not storage.create_new(path, json.dumps(mine).encode()):
            found = _refuse_held(output)
            if found is not None:
                _take_away(path, found, token)
        return cls(path, token)

    def release(self) -> None:
        """Gives the output free; harmless when called twice."""
        self._release()


def check_unlocked(output: str | Path) -> None:
    """Refuses an output that is being written, without locking it.

    Raises:
        ConfigError: as :meth:`OutputLock.acquire`.
    """
    _refuse_held(output)


def _path(output: str | Path) -> str:
    return storage.join(storage.parts_folder(output), storage.LOCK_NAME)


def _refuse_held(output: str | Path) -> dict[str, Any] | None:
    """The lock of a process that has ended, None where there is no lock."""
    path = _path(output)
    found = _read(path)
    if found is None:
        return None
    if found["host"] != platform.node():
        raise ConfigError(
            f"output={output} is being written by process {found['pid']} on {found['host']}; if that one has ended, "
            f"remove {path}"
        )
    if _is_alive(found["pid"], found["started"]):
        raise ConfigError(f"output={output} is being written by process {found['pid']} on this machine")
    return found


def _read(path: str) -> dict[str, Any] | None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with storage.open_read(path) as file:
                found = json_value(file.read())
            if isinstance(found, dict) and {"host", "pid", "started", "token"} <= set(found) and found["pid"] > 0:
                return found
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            pass
        if time.monotonic() > deadline:
            raise ConfigError(f"{path} does not say who is writing; remove it if nobody is")
        time.sleep(_PATIENCE_S / 20)


def _take_away(path: str, stale: dict[str, Any], token: str) -> None:
    """Removes a stale lock, but not the one that another process may just have put in its place."""
    if storage.is_remote(path):
        storage.remove(path)
        return
    aside = f"{path}.{token[:8]}.stale"
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(path, aside)
        if _read(aside) != stale:
            os.rename(aside, path)
            return
        os.unlink(aside)


def _remove_own(path: str, token: str, pid: int) -> None:
    if os.getpid() != pid:  # a forked child, whose parent goes on writing
        return
    with suppress(Exception):  # at the interpreter's end there is nobody to tell
        found = _read(path)
        if found is not None and found["token"] == token:
            storage.remove(path)


def _is_alive(pid: int, started: int | None) -> bool:
    now = _started(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Somebody else's, of which the system may not even tell when it started.
        return now is None or now == started
    # A process that got the same number later, or one that has ended and was not waited for, is another matter.
    return now == started


def _started(pid: int) -> int | None:
    """When a living process started, in clock ticks since boot; None where it has ended or the system does not say."""
    try:
        # The second field is the command's name, in brackets, with any characters.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
