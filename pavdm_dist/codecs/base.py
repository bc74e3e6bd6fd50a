"""What the system needs from a video autoencoder and a text encoder, and the frame arithmetic between them.

A causal video autoencoder turns frame 0 into the first latent and every further ``temporal_stride`` frames into
one more. So the first chunk of c latents of a video gives ``stride * c - (stride - 1)`` frames and each later
one ``stride * c``; a decoder that was warmed on a clip has the first latent behind it already. One that works in
groups (Open-Sora's: 17 frames are 5 latents) begins anew with each of them, so that all give as many frames as the
first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pavdm_dist.errors import ConfigError


@dataclass(frozen=True)
class CodecSpec:
    """Shape facts of a video codec.

    Attributes:
        latent_channels: C of the latents.
        spatial_stride: pixels per latent cell, in both directions.
        temporal_stride: frames per latent, except for the first latent of a video (or group), which is one frame.
        group: latents that are coded together, without a look at others; 0 = a video is one group.
    """

    latent_channels: int
    spatial_stride: int
    temporal_stride: int = 4
    group: int = 0

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels -> latent cells ``(h, w)``.

        Raises:
            ConfigError: a side is not a positive multiple of the spatial stride.
        """
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % self.spatial_stride:
                legal = " or ".join(str(side) for side in _nearest(value, self.spatial_stride))
                raise ConfigError(
                    f"{name}={value} cannot be divided by {self.spatial_stride}, the video codec's stride; "
                    f"nearest legal: {legal}"
                )
        return height // self.spatial_stride, width // self.spatial_stride

    def check_chunk(self, chunk_size: int) -> None:
        """Refuses chunks that are no whole groups.

        Raises:
            ConfigError: naming the nearest legal sizes.
        """
        if self.group and chunk_size % self.group:
            legal = " or ".join(str(size) for size in _nearest(chunk_size, self.group))
            raise ConfigError(
                f"latent_chunk_size={chunk_size}: the video codec decodes groups of {self.group} latents;"
                f" nearest legal: {legal}"
            )

    def frames_in_chunk(self, chunk_size: int, first: bool) -> int:
        """Frames that ``chunk_size`` latents give; ``first``: they are the first of the video."""
        if self.group:
            groups, rest = divmod(chunk_size, self.group)
            return groups * self._from_start(self.group) + (self._from_start(rest) if rest else 0)
        return self._from_start(chunk_size) if first else self.temporal_stride * chunk_size

    def chunks_for_frames(self, num_frames: int, chunk_size: int, warm: bool) -> int:
        """The fewest whole chunks that give at least ``num_frames`` frames.

        Args:
            num_frames: 1 or more.
            chunk_size: latents per chunk.
            warm: the decoder has seen a clip's latents before, so that the first chunk gives no fewer frames.

        Raises:
            ConfigError: ``num_frames`` or ``chunk_size`` below 1.
        """
        if num_frames < 1:
            raise ConfigError(f"num_frames={num_frames}: must be at least 1")
        if chunk_size < 1:
            raise ConfigError(f"latent_chunk_size={chunk_size}: must be at least 1")
        later = self.frames_in_chunk(chunk_size, first=False)
        missing = 0 if warm else later - self.frames_in_chunk(chunk_size, first=True)
        return -(-(num_frames + missing) // later)

    def latents_in_clip(self, num_frames: int) -> int:
        """Latents of a clip that is encoded from its first frame.

        Raises:
            ConfigError: not one frame more than a multiple of the temporal stride, in the last group if there are any.
        """
        stride = self.temporal_stride
        whole = self._from_start(self.group) if self.group else 0
        groups, rest = divmod(num_frames, whole) if whole else (0, num_frames)
        if num_frames < 1 or (rest and (rest - 1) % stride):
            below = max(1, num_frames - (rest - 1) % stride)
            form = f"{whole}m + {stride}n + 1" if whole else f"{stride}n + 1"
            raise ConfigError(
                f"a clip of {num_frames} frames cannot be encoded: their number must be {form}; "
                f"nearest legal: {below} or {below + stride}"
            )
        return groups * self.group + ((rest - 1) // stride + 1 if rest else 0)

    def usable_frames(self, num_frames: int) -> int:
        """How many of a clip's last frames are the latents that a video can go on from; 0 where it is too short."""
        if self.group:
            return num_frames - num_frames % self._from_start(self.group)
        return num_frames - (num_frames - 1) % self.temporal_stride

    def _from_start(self, latents: int) -> int:
        return self.temporal_stride * latents - (self.temporal_stride - 1)


class ChunkDecoder(Protocol):
    """Decodes one stream's latents in order; its feature cache makes every partition give the same frames."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents ``[C, n, h, w]`` that follow those seen so far -> uint8 frames ``[t, H, W, 3]``, CPU.

        A codec that works in groups gives the frames of one with its last latent.
        """

    def warm(self, latents: Tensor) -> None:
        """As :meth:`decode`, with the frames dropped."""


class FrameDecoder(Protocol):
    """What makes frames of latents: a codec, or something cheaper that stands in for it."""

    @property
    def spec(self) -> CodecSpec:
        """Strides and channels."""

    def decoder(self) -> ChunkDecoder:
        """A decoder at the start of a new stream."""

    def receptive_latents(self) -> int:
        """Latents a fresh decoder must be warmed on before the next one decodes exactly as in an unbroken stream."""


class VideoCodec(FrameDecoder, Protocol):
    """Frames <-> normalised latents (mean 0, standard deviation 1); only the codec knows raw ones."""

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames ``[t, H, W, 3]``, as many as :meth:`CodecSpec.latents_in_clip` takes -> float32 latents
        ``[C, n, h, w]``."""


class TextEncoder(Protocol):
    """Prompt -> embeddings of its tokens."""

    text_dim: int

    @property
    def identity(self) -> str:
        """Hash of weights and vocabulary: the encoder's part of a cache key."""

    def prepare(self, prompts: Iterable[str]) -> None:
        """Says that these prompts will be encoded: an encoder that is costly to load does all of them at once."""

    def encode(self, prompt: str) -> Tensor:
        """Float32 ``[L, text_dim]``, one row per token, no padding."""

    def check(self, prompt: str, limit: int) -> None:
        """Refuses, or says, what of a prompt would not be read, without running anything; ``limit``: most tokens.

        Raises:
            ConfigError: it cannot be encoded.
        """

    def unread(self, prompt: str, limit: int) -> str:
        """The end of a prompt that :meth:`check` says would not be read; empty where all is."""

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words that the encoder has never seen, each once, in order."""


def _nearest(value: int, stride: int) -> list[int]:
    below = value - value % stride
    return [side for side in (below, below + stride) if side > 0]
