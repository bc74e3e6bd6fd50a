"""A lock file: what it says of its owner, when it was renewed, and how it is removed without taking another's."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pavdm_dist.io import storage
from pavdm_dist.values.fields import Within, json_value, made


@dataclass(frozen=True)
class Owner:
    """What a lock says."""

    host: str
    machine: str
    pid: Annotated[int, Within(1, 2**31 - 1)]
    started: int | None
    token: str
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Seen(NamedTuple):
    """A lock as it was found.

    Attributes:
        owner: who holds it; None = it does not say.
        content: its bytes.
        stamp: when it was written or touched, by its file system's clock; None in a remote store.
    """

    owner: Owner | None
    content: bytes
    stamp: int | None

    @property
    def who(self) -> str:
        return "a process that its lock does not name" if self.owner is None else str(self.owner)


def read_lock(path: str) -> Seen | None:
    """A lock as it is now; None where there is none.

    Raises:
        OSError: there may be one, but it cannot be read.
    """
    try:
        with storage.open_read(path) as file:
            # Of the file that was opened: a share tells that afresh, and its own time.
            stamp = None if storage.is_remote(path) else os.fstat(file.fileno()).st_mtime_ns
            content = file.read()
    except FileNotFoundError as error:
        if not storage.is_remote(path) and os.path.islink(path):
            raise OSError(errno.ENOENT, "a link to nothing") from error
        return None
    try:
        return Seen(made(Owner, json_value(content), path, ignore_unknown=True), content, stamp)
    except (ValueError, TypeError):
        return Seen(None, content, stamp)


def touched(path: str) -> bool:
    """Moves a local file's time; False where a share refuses that or pays no heed."""
    before = os.stat(path).st_mtime_ns
    with suppress(OSError):
        os.utime(path)
    return os.stat(path).st_mtime_ns != before


def remove_stale(path: str, stale: Seen) -> None:
    """Removes a local lock as it was seen, but not the one that another process may just have put in its place.

    Raises:
        OSError: it cannot be removed.
    """
    aside = f"{path}.{uuid.uuid4().hex[:8]}.stale"
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(path, aside)
        is_stale = False
        try:
            found = read_lock(aside)
            is_stale = found is not None and found[:2] == stale[:2]
        finally:
            if not is_stale:
                # Not over a lock that a third one may have made by now: whose this was finds out that it is lost.
                storage.link_new(aside, path)
            os.unlink(aside)
