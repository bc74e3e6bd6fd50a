"""Weights of tiny decoders for previews, in the layout of TAEHV's files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.codecs.catalog import FrameMaker, codec_spec
from pavdm_dist.models.source import Source

WIDTHS = (8, 6, 4, 4)


def tensors(spec: CodecSpec, doubles: tuple[int, int, int] = (1, 2, 2)) -> dict[str, Tensor]:
    """Random weights in the file's layout, narrow, with an encoder that nobody asks for."""
    generator = torch.Generator().manual_seed(0)

    def conv(after: int, before: int, side: int = 3) -> Tensor:
        return torch.randn(after, before, side, side, generator=generator) * 1.5 / (before * side**2) ** 0.5

    patch = spec.spatial_stride // 8
    found = {"decoder.1.weight": conv(WIDTHS[0], spec.latent_channels), "decoder.1.bias": torch.zeros(WIDTHS[0])}
    for (first, grow), width, after, frames in zip(
        ((3, 7), (9, 13), (15, 19)), WIDTHS, WIDTHS[1:], doubles, strict=False
    ):
        for block in range(first, first + 3):
            for layer, before in ((0, 2 * width), (2, width), (4, width)):
                found[f"decoder.{block}.conv.{layer}.weight"] = conv(width, before)
                found[f"decoder.{block}.conv.{layer}.bias"] = torch.full((width,), 0.1)
        found[f"decoder.{grow}.conv.weight"] = conv(width * frames, width, 1)
        found[f"decoder.{grow + 1}.weight"] = conv(after, width)
    found["decoder.22.weight"] = conv(3 * patch**2, WIDTHS[-1])
    found["decoder.22.bias"] = torch.full((3 * patch**2,), 0.5)
    return {**found, "encoder.0.weight": conv(4, 3), "encoder.0.bias": torch.zeros(4)}


def tiny_decoder(model: Path) -> Path:
    """The file of a tiny decoder for the codec of a model folder, beside it.

    Its frames depend on latents before them, as the codec's do, and an actor that has it starts two seconds of
    computing sooner: it needs no diffusers.
    """
    file = model / "tiny.safetensors"
    if not file.exists():
        save_file(tensors(codec_spec(model / "vae")), file)
    return file


def light_frames(model: Path) -> FrameMaker:
    """What makes frames with :func:`tiny_decoder`."""
    return FrameMaker(Source(str(model / "vae")), preview=str(tiny_decoder(model)))
