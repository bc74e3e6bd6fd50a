"""Files that are either complete or absent, on local disks and in any object store that fsspec knows.

Paths with ``://`` go through fsspec; everything else is a local path. On a local disk a file is written under a
temporary name in its own folder, flushed to the disk and renamed; an object store makes an upload visible only
when it is complete, so there the file is staged locally and uploaded.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pavdm_dist.io.local_disk import give_usual_mode, link_new, make_durable
from pavdm_dist.io.remote import filesystem, is_remote
from pavdm_dist.io.temporary import is_temporary, temporary_prefix

_BLOCK = 1 << 20
# How often a place is made for a new small file that others remove.
_ATTEMPTS = 5
# As stage() names them.
_STAGED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)


def join(folder: str | Path, name: str) -> str:
    """``folder/name``, local or remote."""
    return f"{str(folder).rstrip('/')}/{name}"


def same_path(one: str | Path, other: str | Path) -> bool:
    """Whether two paths name the same file, existing or not, however they are written."""
    if is_remote(one) or is_remote(other):
        return str(one) == str(other)
    return os.path.realpath(one) == os.path.realpath(other)


def exists(path: str | Path) -> bool:
    """Whether there is a file or folder."""
    if is_remote(path):
        fs, inner = filesystem(path)
        return bool(fs.exists(inner))
    return os.path.lexists(path)


def list_names(folder: str | Path) -> list[str]:
    """Sorted names of the files in a folder; empty when there is no such folder."""
    if is_remote(folder):
        fs, inner = filesystem(folder)
        if not fs.exists(inner):
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(inner, detail=False))
    path = Path(folder)
    return sorted(entry.name for entry in path.iterdir()) if os.path.isdir(path) else []


def open_read(path: str | Path) -> IO[bytes]:
    """Opens a file for reading; seekable.

    Raises:
        OSError: it cannot be opened, or is a pipe or a device, which might never end.
    """
    if is_remote(path):
        fs, inner = filesystem(path)
        return fs.open(inner, "rb")
    _check_regular(path)
    return open(path, "rb")


def _check_regular(path: str | Path) -> None:
    """Before it is opened: opening a pipe that nobody writes to waits for ever."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder says so itself
        raise OSError(errno.EINVAL, "is a pipe or a device", str(path))


def remove(path: str | Path) -> None:
    """Removes a file or a whole folder; nothing happens when there is none."""
    if is_remote(path):
        fs, inner = filesystem(path)
        if fs.exists(inner):
            fs.rm(inner, recursive=True)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def remove_matching(folder: str | Path, names: re.Pattern[str], keep: Collection[str] = ()) -> None:
    """Removes files of a folder, and the folder itself when nothing is left in it.

    Args:
        folder: nothing happens when there is none.
        names: of the files, to match as a whole; staged ones (:func:`stage`) that would get such a name go, too.
        keep: names that stay.
    """
    for name in list_names(folder):
        if name not in keep and names.fullmatch(unstaged(name)):
            remove(join(folder, name))
    remove_empty(folder)


def remove_staged(path: str | Path) -> None:
    """Removes what processes that were killed had staged for a local file; nobody may be writing it."""
    if not is_remote(path):
        folder, name = Path(path).parent, Path(path).name
        remove_matching(folder, re.compile(re.escape(name)), keep=[name])


def remove_empty(folder: str | Path) -> None:
    """Removes a folder in which there is nothing; nothing happens when there is something, or no folder."""
    if is_remote(folder):
        if exists(folder) and not list_names(folder):
            remove(folder)
        return
    with suppress(OSError):
        os.rmdir(folder)


def move(path: str | Path, target: str | Path) -> None:
    """Renames a file within its store, replacing what was under ``target``."""
    if is_remote(path):
        fs, inner = filesystem(path)
        fs.mv(inner, filesystem(target)[1])
    else:
        os.replace(path, target)


def create_new(path: str | Path, content: bytes, mode: int | None = None) -> bool:
    """Writes a small file unless there is one, which of several processes at once only one can do; makes the folder.

    It is whole from its first moment on, where the file system knows hard links. In a remote store, which need not know
    exclusive creation, two processes in the same moment may both succeed.

    Args:
        path: of the file.
        content: of it.
        mode: who may read and write it on a local disk, from its first moment on; None = whom the umask lets.

    Returns:
        Whether the file is new; False = there was one, and it is as it was.
    """
    if is_remote(path):
        if exists(path):
            return False
        fs, inner = filesystem(path)
        fs.pipe_file(inner, content)
        return True
    if os.path.lexists(path):
        return False
    for _ in range(_ATTEMPTS - 1):
        with suppress(FileNotFoundError):  # who ends a video just now removes what others stage there, and the folder
            return _create_new(path, content, mode)
    return _create_new(path, content, mode)


@contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """A local file with the content of ``path``: itself, or of a remote one a copy while the block runs.

    Raises:
        OSError: as :func:`open_read`.
    """
    if not is_remote(path):
        _check_regular(path)
        yield Path(path)
        return
    fs, inner = filesystem(path)
    copy = stage(path)
    try:
        fs.get_file(inner, str(copy))
        yield copy
    finally:
        discard(copy)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A local path to write to; when the block ends well, ``path`` becomes that file in one move.

    When the block raises, nothing is left and an earlier file under ``path`` stays as it was.
    """
    staged = stage(path)
    try:
        yield staged
        commit(staged, path)
    except BaseException:
        discard(staged)
        raise


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns what safetensors raises for a disk that is full or went away into the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """As :func:`atomic_path`, with an open file (``mode`` ``"wb"`` or ``"w"``)."""
    if mode == "w" and encoding is None:
        encoding = "utf-8"
    with atomic_path(path) as staged, open(staged, mode, encoding=encoding) as file:
        yield file


def replace_bytes(
    path: str | Path, content: bytes, previous: str | Path, check: Callable[[], None] = lambda: None
) -> None:
    """Writes a small file durably; the one that was there becomes ``previous``. At every moment one of them is whole.

    Args:
        path: of the file, in a folder that there is.
        content: of it.
        previous: where the one that is there goes.
        check: raises where nothing may be replaced any more; asked when all that can take long is done.

    Raises:
        OSError: it cannot be written.
    """
    if is_remote(path):
        check()
        if exists(path):
            move(path, previous)
        fs, inner = filesystem(path)
        fs.pipe_file(inner, content)
        return
    staged = _staged(path)
    try:
        staged.write_bytes(content)
        make_durable(staged)  # before the one that is there steps back
        check()
        if os.path.lexists(path):
            os.replace(path, previous)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    make_durable(Path(path).parent)


def _staged(path: str | Path) -> Path:
    return Path(path).parent / f".{Path(path).name}.{uuid.uuid4().hex[:8]}.tmp"


def stage(path: str | Path) -> Path:
    """A fresh place for a file that :func:`commit` will move to ``path``, or :func:`discard` removes; makes the folder.

    It lies in a folder of its own, where what libraries write beside a file while they make it can be found, too.

    Raises:
        OSError: the folder cannot be made, or ``path`` has no name of its own (``.``, ``..``, ``/``, or nothing), which
            only a folder that there is goes by.
    """
    name = Path(path).name
    if name in ("", ".."):  # below the folder of its own this would be that folder itself, or the one around it
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if is_remote(path):
        return Path(tempfile.mkdtemp(".tmp", temporary_prefix("upload"))) / name
    folder = _staged(path)
    folder.mkdir(0o700, parents=True)
    return folder / name


def commit(staged: Path, path: str | Path) -> None:
    """Makes a staged file durable and moves it to ``path``, replacing what was there."""
    if is_remote(path):
        fs, inner = filesystem(path)
        fs.put_file(str(staged), inner)
    else:
        give_usual_mode(staged)
        make_durable(staged)
        os.replace(staged, path)
    discard(staged)
    if not is_remote(path):
        make_durable(Path(path).parent)


def discard(staged: Path) -> None:
    """Removes a staged file, or its empty place; harmless when called twice.

    Raises:
        ValueError: it lies in no folder of :func:`stage`'s, which may be anybody's.
    """
    folder = staged.parent
    if not (_STAGED.fullmatch(folder.name) or is_temporary(folder.name)):
        raise ValueError(f"{staged} was not staged here")
    shutil.rmtree(folder, ignore_errors=True)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open_read(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _create_new(path: str | Path, content: bytes, mode: int | None) -> bool:
    staged = stage(path)  # in a folder that nobody else may look into
    try:
        staged.write_bytes(content)
        if mode is not None:
            staged.chmod(mode)
        make_durable(staged)
        return link_new(staged, path)
    finally:
        discard(staged)


def unstaged(name: str) -> str:
    """The name that a staged file would get; any other name as it is."""
    staged = _STAGED.fullmatch(name)
    return staged[1] if staged else name
