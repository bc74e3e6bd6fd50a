"""Clean latents on disk (safetensors) and their checksum."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from pavdm_dist.errors import MediaError
from pavdm_dist.io.storage import atomic_path, disk_errors, is_remote, join, list_names, local_copy, remove_matching

LATENTS_NAMES = re.compile(r"latents-(\d{6,})-(\d{6,})\.safetensors")
_METADATA = {"layout": "channels time height width", "scale": "normalised"}
# In a group's file: the checksum of the video's latents up to its end.
_CHAIN = "sha256"
_HASH_TAG = b"pavdm_dist latents 1"

logger = logging.getLogger(__name__)


class LatentsHash:
    """A video's checksum, chained from latent frame to latent frame, so that 32 bytes are enough to go on with it.

    h_0 = SHA-256(``pavdm_dist latents 1``), h_k = SHA-256(h_(k-1) || frame k as ``[C, h, w]`` float32, little endian).
    The same for every division of the frames into chunks.

    Args:
        state: of an earlier one (:attr:`state`) to go on with; None = no frame yet.
    """

    def __init__(self, state: bytes | None = None) -> None:
        self.state = hashlib.sha256(_HASH_TAG).digest() if state is None else state

    def update(self, latents: Tensor) -> None:
        """Adds the next latents, ``[C, c, h, w]``."""
        for frame in _time_major(latents):
            self.state = hashlib.sha256(self.state + frame.tobytes()).digest()

    def hexdigest(self) -> str:
        """The checksum so far."""
        return self.state.hex()


def latents_sha256(latents: Tensor) -> str:
    """Checksum of a whole tensor ``[C, N, h, w]``; equals :class:`LatentsHash` fed with its chunks."""
    digest = LatentsHash()
    digest.update(latents)
    return digest.hexdigest()


class LatentsWriter:
    """Keeps a video's clean latents in files of whole groups of chunks, and joins them at the end.

    A file appears in one move when its group is full; the open group is in memory.

    Args:
        folder: of the files, local or remote.
        chunks_per_segment: chunks in a group.
        resume: go on behind the files of an earlier writer; those that are no whole group, or are not what was written
            any more, are removed, and all behind them.
        num_chunks: with ``resume``, the chunks of the whole video when the earlier writer had closed all of them: then
            a shorter last file is complete, too.
    """

    def __init__(
        self, folder: str | Path, chunks_per_segment: int, resume: bool = False, num_chunks: int | None = None
    ) -> None:
        self._folder, self._group = folder, chunks_per_segment
        self._files: list[str] = []
        self._hash = LatentsHash()  # of all closed groups
        self._open: list[Tensor] = []
        self._frame_shape: tuple[int, ...] | None = None
        self.closed_chunks = 0
        names = list_names(folder) if resume else []
        for first, last, name in sorted((int(m[1]), int(m[2]), m[0]) for m in map(LATENTS_NAMES.fullmatch, names) if m):
            whole = last + 1 == num_chunks or last + 1 == first + self._group
            if first == self.closed_chunks and whole and self._is_sound(name):
                self._files.append(name)
                self.closed_chunks = last + 1
        remove_matching(folder, LATENTS_NAMES, keep=self._files)

    @property
    def next_chunk(self) -> int:
        """The chunk that must come next."""
        return self.closed_chunks + len(self._open)

    def write_chunk(self, index: int, latents: Tensor) -> bool:
        """Takes chunk ``index``.

        Args:
            index: 0-based; must be the next one. Older ones (replayed after a restart) are dropped.
            latents: ``[C, c, h, w]``; not changed later.

        Returns:
            Whether the chunk was new.

        Raises:
            ValueError: a chunk is missing in between, or the shape of a frame differs from the earlier ones'.
        """
        if index < self.next_chunk:
            return False
        if index > self.next_chunk:
            raise ValueError(f"chunk {index} arrived, {self.next_chunk} is next")
        shape = (latents.shape[0], *latents.shape[2:])
        if self._frame_shape not in (None, shape):
            raise ValueError(f"chunk {index} has frames {list(shape)}, earlier ones {self._frame_shape}")
        self._frame_shape = shape
        self._open.append(latents)
        if self.next_chunk % self._group == 0:
            self.close()
        return True

    def close(self) -> None:
        """Writes the open group, though it may not be full; only :meth:`join` may follow."""
        from safetensors.torch import save_file

        if not self._open:
            return
        name = f"latents-{self.closed_chunks:06d}-{self.next_chunk - 1:06d}.safetensors"
        latents = torch.cat([part.detach().to("cpu", torch.float32) for part in self._open], dim=1)
        digest = LatentsHash(self._hash.state)
        digest.update(latents)
        with atomic_path(join(self._folder, name)) as staged, disk_errors():
            save_file({"latents": latents.contiguous()}, staged, {**_METADATA, _CHAIN: digest.hexdigest()})
        self._hash = digest
        self._files.append(name)
        self.closed_chunks, self._open = self.next_chunk, []

    def sha256(self) -> str:
        """Checksum of what is in the closed groups' files, read again: of what a disk has made of them.

        Raises:
            MediaError: a file is not readable.
        """
        digest = LatentsHash()
        for name in self._files:
            with local_copy(join(self._folder, name)) as file:
                digest.update(read_latents(file))
        return digest.hexdigest()

    def join(self, path: str | Path) -> None:
        """Closes, and writes one file with the tensor ``latents`` ``[C, N, h, w]``, float32.

        One group at a time is in memory. The library writes a tensor from where it lies, so the joined one is laid out
        in a scratch file (channel-major: every group has its piece of every channel) and mapped.

        Raises:
            ValueError: no chunk was written.
        """
        from safetensors.numpy import save_file

        self.close()
        if not self._files:
            raise ValueError(f"{path}: no latents were written")
        with ExitStack() as stack:
            # Unnamed: the system reclaims it however the process ends.
            folder = None if is_remote(self._folder) else self._folder
            scratch = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            files = [stack.enter_context(local_copy(join(self._folder, name))) for name in self._files]
            lengths = [_shape(file)[1] for file in files]
            channels, _, height, width = _shape(files[0])
            total, start = sum(lengths), 0
            for file, length in zip(files, lengths, strict=True):
                with safe_open(file, "np") as opened:
                    latents = opened.get_slice("latents")
                    for channel in range(channels):
                        scratch.seek((channel * total + start) * height * width * 4)
                        scratch.write(latents[channel : channel + 1].tobytes())
                start += length
            scratch.flush()
            joined = np.memmap(scratch, dtype="<f4", mode="r", shape=(channels, total, height, width))
            with atomic_path(path) as staged, disk_errors():
                save_file({"latents": joined}, staged, _METADATA)

    def _is_sound(self, name: str) -> bool:
        """Whether the next group's file holds what was written there; if so, its latents are part of the checksum."""
        digest = LatentsHash(self._hash.state)
        try:
            with local_copy(join(self._folder, name)) as file:
                digest.update(read_latents(file))
                with safe_open(file, "np") as opened:
                    sound = (opened.metadata() or {}).get(_CHAIN) == digest.hexdigest()
        except MediaError:
            sound = False
        if sound:
            self._hash = digest
        else:
            logger.warning("%s is not what was written there", join(self._folder, name))
        return sound


def holds_latents(path: str | Path) -> bool:
    """Whether a file, local or remote, is one that :meth:`LatentsWriter.join` has written.

    Raises:
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError

    try:
        with local_copy(path) as file, safe_open(file, "np") as opened:
            return "latents" in opened.keys() and _METADATA.items() <= (opened.metadata() or {}).items()  # noqa: SIM118
    except SafetensorError:
        return False


def read_latents(path: str | Path) -> Tensor:
    """The tensor ``latents`` ``[C, N, h, w]`` of a local safetensors file, float32.

    Raises:
        MediaError: missing, unreadable, or without such a tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.isfile(path):
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
    array = latents.detach().to("cpu", torch.float32).numpy()
    return np.ascontiguousarray(array.swapaxes(0, 1), "<f4")


def _shape(path: Path) -> list[int]:
    with safe_open(path, "np") as opened:
        return opened.get_slice("latents").get_shape()
