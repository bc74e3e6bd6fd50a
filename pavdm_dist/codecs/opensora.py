"""Video codec around Open-Sora's VAE v1.2: pictures by diffusers' ``AutoencoderKL``, time by :mod:`.opensora_temporal`.

Groups of 17 frames become 5 latents and back, without a look at each other: there is nothing to remember from one group
to the next, and a video starts again at every one. Names of tensors are those of the published file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.codecs.opensora_temporal import TemporalConfig, TemporalVAE
from pavdm_dist.codecs.pixels import check_frames, from_uint8, to_finite_uint8
from pavdm_dist.codecs.tiles import Tiles
from pavdm_dist.errors import CheckpointError, ConfigError, first_line
from pavdm_dist.models.loading import load_module, read_tensors
from pavdm_dist.models.saving import save_module
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.values.fields import Within, made

# Latents of pictures are multiplied with this, whatever the picture's autoencoder says itself.
_SCALE = 0.18215

_Width = Annotated[int, Within(1, 8192)]


@dataclass(frozen=True)
class PictureConfig:
    """Shape of the pictures' autoencoder, by diffusers' names; the defaults are SDXL's, as in the published file."""

    block_out_channels: tuple[_Width, ...] = (128, 256, 512, 512)
    layers_per_block: Annotated[int, Within(1, 64)] = 2
    norm_num_groups: _Width = 32
    latent_channels: Annotated[int, Within(1, 1024)] = 4
    micro_batch_size: Annotated[int, Within(1, 1024)] = 4  # pictures at a time


@dataclass(frozen=True)
class OpenSoraConfig:
    """What ``config.json`` says; parts that the published one leaves out are the published shape.

    Raises:
        CheckpointError: entries that contradict one another.
    """

    shift: tuple[Annotated[float, Within(-1e6, 1e6)], ...] = (-0.10, 0.34, 0.27, 0.98)
    scale: tuple[Annotated[float, Within(1e-6, 1e6)], ...] = (3.85, 2.32, 2.33, 3.06)
    micro_frame_size: Annotated[int, Within(1, 1024)] = 17
    vae_2d: dict[str, Any] = field(default_factory=dict)
    vae_temporal: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pictures.latent_channels != self.temporal.in_out_channels:
            raise CheckpointError(
                f"vae_2d gives {self.pictures.latent_channels} channels, vae_temporal takes"
                f" {self.temporal.in_out_channels}"
            )
        for name in ("shift", "scale"):
            if len(getattr(self, name)) != self.temporal.embed_dim:
                raise CheckpointError(
                    f"{name} has {len(getattr(self, name))} entries, {self.temporal.embed_dim} latent channels need as"
                    " many"
                )

    @property
    def pictures(self) -> PictureConfig:
        return made(PictureConfig, self.vae_2d, "vae_2d", ignore_unknown=True, error=CheckpointError)

    @property
    def temporal(self) -> TemporalConfig:
        return made(TemporalConfig, self.vae_temporal, "vae_temporal", ignore_unknown=True, error=CheckpointError)

    @property
    def spec(self) -> CodecSpec:
        """Strides, channels and the latents of a group."""
        stride, pictures = self.temporal.stride, self.pictures
        spatial = 2 ** (len(pictures.block_out_channels) - 1)
        return CodecSpec(self.temporal.embed_dim, spatial, stride, -(-self.micro_frame_size // stride))


def read_opensora_config(source: str | Path | Source) -> OpenSoraConfig:
    """``config.json`` of a component.

    Raises:
        CheckpointError: missing, or naming the field, its value and what is legal.
    """
    where = f"{source}/config.json"
    try:
        return made(OpenSoraConfig, load_config(source), where, ignore_unknown=True, error=CheckpointError)
    except CheckpointError as error:
        raise error if where in str(error) else CheckpointError(f"{where}: {error}") from error


class OpenSoraModules(nn.Module):
    """Both halves under the names of the published file."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        shape, levels = config.pictures, len(config.pictures.block_out_channels)
        self.spatial_vae = nn.Module()
        self.spatial_vae.module = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=shape.block_out_channels,
            layers_per_block=shape.layers_per_block,
            norm_num_groups=shape.norm_num_groups,
            latent_channels=shape.latent_channels,
        )
        self.temporal_vae = TemporalVAE(config.temporal)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.tensor(getattr(config, name)).view(1, -1, 1, 1, 1))


class OpenSoraCodec:
    """Frames <-> normalised latents.

    Args:
        modules: both halves; they compute in their type, latents and pixels outside are float32.
        config: their shape.
        tile: larger pictures are decoded in tiles of so many pixels a side; None = whole.

    Raises:
        ConfigError: a tile that is no multiple of four latent cells.
    """

    def __init__(self, modules: nn.Module, config: OpenSoraConfig, tile: int | None = None) -> None:
        # Weights that could be trained take other kernels, whose last bits differ.
        self.modules: Any = modules.eval().requires_grad_(False)
        self.config, self.spec = config, config.spec
        self._frames = config.micro_frame_size
        self._dtype = next(modules.parameters()).dtype
        if tile is not None:
            pictures = self._pictures
            pictures.enable_tiling()
            pictures.tile_latent_min_size = Tiles.of(tile, self.spec.spatial_stride).size
            pictures.tile_sample_min_size = tile

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Source,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tile: int | None = None,
    ) -> OpenSoraCodec:
        """Loads ``config.json`` and safetensors weights of any precision; arguments as of ``WanCodec``.

        Raises:
            CheckpointError: no such folder, another codec, or a tensor missing or of the wrong size.
        """
        config = read_opensora_config(source)
        modules = _on_meta(config, source)
        buffers = {name: torch.tensor(getattr(config, name)).view(1, -1, 1, 1, 1) for name in ("scale", "shift")}
        load_module(modules, source, optional=buffers, dtype=dtype, device=device, keeps_float32=buffers.__contains__)
        return cls(modules, config, tile)

    @classmethod
    def on_meta(
        cls, source: str | Path | Source, dtype: torch.dtype = torch.float32, tile: int | None = None
    ) -> OpenSoraCodec:
        """A codec of shapes alone, from ``config.json``: it computes on torch's device ``meta``.

        Raises:
            CheckpointError: missing, or not this codec's configuration.
        """
        config = read_opensora_config(source)
        return cls(nn.Module.to(_on_meta(config, source), dtype), config, tile)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes what :meth:`from_pretrained` reads; ``dtype``: precision on disk."""
        shape = {"vae_2d": asdict(self.config.pictures), "vae_temporal": asdict(self.config.temporal)}
        save_module(
            self.modules, folder, {"architectures": ["VideoAutoencoderPipeline"], **asdict(self.config), **shape}, dtype
        )

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encodes a clip group by group, in memory for one of them.

        Both posteriors' modes are taken, not samples, so that the same clip always gives the same latents.

        Args:
            frames: uint8 ``[17 m + 4 n + 1, H, W, 3]``.

        Returns:
            Normalised float32 latents ``[C, n, h, w]`` on the codec's device.

        Raises:
            ConfigError: another number of frames, or a size the codec cannot divide.
        """
        check_frames(frames, self.spec)
        scale, shift = self.modules.scale, self.modules.shift
        latents = []
        for group in frames.split(self._frames):
            parts = [
                self._pictures.encode(part.to(self._dtype)).latent_dist.mode() * _SCALE
                for part in rearrange(from_uint8(group, scale.device), "1 rgb t h w -> t rgb h w").split(self._batch)
            ]
            raw = self.modules.temporal_vae.encode(rearrange(torch.cat(parts), "t c h w -> 1 c t h w"))
            latents.append((raw.float() - shift) / scale)
        return torch.cat(latents, dim=2)[0].contiguous()

    def decoder(self) -> OpenSoraChunkDecoder:
        """A decoder at the start of a new stream; any number may interleave on this codec."""
        return OpenSoraChunkDecoder(self)

    def receptive_latents(self) -> int:
        """None: every group starts anew."""
        return 0

    def decode_group(self, latents: Tensor) -> Tensor:
        """Normalised latents ``[C, n, h, w]`` of a group from its start -> uint8 ``[4 n - 3, H, W, 3]``, CPU.

        Raises:
            VideoError: pixels are not finite.
        """
        return torch.cat([to_finite_uint8(part) for part in self.pixels(latents)])

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Iterator[Tensor]:
        """As :meth:`decode_group`, a few frames at a time: float ``[1, 3, t, H, W]``, around [-1, 1]."""
        modules = self.modules
        raw = (latents.to(modules.scale.device, torch.float32) * modules.scale[0] + modules.shift[0]).to(self._dtype)
        frames = self.spec.frames_in_chunk(raw.shape[1], first=True)
        pictures = rearrange(modules.temporal_vae.decode(raw[None], frames), "1 c t h w -> t c h w")
        for part in pictures.split(self._batch):
            yield rearrange(self._pictures.decode(part / _SCALE).sample.float(), "t rgb h w -> 1 rgb t h w")

    @property
    def _pictures(self) -> Any:
        return self.modules.spatial_vae.module

    @property
    def _batch(self) -> int:
        return self.config.pictures.micro_batch_size


class OpenSoraChunkDecoder:
    """One stream's latents of the group that is not whole yet."""

    def __init__(self, codec: OpenSoraCodec) -> None:
        self._codec = codec
        self._held: Tensor | None = None

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes the groups that the next latents of the stream make whole.

        Args:
            latents: normalised ``[C, n, h, w]``, n >= 1.

        Returns:
            uint8 ``[t, H, W, 3]`` on the CPU, t = 17 for every group; t = 0 while the group is not whole.

        Raises:
            VideoError: pixels are not finite: the latents, or the type that the codec computes in, are out of range.
        """
        spec = self._codec.spec
        whole = self._take(latents)
        groups = whole.split(spec.group, dim=1) if whole.shape[1] else ()
        height, width = (side * spec.spatial_stride for side in latents.shape[2:])
        frames = [torch.empty(0, height, width, 3, dtype=torch.uint8)]
        # Contiguous, so that a view into a longer tensor and a group of its own take the same kernels.
        return torch.cat([*frames, *(self._codec.decode_group(group.contiguous()) for group in groups)])

    def warm(self, latents: Tensor) -> None:
        """As :meth:`decode`, with the frames dropped: whole groups leave nothing behind."""
        self._take(latents)

    def _take(self, latents: Tensor) -> Tensor:
        """The latents of whole groups, held ones in front; keeps the rest."""
        spec = self._codec.spec
        if latents.ndim != 4 or latents.shape[0] != spec.latent_channels or latents.shape[1] < 1:
            raise ValueError(f"latents must be [{spec.latent_channels}, n >= 1, h, w], got {list(latents.shape)}")
        held = latents if self._held is None else torch.cat([self._held, latents], dim=1)
        whole = held.shape[1] - held.shape[1] % spec.group
        self._held = held[:, whole:].clone() if whole < held.shape[1] else None
        return held[:, :whole]


def _on_meta(config: OpenSoraConfig, source: object) -> OpenSoraModules:
    try:
        with torch.device("meta"):
            return OpenSoraModules(config)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(f"{source}/config.json describes no working Open-Sora VAE: {reason}") from error


def opensora_identity(source: str | Path | Source) -> str:
    """Hash of what latents depend on: both encoders and the statistics."""
    config = read_opensora_config(source)
    digest = hashlib.sha256(json.dumps([config.shift, config.scale, config.micro_frame_size]).encode())
    halves = ("spatial_vae.module.", "temporal_vae.")
    encoders = tuple(half + part for half in halves for part in ("encoder.", "quant_conv."))
    tensors = read_tensors(source, lambda key: key.startswith(encoders))
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
