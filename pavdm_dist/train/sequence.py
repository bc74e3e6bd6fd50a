"""Sequence parallelism for long windows: every process of a group holds some frames of the same window (Ulysses).

Only temporal attention mixes frames. There an all-to-all turns "my frames, all heads" into "all frames, my heads" and
back (DeepSpeed's ``DistributedAttention``); everything else in the model works on the frames at hand. Frames that pad
the window to a multiple of the group are hidden from attention and carry no loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pavdm_dist.errors import ConfigError
from pavdm_dist.models.base import BlockContext
from pavdm_dist.models.layers import SelfAttention
from pavdm_dist.models.stdit3 import STDiT3, window_mask
from pavdm_dist.train.processes import World


class SharedAttention:
    """Takes the place of ``SelfAttention.attend``: queries, keys and values of this process' frames.

    Args:
        group: processes that share a window, by place.
    """

    def __init__(self, group: Any) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self._distributed = DistributedAttention(_attend, group, scatter_idx=2, gather_idx=1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, context: BlockContext) -> Tensor:
        """``[b, S, heads, frames here, head_dim]``, mixed over the frames of all processes; ``mask`` is not looked at:
        it covers this process' frames only."""
        b = q.shape[0]
        # [sequences, frames, heads, head_dim], as DistributedAttention wants them.
        parts = (x.flatten(0, 1).transpose(1, 2).contiguous() for x in (q, k, v))
        out = self._distributed(*parts, 0, None, context)
        return out.transpose(1, 2).unflatten(0, (b, -1))


def _attend(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
    mask = window_mask(context, q.shape[1], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


def share_windows(model: STDiT3, world: World, size: int) -> None:
    """Makes the model work on a part of each window; every process must call it.

    Args:
        model: its temporal attention is changed.
        world: ``size`` neighbours share windows; the others train on other ones.
        size: divides ``world.size`` and the attention heads.

    Raises:
        ConfigError: it does not divide the heads.
    """
    heads = model.config.num_heads
    if heads % size:
        legal = " or ".join(str(n) for n in range(1, world.size + 1) if heads % n == 0 and world.size % n == 0)
        raise ConfigError(f"sequence_parallel={size} does not divide the model's {heads} attention heads: use {legal}")
    groups = [torch.distributed.new_group(range(first, first + size)) for first in range(0, world.size, size)]
    attend = SharedAttention(groups[world.rank // size])
    for module in model.temporal_blocks.modules():
        if isinstance(module, SelfAttention):
            module.attend = attend
