"""What a pipeline gives: chunks as they are finished, and whole videos in the forms of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.errors import VideoError
from pavdm_dist.method.resume import ResumePoint


@dataclass(frozen=True)
class VideoChunk:
    """Finished frames of one video.

    Attributes:
        video: position of the request.
        index: chunk of the video, from 0.
        frames: uint8 ``[t, H, W, 3]``; the last chunk is trimmed to the frames asked for.
        latents: clean, normalised, float32 ``[C, c, h, w]``, never trimmed.
        last: whether the video is complete with it.
        resume: from where the video goes on behind this chunk, bit for bit; None where it could not: in mode displaced
            between exact rows; of chunks that become clean together, for all but the last; with ``context="cached"``
            and ``recovery="none"``, but for the first and the last chunk. See
            :attr:`~pavdm_dist.request.video_request.VideoRequest.resume`.
    """

    video: int
    index: int
    frames: Tensor
    latents: Tensor
    last: bool
    resume: ResumePoint | None = None


@dataclass(frozen=True)
class PAVDMPipelineOutput:
    """Result of a call: ``frames[i]`` is video i, as ``output_type`` says.

    As outputs of diffusers it has its fields by position and by name, too: ``output[0]`` and ``output["frames"]``.
    """

    frames: list[Any]

    def __getitem__(self, which: int | slice | str) -> Any:
        """A field, or a tuple of them.

        Raises:
            IndexError, KeyError: there is no such field.
        """
        return {"frames": self.frames}[which] if isinstance(which, str) else (self.frames,)[which]


def _to_pil(frames: Tensor) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in frames.numpy()]


# By ``output_type``: frames uint8 ``[t, H, W, 3]`` (``latent``: latents) -> what a call returns for one video.
OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "np": lambda frames: frames.numpy().astype(np.float32) / 255,
    "pt": lambda frames: frames.permute(0, 3, 1, 2).float() / 255,
    "pil": _to_pil,
    "latent": lambda latents: latents,
}


class WholeVideos:
    """The videos of one call, put together in memory.

    Args:
        count: how many.
        output_type: a name of :data:`OUTPUTS`.
    """

    def __init__(self, count: int, output_type: str) -> None:
        self._output_type = output_type
        self._parts: list[list[Tensor]] = [[] for _ in range(count)]
        self._awaited = set(range(count))

    def add(self, chunk: VideoChunk) -> None:
        """The next chunk of a video."""
        self._parts[chunk.video].append(chunk.latents if self._output_type == "latent" else chunk.frames)
        if chunk.last:
            self._awaited.remove(chunk.video)

    def videos(self) -> list[Any]:
        """All of them, as the output type says.

        Raises:
            VideoError: some were cancelled before their last chunk.
        """
        if self._awaited:
            cut = ", ".join(map(str, sorted(self._awaited)))
            raise VideoError(
                f"cancelled before the end: video {cut} of {len(self._parts)}, counted from 0; iter_chunks() gives what"
                " is finished of a video that may be cancelled"
            )
        axis, put = 1 if self._output_type == "latent" else 0, OUTPUTS[self._output_type]
        return [put(torch.cat(parts, dim=axis)) for parts in self._parts]
