"""Keys and values of clean chunks, each made once, in a call of the chunk's own; noisy windows read them."""

from __future__ import annotations

import torch
from torch import Tensor

from pavdm_dist.models.kv_cache import Pair, Turn


class CleanMemory:
    """A :class:`~pavdm_dist.models.kv_cache.Memory` of anchors and recent chunks; what noisy chunks leave is forgotten.

    Keys are kept unturned: what a call reads lies at the first places, one chunk behind the other, and itself comes
    behind that, so that places stay within one call's span however long the video is.

    Args:
        chunk_frames: latent frames of a chunk.
        context_chunks: recent chunks that are kept.
        anchor_chunks: first chunks that are kept for ever.
    """

    def __init__(self, chunk_frames: int, context_chunks: int, anchor_chunks: int) -> None:
        self._chunk_frames, self._context_chunks, self._anchor_chunks = chunk_frames, context_chunks, anchor_chunks
        self._pairs: dict[int, dict[int, Pair]] = {}  # by chunk and block
        self._new: set[int] = set()
        self._window: tuple[int, ...] = ()
        self._clean: int | None = None

    def begin(self, window: tuple[int, ...], chunk: int | None) -> None:
        """A call starts.

        Args:
            window: chunks whose keys and values it reads, then its own.
            chunk: the clean chunk that is its own; None for noisy ones.
        """
        oldest = max(self._pairs, default=0) + 1 - self._context_chunks
        for gone in [kept for kept in self._pairs if self._anchor_chunks <= kept < oldest]:
            del self._pairs[gone]
            self._new.discard(gone)
        self._window, self._clean = window, chunk

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn, frame_tokens: int = 1) -> Pair:
        read = self._window[: first // (self._chunk_frames * frame_tokens)]
        pairs = [*(self._pairs[chunk][block] for chunk in read), (keys, values)]
        if self._clean is not None:
            self.hold(self._clean, block, (keys, values))
            self._new.add(self._clean)
        keys, values = (torch.cat(part, dim=-2) for part in zip(*pairs, strict=True))
        return turn(keys, 0), values

    def mask(self, first: int, tokens: int, chunk: int, device: torch.device) -> None:
        """None: noisy chunks do not read each other."""

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return sum(part.nbytes for blocks in self._pairs.values() for pair in blocks.values() for part in pair)

    def state(self) -> dict[tuple[int, int], Pair]:
        """What is kept, by chunk and block; tensors are never written to."""
        return {(chunk, block): pair for chunk, blocks in self._pairs.items() for block, pair in blocks.items()}

    def take_new(self) -> dict[tuple[int, int], Pair]:
        """As :meth:`state`, of chunks that have left theirs since the last call."""
        new, self._new = self._new, set()
        return {key: pair for key, pair in self.state().items() if key[0] in new}

    def hold(self, chunk: int, block: int, pair: Pair) -> None:
        """Keeps what a chunk has left in another process."""
        self._pairs.setdefault(chunk, {})[block] = pair
