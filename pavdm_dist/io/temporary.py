"""Names for what this process keeps in the machine's temporary folder, by which others tell it from what was left."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

from pavdm_dist.io import processes

_OURS = re.compile(r"pavdm-[a-z]+-([0-9a-f]{8})-(\d+)-(\d+)-.+")


def temporary_prefix(kind: str) -> str:
    """How the name of a temporary folder of this process begins, for :func:`tempfile.mkdtemp` and its like.

    A process' first call removes what processes of this machine that were killed had in such folders: it may be a whole
    video, and on many machines it lies in memory.

    Args:
        kind: what the folder is for, a word.
    """
    _sweep(tempfile.gettempdir())
    return f"pavdm-{kind}-{_machine()}-{os.getpid()}-{processes.started(os.getpid()) or 0}-"


def is_temporary(name: str) -> bool:
    """Whether a folder is named so, by this process or another."""
    return _OURS.fullmatch(name) is not None


@cache
def _sweep(place: str) -> None:
    try:
        names = os.listdir(place)
    except OSError:  # where nothing can be listed, there is no use in looking
        return
    for name in names:
        parts = _OURS.fullmatch(name)
        # Process numbers of other containers and machines, which may share this folder, mean nothing here.
        if parts is None or parts[1] != _machine() or int(parts[3]) == 0:
            continue
        if not processes.is_alive(int(parts[2]), int(parts[3])):
            shutil.rmtree(Path(place) / name, ignore_errors=True)


def _machine() -> str:
    return hashlib.sha256(processes.machine().encode()).hexdigest()[:8]
