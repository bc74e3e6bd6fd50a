"""Processes as locks name them: by a number, when they started, and what counts those numbers."""

from __future__ import annotations

import os
import platform
import time
import uuid
from pathlib import Path


def machine() -> str:
    """What this process shares its process numbers with: a machine since its start, or a container on it.

    Containers of a machine, or of several, may well have the same host name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{platform.node()} {uuid.getnode():x}"


def now() -> float:
    """Seconds that go on while the machine sleeps, where the system counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def is_alive(pid: int, since: int | None) -> bool:
    """Whether the process with this number is the one that started then (:func:`started`)."""
    found = started(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Somebody else's, of which the system may not even tell when it started.
        return found is None or found == since
    # A process that got the same number later, or one that has ended and was not waited for, is another matter.
    return found == since


def started(pid: int) -> int | None:
    """When a living process started, in clock ticks since boot; None where it has ended or the system does not say."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None  # it counts the processes of another container
        # The second field is the command's name, in brackets, with any characters.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
