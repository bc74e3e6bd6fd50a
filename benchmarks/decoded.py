"""Whole videos, decoded and written: how long the stages of a pipeline wait for anybody but each other.

Part of ``pipeline.py``: the embedded model on two stages, four videos of 20 s one after another, two in flight, with
decode actor and mp4 writer. ``idle_beyond_plan``: the stages' idle share of P x makespan, borders between videos
included, less that of the simulator with this run's own mean unit costs. Once with a consumer that takes chunks as they
come, once with one that sleeps two seconds after each.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.spans import Span
from pavdm_dist.engine.trace import read_trace
from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.planning.simulator import Machine, simulate
from pavdm_dist.request.video_request import VideoRequest

STAGES, STREAMS, SLEEP_S = 2, 2, 2.0
PROMPTS = (
    "a red three drifting up and to the left",
    "a blue seven bouncing fast",
    "a green two drifting down",
    "a yellow zero bouncing slowly",
)


def decoded_rows(quick: bool) -> list[dict[str, Any]]:
    """One row per consumer; with ``quick`` two videos of 2 s, and a consumer that sleeps a tenth of a second."""
    videos, frames, sleep_s = (2, 48, 0.1) if quick else (len(PROMPTS), 480, SLEEP_S)
    return [
        {"consumer": name, **_measured(videos, frames, pause)} for name, pause in (("prompt", 0.0), ("sleeps", sleep_s))
    ]


def _measured(videos: int, frames: int, pause_s: float) -> dict[str, Any]:
    requests = [VideoRequest(prompt, seed, frames) for seed, prompt in enumerate(PROMPTS[:videos])]
    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder) / "trace.json")
        options = EngineOptions(STAGES, trace_file=trace)
        with PAVDMPipeline.from_pretrained("embedded", num_stages=STAGES, engine=options) as pipeline:
            params = pipeline.params()
            writers = [
                SegmentWriter(f"{folder}/{i}.mp4", params.fps, params.height, params.width) for i in range(videos)
            ]
            started = time.monotonic()
            for chunk in pipeline.iter_chunks(requests, params, STREAMS):
                writers[chunk.video].write_chunk(chunk.index, chunk.frames)
                if chunk.last:
                    writers[chunk.video].finish()
                time.sleep(pause_s)
            seconds = time.monotonic() - started
            chunks = pipeline.checkpoint.codec_spec.chunks_for_frames(frames, params.latent_chunk_size, params.warm)
        stages = read_trace(trace)
    plan = params.plan(chunks)
    machine = Machine((1.0,) * STAGES, unit_seconds=_mean_seconds(stages, plan))
    expected = simulate([plan] * videos, params.mode, 2 if params.guidance_scale != 1 else 1, STREAMS, machine)
    spans = [span for trace in stages for span in trace]
    makespan = max(span.end for span in spans) - min(span.start for span in spans)
    busy = sum(span.end - span.start for span in spans) / (STAGES * makespan)
    return {
        "videos": videos,
        "frames_each": frames,
        "sleep_s_per_chunk": pause_s,
        "seconds": round(seconds, 2),
        "stages_makespan_s": round(makespan, 2),
        "idle_share": round(1 - busy, 4),
        "idle_share_of_plan": round(1 - expected.utilisation, 4),
        "idle_beyond_plan": round(expected.utilisation - busy, 4),
    }


def _mean_seconds(stages: list[list[Span]], plan: Any) -> dict[tuple[int, int], float]:
    """By (stage, chunks a unit holds)."""
    found = defaultdict[tuple[int, int], list[float]](list)
    for stage, spans in enumerate(stages):
        for span in spans:
            found[stage, len(plan.row(span.unit.row).window)].append(span.end - span.start)
    return {key: fmean(values) for key, values in found.items()}
