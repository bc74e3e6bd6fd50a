"""What a micro-batch and decoding cost: in FLOP, from shapes alone, or in seconds, measured here once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import torch

from pavdm_dist.codecs.catalog import FrameMaker, codec_spec
from pavdm_dist.codecs.costs import frames_flop
from pavdm_dist.io.local_disk import cache_folder
from pavdm_dist.io.metadata import cpu_model
from pavdm_dist.io.storage import atomic_write
from pavdm_dist.method.denoiser import memories_of, unit_context
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.microbatches import WHOLE
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.models.base import Backbone, Costs, FrameInfo
from pavdm_dist.models.devices import intra_op_threads
from pavdm_dist.models.source import load_config
from pavdm_dist.models.text_cache import TextBank

logger = logging.getLogger(__name__)


def estimated_costs(shape: Backbone, frames: int, cells: tuple[int, int], frames_read: int | None = None) -> Costs:
    """FLOP of a micro-batch of so many latent frames, with the longest text; ``cells``: latent height and width.

    ``frames_read``: as of :meth:`~pavdm_dist.models.base.Backbone.costs`.
    """
    return shape.costs(shape.grid(frames, *cells), shape.spec.text_len, frames_read)


def chunk_reads(mode: Mode, window_chunks: int, context_chunks: int, size: int) -> int:
    """Latent frames that a noisy chunk of a full window reads, on average, where a micro-batch is one chunk.

    Args:
        mode: ``causal``: itself and all before it; else the whole window.
        window_chunks, context_chunks: of the plan.
        size: latents of a chunk.
    """
    full = window_chunks + context_chunks
    return round(size * (context_chunks + 1 + full) / 2) if mode == "causal" else size * full


def estimated_decode(maker: FrameMaker, size: int, cells: tuple[int, int]) -> float:
    """FLOP of making frames of a chunk of ``size`` latents."""
    return size * frames_flop(maker, *cells)


def with_codec(costs: Costs, codec: float) -> Costs:
    """The same costs with a decoder on the last stage's device, which takes ``codec`` per micro-batch."""
    return replace(costs, head=costs.head + codec)


def profiled_costs(
    shape: Backbone,
    plan: WindowPlan,
    cells: tuple[int, int],
    info: FrameInfo,
    threads: int,
    device: str = "cpu",
    mode: Mode = "window",
    dtype: torch.dtype = torch.float32,
    chunks_per_unit: int = 1,
) -> Costs:
    """Costs of a micro-batch in seconds, from the cache or measured now (some seconds).

    Blocks of a kind are alike: one of each is built, with random weights.

    Args:
        shape: the model, without its weights.
        plan: of the run; a full window is timed.
        cells: latent height and width.
        info: picture size and rate.
        threads: intra-op threads of a stage.
        device: ``cpu`` or ``cuda``.
        mode: a micro-batch is a window, or so many chunks that attend to what others left.
        dtype: of the weights.
        chunks_per_unit: how many.
    """
    window = (plan.window_chunks, plan.context_chunks, plan.latent_chunk_size)
    calls = {"calls": (plan.partitions, plan.lookahead)} if plan.is_partitioned else {}
    facts = {
        "model": [type(shape).__name__, asdict(shape.config)], "window": window, "mode": mode, "cells": cells,
        "device": _where(device, threads), "dtype": str(dtype), "torch": torch.__version__, **calls,
        **({"chunks_per_unit": chunks_per_unit} if chunks_per_unit > 1 else {}),
    }  # fmt: skip

    def measure() -> dict[str, Any]:
        with intra_op_threads(threads):
            with torch.random.fork_rng():
                model = shape.shortened(dtype, device)
            latents = (shape.spec.latent_channels, *cells)
            stream = _stream(model, plan, latents, info, mode, chunks_per_unit)
            costs = measure_costs(model, stream, device)
        by_kind = dict(zip(model.spec.block_kinds, costs.blocks, strict=True))
        return {**by_kind, "embed": costs.embed, "head": costs.head}

    found = kept("blocks", facts, measure)
    return Costs(tuple(found[kind] for kind in shape.spec.block_kinds), found["embed"], found["head"])


@torch.inference_mode()
def measure_costs(model: Backbone, stream: Stream, device: torch.device | str = "cpu", repeats: int = 5) -> Costs:
    """Seconds of embed, every block and head for one micro-batch of a full window.

    Median over the repeats of the mean over a row's noisy micro-batches, which attend to more or less.

    Args:
        model: wholly loaded.
        stream: its plan must reach a full window; mode displaced is timed between two exact rows.
        device: the model's.
        repeats: rows that are timed, after one that is not.
    """
    plan, device = stream.plan, torch.device(device)
    full = plan.window_chunks + plan.context_chunks
    row = next(row for row in plan.rows() if len(row.window) == full)
    parts = row.chunks[:: stream.chunks_per_unit]
    units = list(parts) if stream.mode != "window" else [chunk for chunk, _ in stream.batches.parts(row.index)]
    # What a running video has left for them.
    left = {"window": [], "causal": list(row.context), "displaced": [WHOLE]}
    (memory, *_), texts = memories_of(stream, model), TextBank(model.project_text, device)
    texts.add(stream.id, stream.conditioning.texts)
    x, levels = (part.to(device) for part in stream.window().inputs(row))

    def run(chunk: int) -> list[float]:
        context = unit_context(model, stream, row, chunk, 0, texts, memory)
        slots, size = stream.batches.slots(row, chunk), plan.latent_chunk_size
        frames = slice(slots.start * size, slots.stop * size)
        part, part_levels = x[:, :, frames].contiguous(), levels[:, frames]
        marks = [_now(device)]
        activation = model.embed(part, part_levels, stream.info)
        marks.append(_now(device))
        for index in range(model.spec.num_blocks):
            activation = model.block(index, activation, context)
            marks.append(_now(device))
        model.head(activation, context.grid)
        marks.append(_now(device))
        return [b - a for a, b in pairwise(marks)]

    rounds: list[list[float]] = []
    for _ in range(repeats + 1):
        for chunk in left[stream.mode]:
            run(chunk)
        rounds.append([statistics.fmean(column) for column in zip(*(run(unit) for unit in units), strict=True)])
    embed, *blocks, head = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    return Costs(tuple(blocks), embed, head)


def _stream(
    model: Backbone, plan: WindowPlan, shape: tuple[int, int, int], info: FrameInfo, mode: Mode, chunks_per_unit: int
) -> Stream:
    """A stream of noise and a full-length text, long enough for a full window, from text alone."""
    block = plan.block_chunks
    long_enough = block * (-(-plan.context_chunks // block) + plan.window_chunks // block + 1)
    plan = replace(plan, start="noise", end="drain", num_chunks=long_enough)
    text = torch.zeros(model.spec.text_len, model.spec.text_dim)
    return Stream(
        id=0, plan=plan, schedule=NoiseSchedule(plan.num_inference_steps, 1.0), seed=0, latent_shape=shape,
        conditioning=Conditioning.build([(0, text)], None), info=info, mode=mode, chunks_per_unit=chunks_per_unit,
    )  # fmt: skip


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def profiled_decode(
    maker: FrameMaker,
    size: int,
    cells: tuple[int, int],
    threads: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Seconds of decoding one chunk in a running video on this machine, measured once and kept.

    Args:
        maker: what makes its frames.
        size: latents of a chunk.
        cells: latent height and width.
        threads: intra-op threads of the decoder.
        device, dtype: what it computes on, and in.
    """
    facts = {
        "vae": load_config(maker.vae), "size": size, "cells": cells,
        "device": _where(device, threads), "dtype": str(dtype), "torch": torch.__version__,
        **({} if maker.preview is None else {"preview": maker.preview_identity}),
    }  # fmt: skip

    def measure() -> dict[str, float]:
        with intra_op_threads(threads):
            frames = maker.load(device, dtype)
            decoder, times = frames.decoder(), list[float]()
            for _ in range(4):
                started = time.perf_counter()
                decoder.decode(torch.zeros(codec_spec(maker.vae).latent_channels, size, *cells))
                times.append(time.perf_counter() - started)
        return {"seconds": statistics.median(times[1:])}

    return kept("decode", facts, measure)["seconds"]


def _where(device: str, threads: int) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}, {threads} threads"


def kept(kind: str, facts: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement under its ``facts``; taken now where none is kept, or what is kept cannot be read."""
    key = hashlib.sha256(json.dumps([kind, facts], sort_keys=True).encode()).hexdigest()[:24]
    name = f"{key}.json"
    try:
        content = json.loads((cache_folder("costs") / name).read_text())
        if content["facts"] == json.loads(json.dumps(facts)):
            return content["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = measure()
    try:
        with atomic_write(cache_folder("costs") / name, "w") as aside:  # several runs may measure at once
            json.dump({"facts": facts, "found": found}, aside)
    except OSError as error:
        logger.warning("the measured costs cannot be kept: %s", error)
    return found
