"""What the system needs from a video autoencoder and a text encoder, and the frame arithmetic between them.

A causal video autoencoder turns frame 0 into the first latent and every further ``temporal_stride`` frames into
one more. So the first chunk of c latents of a video gives ``stride * c - (stride - 1)`` frames and each later
one ``stride * c``; a decoder that was warmed on a clip has the first latent behind it already.
"""

from __future__ import annotations

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
        temporal_stride: frames per latent, except for the first latent of a video, which is one frame.
    """

    latent_channels: int
    spatial_stride: int
    temporal_stride: int = 4

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

    def frames_in_chunk(self, chunk_size: int, first: bool) -> int:
        """Frames that ``chunk_size`` latents give; ``first``: they are the first of the video."""
        frames = self.temporal_stride * chunk_size
        return frames - (self.temporal_stride - 1) if first else frames

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
        missing = 0 if warm else self.temporal_stride - 1
        return -(-(num_frames + missing) // (self.temporal_stride * chunk_size))

    def latents_in_clip(self, num_frames: int) -> int:
        """Latents of a clip that is encoded from its first frame.

        Raises:
            ConfigError: not one frame more than a multiple of the temporal stride.
        """
        stride = self.temporal_stride
        if num_frames < 1 or (num_frames - 1) % stride:
            below = max(1, num_frames - (num_frames - 1) % stride)
            raise ConfigError(
                f"a clip of {num_frames} frames cannot be encoded: their number must be {stride}n + 1; "
                f"nearest legal: {below} or {below + stride}"
            )
        return (num_frames - 1) // stride + 1


class ChunkDecoder(Protocol):
    """Decodes one stream's latents in order; its feature cache makes every partition give the same frames."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents ``[C, n, h, w]`` that follow those seen so far -> uint8 frames ``[t, H, W, 3]``, CPU."""

    def warm(self, latents: Tensor) -> None:
        """As :meth:`decode`, with the frames dropped."""


class VideoCodec(Protocol):
    """Frames <-> normalised latents (mean 0, standard deviation 1); only the codec knows raw ones."""

    spec: CodecSpec

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See :meth:`CodecSpec.latent_size`."""

    def frames_in_chunk(self, chunk_size: int, first: bool) -> int:
        """See :meth:`CodecSpec.frames_in_chunk`."""

    def chunks_for_frames(self, num_frames: int, chunk_size: int, warm: bool) -> int:
        """See :meth:`CodecSpec.chunks_for_frames`."""

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames ``[t, H, W, 3]``, ``t = temporal_stride * n + 1`` -> latents ``[C, n + 1, h, w]``."""

    def decoder(self) -> ChunkDecoder:
        """A decoder at the start of a new stream."""

    def receptive_latents(self) -> int:
        """Latents a fresh decoder must be warmed on before the next one decodes exactly as in an unbroken stream."""


class TextEncoder(Protocol):
    """Prompt -> embeddings of its tokens."""

    text_dim: int

    @property
    def identity(self) -> str:
        """Hash of weights and vocabulary: the encoder's part of a cache key."""

    def encode(self, prompt: str) -> Tensor:
        """Float32 ``[L, text_dim]``, one row per token, no padding."""

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words that the encoder has never seen, each once, in order."""


def _nearest(value: int, stride: int) -> list[int]:
    below = value - value % stride
    return [side for side in (below, below + stride) if side > 0]
