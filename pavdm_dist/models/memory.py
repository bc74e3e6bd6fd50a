"""What chunks of a window leave for each other, when they are run one by one: temporal keys and values by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
# Keys ``[..., frames, head_dim]`` and the place of their first frame in the window -> keys turned to their places.
Turn = Callable[[Tensor, int], Tensor]


class Memory(Protocol):
    """Temporal attention asks it what a micro-batch may read; one per stream and guidance branch."""

    def begin(self, window: tuple[int, ...], chunk: int | None, is_context: bool, opens_row: bool) -> None:
        """A micro-batch starts.

        Args:
            window: chunks of its row, context first.
            chunk: which of them it is; None for all at once.
            is_context: it is clean.
            opens_row: it is the row's first noisy one, or all.
        """

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn) -> Pair:
        """Keeps a micro-batch's pair and returns all that it attends to, in order of time, keys turned.

        Args:
            block: which.
            keys, values: ``[..., frames, head_dim]``, keys not yet turned.
            first: place of the first frame in the window.
            turn: rotary embedding.
        """


class ChunkMemory:
    """Mode causal: a chunk reads itself, the row's cleaner chunks and the clean context.

    Pairs of the context stay for a shift, those of a row's chunks until the next row begins. Keys are kept turned: the
    context always sits at the window's first places.
    """

    def __init__(self) -> None:
        self._context: dict[int, Pair] = {}
        self._row: dict[int, list[Pair]] = {}
        self._filling_context = False

    def begin(self, window: tuple[int, ...], chunk: int | None, is_context: bool, opens_row: bool) -> None:
        self._filling_context = is_context
        if is_context:
            self._context = {}
        elif opens_row:
            self._row = {}

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn) -> Pair:
        # A view of the values would keep the queries alive.
        keys, values = turn(keys, first), values.clone()
        if self._filling_context:
            self._context[block] = keys, values
            return keys, values
        row = self._row.setdefault(block, [])
        row.append((keys, values))
        return _joined([self._context[block], *row] if block in self._context else row)


class DisplacedMemory:
    """Mode displaced: a chunk reads the whole window, noisier chunks as they were at the row before.

    What a whole window leaves is exact. A newborn chunk has left nothing yet, so cleaner ones do not see it in its
    first row. Keys are kept unturned, because a chunk's place changes with every shift, and turned for the place
    they have now, because every chunk of a row reads them.

    Args:
        probe: the block at which the change of keys is watched.
    """

    def __init__(self, probe: int | None = None) -> None:
        self._probe, self._changed, self._size = probe, 0.0, 0.0
        self._pairs: dict[int, dict[int, Pair]] = {}
        self._turned: dict[int, dict[int, tuple[int, Tensor]]] = {}  # by block and chunk: place, keys
        self._window: tuple[int, ...] = ()
        self._chunk: int | None = None

    def begin(self, window: tuple[int, ...], chunk: int | None, is_context: bool, opens_row: bool) -> None:
        self._window, self._chunk = window, chunk
        kept: list[dict[int, Any]] = [*self._pairs.values(), *self._turned.values()]
        for by_chunk in kept:
            for gone in [index for index in by_chunk if index not in window]:
                del by_chunk[gone]

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn) -> Pair:
        pairs, turned = self._pairs.setdefault(block, {}), self._turned.setdefault(block, {})
        if self._chunk is None:
            turned.clear()
            size = keys.shape[-2] // len(self._window)
            parts = zip(keys.split(size, dim=-2), values.split(size, dim=-2), strict=True)
            # Copies: a view would keep the queries alive, too.
            pairs.update((index, (k.clone(), v.clone())) for index, (k, v) in zip(self._window, parts, strict=True))
            return turn(keys, first), values
        if block == self._probe and self._chunk in pairs:
            before = pairs[self._chunk][0]
            self._changed += float((keys - before).square().sum())
            self._size += float(before.square().sum())
        pairs[self._chunk] = keys.clone(), values.clone()
        turned.pop(self._chunk, None)
        seen = [index for index in self._window if index in pairs]
        if seen != list(self._window[: len(seen)]):
            raise ValueError(f"chunks {seen} of window {self._window} left keys: only the newest may be missing")
        size = keys.shape[-2]
        for position, index in enumerate(seen):
            if turned.get(index, (None,))[0] != position * size:
                turned[index] = position * size, turn(pairs[index][0], position * size)
        return _joined([(turned[index][1], pairs[index][1]) for index in seen])

    def take_change(self) -> float:
        """Relative L2 by which the probe's keys changed from row to row since the last call; 0 if nothing was run."""
        change = math.sqrt(self._changed / self._size) if self._size else 0.0
        self._changed = self._size = 0.0
        return change


def _joined(pairs: list[Pair]) -> Pair:
    if len(pairs) == 1:
        return pairs[0]
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)
