"""Tiny decoders for previews, in the layout of TAEHV's files (``taew2_1``, ``taew2_2``, ...): about a hundredth of the
work of the autoencoder whose latents they read.

A file holds no description: widths, patch and how frames double are told from the shapes of its tensors. Every stream
keeps one frame per block, so the partition into chunks does not change a bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.codecs.pixels import to_finite_uint8
from pavdm_dist.errors import CheckpointError

# Where the decoder's layers that have tensors stand in its list.
_CONV_IN, _CONV_OUT = 1, 22
_STAGES = ((3, 7), (9, 13), (15, 19))  # the first of three blocks, and the layer that doubles frames


class TinyDecoder:
    """What makes preview frames of a codec's normalised latents.

    Args:
        path: a ``.pth`` or ``.safetensors`` file.
        spec: of the codec that it stands in for.
        device: where it computes.
        dtype: what it computes in.

    Raises:
        CheckpointError: no such file, another layout, or one for other latents.
    """

    def __init__(
        self,
        path: str | Path,
        spec: CodecSpec,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.spec = spec
        tensors = _read(Path(path))
        try:
            self.net = _Net(tensors, spec.temporal_stride)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"preview_decoder={path}: is no TAEHV decoder: {error}") from error
        for name, found, needed in (
            ("latent channels", self.net.channels, spec.latent_channels),
            ("pixels per latent cell", 8 * self.net.patch, spec.spatial_stride),
            ("frames per latent", self.net.frames, spec.temporal_stride),
        ):
            if found != needed:
                raise CheckpointError(f"preview_decoder={path}: has {found} {name}, the model's codec {needed}")
        if spec.group:
            raise CheckpointError(f"preview_decoder={path}: is for codecs that decode without groups")
        self.device, self.dtype = torch.device(device), dtype
        self.net.to(self.device, dtype).eval().requires_grad_(False)

    def decoder(self) -> TinyChunkDecoder:
        """A decoder at the start of a new stream."""
        return TinyChunkDecoder(self)

    def receptive_latents(self) -> int:
        """Latents a fresh decoder must be warmed on: each block looks one frame back, at its stage's rate."""
        reach, rate = 0.0, 1
        for frames in self.net.doubles:
            reach, rate = reach + 3 / rate, rate * frames
        return math.ceil(reach)


class TinyChunkDecoder:
    """One stream: the last frame that every block has seen."""

    def __init__(self, tiny: TinyDecoder) -> None:
        self._tiny = tiny
        self._memory: dict[int, Tensor] = {}
        self._started = False

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents ``[C, n, h, w]`` -> uint8 ``[t, H, W, 3]`` on the CPU, as many as the codec gives.

        Raises:
            VideoError: pixels are not finite.
        """
        return torch.cat([to_finite_uint8(self.step(latent) * 2 - 1) for latent in latents.split(1, dim=1)])

    def warm(self, latents: Tensor) -> None:
        """As :meth:`decode`, with the frames dropped."""
        for latent in latents.split(1, dim=1):
            self.step(latent)

    @property
    def weight_bytes(self) -> int:
        """Of the network that all streams share."""
        return sum(value.nbytes for value in self._tiny.net.parameters())

    @torch.no_grad()
    def step(self, latent: Tensor) -> Tensor:
        """One latent -> float pixels ``[1, 3, t, H, W]``, around [0, 1]."""
        tiny = self._tiny
        x = rearrange(latent, "c 1 h w -> 1 c h w").contiguous().to(tiny.device, tiny.dtype)
        frames = tiny.net(x, self._memory).float()
        # The first latent is one frame: those that come before it are the price of looking back only.
        frames, self._started = frames if self._started else frames[-1:], True
        return rearrange(frames, "t rgb h w -> 1 rgb t h w")


class _Block(nn.Module):
    """Three convolutions over a frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        conv = [nn.Conv2d(2 * width, width, 3, padding=1), *(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))]
        self.conv = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class _Stage(nn.Module):
    """Three blocks, then twice the size, ``frames`` for every frame, and another width."""

    def __init__(self, width: int, after: int, frames: int) -> None:
        super().__init__()
        self.width, self.frames = width, frames
        self.blocks = nn.ModuleList(_Block(width) for _ in range(3))
        self.grow = nn.Conv2d(width, width * frames, 1, bias=False)
        self.conv = nn.Conv2d(width, after, 3, padding=1, bias=False)

    def forward(self, x: Tensor, memory: dict[int, Tensor], first: int) -> Tensor:
        for number, block in enumerate(self.blocks, first):
            before = torch.cat([memory.get(number, torch.zeros_like(x[:1])), x[:-1]])
            memory[number] = x[-1:]
            x = block(x, before)
        x = self.grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(rearrange(x, "t (n c) h w -> (t n) c h w", n=self.frames))


class _Net(nn.Module):
    """The decoder of a file's tensors: ``[1, C, h, w]`` -> ``[frames, 3, H, W]``.

    Raises:
        KeyError, ValueError: these are none.
    """

    def __init__(self, tensors: Mapping[str, Tensor], frames: int) -> None:
        super().__init__()
        widths = [_shape(tensors, _CONV_IN)[0], *(_shape(tensors, grow + 1)[0] for _, grow in _STAGES)]
        self.channels = _shape(tensors, _CONV_IN)[1]
        self.patch = round((_shape(tensors, _CONV_OUT)[0] / 3) ** 0.5)
        self.conv_in = nn.Conv2d(self.channels, widths[0], 3, padding=1)
        doubles = [
            _shape(tensors, grow, "conv.weight")[0] // width for (_, grow), width in zip(_STAGES, widths, strict=False)
        ]
        if math.prod(doubles) == 2 * frames and doubles[0] == 2:
            # For a codec of half the rate the later frame of each first pair is what is meant.
            doubles[0], name = 1, f"decoder.{_STAGES[0][1]}.conv.weight"
            tensors = {**tensors, name: tensors[name][-widths[0] :]}
        self.doubles = doubles
        self.stages = nn.ModuleList(_Stage(*shape) for shape in zip(widths, widths[1:], doubles, strict=False))
        self.conv_out = nn.Conv2d(widths[-1], 3 * self.patch**2, 3, padding=1)
        self.frames = math.prod(doubles)
        names = {f"{_CONV_IN}.": "conv_in.", f"{_CONV_OUT}.": "conv_out."}
        for number, (first, grow) in enumerate(_STAGES):
            names |= {f"{first + block}.": f"stages.{number}.blocks.{block}." for block in range(3)}
            names |= {f"{grow}.conv.": f"stages.{number}.grow.", f"{grow + 1}.": f"stages.{number}.conv."}
        renamed = {}
        for name, tensor in tensors.items():
            inside = name.removeprefix("decoder.")
            if inside != name:  # the encoder's are not needed
                old = next((old for old in names if inside.startswith(old)), None)
                if old is None:
                    raise ValueError(f"tensor {name} is not part of it")
                renamed[names[old] + inside.removeprefix(old)] = tensor
        _check(self.state_dict(), renamed)
        self.load_state_dict(renamed)

    def forward(self, x: Tensor, memory: dict[int, Tensor]) -> Tensor:
        x = F.relu(self.conv_in(torch.tanh(x / 3) * 3))
        for number, stage in enumerate(self.stages):
            x = stage(x, memory, 3 * number)
        return F.pixel_shuffle(self.conv_out(F.relu(x)), self.patch)


def _shape(tensors: Mapping[str, Tensor], layer: int, name: str = "weight") -> tuple[int, ...]:
    return tuple(tensors[f"decoder.{layer}.{name}"].shape)


def _check(needed: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, tensor in needed.items():
        if name not in found:
            raise ValueError(f"tensor {name} is missing")
        if found[name].shape != tensor.shape:
            raise ValueError(f"tensor {name} is {list(found[name].shape)}, {list(tensor.shape)} is needed")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"preview_decoder={path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each library has its own kinds
        reason = re.split(r"[.\n]", str(error))[0]
        raise CheckpointError(f"preview_decoder={path}: is no readable file of weights: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"preview_decoder={path}: holds no tensors by name")
    return content
