"""What ``config.json`` of an ``AutoencoderKLWan`` says: all that planning needs, without weights or diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.errors import CheckpointError
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.values.fields import Within, made

# Frames per latent that AutoencoderKLWan's encoder is written for.
TEMPORAL_STRIDE = 4
# Says that the 3x3x3 kernels are zero for earlier frames; diffusers ignores entries with an underscore.
CURRENT_FRAME_ONLY = "_current_frame_only"

_Width = Annotated[int, Within(1, 8192)]
_Factor = Annotated[int, Within(1, 64)]
_Mean = Annotated[float, Within(-1e6, 1e6)]
_Deviation = Annotated[float, Within(1e-6, 1e6)]


@dataclass(frozen=True)
class WanVAEConfig:
    """Shape of the autoencoder; names and defaults are diffusers', the statistics must be given.

    Ours is ``_current_frame_only``: the 3x3x3 kernels are zero for earlier frames (:mod:`pavdm_dist.codecs.taps`).

    Raises:
        CheckpointError: entries that contradict one another, or no autoencoder that can be streamed here.
    """

    latents_mean: tuple[_Mean, ...]
    latents_std: tuple[_Deviation, ...]
    z_dim: Annotated[int, Within(1, 1024)] = 16
    base_dim: _Width = 96
    decoder_base_dim: _Width | None = None
    dim_mult: tuple[_Factor, ...] = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, Within(0, 64)] = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: Annotated[float, Within(0, 1)] = 0.0
    is_residual: bool = False
    in_channels: _Width = 3
    out_channels: _Width = 3
    patch_size: Annotated[int, Within(1, 64)] | None = None
    _class_name: str = "AutoencoderKLWan"
    _current_frame_only: bool = False

    def __post_init__(self) -> None:
        if self._class_name != "AutoencoderKLWan":
            raise CheckpointError(f"it holds a {self._class_name}, an AutoencoderKLWan is needed")
        for key in ("latents_mean", "latents_std"):
            if len(getattr(self, key)) != self.z_dim:
                raise CheckpointError(f"{key} has {len(getattr(self, key))} entries, z_dim={self.z_dim} needs as many")
        if not self.dim_mult or len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise CheckpointError(
                f"temperal_downsample={list(self.temperal_downsample)}: needs one entry less than"
                f" dim_mult={list(self.dim_mult)}"
            )
        frames = 2 ** sum(self.temperal_downsample)
        if frames != TEMPORAL_STRIDE:
            raise CheckpointError(
                f"temperal_downsample={list(self.temperal_downsample)} makes {frames} frames a latent, "
                f"only {TEMPORAL_STRIDE} (two true entries) can be encoded"
            )
        pixels = 3 * (self.patch_size or 1) ** 2
        for key in ("in_channels", "out_channels"):
            if getattr(self, key) != pixels:
                raise CheckpointError(
                    f"{key}={getattr(self, key)}: patch_size={self.patch_size or 'null'} makes {pixels} of a pixel's 3"
                )

    @property
    def taps(self) -> int:
        """Weights of a kernel for an input and an output channel, where the public layout has 3x3x3."""
        return 9 if self._current_frame_only else 27

    @property
    def spec(self) -> CodecSpec:
        """Strides and channels."""
        return CodecSpec(self.z_dim, 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1), TEMPORAL_STRIDE)


def wan_config(values: Mapping[str, Any], where: object) -> WanVAEConfig:
    """From what a file holds, or a model's ``config``; names that say nothing of the shape are ignored.

    Raises:
        CheckpointError: naming the file, the field, its value and what is legal.
    """
    try:
        return made(WanVAEConfig, values, where, ignore_unknown=True, error=CheckpointError)
    except CheckpointError as error:
        raise error if str(where) in str(error) else CheckpointError(f"{where}: {error}") from error


def read_spec(source: str | Path | Source) -> CodecSpec:
    """Shape facts from ``config.json`` alone.

    Raises:
        CheckpointError: missing, unreadable, or not a Wan autoencoder's configuration.
    """
    return read_wan_config(source).spec


def read_wan_config(source: str | Path | Source) -> WanVAEConfig:
    """``config.json`` of a component; raises as :func:`read_spec`."""
    return wan_config(load_config(source), f"{source}/config.json")
