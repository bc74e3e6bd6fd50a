"""Sequence parallelism for long windows: the latent frames of a window lie on several processes (DeepSpeed-Ulysses).

Only one attention mixes frames, over the frames at a place or over all tokens; everything else in a model runs on a
process' own frames. Around that attention two all-to-all exchanges swap frames for heads: each process sees the whole
window for its share of the heads (Jacobs et al., 2023; ``deepspeed.sequence.layer``). Weights are not split: to ZeRO
all processes are data-parallel ones, so it shards over all of them, and the loss is scaled to its averaging of
gradients. DeepSpeed's own ``sequence_parallel_size`` is not used: with it, version 0.19.8 departs from plain torch at
stages 0 to 2.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pavdm_dist.errors import ConfigError
from pavdm_dist.models.attention import attention
from pavdm_dist.models.base import WindowSlice
from pavdm_dist.train.batch import Batch
from pavdm_dist.train.ranks import World
from pavdm_dist.train.zero import exchanging_heads


@dataclass(frozen=True)
class SequenceGroup:
    """The ``size`` consecutive processes of the world that hold one window together.

    Attributes:
        world: all processes, ``data_size * size``.
        size: processes a window is cut among; 1 cuts nothing.
        group: their ``torch.distributed`` process group; None when ``size`` is 1.
    """

    world: World
    size: int
    group: Any = None

    @property
    def rank(self) -> int:
        """Which of the window's processes this is."""
        return self.world.rank % self.size

    @property
    def data_rank(self) -> int:
        """Which share of a batch's samples this process' group has."""
        return self.world.rank // self.size

    @property
    def data_size(self) -> int:
        """Shares that a batch's samples are cut into."""
        return self.world.size // self.size

    def cut(self, batch: Batch) -> Batch:
        """This process' frames of its group's samples; single frames have nothing to cut, and share samples instead.

        Raises:
            ConfigError: fewer latent frames than processes, or single frames that do not divide.
        """
        frames = batch.levels.shape[1]
        if self.size == 1:
            return batch
        if frames == 1:
            if len(batch.dropped) % self.size:
                count = len(batch.dropped) * self.data_size
                raise ConfigError(
                    f"sequence_parallel={self.size}: a batch of {count} single frames does not divide among "
                    f"{self.world.size} processes: use a multiple of {self.world.size}"
                )
            return batch.part(slice(self.rank, None, self.size))
        if frames < self.size:
            raise ConfigError(
                f"sequence_parallel={self.size}: a window of {frames} latent frames cannot be cut among {self.size} "
                f"processes: use at most {frames}"
            )
        lengths = [len(part) for part in torch.arange(frames).tensor_split(self.size)]
        first = sum(lengths[: self.rank])
        mine = slice(first, first + lengths[self.rank])
        return replace(
            batch,
            x=batch.x[:, :, mine],
            target=batch.target[:, :, mine],
            levels=batch.levels[:, mine],
            window=WindowSlice(first, frames, Ulysses(self.group, lengths)),
        )


def join_sequence(
    world: World, size: int, num_heads: int, shortest_window: int, timeout_seconds: float = 1800.0
) -> SequenceGroup:
    """Makes groups of ``size`` consecutive processes of the world; every process must call it.

    Args:
        world: all processes.
        size: processes a window is cut among.
        num_heads: attention heads of the model.
        shortest_window: latent frames of the shortest window in training, single frames apart.
        timeout_seconds: of an exchange.

    Raises:
        ConfigError: ``size`` does not divide the processes and the heads, or a window has fewer frames.
    """
    legal = [n for n in range(1, shortest_window + 1) if world.size % n == 0 and num_heads % n == 0]
    if size not in legal:
        nearest = [n for n in legal if n < size][-1:] + [n for n in legal if n > size][:1]
        raise ConfigError(
            f"sequence_parallel={size} must divide the {world.size} processes and the model's {num_heads} attention "
            f"heads, and the shortest window has {shortest_window} latent frames to cut: use "
            f"{' or '.join(str(n) for n in nearest)}"
        )
    if size == 1:
        return SequenceGroup(world, size)
    starts = range(0, world.size, size)
    # Every process takes part in making every group, in one order.
    limit = datetime.timedelta(seconds=timeout_seconds)
    groups = [torch.distributed.new_group(list(range(start, start + size)), timeout=limit) for start in starts]
    return SequenceGroup(world, size, groups[world.rank // size])


class Ulysses:
    """Attention over a sequence whose consecutive parts lie on the processes of a group, a share of heads on each.

    An :class:`~pavdm_dist.models.attention.Attention` for any model whose queries, keys and values are cut alike: over
    the frames at a place, or over all tokens jointly, a frame's behind each other. Parts may differ in length: they are
    padded for the exchange, which moves equal parts only, and the padding is gone before the attention. Heads must
    divide by the number of processes. DeepSpeed must have been initialised.

    Args:
        group: the processes.
        lengths: units (frames) on each of them, in order; every unit has as many tokens.
    """

    def __init__(self, group: Any, lengths: Sequence[int]) -> None:
        self._attend = exchanging_heads(_attend_whole, group)
        self._lengths, self._length = tuple(lengths), lengths[torch.distributed.get_rank(group)]
        self._places: dict[tuple[int, torch.device], Tensor | None] = {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, chunk: int | None = None
    ) -> Tensor:
        """``[..., heads, tokens, head_dim]`` of this process' tokens -> the same; mask and chunks are of the whole
        sequence."""
        tokens = query.shape[-2]
        unit = tokens // self._length
        missing = max(self._lengths) * unit - tokens
        spread = [_spread(tensor, missing) for tensor in (query, key, value)]
        out = self._attend(*spread, attn_mask, chunk, self._real(unit, query.device))
        return out[:, :tokens].transpose(1, 2).unflatten(0, query.shape[:-3])

    def _real(self, unit: int, device: torch.device) -> Tensor | None:
        """Places of the tokens among the padded ones; None where nothing is padded."""
        longest = max(self._lengths) * unit
        if min(self._lengths) * unit == longest:
            return None
        if (unit, device) not in self._places:
            starts = range(0, len(self._lengths) * longest, longest)
            parts = [start + torch.arange(n * unit) for start, n in zip(starts, self._lengths, strict=True)]
            self._places[unit, device] = torch.cat(parts).to(device)
        return self._places[unit, device]


def _spread(tensor: Tensor, missing: int) -> Tensor:
    """The layout of DeepSpeed's exchange, ``[rows, tokens, heads, head_dim]``, with so many zeros behind."""
    tensor = tensor.flatten(0, -4).transpose(1, 2)
    return F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor


def _attend_whole(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, chunk: int | None, real: Tensor | None
) -> Tensor:
    """Attention of some heads over the gathered sequence ``[rows, tokens, heads, head_dim]``; zeros at the padding."""
    parts = (query, key, value) if real is None else (part.index_select(1, real) for part in (query, key, value))
    q, k, v = (part.transpose(1, 2) for part in parts)
    out = attention(q, k, v, mask, chunk).transpose(1, 2)
    return out if real is None else out.new_zeros(query.shape).index_copy(1, real, out)
