"""Who is writing a video: a lock file in its parts folder, made by exclusive creation, which every share knows.

Also who is writing a folder, which may hold files of others: there the lock has a name that nobody else gives a file.

It names the process, when it started, and the machine, or container, whose process numbers these are. There a lock is
taken over as soon as its process has ended. Whether a process elsewhere has ended cannot be seen from here, so every
owner renews its lock while it lives, and one that is not renewed for ``SILENCE_S`` is taken over; so is one that says
nothing, since its writer was killed or lost power in the middle. No two clocks are compared: who wants it watches it
for that long. An owner that was stopped for longer sees it before it writes again: it reads its lock about once a
second of writing, and whenever it is about to tidy up.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from pavdm_dist.errors import ConfigError, TakenError
from pavdm_dist.io import processes, storage
from pavdm_dist.io.lockfile import Owner, Seen, read_lock, remove_stale, touched
from pavdm_dist.io.parts import LOCK_NAME, parts_folder

# How often an owner renews its lock, and after what time without that others take it for gone.
RENEW_S, SILENCE_S = 10.0, 180.0
# The setting that names a video, whose lock is in its parts folder.
OUTPUT = "output"
# The lock of a folder, named by any other setting.
FOLDER_LOCK = ".pavdm-lock.json"
# How old an owner's knowledge that the lock is its own may be when it writes.
KNOWN_S = 1.0
# Another process may have the lock in its hands for an instant, and puts it back when it sees that it is alive.
_PATIENCE_S = 1.0

logger = logging.getLogger(__name__)


class OutputLock:
    """Held from :meth:`acquire` to :meth:`release`, or until the object is dropped or the process ends.

    In a remote store it is best effort: two processes that begin in the same moment may both succeed.
    """

    def __init__(self, path: str, mine: Owner) -> None:
        self._lease = _Lease(path, mine)
        self._release = weakref.finalize(self, _let_go, self._lease, os.getpid())
        threading.Thread(target=self._lease.keep, name="pavdm-lock", daemon=True).start()

    @classmethod
    def acquire(cls, output: str | Path, field: str = OUTPUT) -> OutputLock:
        """Locks a video's output, and makes the parts folder; or a folder. Waits as :func:`clear_locks` does.

        Args:
            output: what is going to be written.
            field: the setting that names it; any but ``output`` names a folder.

        Raises:
            ConfigError: as :func:`clear_locks`.
            OSError: no lock can be written there.
        """
        path = _path(output, field)
        pid = os.getpid()
        mine = Owner(platform.node(), processes.machine(), pid, processes.started(pid), uuid.uuid4().hex)
        while not storage.create_new(path, json.dumps(asdict(mine)).encode()):
            clear_locks([output], field)
        return cls(path, mine)

    @property
    def token(self) -> str:
        """What tells this lock from all others, before and after it."""
        return self._lease.token

    def check(self) -> None:
        """Says whether the output is still this process' to write; cheap.

        Raises:
            OSError: the lock was taken over, or removed, or could not be renewed for so long that it may be.
        """
        self._lease.check()

    @property
    def lost(self) -> bool:
        """Whether the output is no longer this process' to write, or nothing can be found out; reads the lock."""
        return not self._lease.is_known_mine()

    def release(self) -> None:
        """Gives the output free; harmless when called twice."""
        self._release()


class _Lease:
    """A lock as the thread that renews it and the owner see it."""

    def __init__(self, path: str, mine: Owner) -> None:
        self.path, self.token, self.over, self.lost = path, mine.token, threading.Event(), False
        self._mine, self._beats = mine, 0
        self._renewed = self._known = processes.now()
        self.turn = threading.RLock()  # a finaliser may run within

    def keep(self) -> None:
        """Renews the lock until it is released or lost; a thread of its own."""
        while not self.over.wait(RENEW_S) and not self.lost:
            self.renew()

    def renew(self) -> None:
        with self.turn:
            if self.over.is_set():
                return
            try:
                if self._look():
                    self._beat()
                    self._renewed = processes.now()
            # A share that is away comes back, or what is written fails, too. Remote stores have kinds of their own.
            except Exception as error:
                logger.warning("%s cannot be renewed: %s: %s", self.path, type(error).__name__, error)

    def check(self) -> None:
        if processes.now() - self._known > KNOWN_S:
            self.is_known_mine()
        if self.lost:
            raise OSError("another process took it over while this one was silent, or its lock was removed")
        if processes.now() - self._renewed > SILENCE_S:
            raise OSError(
                f"its lock could not be renewed for {SILENCE_S:.0f} s: another process may have taken it over"
            )

    def is_known_mine(self) -> bool:
        if processes.now() - self._renewed > SILENCE_S / 2:  # this process, or its machine, stood still
            self.renew()
        with self.turn:
            try:
                return self._look()
            except Exception as error:
                logger.warning("%s cannot be read: %s: %s", self.path, type(error).__name__, error)
                return False

    def is_mine(self, found: Seen | None) -> bool:
        return found is not None and found.owner is not None and found.owner.token == self.token

    def _look(self) -> bool:
        """Whether the lock is still this process'; once it is not, it never is again."""
        end = time.monotonic() + _PATIENCE_S
        while not self.lost and not self.is_mine(found := read_lock(self.path)):
            self.lost = found is not None or time.monotonic() > end
            if self.lost:
                logger.error("%s is not this process' any more", self.path)
            else:
                time.sleep(_PATIENCE_S / 20)
        self._known = processes.now()
        return not self.lost

    def _beat(self) -> None:
        """Makes the lock another than before, for who watches it."""
        self._beats += 1
        if not storage.is_remote(self.path) and touched(self.path):
            return
        with storage.atomic_write(self.path, "w") as file:
            json.dump(asdict(replace(self._mine, beats=self._beats)), file)


def clear_locks(outputs: Sequence[str | Path], field: str = OUTPUT) -> None:
    """Takes away locks of processes that are gone; waits up to ``SILENCE_S`` for signs of life from other machines.

    Args:
        outputs: any number, watched together. One whose folder cannot be looked at is passed over: opening it says why.
        field: the setting that names them.

    Raises:
        TakenError: a live process, this one perhaps, is writing one of them.
        ConfigError: the lock of one cannot be read, or not removed, or a folder holds a file of that name that is none.
    """
    watched: dict[str | Path, Seen] = {}
    for output in outputs:
        found = _find(output, field)
        if found is None:
            continue
        owner = found.owner
        if owner is None and found.content and field != OUTPUT:
            raise ConfigError(
                f"{field}={output}: {_path(output, field)} is no lock of ours; move it away if nobody is writing"
            )
        if owner is None or owner.machine != processes.machine():
            watched[output] = found
        elif processes.is_alive(owner.pid, owner.started):
            raise TakenError(f"{field}={output} is being written by process {owner.pid} on this machine")
        else:
            _take_away(output, found, field)
    if watched:
        _await_silence(watched, field)
    for output, found in watched.items():
        said = "%s=%s: %s has given no sign of life for %.0f s; its lock is taken over"
        logger.warning(said, field, output, found.who, SILENCE_S)
        _take_away(output, found, field)


class Watch:
    """Locks of others, looked at now and then by who has other things to do meanwhile; one thread at a time.

    What was seen of a lock is kept until its video is looked at again, or forgotten.
    """

    def __init__(self) -> None:
        self._watched: dict[str, tuple[Seen, float]] = {}

    def is_free(self, output: str | Path) -> bool:
        """Whether nobody is writing a video; the lock of a process that is gone is taken away.

        One of another machine is gone when its lock has not changed for ``SILENCE_S`` since it was looked at first.

        Raises:
            ConfigError: as :func:`clear_locks`.
        """
        found, before = _find(output, OUTPUT), self._watched.pop(str(output), None)
        if found is None:
            return True
        owner = found.owner
        if owner is not None and owner.machine == processes.machine():
            if processes.is_alive(owner.pid, owner.started):
                return False
        else:
            since = before[1] if before is not None and before[0] == found else processes.now()
            if processes.now() - since < SILENCE_S:
                self._watched[str(output)] = found, since
                return False
        _take_away(output, found)
        return True

    def forget(self, output: str | Path) -> None:
        """A video that will not be looked at any more; from any thread that does not look at it."""
        self._watched.pop(str(output), None)


def _await_silence(watched: dict[str | Path, Seen], field: str) -> None:
    """Watches locks of other machines for ``SILENCE_S``; drops those that are released meanwhile."""
    for output, before in watched.items():
        said = "%s=%s was being written by %s; waiting up to %.0f s for a sign of life"
        logger.info(said, field, output, before.who, SILENCE_S)
    end = time.monotonic() + SILENCE_S
    while watched and time.monotonic() < end:
        time.sleep(min(1.0, SILENCE_S / 10))
        for output, before in list(watched.items()):
            found = _find(output, field)
            if found is None:
                del watched[output]
            elif found != before:
                raise TakenError(f"{field}={output} is being written by {found.who}")


def _path(output: str | Path, field: str = OUTPUT) -> str:
    if field == OUTPUT:
        return storage.join(parts_folder(output), LOCK_NAME)
    return storage.join(output, FOLDER_LOCK)


def _find(output: str | Path, field: str = OUTPUT) -> Seen | None:
    """The lock of an output; None where there is none.

    Raises:
        ConfigError: there is something that cannot be read.
    """
    path = _path(output, field)
    try:
        return read_lock(path)
    except OSError as error:
        if storage.is_remote(path) or os.path.lexists(path):
            raise ConfigError(
                f"{field}={output}: its lock {path} cannot be read ({error.strerror or error}); remove it if nobody is"
                " writing"
            ) from error
    return None


def _take_away(output: str | Path, stale: Seen, field: str = OUTPUT) -> None:
    """Removes a stale lock, but not the one that another process may just have put in its place.

    Raises:
        ConfigError: it cannot be removed.
    """
    path = _path(output, field)
    try:
        if not storage.is_remote(path):
            remove_stale(path, stale)
        elif read_lock(path) == stale:
            storage.remove(path)
    except OSError as error:
        raise ConfigError(
            f"{field}={output}: the lock {path} of {stale.who}, which is gone, cannot be removed"
            f" ({error.strerror or error})"
        ) from error


def _let_go(lease: _Lease, pid: int) -> None:
    if os.getpid() != pid:  # a forked child, whose parent goes on writing
        return
    lease.over.set()
    # A remote lock that is being renewed would come back; one that cannot be is not waited for.
    waited = lease.turn.acquire(timeout=_PATIENCE_S)
    with suppress(Exception):  # at the interpreter's end there is nobody to tell
        if not lease.lost and lease.is_mine(read_lock(lease.path)):
            storage.remove(lease.path)
    if waited:
        lease.turn.release()
