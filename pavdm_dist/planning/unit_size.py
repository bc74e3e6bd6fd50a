"""How many chunks a micro-batch should hold on so many GPUs, where nobody has said it."""

from __future__ import annotations

from dataclasses import replace

from pavdm_dist.method.sampler import num_branches
from pavdm_dist.models.base import Backbone
from pavdm_dist.planning.costs import chunk_reads, estimated_costs
from pavdm_dist.planning.forecast import UnitTime, makespan, rows_of
from pavdm_dist.planning.partition import partition
from pavdm_dist.request.sampling import SamplingParams

# What a Hopper GPU sustains in blocks that are compiled whole, and what a block takes beyond its products, whatever it
# holds: launches, and products too small to fill it. Measured with STDiT3-XL (17.3, 38.7, 84 ms for 5, 15, 35 latents).
FLOP_PER_S, BLOCK_S = 4e14, 1.1e-4
# Chunks of the video that is forecast, in windows: long enough that its ends count for little.
_WINDOWS = 4
# A larger micro-batch must be so much faster to be chosen.
_WORTH = 1.02


def suited_chunks_per_unit(
    shape: Backbone, params: SamplingParams, cells: tuple[int, int], stages: int, streams: int
) -> int:
    """Noisy chunks of a micro-batch with which a long video is made fastest; 1 in mode window.

    Bits depend on it, so it is recorded with a video, and told to whoever goes on with it.

    Args:
        shape: the model.
        params: of the run.
        cells: latent height and width.
        stages: P.
        streams: videos in flight.
    """
    if params.mode == "window":
        return 1
    seconds = {n: _seconds(shape, params, cells, stages, streams, n) for n in range(1, params.window_chunks + 1)}
    best = 1
    for number in seconds:
        if seconds[number] * _WORTH < seconds[best]:
            best = number
    return best


def _seconds(
    shape: Backbone, params: SamplingParams, cells: tuple[int, int], stages: int, streams: int, together: int
) -> float:
    size = params.latent_chunk_size
    read = chunk_reads(params.mode, params.window_chunks, params.context_chunks, size)
    plan = replace(params.plan(_WINDOWS * params.window_chunks), start="noise", end="drain")

    def unit(chunks: int) -> UnitTime:
        costs = estimated_costs(shape, chunks * size, cells, read if chunks <= together else None)
        return UnitTime(tuple(costs.stage(*own) / FLOP_PER_S + (own[1] - own[0]) * BLOCK_S for own in ranges))

    ranges = partition(estimated_costs(shape, together * size, cells, read), min(stages, shape.spec.num_blocks))
    rows = rows_of(plan, params.mode, params.displaced, together)
    return makespan(rows, num_branches(params.guidance_scale), streams, streams, unit)
