"""How a model is cut into stages for a run, and how many stages are of use."""

from __future__ import annotations

import statistics
import time

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.wan import decode_flop
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.metadata import cpu_model
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.models.loading import check_tensors
from pavdm_dist.models.source import load_config
from pavdm_dist.planning.costs import kept, profiled_costs
from pavdm_dist.planning.forecast import Unit, makespan, rows_of, work
from pavdm_dist.planning.partition import partition, with_codec
from pavdm_dist.request import SamplingParams


def useful_stages(params: SamplingParams, streams: int) -> int:
    """Stages beyond which another one brings next to nothing: the micro-batches under way at a time in full windows.

    That is M B in mode window (and displaced with every step exact), M W B where a micro-batch is a chunk, for M
    guidance branches and B ``streams``.
    """
    whole = params.mode == "window" or (params.mode == "displaced" and params.displaced.resync_every_steps == 1)
    return num_branches(params.guidance_scale) * (1 if whole else params.window_chunks) * streams


def pipeline_utilisation(params: SamplingParams, plan: WindowPlan, stages: int, streams: int) -> float:
    """Share of the time that equal stages compute, 0..1, for ``streams`` videos of one plan side by side."""
    rows, branches = rows_of(plan, params.mode, params.displaced), num_branches(params.guidance_scale)

    def unit(chunks: int) -> Unit:
        return Unit((float(chunks),) * stages)

    return work(rows, branches, streams, unit) / (stages * makespan(rows, branches, streams, streams, unit))


def layer_split(checkpoint: Checkpoint, params: SamplingParams, options: EngineOptions) -> list[tuple[int, int]]:
    """Half-block range of each stage for a run's full window; reads shapes only, no weights of the backbone.

    With ``balance=measured`` some seconds are spent on timing a block with random weights, and the codec, where that
    has not been done before. A decoder without CPUs of its own shares the last stage's, so its cost counts there.

    Raises:
        ConfigError: more stages than half-blocks, or ``layers_per_stage`` that does not add up.
        CheckpointError: a tensor of the backbone is missing or has the wrong size.
    """
    model = checkpoint.shape
    if checkpoint.has_weights:
        check_tensors(model.state_dict(), checkpoint.transformer, optional=model.optional_tensors)
    size = params.latent_chunk_size
    frames, units_of_branch = (params.window_chunks + params.context_chunks) * size, params.plan(None).steps_per_shift
    if params.mode != "window":
        frames, units_of_branch = size, params.num_inference_steps + params.context_chunks
    cells = checkpoint.codec_spec.latent_size(params.height, params.width)
    units_per_chunk = num_branches(params.guidance_scale) * units_of_branch
    if options.balance == "measured":
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("balance=measured: this process has no GPU to time blocks on; use balance=estimated")
        costs = profiled_costs(
            model, params.plan(None), cells, params.info, options.threads_per_stage,
            options.device, params.mode,
        )  # fmt: skip
        decode = profiled_decode(checkpoint, size, cells, options.threads_per_stage)
    else:
        costs = model.costs(model.grid(frames, *cells), model.spec.text_len)
        decode = size * decode_flop(checkpoint.vae, *cells)
    if not options.cpus_per_decoder:
        costs = with_codec(costs, decode / units_per_chunk)
    return partition(costs, options.num_stages, options.layers_per_stage)


def profiled_decode(checkpoint: Checkpoint, size: int, cells: tuple[int, int], threads: int) -> float:
    """Seconds of decoding one chunk in a running video on this machine, measured once and kept."""
    facts = {
        "vae": load_config(checkpoint.vae), "size": size, "cells": cells, "threads": threads,
        "device": cpu_model(), "torch": torch.__version__,
    }  # fmt: skip

    def measure() -> dict[str, float]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            decoder, times = checkpoint.codec.decoder(), list[float]()
            for _ in range(4):
                started = time.perf_counter()
                decoder.decode(torch.zeros(checkpoint.codec_spec.latent_channels, size, *cells))
                times.append(time.perf_counter() - started)
        finally:
            torch.set_num_threads(before)
        return {"seconds": statistics.median(times[1:])}

    return kept("decode", facts, measure)["seconds"]
