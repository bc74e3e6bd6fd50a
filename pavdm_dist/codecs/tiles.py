"""Large pictures in overlapping tiles, blended at their seams the way diffusers' autoencoders do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError

Decode = Callable[[tuple[int, int], Tensor], Tensor]


@dataclass(frozen=True)
class Tiles:
    """Square tiles of a picture; a tile begins three quarters of its side after the one before.

    Attributes:
        size: latent cells of a side, a multiple of 4.
    """

    size: int

    @classmethod
    def of(cls, pixels: int, spatial_stride: int) -> Tiles:
        """Tiles of so many pixels a side.

        Raises:
            ConfigError: not a multiple of four latent cells.
        """
        step = 4 * spatial_stride
        if pixels < step or pixels % step:
            below = max(step, pixels - pixels % step)
            raise ConfigError(
                f"decoder_tile={pixels}: must be a multiple of {step}, four latent cells; "
                f"nearest legal: {below} or {below + step}"
            )
        return cls(pixels // spatial_stride)

    @property
    def stride(self) -> int:
        """Latent cells from a tile to the next."""
        return self.size * 3 // 4

    def needed(self, height: int, width: int) -> bool:
        """Whether a picture of so many latent cells is more than one tile."""
        return height > self.size or width > self.size

    def decode(self, latents: Tensor, scale: int, decode: Decode) -> Tensor:
        """A picture, tile by tile.

        Args:
            latents: ``[..., h, w]``.
            scale: pixels per latent cell of what ``decode`` gives.
            decode: place and latents of a tile -> its pixels ``[..., scale h, scale w]``.

        Returns:
            Pixels ``[..., scale h, scale w]``.
        """
        height, width = latents.shape[-2:]
        stride, blend = self.stride * scale, (self.size - self.stride) * scale
        above: list[Tensor] = []
        rows: list[Tensor] = []
        for top in range(0, height, self.stride):
            row: list[Tensor] = []
            for left in range(0, width, self.stride):
                cut = latents[..., top : top + self.size, left : left + self.size].contiguous()
                tile = decode((top, left), cut)
                # A tile goes on from the blended one above it, and then from the one to its left.
                tile = _blend(above[len(row)], tile, blend, dim=-2) if above else tile
                row.append(_blend(row[-1], tile, blend, dim=-1) if row else tile)
            rows.append(torch.cat([tile[..., :stride, :stride] for tile in row], dim=-1))
            above = row
        return torch.cat(rows, dim=-2)[..., : height * scale, : width * scale]


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """``tile`` with its first ``extent`` lines mixed with the last ones of ``before``."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    share = torch.arange(extent, dtype=torch.float64) / extent
    shape = (-1, 1) if dim == -2 else (-1,)
    new, old = (weight.to(tile).view(shape) for weight in (share, 1 - share))
    mixed = before.narrow(dim, before.shape[dim] - extent, extent) * old + tile.narrow(dim, 0, extent) * new
    return torch.cat([mixed, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim=dim)
