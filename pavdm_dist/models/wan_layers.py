"""What a block of the Wan family computes, with the weights of diffusers' modules (Wan 2.1, 2.2, SkyReels-V2).

The operations and their order are diffusers', so that results are its bits; three things differ. Modulation comes once
per latent frame and is broadcast over its patches, instead of once per token. Keys and values of a text are made once.
Self-attention, which mixes all tokens of a window, may also read what other chunks have left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.models.base import BlockContext, Grid
from pavdm_dist.models.layers import rotate
from pavdm_dist.models.text_cache import TextRun

ROPE_BASE = 10000.0
# Tables are made for so many latent frames at a time: a window that grows does not make them anew.
_TABLE_FRAMES = 8


class RotaryGrid:
    """Rotary angles over latent frame, row and column, each its part of a head's pairs; made when needed, never sent.

    Args:
        head_dim: of attention.
    """

    def __init__(self, head_dim: int) -> None:
        side = 2 * (head_dim // 6)
        self._dims = (head_dim - 2 * side, side, side)
        self._tables: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def turn(self, x: Tensor, first: int, grid: Grid) -> Tensor:
        """Queries or keys ``[..., tokens, head_dim]`` turned to their places, in their own type.

        Args:
            x: of whole frames, token by token.
            first: place of the first token in the window.
            grid: how a frame's tokens lie; its ``frames`` do not matter.
        """
        last = first + x.shape[-2]
        cos, sin = self._table(grid, -(-last // grid.tokens_per_frame), x.device)
        return rotate(x, cos[first:last], sin[first:last]).type_as(x)

    def _table(self, grid: Grid, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[tokens, head_dim / 2]`` of at least so many frames from place 0 on."""
        key = (grid.height, grid.width, device)
        table = self._tables.get(key)
        if table is None or len(table[0]) < frames * grid.tokens_per_frame:
            table = self._tables[key] = self._made(-(-frames // _TABLE_FRAMES) * _TABLE_FRAMES, grid, device)
        return table

    def _made(self, frames: int, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        sizes = (frames, grid.height, grid.width)

        def over_tokens(axis: int, table: Tensor) -> Tensor:
            """The table of one axis at every token; diffusers repeats each angle for both numbers of its pair."""
            shape = [size if place == axis else 1 for place, size in enumerate(sizes)]
            return table[:, ::2].view(*shape, -1).expand(*sizes, -1)

        # On the CPU and in float64, so that every device has the same angles.
        axes = [
            get_1d_rotary_pos_embed(dim, size, ROPE_BASE, use_real=True, freqs_dtype=torch.float64)
            for dim, size in zip(self._dims, sizes, strict=True)
        ]
        cos, sin = (
            torch.cat([over_tokens(axis, pair[part]) for axis, pair in enumerate(axes)], dim=-1).flatten(0, 2)
            for part in range(2)
        )
        return cos.to(device), sin.to(device)


def run_block(
    block: Any,
    x: Tensor,
    modulation: Tensor,
    index: int,
    context: BlockContext,
    rope: RotaryGrid,
    is_compiled: bool = False,
) -> Tensor:
    """One block: self-attention over all tokens, cross-attention to the texts, MLP.

    Args:
        block: diffusers' ``WanTransformerBlock`` or ``SkyReelsV2TransformerBlock``.
        x: tokens ``[b, F, S, D]``.
        modulation: ``[b, F, 6, D]``: shift, scale and gate of self-attention, then of the MLP.
        index: the block's number, for memory and texts.
        context: what it reads besides.
        rope: rotary embedding.
        is_compiled: what surrounds the attentions runs as compiled functions, one for all blocks.

    Returns:
        The same shape as ``x``, contiguous.
    """
    enter, leave, mlp = map(_compiled, _PARTS) if is_compiled else _PARTS
    parts = (block.scale_shift_table.unsqueeze(1) + modulation.float()).unsqueeze(3).unbind(dim=2)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
    mixed = _self_attention(enter(block, x, shift_attn, scale_attn), index, context, rope)
    x = leave(block, x, mixed, gate_attn)
    x = x + _cross_attention(block, x, index, context)
    return mlp(block, x, shift_mlp, scale_mlp, gate_mlp)


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The norm of ``x [b, F, S, D]`` in float32, scaled and shifted by ``[b, F, 1, D]``, in the type of ``x``."""
    return (norm(x.float()) * (1 + scale) + shift).type_as(x)


def _enter(block: Any, x: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
    """Queries, keys and values of self-attention, ``[b, heads, F S, head_dim]``, not yet turned."""
    attn, h = block.attn1, modulate(block.norm1, x, shift, scale).flatten(1, 2)
    return [_heads(part, attn.heads) for part in (attn.norm_q(attn.to_q(h)), attn.norm_k(attn.to_k(h)), attn.to_v(h))]


def _leave(block: Any, x: Tensor, mixed: Tensor, gate: Tensor) -> Tensor:
    out = block.attn1.to_out[0](mixed.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])
    return (x.float() + out * gate).type_as(x)


def _mlp(block: Any, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    out = block.ffn(modulate(block.norm3, x, shift, scale).flatten(1, 2)).unflatten(1, x.shape[1:3])
    return (x.float() + out.float() * gate).type_as(x)


_PARTS = (_enter, _leave, _mlp)


@cache
def _compiled(part: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(part)


def _self_attention(projected: list[Tensor], index: int, context: BlockContext, rope: RotaryGrid) -> Tensor:
    """Among all tokens of the micro-batch and what the memory has for it, ``[b, heads, F S, head_dim]``.

    Takes queries, keys and values off the list, so that they are gone as soon as they were read.
    """
    v, k, q = projected.pop(), projected.pop(), projected.pop()
    frame = context.grid.tokens_per_frame
    first = context.first_frame * frame

    def turn(keys: Tensor, place: int) -> Tensor:
        return rope.turn(keys, place, context.grid)

    q = turn(q, first)
    if context.memory is None:
        k = turn(k, first)
    else:
        k, v = context.memory.attend(index, k, v, first, turn, frame)
    chunk = None if context.chunk_causal is None else context.chunk_causal * frame
    return context.attend(q, k, v, chunk=chunk)


def _cross_attention(block: Any, x: Tensor, index: int, context: BlockContext) -> Tensor:
    """Of every token to the text of its frame, ``[b, F, S, D]``; one call per run of equal text."""
    attn = block.attn2
    h = block.norm2(x.float()).type_as(x)

    def pair(run: TextRun) -> tuple[Tensor, Tensor]:
        return _heads(attn.norm_k(attn.to_k(run.tokens)), attn.heads), _heads(attn.to_v(run.tokens), attn.heads)

    def read(run: TextRun) -> Tensor:
        if run.key is None or context.text_cache is None:
            k, v = pair(run)
        else:
            k, v = context.text_cache.pair(run.key, index, lambda: pair(run))
        q = _heads(attn.norm_q(attn.to_q(h[:, run.start : run.stop].flatten(1, 2))), attn.heads)
        # Padding is read as well: these models were trained with texts of one length, zero behind their end.
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2)).unflatten(1, (run.stop - run.start, -1))

    parts = [read(run) for run in context.text]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[b, tokens, D]`` -> ``[b, heads, tokens, head_dim]``."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
