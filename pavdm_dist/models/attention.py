"""Attention as backbones call it: what all of them can be given, and the one where all tokens are here."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pavdm_dist.models.kernels import CHOICES, fused_attention


class Attention(Protocol):
    """Softmax attention, as torch's ``scaled_dot_product_attention``; replaced where some tokens are held elsewhere."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, chunk: int | None = None
    ) -> Tensor:
        """``[..., heads, tokens, head_dim]`` each -> the shape of ``query``.

        Args:
            query, key, value: of the tokens that are held here.
            attn_mask: of all tokens, wherever they are held: a row per query, True where it may read a key.
            chunk: tokens of a chunk, where a query reads the keys of its own chunk and of those before it; holds no
                number for every pair of tokens, as a mask would.
        """


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """An :class:`Attention` where all tokens are here.

    Torch's fused kernels take one axis before the heads; with more it would multiply plainly and hold all scores.
    """
    if chunk is not None:
        ends = range(chunk, query.shape[-2] + 1, chunk)
        chunks = zip(query.split(chunk, dim=-2), ends, strict=True)
        return torch.cat([attention(part, key[..., :end, :], value[..., :end, :]) for part, end in chunks], dim=-2)
    q, k, v = (tensor.flatten(0, -4) for tensor in (query, key, value))
    return fused(q, k, v, attn_mask).unflatten(0, query.shape[:-3])


def chunk_mask(first: int, tokens: int, chunk: int, device: torch.device) -> Tensor:
    """The chunk-causal mask of tokens from place ``first`` on, where a chunk begins, over all places up to their last.

    Returns:
        ``[tokens, first + tokens]``, True where a token (row) may read a place: of its own chunk or of one before.
    """
    of = torch.arange(first + tokens, device=device) // chunk
    return of[first:, None] >= of[None, :]


def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Torch's attention, ``[b, heads, n, d]`` each; in sampling by the kernel that was chosen, if any, and where it is
    compiled an operation of its own."""
    if torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
    if not torch.compiler.is_compiling():
        return CHOICES.attend(query, key, value, attn_mask)
    if attn_mask is None:
        return fused_attention(query, key, value).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
