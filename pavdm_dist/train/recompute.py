"""Which blocks keep their insides for the backward pass, and which are computed again there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pavdm_dist.errors import ConfigError
from pavdm_dist.models.base import Activation, Backbone, BlockContext

Block = Callable[[int, Activation, BlockContext], Activation]


@dataclass(frozen=True)
class Recompute:
    """How much is computed again.

    Attributes:
        every: every so manieth block, from the first on; 0 = none.
        budget: bytes that the insides of blocks may take on a device, of which the last ones are kept; None = all.
    """

    every: int = 0
    budget: float | None = None

    @classmethod
    def parse(cls, text: str) -> Recompute:
        """What ``zero.recompute`` says: ``none``, ``every:N`` or ``budget:GiB``.

        Raises:
            ConfigError: something else.
        """
        kind, _, number = text.partition(":")
        try:
            if kind == "every" and int(number) >= 1:
                return cls(every=int(number))
            if kind == "budget" and 0 <= float(number) < math.inf:
                return cls(budget=float(number) * 2**30)
        except ValueError:
            pass
        if text != "none":
            raise ConfigError(
                f"zero.recompute={text}: must be none, every:N (N-th block, from 1 on) or budget:GiB (of what is kept)"
            )
        return cls()


def recompute_blocks(model: Backbone, chosen: Recompute) -> None:
    """Lets the backward pass compute blocks again instead of keeping their insides.

    Args:
        model: its ``block`` is replaced.
        chosen: which.
    """
    plain, rule = model.block, _Budget(model, chosen.budget) if chosen.budget is not None else None
    if rule is None and not chosen.every:
        return

    def block(index: int, activation: Activation, context: BlockContext) -> Activation:
        if not torch.is_grad_enabled():
            return plain(index, activation, context)
        again = rule.again(index, activation, context) if rule is not None else index % chosen.every == 0
        return _again(plain, index, activation, context) if again else plain(index, activation, context)

    model.block = block  # type: ignore[method-assign]


def _again(plain: Block, index: int, activation: Activation, context: BlockContext) -> Activation:
    def hidden(*parts: Tensor) -> Tensor:
        return plain(index, Activation(*parts), context).hidden

    given = (activation.hidden, activation.modulation, activation.time)
    # Nothing in a block is drawn at random, so that there is no state of generators to keep.
    return Activation(checkpoint(hidden, *given, use_reentrant=False, preserve_rng_state=False), *given[1:])


class _Budget:
    """Keeps the insides of as many last blocks as fit: they are the first to be read, and to be gone.

    What a block of a kind keeps is measured once for every shape of window, by a forward pass of its own.
    """

    def __init__(self, model: Backbone, budget: float) -> None:
        self._plain, self._kinds, self._budget = model.block, model.spec.block_kinds, budget
        self._first: dict[Any, int] = {}  # block whose insides are kept, by shape

    def again(self, index: int, activation: Activation, context: BlockContext) -> bool:
        shapes = tuple(part.shape for part in (activation.hidden, activation.modulation))
        # What is not in the shapes and changes what is kept: the length of texts, and masks.
        texts = tuple((run.tokens.shape, run.mask is None) for run in context.text)
        key = (*shapes, activation.hidden.dtype, texts, context.chunk_causal)
        if key not in self._first:
            sizes = {
                kind: kept_bytes(self._plain, self._kinds.index(kind), activation, context)
                for kind in dict.fromkeys(self._kinds)
            }
            first, left = len(self._kinds), self._budget
            while first and (left := left - sizes[self._kinds[first - 1]]) >= 0:
                first -= 1
            self._first[key] = first
        return index < self._first[key]


def kept_bytes(block: Block, index: int, activation: Activation, context: BlockContext) -> int:
    """Bytes that a block keeps for the backward pass besides its input and its weights; it is run once."""
    # Storages are held, so that none of them gets the place of another.
    found: dict[int, torch.UntypedStorage] = {}
    given = replace(activation, hidden=activation.hidden.detach().requires_grad_())
    texts = [run.tokens for run in context.text]
    own = {part.untyped_storage().data_ptr() for part in (given.hidden, given.modulation, given.time, *texts)}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_weight = any(isinstance(part, torch.nn.Parameter) for part in (tensor, tensor._base))
        if not is_weight and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        block(index, given, context)
    return sum(storage.nbytes() for storage in found.values())
