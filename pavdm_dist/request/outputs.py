"""What a pipeline gives: chunks as they are finished, and whole videos in the forms of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pavdm_dist.method.stream import ResumePoint


@dataclass(frozen=True)
class VideoChunk:
    """Finished frames of one video.

    Attributes:
        video: position of the request.
        index: chunk of the video, from 0.
        frames: uint8 ``[t, H, W, 3]``; the last chunk is trimmed to the frames asked for.
        latents: clean, normalised, float32 ``[C, c, h, w]``, never trimmed.
        last: whether the video is complete with it.
        resume: from where the video goes on behind this chunk, bit for bit; None where it could not (mode displaced,
            between exact rows). See :attr:`~pavdm_dist.request.video_request.VideoRequest.resume`.
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
