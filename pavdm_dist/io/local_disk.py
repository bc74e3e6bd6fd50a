"""What files on a local disk need, and a remote store sees to itself: a place, being on the disk, links, rights."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from pavdm_dist.errors import ConfigError

# Of a name and of a whole path, on nearly all systems; and what names of files beside an output are longer by at most:
# .parts with what is in it, .safetensors for .mp4 while it is staged.
_NAME_BYTES, _PATH_BYTES, _STAGED_BYTES = 255, 4095, 22


def check_place(path: Path, field: str) -> None:
    """Refuses a path at which no file can be made, whatever is in it.

    Args:
        path: of a file; its folders need not exist.
        field: the setting that names it.

    Raises:
        ConfigError: a folder of that name, a file for a folder, a name that is too long, no right to write.
    """
    if os.path.isdir(path):
        raise ConfigError(f"{field}={path} is a folder; name a file in it")
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"{field}={path}: {folder} is a file, not a folder")
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):  # a share that does not say
        longest = _NAME_BYTES
    missing = path.absolute().relative_to(folder).parts
    for name, room in zip(missing, (*[0] * (len(missing) - 1), _STAGED_BYTES), strict=True):
        if len(os.fsencode(name)) + room > longest:
            raise ConfigError(
                f"{field}={path}: a name of {len(os.fsencode(name))} bytes is too long; {folder} takes at most"
                f" {longest - room} here"
            )
    if len(os.fsencode(path.absolute())) + _STAGED_BYTES > _PATH_BYTES:
        raise ConfigError(
            f"{field}={path}: the whole path is too long, {_PATH_BYTES - _STAGED_BYTES} bytes are the most"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{field}={path}: no right to write in {folder}")


def make_durable(path: Path) -> None:
    """Waits until a file or folder is on the disk, as far as its file system knows how to.

    Raises:
        OSError: the disk is full or broken.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # Shares that cannot, for folders above all; what is there is as durable as it will be.
        unable = error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
        if not (unable or (path.is_dir() and error.errno in (errno.EACCES, errno.EISDIR, errno.EBADF))):
            raise


def link_new(path: str | Path, target: str | Path) -> bool:
    """Gives a local file a second name, unless there is something of that name: only one of several at once can.

    Returns:
        Whether it has; False = there was something, and it is as it was.
    """
    try:
        os.link(path, target)
    except FileExistsError:
        return False
    except OSError:  # a share without hard links: a copy, which is empty for an instant
        content, mode = Path(path).read_bytes(), os.stat(path).st_mode & 0o777
        try:
            file = open(target, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
        except FileExistsError:
            return False
        try:
            with file:
                file.write(content)
        except BaseException:
            Path(target).unlink(missing_ok=True)
            raise
    return True


def give_usual_mode(path: Path) -> None:
    """Lets others read what the umask lets them read: some libraries make files that only their owner may."""
    # The one way to ask that doesn't change it for other threads, too.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for umask in (line.partition(":")[2] for line in lines if line.startswith("Umask:")):
        with suppress(OSError):  # a share without modes
            path.chmod(0o666 & ~int(umask, 8))


def cache_folder(kind: str) -> Path:
    """Where what can be found out again is kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, in ``pavdm_dist/KIND``.

    Raises:
        OSError: this user has no home, or ``$XDG_CACHE_HOME`` is no absolute path.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise OSError(errno.ENOENT, "this user has no home for a cache; XDG_CACHE_HOME names a folder")
    return Path(base, "pavdm_dist", kind)
