"""What a user asks for (prompt, frames, clip), and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.values.arguments import checked_seed
from pavdm_dist.values.fields import FrameCount, checked_arguments, fault, show

_KINDS = {"num_frames": FrameCount}
_CHANGE = tuple[int, str]


@dataclass(frozen=True)
class VideoRequest:
    """One video a user asks for.

    Attributes:
        prompt: text of the first chunk.
        seed: 0 or more; noise of chunk k is a function of (seed, k).
        num_frames: new frames; the last chunk is trimmed. None = endless, until it is stopped.
        negative_prompt: text of the unconditional branch; None, or a blank one, = the model's learned null text.
        prompt_schedule: ``(first chunk, prompt)`` of later prompts.
        clip: conditioning frames, uint8 ``[t, H, W, 3]`` at the run's size and rate, as many as the codec encodes; an
            array becomes a tensor.
        image: picture that the video begins with, uint8 ``[H, W, 3]`` at the run's size, as ``clip``; needs
            ``start="noise"``.
        resume: where to go on instead of at the beginning; all else must be as it was.
        before: frames of the clip's film that come before the clip, one by one, for whoever shows the whole film.
        params: settings of this video, where they are not those of the run.

    Raises:
        ConfigError: a prompt that is no text, a seed that is no whole number from 0 on, frames that are no whole number
            above 0, or a prompt schedule that does not rise from chunk 1 on.
    """

    prompt: str
    seed: int
    num_frames: int | None
    negative_prompt: str | None = None
    prompt_schedule: tuple[tuple[int, str], ...] = ()
    clip: Tensor | None = None
    image: Tensor | None = None
    resume: ResumePoint | None = None
    before: Callable[[], Iterable[Any]] | None = None
    params: SamplingParams | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str) and (name == "prompt" or text is not None):
                raise ConfigError(f"{name}={show(text)}: must be text, one for each video")
        object.__setattr__(self, "seed", checked_seed(self.seed))
        object.__setattr__(self, "num_frames", checked_arguments(_KINDS, {"num_frames": self.num_frames})["num_frames"])
        self._check_schedule()
        # What forms and other programs send where nothing was written.
        if self.negative_prompt is not None and not self.negative_prompt.strip():
            object.__setattr__(self, "negative_prompt", None)
        for name, said in (("clip", "video"), ("image", "image")):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, frames_of(said, getattr(self, name)))

    def _check_schedule(self) -> None:
        before = 0
        for number, entry in enumerate(self.prompt_schedule):
            found = fault(_CHANGE, f"prompt_schedule[{number}]", entry)
            if found is None and entry[0] <= before:
                found = f"prompt_schedule[{number}]={show(entry)}: must begin behind chunk {before}"
            if found is not None:
                raise ConfigError(f"{found}; an entry is (first chunk, prompt), and they rise")
            before = entry[0]


def frames_of(name: str, given: Any) -> Tensor:
    """Pictures as a tensor on the CPU; an array keeps its memory.

    Args:
        name: of the argument.
        given: tensor, array, or nested numbers.

    Raises:
        ConfigError: they are none.
    """
    if isinstance(given, Tensor):
        return given.detach().cpu()
    try:
        return torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError) as error:  # a path, pictures of several sizes
        raise ConfigError(f"{name}={show(given)}: must be uint8 frames [height, width, 3]") from error


def plan_of(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> WindowPlan:
    """A request's plan; endless where it is.

    Raises:
        ConfigError: ``num_frames`` is below 1, or the resume point is of another plan.
    """
    chunks = None
    if request.num_frames is not None:
        spec = checkpoint.codec_spec
        chunks = spec.chunks_for_frames(request.num_frames, params.latent_chunk_size, params.warm)
    plan = params.plan(chunks)
    displaced = params.displaced if params.mode == "displaced" else None
    return plan if request.resume is None else request.resume.follow(plan, displaced)


def frames_left(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> int | None:
    """Frames that a request is still to give, those of undecoded chunks included; None = endless.

    Raises:
        ConfigError: ``num_frames`` is below 1.
    """
    if request.num_frames is None:
        return None
    spec, size = checkpoint.codec_spec, params.latent_chunk_size
    plan = plan_of(request, params, checkpoint)
    if request.resume is None:
        return request.num_frames
    row = request.resume.snapshot.row
    done = (plan.num_chunks or 0) if plan.is_over(row) else plan.row(row).chunks[0]
    done -= len(request.resume.undecoded)
    before = sum(spec.frames_in_chunk(size, first=index == 0 and not params.warm) for index in range(done))
    return request.num_frames - before
