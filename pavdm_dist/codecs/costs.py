"""What making frames costs, from a video codec's configuration or a preview's file alone: operations, and memory."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.codecs.catalog import RGB, FrameMaker, codec_spec, is_opensora
from pavdm_dist.codecs.opensora import OpenSoraCodec
from pavdm_dist.codecs.pixels import to_uint8
from pavdm_dist.codecs.tiles import Tiles
from pavdm_dist.codecs.tiny import TinyChunkDecoder, TinyDecoder
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.codecs.wan_config import read_wan_config
from pavdm_dist.models.source import Source, load_config

# Latents after which the cache has its full size: the first one fills none of the temporal upsampling's.
_SETTLED = 3


def frames_flop(maker: FrameMaker, latent_height: int, latent_width: int) -> float:
    """FLOP of making one latent's frames: as of :func:`decode_flop`, or of what stands in for the codec; 0 of colours.

    Raises:
        CheckpointError: no such file of a tiny decoder, or not one for the codec.
    """
    if maker.preview is None:
        return decode_flop(maker.vae, latent_height, latent_width)
    if maker.preview == RGB:
        return 0.0
    from torch.utils.flop_counter import FlopCounterMode

    decoder, latent = _tiny(maker, latent_height, latent_width)
    with FlopCounterMode(display=False) as counter:
        decoder.step(latent)
    return counter.get_total_flops()


def frames_memory(
    maker: FrameMaker,
    latent_height: int,
    latent_width: int,
    dtype: torch.dtype = torch.float32,
    in_main_memory: bool = False,
) -> DecodeMemory:
    """Memory of making frames: as of :func:`decode_memory`, or of what stands in for the codec; raises as
    :func:`frames_flop`."""
    if maker.preview is None:
        return decode_memory(maker.vae, latent_height, latent_width, dtype, maker.tile, in_main_memory)
    if maker.preview == RGB:
        spec = codec_spec(maker.vae)
        pixels = latent_height * latent_width * spec.spatial_stride**2
        return DecodeMemory(0, 0, 0, 3 * spec.temporal_stride * pixels)
    decoder, latent = _tiny(maker, latent_height, latent_width, dtype)
    with Allocated() as allocated:
        for _ in range(_SETTLED):
            frames = to_uint8((decoder.step(latent) * 2 - 1).clamp(-1, 1))
    size = frames.nbytes
    del frames
    # What a block keeps is a frame, and with it the others that it was computed with.
    return DecodeMemory(decoder.weight_bytes, allocated.bytes, allocated.peak - allocated.bytes, size)


def _tiny(
    maker: FrameMaker, latent_height: int, latent_width: int, dtype: torch.dtype = torch.float32
) -> tuple[TinyChunkDecoder, torch.Tensor]:
    """A preview's tiny decoder on shapes alone, and a latent for it."""
    spec = codec_spec(maker.vae)
    decoder = TinyDecoder(str(maker.preview), spec, "meta", dtype).decoder()
    return decoder, torch.empty(spec.latent_channels, 1, latent_height, latent_width, device="meta")


def decode_flop(source: str | Path | Source, latent_height: int, latent_width: int) -> float:
    """FLOP of decoding one latent (four frames), from ``config.json`` alone.

    Two per multiply-add. Of Wan's layouts convolutions only: good to about a quarter, enough to balance stages.
    """
    if is_opensora(source):
        return _counted_flop(Source.of(source), _told(source), latent_height, latent_width)
    config = read_wan_config(source)
    base = config.decoder_base_dim or config.base_dim
    widths = [base * factor for factor in [config.dim_mult[-1], *reversed(config.dim_mult)]]
    doubles = list(reversed(config.temperal_downsample))
    places, frames = latent_height * latent_width, 1
    total = float(config.taps) * places * (config.z_dim * widths[0] + 4 * widths[0] ** 2)
    for level, (before, width) in enumerate(pairwise(widths)):
        if level and not config.is_residual:
            before //= 2  # the plain layout halves the channels with the resolution
        convolutions = before * width + (2 * config.num_res_blocks + 1) * width**2
        total += config.taps * places * frames * convolutions
        if level < len(doubles):
            if doubles[level]:
                total += 3 * places * frames * 2 * width**2
                frames *= 2
            places *= 4
            total += 9 * places * frames * width**2 / (1 if config.is_residual else 2)
    return 2 * (total + config.taps * places * frames * widths[-1] * config.out_channels)


def _told(source: str | Path | Source) -> str:
    """All that costs are counted from: what was counted is kept for as long as it says the same."""
    return json.dumps(load_config(source), sort_keys=True)


@lru_cache
def _counted_flop(source: Source, told: str, latent_height: int, latent_width: int) -> float:
    """By letting Open-Sora's decoder work on shapes alone; takes seconds once, to import diffusers."""
    from torch.utils.flop_counter import FlopCounterMode

    codec = OpenSoraCodec.on_meta(source)
    with FlopCounterMode(display=False) as counter:
        for _ in codec.pixels(_group(codec.spec, latent_height, latent_width)):
            pass
    return counter.get_total_flops() / codec.spec.group


def _group(spec: CodecSpec, latent_height: int, latent_width: int) -> torch.Tensor:
    return torch.empty(spec.latent_channels, spec.group, latent_height, latent_width, device="meta")


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive, and the most there were.

    The same on device ``meta`` as on any other; scratch space inside a kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # What is only looked at in another way is no new memory: whether a product transposes its weights is torch's
        # affair, and depends on what else is imported.
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._alive | given:
                self._alive.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.bytes -= size


@dataclass(frozen=True)
class DecodeMemory:
    """Bytes of decoding, without what kernels need for themselves.

    Attributes:
        weights: of the whole codec, which is loaded whole.
        cache: features that one stream keeps from latent to latent.
        working: the most that decoding one latent takes beside these.
        frames: what a latent becomes: four uint8 frames, or its share of a group's.
    """

    weights: int
    cache: int
    working: int
    frames: int


def decode_memory(
    source: str | Path | Source,
    latent_height: int,
    latent_width: int,
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
    in_main_memory: bool = False,
) -> DecodeMemory:
    """Memory of decoding pictures of a size, counted by letting the decoder work on shapes alone; takes seconds once,
    to import diffusers.

    Args:
        source: component folder, hub id, or :class:`~pavdm_dist.models.source.Source`; only ``config.json`` is read.
        latent_height, latent_width: latent cells.
        dtype: what the codec computes in.
        tile: large pictures in tiles of so many pixels a side; None = whole.
        in_main_memory: the codec computes on a GPU, so that what tiles remember waits elsewhere.

    Raises:
        CheckpointError: missing, or not a codec's configuration.
        ConfigError: a tile that is no multiple of four latent cells.
    """
    if is_opensora(source):
        return _group_memory(Source.of(source), _told(source), latent_height, latent_width, dtype, tile)
    tiles = None if tile is None else Tiles.of(tile, read_wan_config(source).spec.spatial_stride)
    if tiles is not None and tiles.needed(latent_height, latent_width):
        return _tiled_memory(source, (latent_height, latent_width), dtype, tiles, in_main_memory)
    return _whole_memory(Source.of(source), _told(source), latent_height, latent_width, dtype)


@lru_cache
@torch.no_grad()
def _whole_memory(source: Source, told: str, latent_height: int, latent_width: int, dtype: torch.dtype) -> DecodeMemory:
    codec = WanCodec.on_meta(source, dtype)
    weights = sum(value.numel() for value in codec.vae.parameters()) * dtype.itemsize
    decoder, latent = codec.decoder(), (1, codec.spec.latent_channels, 1, latent_height, latent_width)
    with Allocated() as allocated:
        for _ in range(_SETTLED):
            frames = to_uint8(decoder.step(torch.empty(latent, device="meta")).clamp(-1, 1))
    return DecodeMemory(weights, decoder.cache_bytes, allocated.peak - decoder.cache_bytes, frames.nbytes)


def _tiled_memory(
    source: str | Path | Source, cells: tuple[int, int], dtype: torch.dtype, tiles: Tiles, in_main_memory: bool
) -> DecodeMemory:
    """From what one tile takes: to let all of them work on shapes would take minutes."""
    height, width = (min(side, tiles.size) for side in cells)
    one = decode_memory(source, height, width, dtype)
    heights, widths = ([min(tiles.size, side - start) for start in range(0, side, tiles.stride)] for side in cells)
    cell = one.frames / (height * width)
    # Pixels are float32 until all tiles of a latent are there: finished rows, the row above and the row so far.
    # In the end they are joined, limited and rounded, each in a copy.
    working = 16 * cell * prod(cells)
    for row, high in enumerate(heights):
        done = cells[1] * sum(min(tiles.stride, before) for before in heights[:row])
        above = sum(widths) * heights[row - 1] if row else 0
        for column, wide in enumerate(widths):
            held = 4 * cell * (done + above + high * sum(widths[:column]))
            working = max(working, held + one.working * high * wide / (height * width))
    kept = one.cache * sum(heights) * sum(widths) // (height * width)
    if in_main_memory:
        kept, working = 0, working + one.cache
    return DecodeMemory(one.weights, kept, int(working), int(cell * prod(cells)))


@lru_cache
@torch.no_grad()
def _group_memory(
    source: Source, told: str, latent_height: int, latent_width: int, dtype: torch.dtype, tile: int | None
) -> DecodeMemory:
    """Of Open-Sora's codec: nothing is kept, a whole group is at work."""
    codec = OpenSoraCodec.on_meta(source, dtype, tile)
    weights = sum(value.numel() for value in codec.modules.parameters()) * dtype.itemsize
    with Allocated() as allocated:
        parts = [to_uint8(part.clamp(-1, 1)) for part in codec.pixels(_group(codec.spec, latent_height, latent_width))]
    return DecodeMemory(weights, 0, allocated.peak, sum(part.nbytes for part in parts) // codec.spec.group)
