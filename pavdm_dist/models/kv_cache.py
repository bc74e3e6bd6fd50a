"""What chunks of a window leave for each other, when they are run one by one: keys and values by block.

Everything is counted in the tokens that one attention mixes, in order of time. Attention over the frames of a place has
one of them a latent frame, attention over a whole window as many as a frame has patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pavdm_dist.models.attention import chunk_mask

Pair = tuple[Tensor, Tensor]
# Keys ``[..., tokens, head_dim]`` and the place of their first token in the window -> keys turned to their places.
Turn = Callable[[Tensor, int], Tensor]


class Memory(Protocol):
    """Attention that mixes frames asks it what a micro-batch may read; one per stream and guidance branch.

    What is kept lies in order of time, so that what is read is a part of it and nothing is put together for a call.
    """

    def begin(self, window: tuple[int, ...], chunk: int | None) -> None:
        """A micro-batch starts.

        Args:
            window: chunks of its row, context first.
            chunk: which of them it is; None for all at once.
        """

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn, frame_tokens: int = 1) -> Pair:
        """Keeps a micro-batch's pair and returns all that it attends to, in order of time, keys turned.

        What is returned holds until the next call for this block.

        Args:
            block: which.
            keys, values: ``[..., tokens, head_dim]``, keys not yet turned.
            first: place of the first token in the window.
            turn: rotary embedding.
            frame_tokens: tokens that a latent frame has among these, always the same in one block.
        """

    def mask(self, first: int, tokens: int, chunk: int, device: torch.device) -> Tensor | None:
        """How the chunks of a micro-batch may read at once, each what it would if it came alone.

        Args:
            first: place of the first token in the window.
            tokens: of the micro-batch.
            chunk: tokens of a chunk.
            device: of the mask.

        Returns:
            Over all that :meth:`attend` returns, ``[tokens, read]``, True where a token may read another; None where
            what a chunk reads is only there in its turn.
        """


def read_in_turn(
    memory: Memory,
    attend: Callable[..., Tensor],
    block: int,
    projected: list[Tensor],
    first: int,
    turn: Turn,
    chunk: int | None,
    frame_tokens: int = 1,
) -> Tensor:
    """Attention of a micro-batch over what its memory has for it: at once, or chunk by chunk.

    Of several chunks each reads as if it came alone. Where the memory has a mask for that, and a frame is one token,
    they read together: a mask over few tokens costs less than a call for each. (Values that are no numbers go through
    it, though: a video that fails may be told of at a cleaner chunk.) Else each leaves its pair and reads before the
    next one does; only what is no attention over frames is computed for all together.

    Args:
        memory: asked for keys and values.
        attend: softmax attention, of queries, keys, values and a mask, if any.
        block: which.
        projected: queries turned to their places, keys that are not, values, ``[..., tokens, head_dim]`` each. They are
            taken off the list, so that they are gone as soon as they were read.
        first: place of the first token in the window.
        turn: rotary embedding.
        chunk: tokens of a chunk; None where all read at once.
        frame_tokens: see :meth:`Memory.attend`.

    Returns:
        The shape of the queries.
    """
    v, k, q = projected.pop(), projected.pop(), projected.pop()
    if chunk is None:
        k, v = memory.attend(block, k, v, first, turn, frame_tokens)
        return attend(q, k, v)
    together = memory.mask(first, q.shape[-2], chunk, q.device) if frame_tokens == 1 else None
    if together is not None:
        k, v = memory.attend(block, k, v, first, turn)
        return attend(q, k, v, together)
    parts = []
    for start, queries in enumerate(q.split(chunk, dim=-2)):
        own = slice(start * chunk, start * chunk + queries.shape[-2])
        pair = memory.attend(block, k[..., own, :], v[..., own, :], first + own.start, turn, frame_tokens)
        parts.append(attend(queries, *pair))
    return torch.cat(parts, dim=-2)


class ChunkMemory:
    """Mode causal: a chunk reads itself, the row's cleaner chunks and the clean context: all places up to its own.

    A row's chunks come cleanest first, so that each finds those before it just written; what the context left at the
    first places stays for a shift. Keys are kept turned.

    Args:
        frames: latent frames of a full window, context included.
    """

    def __init__(self, frames: int) -> None:
        self._frames = frames
        self._pairs: dict[int, Pair] = {}
        self._masks: dict[tuple[int, int, int, torch.device], Tensor] = {}

    def begin(self, window: tuple[int, ...], chunk: int | None) -> None:
        """Places alone say what is read."""

    def mask(self, first: int, tokens: int, chunk: int, device: torch.device) -> Tensor:
        """True for a token's own chunk and all places before it."""
        key = (first, tokens, chunk, device)
        if key not in self._masks:
            self._masks[key] = chunk_mask(*key)
        return self._masks[key]

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn, frame_tokens: int = 1) -> Pair:
        if block not in self._pairs:
            room = self._frames * frame_tokens
            self._pairs[block] = _empty(keys, room), _empty(values, room)
        last = first + keys.shape[-2]
        kept_keys, kept_values = self._pairs[block]
        kept_keys[..., first:last, :] = turn(keys, first)
        kept_values[..., first:last, :] = values
        return kept_keys[..., :last, :], kept_values[..., :last, :]


@dataclass
class _Bank:
    """One block's keys as they are, keys turned, and values, at the window's places; the first ``held`` are written."""

    keys: Tensor
    turned: Tensor
    values: Tensor
    frame_tokens: int
    held: int = 0
    placed: bool = True  # whether keys were turned for the places they have now

    def write(self, keys: Tensor, values: Tensor, first: int, turn: Turn) -> Pair:
        last = first + keys.shape[-2]
        if first > self.held:
            raise ValueError(
                f"token {first} of the window follows {self.held} that left keys: only the newest may lack"
            )
        self.keys[..., first:last, :], self.values[..., first:last, :] = keys, values
        self.held = max(self.held, last)
        if self.placed:
            self.turned[..., first:last, :] = turn(keys, first)
        else:
            self.turned[..., : self.held, :] = turn(self.keys[..., : self.held, :], 0)
            self.placed = True
        return self.turned[..., : self.held, :], self.values[..., : self.held, :]

    def leave(self, frames: int) -> None:
        """The window's first ``frames`` are gone; the others move up."""
        gone = frames * self.frame_tokens
        for kept in (self.keys, self.values):
            kept[..., : self.held - gone, :] = kept[..., gone : self.held, :].clone()
        self.held, self.placed = self.held - gone, False


class DisplacedMemory:
    """Mode displaced: a chunk reads the whole window, noisier chunks as they were at the row before.

    What a whole window leaves is exact. A newborn chunk has left nothing yet, so cleaner ones do not see it in its
    first row. Keys are kept unturned, because a chunk's place changes with every shift, and turned for the place
    they have now, because every chunk of a row reads them.

    Args:
        frames: latent frames of a full window, context included.
        chunk_frames: those of a chunk.
        probe: the block at which the change of keys is watched.
    """

    def __init__(self, frames: int, chunk_frames: int, probe: int | None = None) -> None:
        self._frames, self._chunk_frames = frames, chunk_frames
        self._probe = probe
        self._changed: Tensor | float = 0.0
        self._size: Tensor | float = 0.0
        self._banks: dict[int, _Bank] = {}
        self._window: tuple[int, ...] = ()
        self._is_whole = False

    def begin(self, window: tuple[int, ...], chunk: int | None) -> None:
        if window[0] not in self._window:  # the first one, or a single chunk without context that has made way
            self._banks.clear()
        elif gone := self._window.index(window[0]):
            for bank in self._banks.values():
                bank.leave(gone * self._chunk_frames)
        self._window, self._is_whole = window, chunk is None

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn, frame_tokens: int = 1) -> Pair:
        bank = self._banks.get(block)
        if bank is None:
            room = self._frames * frame_tokens
            as_they_are, turned, kept_values = (_empty(tensor, room) for tensor in (keys, keys, values))
            bank = self._banks[block] = _Bank(as_they_are, turned, kept_values, frame_tokens)
        last = first + keys.shape[-2]
        if block == self._probe and not self._is_whole and last <= bank.held:
            before = bank.keys[..., first:last, :]
            # Summed where it is: nobody waits for a device before the end of a shift.
            self._changed = self._changed + (keys - before).square().sum().double()
            self._size = self._size + before.square().sum().double()
        return bank.write(keys, values, first, turn)

    def mask(self, first: int, tokens: int, chunk: int, device: torch.device) -> None:
        """None: noisier chunks are read as they were, until they come themselves."""

    def take_change(self) -> float:
        """Relative L2 by which the probe's keys changed from row to row since the last call; 0 if nothing was run."""
        changed, size = float(self._changed), float(self._size)
        change = math.sqrt(changed / size) if size else 0.0
        self._changed = self._size = 0.0
        return change


def _empty(like: Tensor, tokens: int) -> Tensor:
    """Room for so many tokens; reading what was not written would show."""
    return torch.full((*like.shape[:-2], tokens, like.shape[-1]), math.nan, dtype=like.dtype, device=like.device)
