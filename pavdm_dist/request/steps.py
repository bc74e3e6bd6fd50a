"""What whoever watches the steps of a video is shown, as diffusers' pipelines show theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.sampler import StepCallback
from pavdm_dist.method.schedule import PlanRow
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk, Window


def step_callback(pipeline: Any, on_step: Callable[..., Any], stream: Stream) -> StepCallback:
    """What calls a user's callback after every row of a stream.

    Args:
        pipeline: that the user holds.
        on_step: called with (pipeline, row, level of the noisiest chunk, ``{"latents": [1, C, F, h, w]}``): the
            window's input of the next row, with the noise of chunks that are born then; behind the last row its own
            chunks, as they have become.

    Raises:
        ConfigError: from the callback, where the user's gives other latents back than it was shown.
    """
    levels = stream.schedule.levels

    def callback(row: PlanRow, window: Window, clean: Sequence[CleanChunk]) -> None:
        shown = _shown(row, window, clean)
        given = on_step(pipeline, row.index, levels[row.steps_left[-1]], {"latents": shown})
        # Where diffusers goes on with what comes back, silence would be another video than was meant.
        if isinstance(given, dict) and given.get("latents", shown) is not shown:
            raise ConfigError("callback_on_step_end: gave other latents back; here they can be looked at only")

    return callback


def _shown(row: PlanRow, window: Window, clean: Sequence[CleanChunk]) -> Tensor:
    if not window.plan.is_over(row.index + 1):
        return window.inputs(window.plan.row(row.index + 1))[0]
    held = {**window.latents, **{chunk.index: chunk.latents for chunk in clean}}
    return torch.cat([held[index] for index in row.chunks if index in held], dim=1).unsqueeze(0)
