"""Which blocks go to which stage: contiguous ranges with the slowest stage as fast as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.models.base import Costs
from pavdm_dist.models.devices import DTYPES, named_dtype
from pavdm_dist.models.loading import check_tensors
from pavdm_dist.planning.costs import (
    chunk_reads,
    estimated_costs,
    estimated_decode,
    profiled_costs,
    profiled_decode,
    with_codec,
)
from pavdm_dist.request.sampling import SamplingParams


def partition(costs: Costs, num_stages: int, layers_per_stage: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Block ranges ``(first, last)`` of the stages, with the smallest possible slowest stage.

    Args:
        costs: of a micro-batch.
        num_stages: P, at most the number of blocks.
        layers_per_stage: blocks per stage, chosen by the user; overrides the balance.

    Raises:
        ConfigError: more stages than blocks, or ``layers_per_stage`` does not add up.
    """
    count = len(costs.blocks)
    if not 1 <= num_stages <= count:
        raise ConfigError(f"num_stages={num_stages}: the model has {count} blocks, use 1 to {count} stages")
    if layers_per_stage is not None:
        sizes = list(layers_per_stage)
        if len(sizes) != num_stages or sum(sizes) != count or min(sizes) < 1:
            raise ConfigError(
                f"layers_per_stage={sizes}: needs num_stages={num_stages} positive numbers that add up to {count}"
            )
        return list(pairwise([0, *accumulate(sizes)]))

    @cache
    def best(first: int, stages: int) -> tuple[float, float, tuple[int, ...]]:
        """(slowest stage, sum of squares, ends) for blocks ``first ..`` on ``stages`` stages.

        Where one stage cannot be helped, the squares keep the others even.
        """
        if stages == 1:
            cost = costs.stage(first, count)
            return cost, cost**2, (count,)
        options = []
        for last in range(first + 1, count - stages + 2):
            cost = costs.stage(first, last)
            slowest, squares, ends = best(last, stages - 1)
            options.append((max(cost, slowest), cost**2 + squares, (last, *ends)))
        return min(options)

    return list(pairwise([0, *best(0, num_stages)[2]]))


def layer_split(
    checkpoint: Checkpoint, params: SamplingParams, options: EngineOptions, preview: str | None = None
) -> list[tuple[int, int]]:
    """Block range of each stage for a run's full window; reads shapes only, no weights of the backbone.

    With ``balance=measured`` some seconds are spent on timing a block of each kind with random weights, and the codec,
    where that has not been done before. A decoder that computes on the last stage's device counts there.

    Args:
        checkpoint: of the model.
        params: of the videos.
        options: of the engine.
        preview: what makes frames instead of the codec, as of :class:`~pavdm_dist.codecs.catalog.FrameMaker`.

    Raises:
        ConfigError: more stages than blocks, or ``layers_per_stage`` that does not add up.
        CheckpointError: a tensor of the backbone is missing or has the wrong size.
    """
    model = checkpoint.shape
    if checkpoint.has_weights:
        check_tensors(model.state_dict(), checkpoint.transformer, optional=model.optional_tensors)
    cells = checkpoint.codec_spec.latent_size(params.height, params.width)
    costs, decode = _costs(checkpoint, params, options, cells, FrameMaker(checkpoint.vae, preview=preview))
    if options.decoder_slows_last_stage:
        costs = with_codec(costs, decode / units_per_chunk(params))
    return partition(costs, options.num_stages, options.layers_per_stage)


def units_per_chunk(params: SamplingParams) -> float:
    """Micro-batches of a full window for one finished chunk."""
    branches, plan = num_branches(params.guidance_scale), params.plan(None)
    if params.mode == "window":
        return branches * plan.steps_per_shift * params.calls_per_row / plan.block_chunks
    units = -(-params.window_chunks // params.chunks_per_unit)
    return branches * (plan.steps_per_shift * units + params.context_chunks)


def _costs(
    checkpoint: Checkpoint, params: SamplingParams, options: EngineOptions, cells: tuple[int, int], maker: FrameMaker
) -> tuple[Costs, float]:
    """Costs of a micro-batch and of decoding a chunk, in one unit."""
    size = params.latent_chunk_size
    if options.balance == "estimated":
        window, context = params.window_chunks, params.context_chunks
        read = chunk_reads(params.mode, window, context, size)
        frames = read if params.mode == "window" else size * params.chunks_per_unit
        if params.cached:
            frames, read = params.window_chunks * size, params.span * size
        if params.calls_per_row > 1:
            frames = read = params.span * size
        return estimated_costs(checkpoint.shape, frames, cells, read), estimated_decode(maker, size, cells)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("balance=measured: this process has no GPU to time blocks on; use balance=estimated")
    dtype = named_dtype(options.dtype, torch.device(options.device), checkpoint.transformer)
    plan = params.plan(None)
    if params.cached:  # a window beside as many clean chunks as it reads: the share of a block hardly differs
        beside = params.span - params.window_chunks
        plan = replace(plan, context="joint", anchor_chunks=0, context_chunks=beside)
    costs = profiled_costs(
        checkpoint.shape, plan, cells, params.info, options.threads_per_stage, options.device,
        params.mode, dtype, params.chunks_per_unit,
    )  # fmt: skip
    decode = 0.0
    if options.decoder_slows_last_stage:
        codec = options.decoder_threads, options.decoder_device, DTYPES[options.decoder_dtype]
        decode = profiled_decode(maker, size, cells, *codec)
    return costs, decode
