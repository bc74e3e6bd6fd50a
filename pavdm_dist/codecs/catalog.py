"""The video codecs this package has, by the class name in ``config.json``, and what stands in for them in previews."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from pavdm_dist.codecs.base import CodecSpec, FrameDecoder, VideoCodec
from pavdm_dist.codecs.wan_config import read_wan_config
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.checksums import kept_sha256
from pavdm_dist.io.folders import without_hidden
from pavdm_dist.io.local_disk import cache_folder
from pavdm_dist.io.storage import atomic_write
from pavdm_dist.models.loading import stored_tensors
from pavdm_dist.models.source import Source, class_names, load_config

WAN = "AutoencoderKLWan"
OPENSORA = ("VideoAutoencoderPipeline", "OpenSoraVAE_V1_2")
CODECS = (WAN, *OPENSORA)
# preview_decoder: colours alone, fitted to the codec.
RGB = "rgb"

logger = logging.getLogger(__name__)

Place = str | Path | Source


def is_opensora(source: Place) -> bool:
    """Whether a component is Open-Sora's VAE; what names no class is Wan's.

    Raises:
        CheckpointError: there is no configuration, or one that names no class by text.
    """
    return not {*OPENSORA}.isdisjoint(class_names(load_config(source), f"{source}/config.json"))


def codec_spec(source: Place) -> CodecSpec:
    """Strides and channels, from ``config.json`` alone.

    Raises:
        CheckpointError: missing, unreadable, or no configuration of a codec.
    """
    if not is_opensora(source):
        return read_wan_config(source).spec
    from pavdm_dist.codecs.opensora import read_opensora_config

    return read_opensora_config(source).spec


def load_codec(
    source: Place,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
) -> VideoCodec:
    """Loads ``config.json`` and safetensors weights of any precision.

    Args:
        source: component folder, hub id, or :class:`~pavdm_dist.models.source.Source`.
        device: where the codec runs.
        dtype: what it computes in.
        tile: larger pictures are decoded in tiles of so many pixels a side; None = whole.

    Raises:
        CheckpointError: no such folder, no codec, or a tensor missing or of the wrong size.
        ConfigError: a tile that is no multiple of four latent cells.
    """
    if is_opensora(source):
        from pavdm_dist.codecs.opensora import OpenSoraCodec

        return OpenSoraCodec.from_pretrained(source, device, dtype, tile)
    from pavdm_dist.codecs.wan import WanCodec

    return WanCodec.from_pretrained(source, device, dtype, tile)


@dataclass(frozen=True)
class FrameMaker:
    """What makes frames of clean latents; small, it travels to whoever decodes.

    Attributes:
        vae: the codec.
        tile: of large pictures, see :func:`load_codec`.
        preview: None = the codec itself; ``rgb`` = a colour per latent cell, or the file of a tiny decoder.
    """

    vae: Source
    tile: int | None = None
    preview: str | None = None

    @cached_property
    def preview_identity(self) -> str | None:
        """What tells ``preview`` from others wherever it lies: ``rgb``, the SHA-256 of its file, read once, or None."""
        return self.preview if self.preview in (None, RGB) else kept_sha256(str(self.preview))

    def check(self) -> None:
        """Refuses what could not be loaded; reads configuration and headers only.

        Raises:
            ConfigError, CheckpointError: naming the setting.
        """
        spec = codec_spec(self.vae)
        if self.tile is not None:
            from pavdm_dist.codecs.tiles import Tiles

            Tiles.of(self.tile, spec.spatial_stride)
        if self.preview is not None and self.tile is not None:
            raise ConfigError(f"decoder_tile={self.tile}: preview_decoder={self.preview} has no tiles; drop one")
        if self.preview not in (None, RGB):
            from pavdm_dist.codecs.tiny import TinyDecoder

            TinyDecoder(str(self.preview), spec)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> FrameDecoder:
        """On a device of this process; raises as :meth:`check`."""
        if self.preview is None:
            return load_codec(self.vae, device, dtype, self.tile)
        if self.preview == RGB:
            return _colours(self.vae)
        from pavdm_dist.codecs.tiny import TinyDecoder

        return TinyDecoder(self.preview, codec_spec(self.vae), device, dtype)


def _colours(vae: Source) -> FrameDecoder:
    """The map from latents to colours, fitted once per codec and kept."""
    from pavdm_dist.codecs.latent_rgb import LatentRGB

    spec = codec_spec(vae)
    name = (
        f"{hashlib.sha256(json.dumps([load_config(vae), _told(vae)], sort_keys=True).encode()).hexdigest()[:24]}.json"
    )
    try:
        kept = json.loads((cache_folder("previews") / name).read_text())
        weight, bias = torch.tensor(kept["weight"]), torch.tensor(kept["bias"])
        if weight.shape == (spec.latent_channels, 3) and bias.shape == (3,):
            return LatentRGB(spec, weight, bias)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = LatentRGB.fitted(load_codec(vae))
    try:
        with atomic_write(cache_folder("previews") / name, "w") as file:
            json.dump({"weight": found.weight.tolist(), "bias": found.bias.tolist()}, file)
    except OSError as error:
        logger.warning("the colours of previews cannot be kept: %s", error)
    return found


def _told(vae: Source) -> object:
    """What tells a codec's weights from others' without reading them: their commit, or their files' times."""
    if not vae.is_folder:
        return str(vae)
    if not stored_tensors(vae):
        raise CheckpointError(f"{vae} has no weights")
    files = without_hidden(vae.folder().glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def encoder_identity(source: Place) -> str:
    """Hash of what latents depend on: the encoder and the statistics; a decoder may be refined later."""
    if is_opensora(source):
        from pavdm_dist.codecs.opensora import opensora_identity

        return opensora_identity(source)
    from pavdm_dist.codecs.wan import wan_identity

    return wan_identity(source)
