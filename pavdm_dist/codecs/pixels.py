"""Between frames as files hold them, uint8, and pixels as autoencoders see them, floats in [-1, 1]."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.errors import ConfigError, VideoError


def check_frames(frames: Tensor, spec: CodecSpec) -> None:
    """Refuses what a codec cannot encode.

    Raises:
        ConfigError: no uint8 ``[t, H, W, 3]``, another number of frames, or a size the codec cannot divide.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ConfigError(f"frames must be uint8 [t, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    spec.latents_in_clip(frames.shape[0])
    spec.latent_size(frames.shape[1], frames.shape[2])


def from_uint8(frames: Tensor, device: torch.device) -> Tensor:
    """uint8 ``[t, H, W, 3]`` -> float32 ``[1, 3, t, H, W]`` in [-1, 1] on a device."""
    return rearrange(frames.to(device, torch.float32), "t h w rgb -> 1 rgb t h w") / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Float pixels ``[1, 3, t, H, W]`` in [-1, 1] -> uint8 ``[t, H, W, 3]``, where they are."""
    frames = rearrange(pixels, "1 rgb t h w -> t h w rgb")
    return ((frames + 1) * 127.5).round().to(torch.uint8)


def to_finite_uint8(pixels: Tensor) -> Tensor:
    """As :func:`to_uint8`, limited to [-1, 1] first, on the CPU.

    Raises:
        VideoError: pixels are not finite; once they are limited, an infinite one looks like any other.
    """
    if not bool(pixels.isfinite().all()):
        raise VideoError("the codec gave pixels that are not finite; decoder_dtype=float32 has the widest range")
    pixels = pixels.clamp(-1, 1)  # under the same name: what came in need not be held any longer
    return to_uint8(pixels).cpu().contiguous()
