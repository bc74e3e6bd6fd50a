"""Temporal half of Open-Sora's VAE v1.2: latents of single pictures <-> a quarter as many, by causal 3-D convolutions.

Nothing is remembered between calls: a group of frames starts from zeros, as the published weights were trained. Names
of tensors are those of the published file.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pavdm_dist.errors import CheckpointError
from pavdm_dist.values.fields import Within

_Width = Annotated[int, Within(1, 8192)]


@dataclass(frozen=True)
class TemporalConfig:
    """Shape; the defaults are ``VAE_Temporal_SD``.

    Raises:
        CheckpointError: entries that contradict one another.
    """

    in_out_channels: _Width = 4
    latent_embed_dim: _Width = 4
    embed_dim: _Width = 4
    filters: _Width = 128
    num_res_blocks: Annotated[int, Within(1, 64)] = 4
    channel_multipliers: tuple[Annotated[int, Within(1, 64)], ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: _Width = 32

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise CheckpointError(
                f"temporal_downsample={list(self.temporal_downsample)}: needs one entry less than"
                f" channel_multipliers={list(self.channel_multipliers)}"
            )
        for factor in self.channel_multipliers:
            if self.filters * factor % self.num_groups:
                raise CheckpointError(f"num_groups={self.num_groups} does not divide {self.filters * factor} channels")

    @property
    def stride(self) -> int:
        """Frames per latent."""
        return 2 ** sum(self.temporal_downsample)


class TemporalVAE(nn.Module):
    """Frames ``[b, C, t, h, w]`` <-> latents ``[b, D, ceil(t / stride), h, w]``."""

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self._stride = config.stride
        self.encoder = _Encoder(config)
        self.quant_conv = _CausalConv(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = _CausalConv(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = _Decoder(config)

    def encode(self, frames: Tensor) -> Tensor:
        """The posterior's mode; what is missing to whole strides is put in front, as zeros."""
        padded = F.pad(frames, (0, 0, 0, 0, -frames.shape[2] % self._stride, 0))
        mean, _ = self.quant_conv(self.encoder(padded)).chunk(2, dim=1)
        return mean

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """``num_frames``: how many were encoded."""
        return self.decoder(self.post_quant_conv(latents))[:, :, -num_frames % self._stride :]


class _CausalConv(nn.Module):
    """A convolution that sees no later frame; zeros stand for those before the first."""

    def __init__(self, before: int, after: int, kernel: int, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel // 2
        self._pad = (side, side, side, side, kernel - time_stride, 0)
        self.conv = nn.Conv3d(before, after, kernel, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self._pad))


class _ResBlock(nn.Module):
    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before)
        self.conv1 = _CausalConv(before, after, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, after)
        self.conv2 = _CausalConv(after, after, 3, bias=False)
        self.conv3 = _CausalConv(before, after, 1, bias=False) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.conv3(x)


class _Encoder(nn.Module):
    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        width = config.filters
        self.conv_in = _CausalConv(config.in_out_channels, width, 3, bias=False)
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(), nn.ModuleList()
        for level, factor in enumerate(config.channel_multipliers):
            self.block_res_blocks.append(_res_blocks(config, width, config.filters * factor))
            width = config.filters * factor
            if level < len(config.temporal_downsample):
                halves = config.temporal_downsample[level]
                self.conv_blocks.append(_CausalConv(width, width, 3, time_stride=2) if halves else nn.Identity())
        self.res_blocks = _res_blocks(config, width, width)
        self.norm1 = nn.GroupNorm(config.num_groups, width)
        self.conv2 = _CausalConv(width, 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = _through(blocks, x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        return self.conv2(F.silu(self.norm1(_through(self.res_blocks, x))))


class _Decoder(nn.Module):
    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        width = config.filters * config.channel_multipliers[-1]
        self.conv1 = _CausalConv(config.latent_embed_dim, width, 3)
        self.res_blocks = _res_blocks(config, width, width)
        # Both lists count levels from the finest one, which comes last.
        levels, ups = list[nn.Module](), list[nn.Module]()
        for level in reversed(range(len(config.channel_multipliers))):
            after = config.filters * config.channel_multipliers[level]
            levels.insert(0, _res_blocks(config, width, after))
            width = after
            if level:
                doubles = config.temporal_downsample[level - 1]
                ups.insert(0, _CausalConv(width, 2 * width, 3) if doubles else nn.Identity())
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(levels), nn.ModuleList(ups)
        self.norm1 = nn.GroupNorm(config.num_groups, width)
        self.conv_out = _CausalConv(width, config.in_out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = _through(self.res_blocks, self.conv1(x))
        for level in reversed(range(len(self.block_res_blocks))):
            x = _through(self.block_res_blocks[level], x)
            if level:
                up = self.conv_blocks[level - 1]
                x = (
                    up(x)
                    if isinstance(up, nn.Identity)
                    else rearrange(up(x), "b (c two) t h w -> b c (t two) h w", two=2)
                )
        return self.conv_out(F.silu(self.norm1(x)))


def _res_blocks(config: TemporalConfig, before: int, after: int) -> nn.ModuleList:
    widths = [before] + [after] * config.num_res_blocks
    return nn.ModuleList(_ResBlock(*pair, config.num_groups) for pair in pairwise(widths))


def _through(blocks: nn.Module, x: Tensor) -> Tensor:
    for block in blocks.children():
        x = block(x)
    return x
