"""A half-block of STDiT3, as functions of tensors that run as they are or compiled whole.

Where attention over frames reads nothing but the micro-batch itself, a half-block is one function. Else it is two, with
what chunks leave for each other, or what other processes hold, between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from pavdm_dist.models.attention import attention
from pavdm_dist.models.base import BlockContext
from pavdm_dist.models.compiling import Compiler, any_length
from pavdm_dist.models.kv_cache import read_in_turn
from pavdm_dist.models.layers import MLP, CrossAttention, RotaryTable, SelfAttention, Words, drawn, modulate, turned

Rotation = tuple[Tensor, Tensor]
Parts = tuple[Tensor, ...]
# A function of tensors, and what its version depends on besides the call's own shape -> what is run.
Versions = Callable[..., Callable[..., Any]]


class STDiT3Block(nn.Module):
    """A half-block: self-attention (spatial or temporal), cross-attention to the text, MLP.

    The six modulation parts, shift, scale and gate of the attention and then of the MLP, differ per frame; that
    is the only change progressive noise levels ask of the published block (paper App. E.1).

    Attributes:
        compiler: makes the versions that run; None runs the functions as they are.
    """

    compiler: Compiler | None = None

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.places = "b s n f d" if temporal else "b f n s d"
        self.attn = SelfAttention(dim, num_heads, qk_norm)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dim)
        self.scale_shift_table = nn.Parameter(drawn(6, dim))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        index: int,
        context: BlockContext,
        rope: RotaryTable,
        mask: Tensor | None,
    ) -> Tensor:
        """``x [b, F, S, D]``, ``modulation [b, F, 6, D]`` -> the same shape as ``x``.

        Args:
            x: tokens.
            modulation: of every frame.
            index: this block's number, for memory and texts.
            context: place of the first frame; the attention over frames; the memory, if any.
            rope: rotary embedding.
            mask: over the frames that ``context.attend`` mixes, True where attention is allowed.
        """
        texts = self.cross_attn.read(index, context)
        version = self._versions(x, texts, context, mask)
        rotation = rope(x.shape[1], context.first_frame) if self.temporal else None
        if not self.temporal or (context.memory is None and context.attend is attention):
            return version(_whole)(self, x, modulation, texts, rotation, mask)
        return version(_leave)(
            self, x, modulation, self._read(version, x, modulation, index, context, rope, mask), texts
        )

    def _read(
        self,
        version: Versions,
        x: Tensor,
        modulation: Tensor,
        index: int,
        context: BlockContext,
        rope: RotaryTable,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention over frames of which others are held elsewhere."""
        first, lengths = context.first_frame, (x.shape[1], context.chunk_frames)

        def turn(keys: Tensor, place: int) -> Tensor:
            rotation = rope(keys.shape[-2], place)
            return (version(turned, keys.shape) if keys.shape[-2] in lengths else turned)(keys, *rotation)

        projected = version(_enter)(self, x, modulation, rope(x.shape[1], first))
        if context.memory is not None:
            return read_in_turn(context.memory, context.attend, index, projected, first, turn, context.chunk_frames)
        v, k, q = projected.pop(), projected.pop(), projected.pop()
        return context.attend(q, turn(k, first), v, attn_mask=mask)

    def _versions(self, x: Tensor, texts: Sequence[Words], context: BlockContext, mask: Tensor | None) -> Versions:
        """How the functions of this call are run."""
        compiler = self.compiler
        if compiler is None or not context.steady:
            return _as_it_is
        for words in texts:
            any_length(words.keys, 2), any_length(words.values, 2)
            if words.mask is not None:
                any_length(words.mask, 3)
        given = tuple((words.mask is None, words.keys.shape[2] == 1) for words in texts)
        kind = (self.temporal, mask is None, x.shape[0] == 1, x.shape[1] == 1, given)
        shape = (x.shape, x.dtype, x.device, tuple((words.start, words.stop) for words in texts))
        return lambda function, *more: compiler.of(function, kind, *shape, *more)


def _as_it_is(function: Callable[..., Any], *_: object) -> Callable[..., Any]:
    return function


def _whole(
    block: STDiT3Block,
    x: Tensor,
    modulation: Tensor,
    texts: Sequence[Words],
    rotation: Rotation | None,
    mask: Tensor | None,
) -> Tensor:
    """All of it: attention among the tokens of a frame, or of every place over the micro-batch's frames."""
    parts = _parts(block, modulation)
    return _leave(
        block, x, modulation, _mixed(_enter(block, x, modulation, rotation, parts), rotation, mask), texts, parts
    )


def _mixed(projected: list[Tensor], rotation: Rotation | None, mask: Tensor | None) -> Tensor:
    """Takes queries, keys and values off the list, so that they are gone as soon as they were read."""
    v, k, q = projected.pop(), projected.pop(), projected.pop()
    if rotation is not None:
        k = turned(k, *rotation)
    return attention(q, k, v, attn_mask=mask)


def _enter(
    block: STDiT3Block, x: Tensor, modulation: Tensor, rotation: Rotation | None, parts: Parts | None = None
) -> list[Tensor]:
    """Queries, turned where a rotation is given, keys that are not, and values."""
    shift, scale, *_ = _parts(block, modulation) if parts is None else parts
    q, k, v = block.attn.project(modulate(x, shift, scale), block.places)
    return [q if rotation is None else turned(q, *rotation), k, v]


def _leave(
    block: STDiT3Block,
    x: Tensor,
    modulation: Tensor,
    y: Tensor,
    texts: Sequence[Words],
    parts: Parts | None = None,
) -> Tensor:
    """What follows the attention, whose result is ``y``."""
    parts = _parts(block, modulation) if parts is None else parts
    _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
    x = torch.addcmul(x, gate_attn, block.attn.proj(rearrange(y, f"{block.places} -> b f s (n d)")))
    del y
    x = x + block.cross_attn(x, texts)
    return torch.addcmul(x, gate_mlp, block.mlp(modulate(x, shift_mlp, scale_mlp)))


def _parts(block: STDiT3Block, modulation: Tensor) -> Parts:
    """Shift, scale and gate of the attention, then of the MLP, ``[b, F, 1, D]`` each."""
    return (block.scale_shift_table + modulation).unsqueeze(-2).unbind(dim=2)
