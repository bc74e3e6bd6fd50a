"""Checks of the sample settings that need no tensor, no checkpoint and no file content.

What depends on the checkpoint's defaults (T and W, sizes the codec can divide, the layer split) is checked
where those are known; these checks let a typing mistake end a command in milliseconds.
"""

from __future__ import annotations

import math
from pathlib import Path

from pavdm_dist.config import DEFAULT_SECONDS, SampleConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.schedule import WindowPlan

_POSITIVE = (
    "num_frames",
    "seconds",
    "height",
    "width",
    "fps",
    "num_inference_steps",
    "window_chunks",
    "latent_chunk_size",
    "time_shift",
    "threads_per_stage",
    "threads_per_decoder",
    "gpus_per_decoder",
    "streams",
    "link_timeout_s",
    "chunks_per_segment",
)
_NOT_NEGATIVE = (
    "seed",
    "context_chunks",
    "guidance_scale",
    "num_stages",
    "cpus_per_stage",
    "cpus_per_decoder",
    "gpus_per_stage",
)
# What a run without stages would not read.
_OF_STAGES = (
    "cpus_per_stage",
    "gpus_per_stage",
    "threads_per_decoder",
    "cpus_per_decoder",
    "gpus_per_decoder",
    "backend",
    "ray_address",
    "link_timeout_s",
)


def validate_sample(config: SampleConfig, *, needs_prompt: bool = True) -> None:
    """Refuse settings that contradict one another or can never be legal.

    Args:
        needs_prompt: False for ``pavdm plan``, which renders nothing.

    Raises:
        ConfigError: with the field, its value and what is legal.
    """
    for name in _POSITIVE + _NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{name}={value}: must be a finite number")
        if name in _POSITIVE and value is not None and value <= 0:
            raise ConfigError(f"{name}={value}: must be above 0")
        if value is not None and value < 0:
            raise ConfigError(f"{name}={value}: must be 0 or more")
    if config.num_frames is not None and config.seconds is not None:
        raise ConfigError(f"num_frames={config.num_frames} and seconds={config.seconds:g}: give one of them")
    _check_plan(config)
    _check_prompts(config, needs_prompt)
    _check_start(config, needs_clip=needs_prompt)
    _check_stages(config)


def frames_wanted(config: SampleConfig, fps: float) -> int:
    """New frames to render at ``fps`` (the resolved rate): ``num_frames``, or ``seconds``, or 5 seconds."""
    if config.num_frames is not None:
        return config.num_frames
    seconds = DEFAULT_SECONDS if config.seconds is None else config.seconds
    return max(1, round(seconds * fps))


def _check_plan(config: SampleConfig) -> None:
    steps, width = config.num_inference_steps, config.window_chunks
    if steps is not None and width is not None:
        context = 1 if config.context_chunks is None else config.context_chunks
        WindowPlan(steps, width, config.latent_chunk_size or 1, context, config.start, config.end)


def _check_prompts(config: SampleConfig, needs_prompt: bool) -> None:
    if config.prompt is not None and config.prompts is not None:
        raise ConfigError(f"prompt={config.prompt!r} and prompts={config.prompts}: give one of them")
    if needs_prompt and config.prompts is None and not (config.prompt or "").strip():
        raise ConfigError('nothing to render: give a prompt, pavdm sample "a red three drifting up", or prompts=FILE')
    if config.prompts is not None:
        if not Path(config.prompts).is_file():
            raise ConfigError(f"prompts={config.prompts}: no such file")
        if config.output.lower().endswith(".mp4"):
            raise ConfigError(f"output={config.output}: prompts=FILE renders several videos, output must be a folder")
    previous = 0
    for change in config.prompt_schedule:
        if change.from_chunk <= previous:
            raise ConfigError(
                f"prompt_schedule: from_chunk={change.from_chunk} must be above {previous}, "
                "the chunk where the prompt before it starts"
            )
        previous = change.from_chunk


def _check_start(config: SampleConfig, needs_clip: bool) -> None:
    if config.start == "noise" and config.video is not None:
        raise ConfigError(f"video={config.video}: start=noise uses no clip; set start=clip or start=chunk")
    if needs_clip and config.start != "noise" and config.video is None:
        raise ConfigError(f"start={config.start}: needs a conditioning clip, video=FILE")
    if config.video is not None and not Path(config.video).is_file():
        raise ConfigError(f"video={config.video}: no such file")
    if config.include_input and config.video is None:
        raise ConfigError("include_input=true: there is no input, video=FILE is not set")


def _check_stages(config: SampleConfig) -> None:
    split = config.layers_per_stage
    if config.trace is not None and not config.num_stages:
        raise ConfigError(f"trace={config.trace}: there are no stages to trace with num_stages=0")
    if config.trace is not None and not config.trace.endswith(".json"):
        raise ConfigError(f"trace={config.trace}: must end in .json")
    if config.balance == "measured" and not config.num_stages:
        raise ConfigError("balance=measured: there is nothing to balance with num_stages=0")
    if config.compile and not config.num_stages:
        raise ConfigError(
            "compile=true: there are no stages to compile for with num_stages=0; set num_stages=1 or more"
        )
    for name in () if config.num_stages else _OF_STAGES:
        value = getattr(config, name)
        if value != getattr(SampleConfig, name):
            instead = "; device=cuda samples on this process' GPU" if name == "gpus_per_stage" else ""
            raise ConfigError(f"{name}={value}: is for stages, there are none with num_stages=0{instead}")
    if config.device == "cpu" and config.gpus_per_stage:
        raise ConfigError(f"device=cpu: gpus_per_stage={config.gpus_per_stage:g} gives every stage a GPU; drop one")
    if split is None:
        return
    if config.num_stages and len(split) != config.num_stages:
        raise ConfigError(f"layers_per_stage={split}: has {len(split)} entries for num_stages={config.num_stages}")
    if not config.num_stages:
        raise ConfigError(f"layers_per_stage={split}: has no meaning with num_stages=0, set num_stages={len(split)}")
    if min(split) < 1:
        raise ConfigError(f"layers_per_stage={split}: each stage needs at least 1 block")
