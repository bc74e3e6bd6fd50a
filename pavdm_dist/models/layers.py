"""Layers of STDiT3 (Open-Sora v1.2), with the public checkpoint's parameter names.

Tokens are ``[b, F, S, D]``: F latent frames of S patches. Spatial attention mixes the S tokens of a frame,
temporal attention mixes the F frames at a place; cross-attention and the MLP act on each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pavdm_dist.models.attention import fused
from pavdm_dist.models.base import BlockContext
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

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self._head_dim = head_dim
        self._tables: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self.register_buffer("freqs", torch.empty(head_dim // 2, dtype=torch.float32))
        if not self.freqs.is_meta:
            self.restore()

    def restore(self) -> None:
        """Makes the angles anew, on their device: something may have rounded them."""
        freqs = ROPE_BASE ** -(torch.arange(0, self._head_dim, 2, dtype=torch.float32) / self._head_dim)
        self.freqs = freqs.to(self.freqs.device)
        self._tables.clear()

    def forward(self, frames: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[frames, head_dim / 2]`` for places first .. first + frames - 1 of the window."""
        key = (frames, first, self.freqs.device)
        if key not in self._tables:
            with torch.inference_mode(False):  # also training reads it, whoever made it
                freqs = self.freqs.float()
                places = torch.arange(first, first + frames, dtype=torch.float32, device=freqs.device)
                angles = places[:, None] * freqs
                self._tables[key] = angles.cos(), angles.sin()
        return self._tables[key]

    def turn(self, x: Tensor, first: int) -> Tensor:
        """Queries or keys ``[..., frames, head_dim]`` of places ``first`` and on, turned; in their own type."""
        return turned(x, *self(x.shape[-2], first))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        self._tables.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._tables.clear()
        super()._load_from_state_dict(*arguments)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of ``x [..., tokens, head_dim]`` by their token's angles, in its own type.

    Args:
        x: queries or keys.
        cos, sin: ``[tokens, head_dim / 2]``, float32, which products are computed in.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    parts = even * cos - odd * sin, even * sin + odd * cos
    # Rounded before they are put together: compiled, it is one pass with the norm before it, and half the bytes.
    return torch.stack([part.type_as(x) for part in parts], dim=-1).flatten(-2)


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


class Words(NamedTuple):
    """What latent frames ``start .. stop - 1`` read of their text in one block.

    Attributes:
        keys, values: ``[b, heads, L, head_dim]``.
        mask: ``[b, 1, 1, L]`` bool, True = a real token; None when all are.
    """

    start: int
    stop: int
    keys: Tensor
    values: Tensor
    mask: Tensor | None


class CrossAttention(nn.Module):
    """Attention of every token to the text of its frame."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def read(self, block: int, context: BlockContext) -> list[Words]:
        """Keys and values of the texts that a micro-batch reads, made once per text where they are cached."""
        return [self._words(run, block, context) for run in context.text]

    def forward(self, x: Tensor, texts: Sequence[Words]) -> Tensor:
        """``x [b, F, S, D]`` -> the same shape; one attention call per run of equal text."""
        parts = [self._run(x[:, words.start : words.stop], words) for words in texts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _words(self, run: TextRun, block: int, context: BlockContext) -> Words:
        if run.key is None or context.text_cache is None:
            k, v = self._pair(run.tokens)
        else:
            k, v = context.text_cache.pair(run.key, block, lambda: self._pair(run.tokens))
        return Words(run.start, run.stop, k, v, None if run.mask is None else run.mask[:, None, None, :])

    def _run(self, x: Tensor, words: Words) -> Tensor:
        q = rearrange(self.q_linear(x), "b f s (n d) -> b n (f s) d", n=self.num_heads)
        out = fused(q, words.keys, words.values, words.mask)
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
        return self.fc2(_gelu(self.fc1, x))


def _gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """Tanh-approximated GELU of a linear layer; compiled for sampling on a GPU it is done in the product's own pass."""
    alone = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if alone and x.is_cuda and x.dtype != torch.float32 and linear.bias is not None:
        product = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
        return product.unflatten(0, x.shape[:-1])
    return F.gelu(linear(x), approximate="tanh")


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


def drawn(rows: int, dim: int) -> Tensor:
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
        self.register_buffer("y_embedding", drawn(max_length, in_dim))


class FinalLayer(nn.Module):
    """Modulated norm and projection of every token to its patch."""

    def __init__(self, dim: int, patch_volume: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, patch_volume * out_channels)
        self.scale_shift_table = nn.Parameter(drawn(2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x [b, F, S, D]``, ``time [b, F, D]`` -> ``[b, F, S, patch_volume * out_channels]``."""
        shift, scale = (self.scale_shift_table + time.unsqueeze(2)).unsqueeze(-2).unbind(dim=2)
        return self.linear(modulate(x, shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then ``y (1 + scale) + shift`` in one pass; ``shift``, ``scale`` ``[b, F, 1, D]``."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)
