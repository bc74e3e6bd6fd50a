"""Video codec around diffusers' ``AutoencoderKLWan`` (Wan 2.1 layout and the patched, residual 2.2 layout).

The autoencoder is causal and decodes latent by latent with a cache of past features. Its own ``decode`` keeps
that cache inside the module and grows its output by concatenation; here each stream owns its cache instead, so
streams may interleave on one module and memory does not grow with the length of the video.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from pavdm_dist.codecs.pixels import check_frames, from_uint8, to_finite_uint8
from pavdm_dist.codecs.taps import drop_empty_taps
from pavdm_dist.codecs.tiles import Tiles
from pavdm_dist.codecs.wan_config import CURRENT_FRAME_ONLY, read_wan_config, wan_config
from pavdm_dist.errors import CheckpointError, VideoError, first_line
from pavdm_dist.models.loading import load_module, read_tensors
from pavdm_dist.models.saving import save_module
from pavdm_dist.models.source import Source, load_config

# A probe that runs longer than this has a decoder with unbounded memory, which a causal convolution cannot have.
_PROBE_LIMIT = 1000
# Latent cells of the probe: for attention over a single place CUDA has no kernel that takes its strides.
_PROBE_SIZE = (2, 2)


def wan_identity(source: str | Path | Source) -> str:
    """Hash of what latents depend on: the encoder and the statistics; a decoder may be refined later."""
    read_wan_config(source)
    config = load_config(source)
    digest = hashlib.sha256(json.dumps([config["latents_mean"], config["latents_std"]]).encode())
    tensors = read_tensors(source, lambda key: key.startswith(("encoder.", "quant_conv.")))
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class WanCodec:
    """Frames <-> normalised latents.

    Args:
        vae: an ``AutoencoderKLWan``; it is switched to evaluation and its weights are used as they are. It computes in
            their type; latents and pixels outside it are float32.
        tile: larger pictures are decoded in tiles of so many pixels a side, which takes less memory at a time and more
            work, and is not bit-equal to decoding them whole; None = whole.

    Raises:
        ConfigError: a tile that is no multiple of four latent cells.
    """

    def __init__(self, vae: nn.Module, tile: int | None = None) -> None:
        config: Any = vae.config
        self.spec = wan_config(config, "the video codec").spec
        self.tiles = None if tile is None else Tiles.of(tile, self.spec.spatial_stride)
        self.vae: Any = vae.eval()
        self._patch: int | None = config.get("patch_size")
        device, self._dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
        self._mean = torch.tensor(config["latents_mean"], dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config["latents_std"], dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)
        self._receptive: int | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Source,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tile: int | None = None,
    ) -> WanCodec:
        """Loads ``config.json`` and safetensors weights of any precision.

        Convolutions that look at the current frame only, as ``config.json`` says, compute frame by frame
        (:mod:`pavdm_dist.codecs.taps`).

        Args:
            source: component folder, hub id, or :class:`~pavdm_dist.models.source.Source`.
            device: where the codec runs.
            dtype: what it computes in.
            tile: see above.

        Raises:
            CheckpointError: no such folder, not a Wan autoencoder, a tensor missing or of the wrong size, or one that
                looks at earlier frames against what ``config.json`` says.
        """
        vae = _without_weights(source)
        load_module(vae, source, dtype=dtype, device=device)
        return cls(_shortened(vae), tile)

    @classmethod
    def on_meta(cls, source: str | Path | Source, dtype: torch.dtype = torch.float32) -> WanCodec:
        """A codec of shapes alone, from ``config.json``: it computes on torch's device ``meta``.

        Raises:
            CheckpointError: missing, or not a Wan autoencoder's configuration.
        """
        # Not diffusers' own `to`, which warns of types that some other models keep.
        return cls(_shortened(nn.Module.to(_without_weights(source), dtype)))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes what :meth:`from_pretrained` and diffusers' own loader read; ``dtype``: precision on disk."""
        config = {k: v for k, v in dict(self.vae.config).items() if not k.startswith("_") or k == CURRENT_FRAME_ONLY}
        save_module(self.vae, folder, {"_class_name": "AutoencoderKLWan", **config}, dtype)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels -> latent cells; ConfigError when a side cannot be divided."""
        return self.spec.latent_size(height, width)

    def frames_in_chunk(self, chunk_size: int, first: bool) -> int:
        """``4c - 3`` frames for the first chunk of a video, ``4c`` for others."""
        return self.spec.frames_in_chunk(chunk_size, first)

    def chunks_for_frames(self, num_frames: int, chunk_size: int, warm: bool) -> int:
        """The fewest chunks that give ``num_frames`` frames; see :meth:`CodecSpec.chunks_for_frames`."""
        return self.spec.chunks_for_frames(num_frames, chunk_size, warm)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """One causal pass over a clip, in memory for one latent's frames.

        The posterior's mode is taken, not a sample, so that the same clip always gives the same latents; the
        beginning of a clip gives bit for bit the beginning of its latents.

        Args:
            frames: uint8 ``[4n + 1, H, W, 3]``.

        Returns:
            Normalised float32 latents ``[C, n + 1, h, w]`` on the codec's device.

        Raises:
            ConfigError: another number of frames, or a size the codec cannot divide.
            VideoError: latents are not finite.
        """
        check_frames(frames, self.spec)
        cache: list[Any] = [None] * self.vae._cached_conv_counts["encoder"]
        stride = self.spec.temporal_stride
        latents = []
        for group in frames.split([1, *[stride] * (frames.shape[0] // stride)]):
            patches = self._patchify(from_uint8(group, self._mean.device)).to(self._dtype)
            features = self.vae.encoder(patches, feat_cache=cache, feat_idx=[0])
            mean, _ = self.vae.quant_conv(features).chunk(2, dim=1)
            latents.append((mean.float() - self._mean) / self._std)
        result = torch.cat(latents, dim=2)[0].contiguous()
        if not bool(result.isfinite().all()):
            raise VideoError("the codec gave latents that are not finite: its encoder is damaged, or its type narrow")
        return result

    def decoder(self) -> WanChunkDecoder:
        """A decoder at the start of a new stream; any number may interleave on this codec."""
        return WanChunkDecoder(self)

    def receptive_latents(self) -> int:
        """Latents a fresh decoder must be warmed on before the next one decodes exactly as in an unbroken stream.

        Measured once by sending a NaN through the decoder: unlike a perturbation, which trained weights may damp
        below the last bit, NaN marks every output that depends on it, however weakly. Costs some dozens of 2x2
        latents.

        Raises:
            CheckpointError: pixels are not finite without that.
        """
        if self._receptive is None:
            self._receptive = self._probe()
        return self._receptive

    @torch.no_grad()
    def _probe(self) -> int:
        stream = self.decoder()
        clean = torch.zeros(1, self.spec.latent_channels, 1, *_PROBE_SIZE, device=self._mean.device)
        # The first latent skips the temporal upsampling; the second is the first regular one.
        stream.step(clean)
        if not bool(stream.step(clean).isfinite().all()):
            raise CheckpointError("vae: the codec gives pixels that are not finite whatever it decodes: it is damaged")
        stream.step(clean * torch.nan)
        for reached in range(_PROBE_LIMIT):
            marked = bool(stream.step(clean).isnan().any())
            if not marked and not stream.holds_nan():
                return reached + 1
        raise RuntimeError(f"the decoder still remembers a latent after {_PROBE_LIMIT} others")

    def denormalise(self, latents: Tensor) -> Tensor:
        """Normalised ``[1, C, n, h, w]`` -> the autoencoder's own scale and type."""
        return (latents * self._std + self._mean).to(self._dtype)

    @property
    def scale(self) -> int:
        """Pixels per latent cell of what the network itself gives, before :meth:`unpatchify`."""
        return self.spec.spatial_stride // (self._patch or 1)

    def unpatchify(self, pixels: Tensor) -> Tensor:
        """Undoes the 2.2 layout's space-to-depth; the identity for the 2.1 layout."""
        if self._patch is None:
            return pixels
        return rearrange(pixels, "b (c q r) t h w -> b c t (h r) (w q)", q=self._patch, r=self._patch)

    def _patchify(self, pixels: Tensor) -> Tensor:
        if self._patch is None:
            return pixels
        # The column offset is the slower of the two in that layout's channel order.
        return rearrange(pixels, "b c t (h r) (w q) -> b (c q r) t h w", q=self._patch, r=self._patch)


class WanChunkDecoder:
    """One stream's feature caches: one, or one for every tile of a large picture.

    Every latent goes through the network alone, so the partition into chunks cannot change a bit. What tiles on a GPU
    remember waits in main memory, so that the GPU holds one tile at a time.
    """

    def __init__(self, codec: WanCodec) -> None:
        self._codec = codec
        self._caches: dict[tuple[int, int], list[Any]] = {}
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes the next latents of the stream.

        Args:
            latents: normalised ``[C, n, h, w]``, n >= 1.

        Returns:
            uint8 ``[t, H, W, 3]`` on the CPU; t = 4n, or 4n - 3 at the start of the stream.

        Raises:
            VideoError: pixels are not finite: the latents, or the type that the codec computes in, are out of range.
        """
        return torch.cat([to_finite_uint8(self.step(latent)) for latent in self._split(latents)])

    @torch.no_grad()
    def warm(self, latents: Tensor) -> None:
        """As :meth:`decode`, with the frames dropped."""
        for latent in self._split(latents):
            self.step(latent)

    def step(self, latent: Tensor) -> Tensor:
        """One normalised latent ``[1, C, 1, h, w]`` -> float pixels ``[1, 3, 1 or 4, H, W]``, around [-1, 1]."""
        codec, tiles = self._codec, self._codec.tiles
        if tiles is None or not tiles.needed(*latent.shape[-2:]):
            pixels = self._decode((0, 0), latent)
        else:
            pixels = tiles.decode(latent, codec.scale, self._decode_tile)
        self._started = True
        return codec.unpatchify(pixels)

    @property
    def cache_bytes(self) -> int:
        """Of the features that later latents will read."""
        return sum(entry.nbytes for entry in self._kept())

    def holds_nan(self) -> bool:
        """Whether a feature that later latents will read is NaN."""
        return any(bool(entry.isnan().any()) for entry in self._kept())

    def _kept(self) -> Iterator[Tensor]:
        return (entry for cache in self._caches.values() for entry in cache if isinstance(entry, Tensor))

    def _decode(self, place: tuple[int, int], latent: Tensor) -> Tensor:
        """Pixels of one tile, float, still in patches."""
        codec = self._codec
        cache = self._caches.setdefault(place, [None] * codec.vae._cached_conv_counts["decoder"])
        raw = codec.vae.post_quant_conv(codec.denormalise(latent))
        return codec.vae.decoder(raw, feat_cache=cache, feat_idx=[0], first_chunk=not self._started).float()

    def _decode_tile(self, place: tuple[int, int], latent: Tensor) -> Tensor:
        """As :meth:`_decode`; what the tile remembers is on a GPU for so long only."""
        self._move(place, latent.device)
        pixels = self._decode(place, latent)
        if latent.device.type == "cuda":
            self._move(place, "cpu")
        return pixels

    def _move(self, place: tuple[int, int], device: torch.device | str) -> None:
        cache = self._caches.get(place, [])
        cache[:] = [entry.to(device) if isinstance(entry, Tensor) else entry for entry in cache]

    def _split(self, latents: Tensor) -> list[Tensor]:
        channels = self._codec.spec.latent_channels
        if latents.ndim != 4 or latents.shape[0] != channels or latents.shape[1] < 1:
            raise ValueError(f"latents must be [{channels}, n >= 1, h, w], got {list(latents.shape)}")
        moved = latents.to(self._codec._mean.device, torch.float32)
        # Contiguous, so that a view into a longer tensor and a chunk of its own take the same kernels.
        return [latent.contiguous() for latent in moved.unsqueeze(0).split(1, dim=2)]


def _shortened(vae: Any) -> nn.Module:
    """An autoencoder whose convolutions do no more than its configuration asks for."""
    if vae.config.get(CURRENT_FRAME_ONLY):
        drop_empty_taps(vae)
    return vae


def _without_weights(source: str | Path | Source) -> nn.Module:
    """The autoencoder that ``config.json`` describes, on device ``meta``."""
    read_wan_config(source)
    config = load_config(source)
    from diffusers import AutoencoderKLWan

    try:
        with torch.device("meta"):
            # What is null is left out, the class has its own values for that; so are names that it does not know.
            known = {*signature(AutoencoderKLWan.__init__).parameters, CURRENT_FRAME_ONLY}
            given = {key: value for key, value in config.items() if value is not None and key in known}
            return AutoencoderKLWan.from_config(given)
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(f"{source}/config.json describes no working AutoencoderKLWan: {reason}") from error
