"""Previews without a network: a colour per latent cell, by the linear map that is nearest to what the codec decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from pavdm_dist.codecs.base import CodecSpec, VideoCodec

# Latents that the map is fitted on: frames of so many cells, in so many groups of one colour each and finer ones.
_SIDE, _FITTED = 8, 12


@dataclass(frozen=True)
class LatentRGB:
    """Colours of latents, and what makes frames of them.

    Attributes:
        spec: of the codec whose latents they are.
        weight: ``[C, 3]``.
        bias: ``[3]``; colours are in [-1, 1].
    """

    spec: CodecSpec
    weight: Tensor
    bias: Tensor

    @classmethod
    def fitted(cls, codec: VideoCodec) -> LatentRGB:
        """By least squares over what ``codec`` makes of random latents; some seconds for a large one."""
        spec = codec.spec
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(spec.latent_channels, _FITTED, 2, 2, generator=generator)
        fine = torch.randn(spec.latent_channels, _FITTED, _SIDE, _SIDE, generator=generator)
        count = _FITTED if not spec.group else _FITTED - _FITTED % spec.group
        latents = (repeat(coarse, "c n h w -> c n (h 4) (w 4)") + 0.5 * fine)[:, :count] / 1.25**0.5
        frames = codec.decoder().decode(latents).float() / 127.5 - 1
        cells = reduce(frames, "t (h y) (w x) rgb -> t h w rgb", "mean", y=spec.spatial_stride, x=spec.spatial_stride)
        # Each latent's last frame: the first of a video, or of a group, has no other.
        ends = [spec.frames_in_chunk(number + 1, first=True) - 1 for number in range(count)]
        seen = rearrange(latents, "c n h w -> (n h w) c")
        table = torch.cat([seen, torch.ones(len(seen), 1)], dim=1)
        found = torch.linalg.lstsq(table.double(), rearrange(cells[ends], "n h w rgb -> (n h w) rgb").double()).solution
        return cls(spec, found[:-1].float(), found[-1].float())

    def decoder(self) -> RGBChunkDecoder:
        """A decoder at the start of a new stream."""
        return RGBChunkDecoder(self)

    def receptive_latents(self) -> int:
        """One, so that a fresh decoder knows that it is not at the beginning; in groups none."""
        return 0 if self.spec.group else 1


class RGBChunkDecoder:
    """One stream: how many latents it has seen."""

    def __init__(self, rgb: LatentRGB) -> None:
        self._rgb, self._seen = rgb, 0

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents ``[C, n, h, w]`` -> uint8 ``[t, H, W, 3]`` on the CPU, as many as the codec gives.

        Values that are not finite are black: a preview stops nothing.
        """
        rgb = self._rgb
        spec = rgb.spec
        colours = torch.einsum("cnhw,ck->nhwk", latents.cpu().float().nan_to_num(0.0, 0.0, 0.0), rgb.weight) + rgb.bias
        cells = ((colours.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        frames = []
        for cell in cells:
            starts = self._seen % spec.group == 0 if spec.group else self._seen == 0
            frames.append(
                repeat(
                    cell, "h w k -> t (h y) (w x) k",
                    t=1 if starts else spec.temporal_stride, y=spec.spatial_stride, x=spec.spatial_stride,
                )
            )  # fmt: skip
            self._seen += 1
        return torch.cat(frames).contiguous()

    def warm(self, latents: Tensor) -> None:
        """As :meth:`decode`, with the frames dropped."""
        self._seen += latents.shape[1]
