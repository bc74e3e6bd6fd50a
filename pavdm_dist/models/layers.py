"""Layers of STDiT3 (Open-Sora v1.2), with the public checkpoint's parameter names.

Tokens are ``[b, F, S, D]``: F latent frames of S patches. Spatial attention mixes the S tokens of a frame,
temporal attention mixes the F frames at a place; cross-attention and the MLP act on each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pavdm_dist.models.base import BlockContext, attention
from pavdm_dist.models.text_cache import TextRun

ROPE_BASE = 10000.0
NORM_EPS = 1e-6


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of ``values [n]`` at ``dim / 2`` geometric frequencies: ``[n, dim]``, float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding_2d(height: int, width: int, dim: int, scale: float, device: torch.device) -> Tensor:
    """Sine-cosine embedding of a patch grid, ``[height * width, dim]``: columns first, then rows.

    Coordinates are divided by ``scale`` (picture size over 512) and stretched so that every picture spans the
    same range per axis, which is what lets one checkpoint serve several sizes.
    """
    base_size = round(math.sqrt(height * width))

    def axis(count: int) -> Tensor:
        coordinates = torch.arange(count, dtype=torch.float32, device=device) / scale * (base_size / count)
        inverse = 1.0 / 10000 ** (torch.arange(0, dim // 2, 2, dtype=torch.float32, device=device) / (dim // 2))
        angles = coordinates[:, None] * inverse
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    rows = axis(height)[:, None, :].expand(height, width, -1)
    columns = axis(width)[None, :, :].expand(height, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(height * width, dim)


class RotaryTable(nn.Module):
    """Rotary angles over the frame index, interleaved pairs; ``freqs`` is part of the checkpoint."""

    freqs: Tensor
    compiled = False

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self._head_dim = head_dim
        self.register_buffer("freqs", torch.empty(head_dim // 2, dtype=torch.float32))
        if not self.freqs.is_meta:
            self.restore()

    def restore(self) -> None:
        """Makes the angles anew, on their device: something may have rounded them."""
        freqs = ROPE_BASE ** -(torch.arange(0, self._head_dim, 2, dtype=torch.float32) / self._head_dim)
        self.freqs = freqs.to(self.freqs.device)

    def forward(self, frames: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[frames, head_dim / 2]`` for places first .. first + frames - 1 of the window."""
        freqs = self.freqs.float()
        angles = torch.arange(first, first + frames, dtype=torch.float32, device=freqs.device)[:, None] * freqs
        return angles.cos(), angles.sin()

    def turn(self, x: Tensor, first: int) -> Tensor:
        """Queries or keys ``[..., frames, head_dim]`` of places ``first`` and on, turned; in their own type."""
        turned = _compiled(_turned) if self.compiled else _turned
        return turned(x, *self(x.shape[-2], first))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(x, cos, sin).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of ``x [..., frames, head_dim]`` by the frame's angles."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, with weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), NORM_EPS)


class SelfAttention(nn.Module):
    """Multi-head attention with normalised queries and keys; the caller chooses which axis it mixes."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor, places: str) -> list[Tensor]:
        """``x [b, F, S, D]`` -> normalised queries and keys, and values, whose axes are ``places``."""
        q, k, v = rearrange(self.qkv(x), f"b f s (three n d) -> three {places}", three=3, n=self.num_heads)
        return [self.q_norm(q), self.k_norm(k), v]


class CrossAttention(nn.Module):
    """Attention of every token to the text of its frame."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, block: int, context: BlockContext) -> Tensor:
        """``x [b, F, S, D]`` -> the same shape; one attention call per run of equal text."""
        parts = [self._run(x[:, run.start : run.stop], run, block, context) for run in context.text]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _run(self, x: Tensor, run: TextRun, block: int, context: BlockContext) -> Tensor:
        if run.key is None or context.text_cache is None:
            k, v = self._pair(run.tokens)
        else:
            k, v = context.text_cache.pair(run.key, block, lambda: self._pair(run.tokens))
        q = rearrange(self.q_linear(x), "b f s (n d) -> b n (f s) d", n=self.num_heads)
        mask = None if run.mask is None else run.mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(out, "b n (f s) d -> b f s (n d)", f=x.shape[1]))

    def _pair(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        k, v = rearrange(self.kv_linear(tokens), "b l (two n d) -> two b n l d", two=2, n=self.num_heads)
        return k, v


class MLP(nn.Module):
    """Two linear layers with tanh-approximated GELU."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ScalarEmbedder(nn.Module):
    """Embeds a scalar (timestep in thousandths, or frames per second) through sinusoids and an MLP."""

    FREQUENCIES = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, values: Tensor) -> Tensor:
        """``values [n]`` -> ``[n, D]``; the sinusoid is float32 whatever the weights are."""
        return self.mlp(sinusoid(values, self.FREQUENCIES).to(next(self.mlp.parameters()).dtype))


class PatchEmbedding(nn.Module):
    """One token per latent patch."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, kernel_size=patch, stride=patch)


def _drawn(rows: int, dim: int) -> Tensor:
    """First values of a table, ``[rows, dim]``, with rows of length 1 on average."""
    values = torch.randn(rows, dim)
    # Arithmetic on the meta device would import torch's compiler: a second of every process, for values nobody has.
    return values if values.is_meta else values / dim**0.5


class Caption(nn.Module):
    """Projects text to the model's width and holds the learned null text (``y_embedding``)."""

    y_embedding: Tensor

    def __init__(self, in_dim: int, dim: int, max_length: int) -> None:
        super().__init__()
        self.y_proj = MLP(in_dim, dim, dim)
        self.register_buffer("y_embedding", _drawn(max_length, in_dim))


class STDiT3Block(nn.Module):
    """A half-block: self-attention (spatial or temporal), cross-attention to the text, MLP.

    The six modulation parts, shift, scale and gate of the attention and then of the MLP, differ per frame; that
    is the only change progressive noise levels ask of the published block (paper App. E.1).

    Attributes:
        compiled: what surrounds the attentions runs as functions that torch has compiled, one for all blocks.
    """

    compiled = False

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.places = "b s n f d" if temporal else "b f n s d"
        self.attn = SelfAttention(dim, num_heads, qk_norm)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dim)
        self.scale_shift_table = nn.Parameter(_drawn(6, dim))

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
        enter, leave, mlp = map(_compiled, _PARTS) if self.compiled else _PARTS
        parts = (self.scale_shift_table + modulation).unsqueeze(-2).unbind(dim=2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        x = leave(self, x, self._mixed(enter(self, x, shift_attn, scale_attn), index, context, rope, mask), gate_attn)
        x = x + self.cross_attn(x, index, context)
        return mlp(self, x, shift_mlp, scale_mlp, gate_mlp)

    def _mixed(
        self, projected: list[Tensor], index: int, context: BlockContext, rope: RotaryTable, mask: Tensor | None
    ) -> Tensor:
        """Attention among the tokens of a frame, or of every place over frames, also over those in the memory.

        Takes queries, keys and values off the list ``projected``, so that they are gone as soon as they were read.
        """
        v, k, q = projected.pop(), projected.pop(), projected.pop()
        if not self.temporal:
            return attention(q, k, v)
        first = context.first_frame
        q = rope.turn(q, first)
        if context.memory is None:
            k = rope.turn(k, first)
        else:
            k, v = context.memory.attend(index, k, v, first, rope.turn)
        return context.attend(q, k, v, attn_mask=mask)


def _enter(block: STDiT3Block, x: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
    return block.attn.project(modulate(x, shift, scale), block.places)


def _leave(block: STDiT3Block, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, block.attn.proj(rearrange(y, f"{block.places} -> b f s (n d)")))


def _mlp(block: STDiT3Block, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, block.mlp(modulate(x, shift, scale)))


_PARTS = (_enter, _leave, _mlp)


@cache
def _compiled(part: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first call per kind of block; sizes that change are compiled once more, for all sizes."""
    return torch.compile(part)


class FinalLayer(nn.Module):
    """Modulated norm and projection of every token to its patch."""

    def __init__(self, dim: int, patch_volume: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, patch_volume * out_channels)
        self.scale_shift_table = nn.Parameter(_drawn(2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x [b, F, S, D]``, ``time [b, F, D]`` -> ``[b, F, S, patch_volume * out_channels]``."""
        shift, scale = (self.scale_shift_table + time.unsqueeze(2)).unsqueeze(-2).unbind(dim=2)
        return self.linear(modulate(x, shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then ``y (1 + scale) + shift`` in one pass; ``shift``, ``scale`` ``[b, F, 1, D]``."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)
