"""What a pretrained text encoder gives, on disk: without padding, a file per text under its key."""

from __future__ import annotations

import logging
import tempfile
import threading
from functools import cache, cached_property
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pavdm_dist.io.local_disk import cache_folder
from pavdm_dist.io.storage import atomic_write
from pavdm_dist.io.temporary import temporary_prefix

logger = logging.getLogger(__name__)


class KeptEmbeddings:
    """Embeddings by key, for this process where they cannot be kept for others.

    Args:
        chosen: folder; None = that of this user.
        text_dim: columns of an embedding.
    """

    def __init__(self, chosen: str | None, text_dim: int) -> None:
        self._chosen, self._text_dim = chosen, text_dim
        self._is_told = False  # that the folder cannot be written

    @cached_property
    def folder(self) -> Path | None:
        """Where they are kept; None = for this process alone, which is said: this user has no place for them."""
        if self._chosen is not None:
            return Path(self._chosen)
        try:
            return cache_folder("text")
        except OSError as error:
            logger.warning("%s, or text_cache=FOLDER; embeddings go with this process", error.strerror)
            return None

    def find(self, key: str) -> Tensor | None:
        """``[L, text_dim]``; None of one that is not there, or is damaged."""
        found = None if self.folder is None else self._read(self.folder, key)
        if found is not None:
            return found
        return self._read(_of_this_process(), key) if _temporary.cache_info().currsize else None

    def keep(self, key: str, embedding: Tensor) -> None:
        """Where they are to be kept, else where they last as long as this process: in memory those of a long manifest
        would be many gigabytes.

        Raises:
            OSError: neither disk takes it.
        """
        content = save({"embedding": embedding})
        if self.folder is not None:
            try:
                _write(self.folder, key, content)
                return
            except OSError as error:
                self.tell_unwritten(error)
        _write(_of_this_process(), key, content)

    def tell_unwritten(self, error: OSError) -> None:
        """Once: every text would say it."""
        if not self._is_told:
            logger.warning("text_cache=%s cannot be written: %s", self.folder, error)
        self._is_told = True

    def _read(self, folder: Path, key: str) -> Tensor | None:
        try:
            found = load_file(_file(folder, key))["embedding"]
        except (OSError, SafetensorError, KeyError):
            return None
        return found if found.ndim == 2 and found.shape[1] == self._text_dim and bool(found.isfinite().all()) else None


def _file(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def _write(folder: Path, key: str, content: bytes) -> None:
    with atomic_write(_file(folder, key), "wb") as file:
        file.write(content)


def _of_this_process() -> Path:
    """A folder that all encoders of this process share, and that goes with it.

    Raises:
        OSError: there is no place for one.
    """
    with _MAKING:
        return Path(_temporary().name)


# Of two folders that were made at once, one would go at once.
_MAKING = threading.Lock()


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=temporary_prefix("text"))
