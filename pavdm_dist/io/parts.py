"""Where the parts of an unfinished video are, and what is in the way of an output."""

from __future__ import annotations

import re
from pathlib import Path

from pavdm_dist.errors import ConfigError
from pavdm_dist.io.local_disk import check_place
from pavdm_dist.io.remote import check_store, is_remote
from pavdm_dist.io.storage import exists, list_names, unstaged

PARTS_SUFFIX = ".parts"
# In the parts folder: who is writing the video; and locks of ended processes on their way out.
LOCK_NAME = "lock.json"
LOCK_NAMES = re.compile(rf"{re.escape(LOCK_NAME)}(\.[0-9a-f]{{8}}\.stale)?")


def check_output(path: str | Path, overwrite: bool = False, field: str = "output", parts: bool = True) -> None:
    """Refuses an output that would be lost or can't be written, before any work is done.

    Looks at the file, its sidecar and the segments of an interrupted run. Changes nothing.

    Args:
        path: of the file.
        overwrite: it may be replaced.
        field: the setting that names it.
        parts: the segments of an interrupted run are in the way, too.

    Raises:
        ConfigError: something is there and ``overwrite`` is false; a folder of that name; a name that is too long; no
            right to write; a store that is no object store.
    """
    if is_remote(path):
        check_store(path, field)
    else:
        check_place(Path(path), field)
    if overwrite:
        return
    if exists(path):
        raise ConfigError(f"{field}={path} exists; choose another name or pass --overwrite")
    if parts and holds_work(parts_folder(path)):
        raise ConfigError(
            f"{field}={path}: {parts_folder(path)} holds the segments of an interrupted run; "
            "choose another name or pass --overwrite"
        )


def parts_folder(path: str | Path) -> str:
    """Where the segments of an unfinished video are."""
    return f"{path}{PARTS_SUFFIX}"


def holds_work(parts: str | Path) -> bool:
    """Whether a parts folder holds anything but locks."""
    return not all(LOCK_NAMES.fullmatch(unstaged(name)) for name in list_names(parts))
