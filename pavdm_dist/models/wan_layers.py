"""What a block of the Wan family computes, with the weights of diffusers' modules (Wan 2.1, 2.2, SkyReels-V2).

The operations and their order are diffusers', so that results are its bits; three things differ. Modulation comes once
per latent frame and is broadcast over its patches, instead of once per token. Keys and values of a text are made once.
Self-attention, which mixes all tokens of a window, may also read what other chunks have left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.models.attention import attention, fused
from pavdm_dist.models.base import BlockContext, Grid
from pavdm_dist.models.compiling import Compiler, any_length
from pavdm_dist.models.kv_cache import read_in_turn
from pavdm_dist.models.layers import Words, turned
from pavdm_dist.models.text_cache import TextRun

ROPE_BASE = 10000.0
# Tables are made for so many latent frames at a time: a window that grows does not make them anew.
_TABLE_FRAMES = 8


class RotaryGrid:
    """Rotary angles over latent frame, row and column, each its part of a head's pairs; made when needed, never sent.

    What it has given stays where it is: a CUDA graph goes on reading it there.

    Args:
        head_dim: of attention.
    """

    def __init__(self, head_dim: int) -> None:
        side = 2 * (head_dim // 6)
        self._dims = (head_dim - 2 * side, side, side)
        self._tables: dict[tuple[int, int, torch.device], list[tuple[Tensor, Tensor]]] = {}

    def turn(self, x: Tensor, first: int, grid: Grid) -> Tensor:
        """Queries or keys ``[..., tokens, head_dim]`` turned to their places, in their own type.

        Args:
            x: of whole frames, token by token.
            first: place of the first token in the window.
            grid: how a frame's tokens lie; its ``frames`` do not matter.
        """
        return turned(x, *self.angles(first, x.shape[-2], grid, x.device))

    def angles(self, first: int, tokens: int, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[tokens, head_dim / 2]`` of so many tokens from ``first`` on."""
        last = first + tokens
        cos, sin = self._table(grid, -(-last // grid.tokens_per_frame), device)
        return cos[first:last], sin[first:last]

    def _table(self, grid: Grid, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[tokens, head_dim / 2]`` of at least so many frames from place 0 on."""
        tables = self._tables.setdefault((grid.height, grid.width, device), [])
        for table in tables:
            if len(table[0]) >= frames * grid.tokens_per_frame:
                return table
        tables.append(self._made(-(-frames // _TABLE_FRAMES) * _TABLE_FRAMES, grid, device))
        return tables[-1]

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
    compiler: Compiler | None = None,
) -> Tensor:
    """One block: self-attention over all tokens, cross-attention to the texts, MLP.

    Where self-attention reads nothing but the micro-batch itself, the block is one function of tensors. Else it is two,
    with what other chunks left, or other processes hold, between them.

    Args:
        block: diffusers' ``WanTransformerBlock`` or ``SkyReelsV2TransformerBlock``.
        x: tokens ``[b, F, S, D]``.
        modulation: ``[b, F, 6, D]``: shift, scale and gate of self-attention, then of the MLP.
        index: the block's number, for memory and texts.
        context: what it reads besides.
        rope: rotary embedding.
        compiler: makes the versions that run; None runs the functions as they are.

    Returns:
        The same shape as ``x``, contiguous.
    """
    texts = [_words(block.attn2, run, index, context) for run in context.text]
    version = _versions(x, texts, context, compiler)
    first, frame = context.first_frame * context.grid.tokens_per_frame, context.grid.tokens_per_frame
    rotation = rope.angles(first, x.shape[1] * frame, context.grid, x.device)
    alone = context.memory is None and context.chunk_causal is None
    if alone and context.attend is attention:
        return version(_whole)(block, x, modulation, rotation, texts)

    def turn(keys: Tensor, place: int) -> Tensor:
        angles = rope.angles(place, keys.shape[-2], context.grid, keys.device)
        own = keys.shape[-2] in (x.shape[1] * frame, (context.chunk_frames or 0) * frame)
        return (version(turned, keys.shape) if own else turned)(keys, *angles)

    projected = version(_enter)(block, x, modulation, rotation)
    mixed = _self_attention(projected, index, context, first, turn)
    del projected
    return version(_leave)(block, x, modulation, mixed, texts)


def _versions(
    x: Tensor, texts: Sequence[Words], context: BlockContext, compiler: Compiler | None
) -> Callable[..., Callable[..., Any]]:
    """How the functions of this call are run."""
    if compiler is None or not context.steady:
        return lambda function, *_: function
    for words in texts:
        for part in (words.keys, words.values):
            any_length(part, 2)
    kind = (x.shape[0] == 1, x.shape[1] == 1, tuple(words.keys.shape[2] == 1 for words in texts))
    shape = (x.shape, x.dtype, x.device, tuple((words.start, words.stop) for words in texts))
    return lambda function, *more: compiler.of(function, kind, *shape, *more)


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The norm of ``x [b, F, S, D]`` in float32, scaled and shifted by ``[b, F, 1, D]``, in the type of ``x``."""
    return (norm(x.float()) * (1 + scale) + shift).type_as(x)


def _whole(
    block: Any, x: Tensor, modulation: Tensor, rotation: tuple[Tensor, Tensor], texts: Sequence[Words]
) -> Tensor:
    parts = _parts(block, modulation)
    return _leave(block, x, modulation, _mixed(_enter(block, x, modulation, rotation, parts), rotation), texts, parts)


def _mixed(projected: list[Tensor], rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Takes queries, keys and values off the list, so that they are gone as soon as they were read."""
    v, k, q = projected.pop(), projected.pop(), projected.pop()
    k = turned(k, *rotation)
    return attention(q, k, v)


def _enter(
    block: Any,
    x: Tensor,
    modulation: Tensor,
    rotation: tuple[Tensor, Tensor],
    parts: tuple[Tensor, ...] | None = None,
) -> list[Tensor]:
    """Queries, turned to their places, keys that are not, and values, ``[b, heads, F S, head_dim]`` each."""
    shift, scale, *_ = _parts(block, modulation) if parts is None else parts
    attn, h = block.attn1, modulate(block.norm1, x, shift, scale).flatten(1, 2)
    parts = (attn.norm_q(attn.to_q(h)), attn.norm_k(attn.to_k(h)), attn.to_v(h))
    q, k, v = (_heads(part, attn.heads) for part in parts)
    return [turned(q, *rotation), k, v]


def _leave(
    block: Any,
    x: Tensor,
    modulation: Tensor,
    mixed: Tensor,
    texts: Sequence[Words],
    parts: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """What follows self-attention, whose result is ``mixed``, ``[b, heads, F S, head_dim]``."""
    parts = _parts(block, modulation) if parts is None else parts
    _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
    out = block.attn1.to_out[0](mixed.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])
    del mixed
    x = (x.float() + out * gate_attn).type_as(x)
    del out
    x = x + _cross_attention(block, x, texts)
    out = block.ffn(modulate(block.norm3, x, shift_mlp, scale_mlp).flatten(1, 2)).unflatten(1, x.shape[1:3])
    return (x.float() + out.float() * gate_mlp).type_as(x)


def _parts(block: Any, modulation: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of self-attention, then of the MLP, ``[b, F, 1, D]`` each, float32."""
    return (block.scale_shift_table.unsqueeze(1) + modulation.float()).unsqueeze(3).unbind(dim=2)


def _self_attention(
    projected: list[Tensor], index: int, context: BlockContext, first: int, turn: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Among all tokens of the micro-batch and what the memory has for it, ``[b, heads, F S, head_dim]``.

    Takes queries, keys and values off the list, so that they are gone as soon as they were read.
    """
    frame = context.grid.tokens_per_frame
    if context.memory is not None:
        chunk = None if context.chunk_frames is None else context.chunk_frames * frame
        return read_in_turn(context.memory, context.attend, index, projected, first, turn, chunk, frame)
    v, k, q = projected.pop(), projected.pop(), projected.pop()
    k = turn(k, first)
    chunk = None if context.chunk_causal is None else context.chunk_causal * frame
    return context.attend(q, k, v, chunk=chunk)


def _words(attn: Any, run: TextRun, index: int, context: BlockContext) -> Words:
    """Keys and values of a text, made once where they are cached."""

    def pair() -> tuple[Tensor, Tensor]:
        return _heads(attn.norm_k(attn.to_k(run.tokens)), attn.heads), _heads(attn.to_v(run.tokens), attn.heads)

    cached = run.key is not None and context.text_cache is not None
    k, v = context.text_cache.pair(run.key, index, pair) if cached else pair()  # type: ignore[union-attr,arg-type]
    return Words(run.start, run.stop, k, v, None)


def _cross_attention(block: Any, x: Tensor, texts: Sequence[Words]) -> Tensor:
    """Of every token to the text of its frame, ``[b, F, S, D]``; one call per run of equal text."""
    attn = block.attn2
    h = block.norm2(x.float()).type_as(x)

    def read(words: Words) -> Tensor:
        q = _heads(attn.norm_q(attn.to_q(h[:, words.start : words.stop].flatten(1, 2))), attn.heads)
        # Padding is read as well: these models were trained with texts of one length, zero behind their end.
        out = fused(q, words.keys, words.values)
        return attn.to_out[0](out.transpose(1, 2).flatten(2)).unflatten(1, (words.stop - words.start, -1))

    parts = [read(words) for words in texts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[b, tokens, D]`` -> ``[b, heads, tokens, head_dim]``."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
