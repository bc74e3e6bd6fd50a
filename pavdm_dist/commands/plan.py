"""``pavdm plan``: what a run would do and cost, from shapes alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.commands.resolve import (
    check_recovery,
    decoder_of_stages,
    engine_options,
    open_checkpoint,
    plain_cost,
    sampling_params,
    say_what_to_expect,
)
from pavdm_dist.config import ClusterConfig, PlanConfig, SampleConfig, frames_wanted
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.models.devices import DTYPES
from pavdm_dist.planning import planner
from pavdm_dist.planning.forecast import calls_of, pipeline_utilisation, useful_stages
from pavdm_dist.planning.memory import kept_for_recovery
from pavdm_dist.planning.partition import layer_split
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.texts import check_schedule, timed_prompts

# A forecast goes through all rows, some 20,000 a second; these are 9 hours of Open-Sora.
MAX_ROWS = 200_000


def plan_command(config: SampleConfig, chunks: int | None = None) -> dict[str, Any]:
    """As :func:`plan_report`, and warns of what the model was not trained for."""
    report = plan_report(config, chunks)
    checkpoint = open_checkpoint(config)
    say_what_to_expect(sampling_params(config, checkpoint), checkpoint)
    return report


def plan_report(config: SampleConfig, chunks: int | None = None, *, any_length: bool = False) -> dict[str, Any]:
    """What a run would do: window plan, cost, layer split. Reads shapes, no weights.

    Args:
        config: validated settings.
        chunks: new chunks, instead of a length in frames.
        any_length: what is too long to forecast row by row is scaled up from as much as is not, and the report says so.

    With ``cluster.devices`` the planner says how to use them (:mod:`pavdm_dist.planning.planner`).

    Raises:
        ConfigError: settings that no run takes, or without ``any_length`` a video of too many rows.
    """
    checkpoint = open_checkpoint(config)
    params = sampling_params(config, checkpoint)
    check_recovery(config, params)
    checkpoint.check_text()
    FrameMaker(checkpoint.vae, config.decoder_tile, config.preview_decoder).check()
    spec, size = checkpoint.codec_spec, params.latent_chunk_size
    if chunks is None:
        frames = frames_wanted(config, params.fps)
        chunks = spec.chunks_for_frames(frames, size, params.warm)
    else:
        frames = spec.frames_in_chunk(size, first=not params.warm) + (chunks - 1) * spec.frames_in_chunk(size, False)
    plan = params.plan(chunks)
    schedule = [change.from_chunk for change in config.prompt_schedule]
    schedule = schedule or [chunk for chunk, _ in timed_prompts(config.timed_prompts, params, checkpoint)]
    check_schedule(schedule, plan, params, checkpoint)
    forecast, planned = plan, chunks
    if plan.num_rows > MAX_ROWS:
        planned = max(1, MAX_ROWS // plan.steps_per_shift * plan.block_chunks - params.window_chunks)
        if not any_length:
            raise ConfigError(
                f"num_frames={frames}: {plan.num_rows} steps are too many to forecast one by one; plan at most"
                f" chunks={planned}, the rest goes on like that"
            )
        forecast = params.plan(planned)
    branches = 1 if params.guidance_scale == 1 else 2
    split = [(0, checkpoint.shape.spec.num_blocks)]
    if config.num_stages:
        split = layer_split(checkpoint, params, engine_options(config), config.preview_decoder)
    work, times = calls_of(params, forecast), chunks / planned
    utilisation = pipeline_utilisation(params, forecast, max(config.num_stages, 1), config.streams)
    cluster = config.cluster if isinstance(config, PlanConfig) and config.cluster.devices is not None else None
    return {
        "chunks": chunks,
        "num_frames": frames,
        "seconds": round(frames / params.fps, 3),
        **({} if forecast is plan else {"forecast": f"of {planned} chunks step by step, scaled to {chunks}"}),
        "model_calls": round(work.calls * times),
        "guidance_branches": branches,
        "latent_evaluations": round(work.latents * times),
        "latent_evaluations_per_new_latent": round(work.latents / (planned * size), 3),
        **({"plain_plan": plain} if (plain := plain_cost(params, plan, checkpoint)) else {}),
        "first_chunk_after_calls": work.first,
        "calls_per_chunk": round(work.per_chunk, 3),
        "window_latents": params.span * size,
        "levels": [round(level, 6) for level in reversed(params.schedule.levels)],
        "layer_split": [list(blocks) for blocks in split],
        "pipeline_utilisation": round(utilisation, 4),
        "useful_stages": useful_stages(params, config.streams),
        "sampling": asdict(params),
        **({} if params.context == "joint" else {"recovery": _recovery_report(config, checkpoint, params)}),
        **({} if cluster is None else {"cluster": _cluster_report(config, cluster, checkpoint, params, forecast)}),
    }


def _recovery_report(config: SampleConfig, checkpoint: Checkpoint, params: SamplingParams) -> dict[str, Any]:
    """What is kept of each video for going on with it, and what that takes."""
    size = checkpoint.codec_spec.latent_size(params.height, params.width)
    latent_shape = (checkpoint.codec_spec.latent_channels, *size)
    dtype = _dtype(config, checkpoint)
    kept = kept_for_recovery(config.recovery, params, checkpoint.shape, latent_shape, dtype)
    return {
        "by": config.recovery,
        "main_memory_gib_per_video": float(f"{kept.bytes / 2**30:.3g}"),
        "gib_per_shift_from_stages": float(f"{kept.bytes_per_shift / 2**30:.3g}"),
        "clean_calls_to_go_on": kept.calls,
    }


def _dtype(config: SampleConfig, checkpoint: Checkpoint) -> torch.dtype:
    """Of weights as they are stored, which GPUs hold."""
    return checkpoint.dtype if config.dtype == "auto" else DTYPES[config.dtype]


def _cluster_report(
    config: SampleConfig, cluster: ClusterConfig, checkpoint: Checkpoint, params: SamplingParams, plan: WindowPlan
) -> dict[str, Any]:
    """What the planner says; a cluster's devices are GPUs, which hold the weights as they are stored."""
    dtype = _dtype(config, checkpoint)
    decoder_dtype = DTYPES[config.decoder_dtype]
    decoder = decoder_of_stages(config)
    return planner.report(
        checkpoint, params, plan, cluster, dtype, decoder, decoder_dtype, config.decoder_tile, config.preview_decoder
    )
