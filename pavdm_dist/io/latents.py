"""Clean latents on disk (safetensors) and their checksum."""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pavdm_dist.errors import MediaError
from pavdm_dist.io.storage import atomic_write, is_remote

# Values copied at a time when the layout is changed at the end.
_COPY_VALUES = 1 << 22


class LatentsHash:
    """SHA-256 of a stream's latents, the same for every division into chunks.

    The bytes are time-major: each latent frame as ``[C, h, w]`` float32, little endian, in order.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, latents: Tensor) -> None:
        """Adds the next latents, ``[C, c, h, w]``."""
        self._digest.update(_time_major(latents).tobytes())

    def hexdigest(self) -> str:
        """The checksum so far."""
        return self._digest.hexdigest()


def latents_sha256(latents: Tensor) -> str:
    """Checksum of a whole tensor ``[C, N, h, w]``; equals :class:`LatentsHash` fed with its chunks."""
    digest = LatentsHash()
    digest.update(latents)
    return digest.hexdigest()


class LatentsWriter:
    """Streams chunks into one safetensors file with the tensor ``latents`` ``[C, N, h, w]``, float32.

    Chunks are kept in a scratch file until :meth:`finish` (the final layout is channel-major and N is unknown
    before), so memory does not grow with the length. The file appears in one move.

    Args:
        path: the ``.safetensors`` file, local or remote.
        metadata: text entries for the file's header.
    """

    def __init__(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        self.path = path
        self._metadata = {"layout": "channels time height width", "scale": "normalised", **(metadata or {})}
        folder = None if is_remote(path) else Path(path).absolute().parent
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        # An unnamed file: the system reclaims it however the process ends.
        self._scratch = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._frame_shape: tuple[int, int, int] | None = None
        self._next = 0
        self._frames = 0

    def write_chunk(self, index: int, latents: Tensor) -> bool:
        """Appends chunk ``index``.

        Args:
            index: 0-based; must be the next one. Older ones (replayed after a restart) are dropped.
            latents: ``[C, c, h, w]``.

        Returns:
            Whether the chunk was new.

        Raises:
            ValueError: a chunk is missing in between, or the shape differs from the first chunk's.
        """
        if index < self._next:
            return False
        if index > self._next:
            raise ValueError(f"chunk {index} arrived, {self._next} is next")
        data = _time_major(latents)
        frame_shape = data.shape[1:]
        if self._frame_shape not in (None, frame_shape):
            raise ValueError(f"chunk {index} has frames {list(frame_shape)}, earlier ones {self._frame_shape}")
        self._frame_shape = frame_shape
        self._scratch.write(data.tobytes())
        self._frames += data.shape[0]
        self._next += 1
        return True

    def finish(self) -> None:
        """Writes the file and drops the scratch.

        Raises:
            ValueError: no chunk was written.
        """
        if self._frame_shape is None:
            raise ValueError(f"{self.path}: no latents were written")
        self._scratch.flush()
        channels, height, width = self._frame_shape
        shape = (self._frames, channels, height, width)
        data = np.memmap(self._scratch, dtype="<f4", mode="r", shape=shape)
        step = max(1, _COPY_VALUES // (height * width))
        with atomic_write(self.path) as file:
            file.write(_header([channels, self._frames, height, width], self._metadata))
            for channel in range(channels):
                for start in range(0, self._frames, step):
                    file.write(data[start : start + step, channel].tobytes())
        del data
        self.abort()

    def abort(self) -> None:
        """Drops what was written; no file appears."""
        with suppress(OSError):  # a full disk: what is dropped needs no flush
            self._scratch.close()


def read_latents(path: str | Path) -> Tensor:
    """The tensor ``latents`` ``[C, N, h, w]`` of a local safetensors file, float32.

    Raises:
        MediaError: missing, unreadable, or without such a tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise MediaError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise MediaError(f"{path} is not a readable safetensors file: {error}") from error
    if "latents" not in tensors or tensors["latents"].ndim != 4:
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise MediaError(f"{path} has no tensor 'latents' of shape [C, N, h, w]; it holds {found}")
    return tensors["latents"].to(torch.float32, copy=True)


def _time_major(latents: Tensor) -> np.ndarray:
    if latents.ndim != 4:
        raise ValueError(f"latents must be [C, c, h, w], got {list(latents.shape)}")
    frames = rearrange(latents.detach().to("cpu", torch.float32), "c t h w -> t c h w").contiguous()
    return frames.numpy().astype("<f4", copy=False)


def _header(shape: list[int], metadata: dict[str, str]) -> bytes:
    """safetensors: 8-byte little-endian length, then JSON padded with spaces to a multiple of 8."""
    size = 4 * int(np.prod(shape, dtype=np.int64))
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, "latents": entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
