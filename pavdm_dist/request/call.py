"""The requests of one call that renders whole videos into memory: its arguments are those of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.image import read_image
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.texts import first_and_later
from pavdm_dist.request.video_request import VideoRequest, frames_of
from pavdm_dist.values.arguments import seeds_of
from pavdm_dist.values.fields import FrameCount, Within, checked_arguments, show

Prompt = str | Mapping[str, str]
_COUNTS = {"num_frames": FrameCount, "num_videos_per_prompt": Annotated[int, Within(1, 1_000_000)]}
# A whole video in memory larger than this is refused: long videos are streamed.
MAX_RESULT_BYTES = 4 * 2**30


def requests_of_call(
    prompt: Prompt | Sequence[Prompt],
    params: SamplingParams,
    checkpoint: Checkpoint,
    *,
    negative_prompt: str | Sequence[str] | None,
    num_frames: int,
    num_videos_per_prompt: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seed: int,
    video: Tensor | np.ndarray | None,
    image: Any,
    keeps_frames: bool,
) -> list[VideoRequest]:
    """One request for every video, those of a prompt side by side.

    Args:
        prompt, negative_prompt, num_frames, num_videos_per_prompt, generator, seed, video, image: see
            :meth:`PAVDMPipeline.__call__ <pavdm_dist.pipeline.PAVDMPipeline.__call__>`.
        params: settings of the call.
        checkpoint: the model.
        keeps_frames: the call gives pixels, and not latents alone, which are small.

    Raises:
        ConfigError: no prompt, another number of negative prompts, impossible arguments, or a result that would not
            fit in memory.
        MediaError: the picture cannot be read.
    """
    counts = checked_arguments(_COUNTS, {"num_frames": num_frames, "num_videos_per_prompt": num_videos_per_prompt})
    if num_videos_per_prompt is None:
        raise ConfigError("num_videos_per_prompt=None: must be 1 to 1,000,000")
    if num_frames is None:
        raise ConfigError("num_frames=None: a whole video needs a number; iter_chunks() takes endless ones")
    num_frames, num_videos_per_prompt = counts["num_frames"], counts["num_videos_per_prompt"]
    prompts = [prompt] if isinstance(prompt, str | Mapping) else list(prompt) if isinstance(prompt, Sequence) else []
    if not prompts:
        raise ConfigError(f"prompt={show(prompt)}: give a text, or a list of them")
    negatives = _negatives(negative_prompt, len(prompts))
    words = [first_and_later(one, params, checkpoint) for one in prompts]
    total = len(prompts) * num_videos_per_prompt
    size = total * num_frames * params.height * params.width * 3 * 4
    if keeps_frames and size > MAX_RESULT_BYTES:
        raise ConfigError(
            f"num_frames={num_frames}: the result would take {size / 2**30:.1f} GiB; use iter_chunks(), or "
            "`pavdm sample`, which write as they go"
        )
    seeds = seeds_of(generator, seed, total)
    clip = None if video is None else frames_of("video", video)  # once for all videos
    picture = None if image is None else torch.from_numpy(read_image(image, params.height, params.width))
    requests = []
    for i in range(total):
        text, schedule = words[i // num_videos_per_prompt]
        negative = negatives[i // num_videos_per_prompt]
        requests.append(VideoRequest(text, seeds[i], num_frames, negative, schedule, clip, picture))
    return requests


def _negatives(given: Any, count: int) -> list[Any]:
    """The negative prompt of each of ``count`` prompts: one text is for all of them, a list has one for each."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count or not all(isinstance(text, str) for text in given):
        raise ConfigError(
            f"negative_prompt={show(list(given))}: must be one text, which is for all videos of the call, or a list of"
            f" {count}, one for each prompt"
        )
    return list(given)


def check_tensor_inputs(names: Any) -> None:
    """Checks what a callback of steps asks to be shown.

    Raises:
        ConfigError: anything but the latents.
    """
    if not isinstance(names, list | tuple) or list(names) != ["latents"]:
        raise ConfigError(
            f"callback_on_step_end_tensor_inputs={show(names)}: must be ['latents'], which is all that is shown here"
        )
