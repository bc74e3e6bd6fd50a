"""Who is writing a video: a lock file in its parts folder, made by exclusive creation, which every share knows.

It names the process, when it started, and the machine, or container, whose process numbers these are. There a lock is
taken over as soon as its process has ended. Whether a process elsewhere has ended cannot be seen from here, so every
owner renews its lock while it lives, and one that is not renewed for ``SILENCE_S`` is taken over. No two clocks are
compared: who wants it watches it for that long. An owner that was stopped for longer notices it before it writes again.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pavdm_dist.errors import ConfigError
from pavdm_dist.fields import json_value
from pavdm_dist.io import processes, storage

# How often an owner renews its lock, and after what time without that others take it for gone.
RENEW_S, SILENCE_S = 10.0, 180.0
# Locks of ended processes on their way out.
STALE_NAMES = re.compile(rf"{re.escape(storage.LOCK_NAME)}\.[0-9a-f]{{8}}\.stale")
# A lock that is being written is empty for an instant.
_PATIENCE_S = 1.0

logger = logging.getLogger(__name__)


class OutputLock:
    """Held from :meth:`acquire` to :meth:`release`, or until the object is dropped or the process ends.

    In a remote store it is best effort: two processes that begin in the same moment may both succeed.
    """

    def __init__(self, path: str, mine: dict[str, Any]) -> None:
        self._lease = _Lease(path, mine)
        self._release = weakref.finalize(self, _let_go, self._lease, os.getpid())
        threading.Thread(target=self._lease.keep, name="pavdm-lock", daemon=True).start()

    @classmethod
    def acquire(cls, output: str | Path) -> OutputLock:
        """Locks a video's output; makes the parts folder. Waits as :func:`clear_locks` does.

        Raises:
            ConfigError: another live process, or this one, is writing it.
        """
        path = _path(output)
        mine = {
            "host": platform.node(),
            "machine": processes.machine(),
            "pid": os.getpid(),
            "started": processes.started(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        while not storage.create_new(path, json.dumps(mine).encode()):
            clear_locks([output])
        return cls(path, mine)

    def check(self) -> None:
        """Says whether the output is still this process' to write; cheap.

        Raises:
            OSError: the lock was taken over, or removed.
        """
        self._lease.check()

    @property
    def lost(self) -> bool:
        """Whether :meth:`check` has failed, or would."""
        return self._lease.lost

    def release(self) -> None:
        """Gives the output free; harmless when called twice."""
        self._release()


class _Lease:
    """A lock as the thread that renews it and the owner see it."""

    def __init__(self, path: str, mine: dict[str, Any]) -> None:
        self.path, self.over, self.lost = path, threading.Event(), False
        self._mine, self._beats, self._renewed = mine, 0, processes.now()
        self.turn = threading.RLock()  # a finaliser may run within

    def keep(self) -> None:
        """Renews the lock until it is released or lost; a thread of its own."""
        while not self.over.wait(RENEW_S) and not self.lost:
            self.renew()

    def renew(self) -> None:
        with self.turn:
            if self.over.is_set() or self.lost:
                return
            try:
                if not self.is_mine():
                    self.lost = True
                    logger.error("%s is not this process' any more", self.path)
                    return
                self._beats += 1
                if storage.is_remote(self.path):
                    with storage.atomic_write(self.path, "w") as file:
                        json.dump({**self._mine, "beats": self._beats}, file)
                else:
                    os.utime(self.path)
                self._renewed = processes.now()
            except (OSError, ConfigError) as error:  # a share that is away comes back, or what is written fails, too
                logger.warning("%s cannot be renewed: %s", self.path, error)

    def check(self) -> None:
        if processes.now() - self._renewed > SILENCE_S / 2:  # this process, or its machine, stood still
            self.renew()
        if self.lost:
            raise OSError("another process took it over while this one was silent, or its lock was removed")

    def is_mine(self) -> bool:
        found = _look(self.path)
        return found is not None and found[0]["token"] == self._mine["token"]


def clear_locks(outputs: Sequence[str | Path]) -> None:
    """Takes away locks of processes that are gone; waits up to ``SILENCE_S`` for signs of life from other machines.

    Args:
        outputs: any number, watched together. One that cannot be looked at is passed over: opening it says why.

    Raises:
        ConfigError: a live process, this one perhaps, is writing one of them.
    """
    watched: dict[str | Path, tuple[dict[str, Any], Any]] = {}
    for output in outputs:
        found = None
        with suppress(OSError):
            found = _look(_path(output))
        if found is None:
            continue
        if found[0]["machine"] != processes.machine():
            watched[output] = found
        elif processes.is_alive(found[0]["pid"], found[0]["started"]):
            raise ConfigError(f"output={output} is being written by process {found[0]['pid']} on this machine")
        else:
            _take_away(_path(output), found[0])
    if watched:
        _await_silence(watched)
    for output, (owner, _) in watched.items():
        said = "output=%s: process %d on %s has given no sign of life for %.0f s; its lock is taken over"
        logger.warning(said, output, owner["pid"], owner["host"], SILENCE_S)
        _take_away(_path(output), owner)


def _await_silence(watched: dict[str | Path, tuple[dict[str, Any], Any]]) -> None:
    """Watches locks of other machines for ``SILENCE_S``; drops those that are released meanwhile."""
    for output, (owner, _) in watched.items():
        said = "output=%s was being written by process %d on %s; waiting up to %.0f s for a sign of life"
        logger.info(said, output, owner["pid"], owner["host"], SILENCE_S)
    end = time.monotonic() + SILENCE_S
    while watched and time.monotonic() < end:
        time.sleep(min(1.0, SILENCE_S / 10))
        for output, before in list(watched.items()):
            try:
                found = _look(_path(output))
            except OSError as error:
                raise ConfigError(f"output={output}: its lock cannot be read: {error}") from error
            if found is None:
                del watched[output]
            elif found != before:
                owner = found[0]
                raise ConfigError(f"output={output} is being written by process {owner['pid']} on {owner['host']}")


def _path(output: str | Path) -> str:
    return storage.join(storage.parts_folder(output), storage.LOCK_NAME)


def _look(path: str) -> tuple[dict[str, Any], Any] | None:
    """Who holds a lock, and what is different whenever it has been renewed; None where there is no lock."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with storage.open_read(path) as file:
                # Of the file that was opened: a share tells that afresh, and its own time.
                stamp = None if storage.is_remote(path) else os.fstat(file.fileno()).st_mtime_ns
                found = json_value(file.read())
            names = {"host", "machine", "pid", "started", "token"}
            if isinstance(found, dict) and names <= set(found) and found["pid"] > 0:
                return found, stamp
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            pass
        if time.monotonic() > deadline:
            raise ConfigError(f"{path} does not say who is writing; remove it if nobody is")
        time.sleep(_PATIENCE_S / 20)


def _take_away(path: str, stale: dict[str, Any]) -> None:
    """Removes a stale lock, but not the one that another process may just have put in its place."""
    if storage.is_remote(path):
        storage.remove(path)
        return
    aside = f"{path}.{uuid.uuid4().hex[:8]}.stale"
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(path, aside)
        found = _look(aside)
        if found is None or found[0] != stale:
            os.rename(aside, path)
            return
        os.unlink(aside)


def _let_go(lease: _Lease, pid: int) -> None:
    if os.getpid() != pid:  # a forked child, whose parent goes on writing
        return
    lease.over.set()
    # A remote lock that is being renewed would come back; one that cannot be is not waited for.
    waited = lease.turn.acquire(timeout=_PATIENCE_S)
    with suppress(Exception):  # at the interpreter's end there is nobody to tell
        if lease.is_mine():
            storage.remove(lease.path)
    if waited:
        lease.turn.release()
