"""Stores of fsspec's: what is reached by a path with ``://``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pavdm_dist.errors import ConfigError

# Where folders need not be made, and a file is there when its upload is complete and not before.
_OBJECT_STORES = (
    "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "wasb", "wasbs", "oss", "oci", "ocilake", "tos", "tosfs",
    "hf", "lakefs", "memory",
)  # fmt: skip


def is_remote(path: str | Path) -> bool:
    """Whether the path names a store of fsspec's (``s3://...``) instead of a local file."""
    return "://" in str(path)


def check_store(path: str | Path, field: str) -> None:
    """Refuses stores in which a file could be seen, or be left, half written. Any is good enough to read from.

    Args:
        path: with ``://``.
        field: the setting that names it.

    Raises:
        ConfigError: it is no object store.
    """
    kind, _, inside = str(path).partition("://")
    if kind.lower() in ("file", "local"):
        raise ConfigError(f"{field}={path}: is on a disk of this machine; write it as a path, {field}={inside}")
    if "::" in kind:
        raise ConfigError(f"{field}={path}: is a chain of stores; name the one that files are to be in, and it alone")
    if kind.lower() not in _OBJECT_STORES:
        stores = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "oss", "oci"))
        raise ConfigError(
            f"{field}={path}: in {kind}:// files would appear before they are whole; name an object store"
            f" ({stores}, ...), or a path (of what is mounted)"
        )


class _Store:
    """A file system of fsspec's whose drivers' own kinds of error are the OSError that they stand for."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._fs, name)

        def told(*args: Any, **options: Any) -> Any:
            try:
                return call(*args, **options)
            except OSError:
                raise
            except Exception as error:
                raise OSError(f"{self._path}: {type(error).__name__}: {error}") from error

        return told


def filesystem(path: str | Path) -> tuple[_Store, str]:
    """The store of a path with ``://``, and the path inside it.

    Raises:
        ConfigError: no such kind of store, or nobody to sign in as.
        OSError: it cannot be reached.
    """
    from fsspec.core import url_to_fs

    try:
        # What other machines write is seen at once: locks and sidecars are looked for again and again.
        fs, inner = url_to_fs(str(path), use_listings_cache=False)
    except OSError:
        raise
    except ImportError as error:
        extra = ": pip install 'pavdm-dist[s3]'" if str(path).lower().startswith(("s3://", "s3a://")) else ""
        raise ConfigError(f"{path} needs a package that is not installed: {error}{extra}") from error
    except Exception as error:  # no such protocol, nobody to sign in as
        raise ConfigError(f"{path} cannot be reached: {error}") from error
    return _Store(fs, str(path)), inner
