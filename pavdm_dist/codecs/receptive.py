"""How much of a clip's past an encoder remembers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.codecs.base import VideoCodec
from pavdm_dist.codecs.wan import WanCodec

# Pixels a side are these times the codec's stride; and latents after which an encoder cannot be a causal convolution.
_PROBE_CELLS, _PROBE_LIMIT = 2, 1000


def encoder_receptive_latents(codec: VideoCodec) -> int:
    """Latents at the beginning of a clip that are not those of a clip that begins earlier; all others are, to the bit.

    Measured by a NaN, as :meth:`~pavdm_dist.codecs.wan.WanCodec.receptive_latents` is: it marks all that depends on it.
    A codec that works in groups remembers nothing.
    """
    return _probed(codec) if isinstance(codec, WanCodec) else 0


@lru_cache(maxsize=1)
def _probed(codec: WanCodec) -> int:
    cache: list[Any] = [None] * codec.vae._cached_conv_counts["encoder"]
    weights = next(codec.vae.parameters())
    side, stride = _PROBE_CELLS * codec.spec.spatial_stride, codec.spec.temporal_stride
    pixels = torch.zeros(1, 3, stride, side, side, device=weights.device)

    @torch.no_grad()
    def encode(frames: Tensor) -> Tensor:
        return codec.vae.encoder(codec._patchify(frames).to(weights.dtype), feat_cache=cache, feat_idx=[0])

    encode(pixels[:, :, :1])  # the first frame is a latent alone
    encode(pixels)
    encode(pixels * torch.nan)
    for reached in range(_PROBE_LIMIT):
        marked = bool(encode(pixels).isnan().any())
        if not marked and not any(isinstance(entry, Tensor) and bool(entry.isnan().any()) for entry in cache):
            return reached + 1
    raise RuntimeError(f"the encoder still remembers frames after {_PROBE_LIMIT} latents")
