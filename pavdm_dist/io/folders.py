"""Folders that are either complete or absent, among those of others: nothing is removed that was not made here.

And what in folders of others is theirs: not what machines leave there.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pavdm_dist.errors import ConfigError
from pavdm_dist.io.storage import discard, stage

# Folders of file servers, archives and trash cans, whose makers differ on capitals; those that begin with a dot are
# passed over, too.
_FOREIGN = (
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "~snapshot", "$recycle.bin",
    "recycler", "recycled", "system volume information", "network trash folder", "temporary items", "lost+found",
    "__macosx",
)  # fmt: skip
# What files that hold a video are called; ``.gif`` is a picture to some.
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")

# Files that they put into any folder that somebody looks at.
_LEFT_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")


def check_no_link(path: str | Path, field: str) -> None:
    """Refuses a link where a folder is to be replaced: the link would be, and what it leads to stay as it is.

    Args:
        path: of the folder, which need not exist; its parents may be links.
        field: the setting that names it.

    Raises:
        ConfigError: naming where the link leads.
    """
    if os.path.islink(path):
        raise ConfigError(f"{field}={path}: is a link to {os.readlink(path)}; name the folder itself")


def check_only(folder: Path, known: Container[str], field: str, what: str, inside: str = "") -> None:
    """Refuses to replace a folder that holds more than what would take its place: the rest would be gone.

    Args:
        folder: that is there.
        known: names of what is replaced; what systems leave in folders is nobody's.
        field: the setting that names it.
        what: the folder is taken for.
        inside: look into this folder in it instead.

    Raises:
        ConfigError: naming what it holds besides.
    """
    for file in sorted((folder / inside).iterdir()):
        if file.name not in known and file.name not in _LEFT_BY_SYSTEMS and not file.name.startswith("._"):
            found = file.relative_to(folder)
            raise ConfigError(
                f"{field}={folder}: holds {found}, which is no part of {what} and would be gone; name another"
            )


def touches(target: Path, place: Path) -> str:
    """How a folder that is to be replaced touches another place, links followed in both; empty where it does not."""
    target, place = (Path(os.path.realpath(path)) for path in (target, place))
    if target == place:
        return "is"
    if target in place.parents:
        return "holds"
    return "lies in" if place in target.parents else ""


def files_in(folder: str, suffixes: Sequence[str], field: str, hidden: list[str]) -> Iterator[Path]:
    """All files of a kind in a folder and its subfolders, linked ones too; links that lead nowhere are given as files.

    Args:
        folder: what is given begins with it.
        suffixes: of the kind, in small letters.
        field: the setting that names the folder.
        hidden: gets what is passed over: what Macs, file servers and trash cans leave beside files.

    Raises:
        ConfigError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{field}={folder}: {error.filename} cannot be read: {error.strerror}") from error

    seen = {os.path.realpath(folder)}
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        files = [name for name in names if Path(name).suffix.lower() in suffixes]
        foreign = sorted(name for name in subfolders if name.startswith(".") or name.casefold() in _FOREIGN)
        dotted = sorted(name for name in files if name.startswith("."))
        hidden += [os.path.join(place, name) for name in (*foreign, *dotted)]
        subfolders[:] = [name for name in subfolders if name not in foreign]
        real = {name: os.path.realpath(os.path.join(place, name)) for name in subfolders}
        subfolders[:] = [name for name in subfolders if real[name] not in seen]
        seen.update(real.values())
        yield from (Path(place, name) for name in files if not name.startswith("."))


def passed_over(hidden: Sequence[str]) -> str:
    """What to say of what :func:`files_in` passed over; empty where it was nothing."""
    return f"{len(hidden)} hidden files and folders are passed over, such as {hidden[0]}" if hidden else ""


def without_hidden(files: Iterable[Path]) -> list[Path]:
    """Sorted, without names that begin with a dot: on a share a Mac leaves ``._a.safetensors`` beside each file."""
    return sorted(file for file in files if not file.name.startswith("."))


@contextmanager
def whole_folder(path: str | Path, *, replaces: bool) -> Iterator[Path]:
    """A new, empty folder to write to; when the block ends well, ``path`` becomes it, and an earlier one there is gone.

    When the block raises, nothing is left and an earlier folder stays as it was. What is on its way has hidden names
    that nobody else has: ``path.old`` and ``path.partial`` are as good names as any for somebody's own folder.

    Args:
        path: a folder or nothing.
        replaces: a folder there; else one that is not empty, also where it has come meanwhile, is an OSError.

    Raises:
        OSError: it cannot be made, or not replaced.
    """
    folder = Path(os.path.realpath(path))  # "." has no name to put it under
    staged = stage(folder)
    try:
        staged.mkdir()
        yield staged
        if folder.exists() and replaces:
            _exchange(folder, staged)
        else:
            os.replace(staged, folder)
    finally:
        discard(staged)


def _exchange(folder: Path, staged: Path) -> None:
    """Moves ``staged`` to ``folder`` and removes what was there, which is in no moment without a name."""
    before = stage(folder)
    try:
        os.replace(folder, before)
        os.replace(staged, folder)
    except BaseException:
        if before.exists():
            os.replace(before, folder)
        discard(before)
        raise
    discard(before)
