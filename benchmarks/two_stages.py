"""Two stage actors on one machine: how busy the trace says they are, and what the wall clock makes of it.

    python benchmarks/two_stages.py [--quick] [--json]

For 1 and 2 videos in flight with guidance, latents only: busy time over (P x makespan) against the closed form
min(1, M B / (M + P - 1)); the wall-clock speed-up over one stage actor, beside what two independent one-stage
engines reach together in the same round (the machine's own ceiling); bytes per hop against the formula.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time

import torch
from common import machine, machine_line, parser, random_model, small_config

from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.partition import estimate_costs, partition
from pavdm_dist.engine.renderer import RayEngine
from pavdm_dist.engine.runner import RunReport
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.schedule import NoiseSchedule, WindowPlan
from pavdm_dist.stream import Conditioning, Stream

BRANCHES, STAGES, TEXT_LEN, CELLS = 2, 2, 16, 16
# Streams of the warm-up carry ids from here on and are left out of every figure.
WARM_UP_ID = 100


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, help="rounds to take medians over (3; 1 with --quick)")
    arguments = options.parse_args()
    depth, hidden, heads, chunks = (4, 192, 6, 3) if arguments.quick else (8, 256, 8, 10)
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    config = small_config(depth, hidden, heads, 64, TEXT_LEN)
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(config)
        model.save_pretrained(folder)
        rows = [_median([_round(folder, model, chunks, videos) for _ in range(rounds)]) for videos in (1, 2)]
    ray.shutdown()
    shape = {"depth": depth, "hidden_size": hidden, "latents": [8, CELLS, CELLS], "window_latents": 35}
    report = {
        "machine": {**machine(), "ray": ray.__version__},
        "shape": {**shape, "chunks": chunks, "threads_per_stage": 1},
        "rounds": rounds,
        "rows": rows,
    }
    print(json.dumps(report) if arguments.json else _table(report))


def _round(folder: str, model: STDiT3, chunks: int, videos: int) -> dict[str, float]:
    """One measurement of everything; ratios are taken within it."""
    two, reports = _run(folder, model, STAGES, chunks, videos)
    one, _ = _run(folder, model, 1, chunks, videos)
    ceiling = _two_independent(folder, model, chunks, videos, one)
    spans = [span for report in reports for span in report.trace]
    makespan = max(span.end for span in spans) - min(span.start for span in spans)
    utilisation = sum(span.end - span.start for span in spans) / (STAGES * makespan)
    ideal = min(1.0, BRANCHES * videos / (BRANCHES + STAGES - 1))
    return {
        "videos": videos,
        "hops": reports[0].units,
        "unit_ms_stage_0": 1000 * statistics.median(s.end - s.start for s in reports[0].trace),
        "unit_ms_stage_1": 1000 * statistics.median(s.end - s.start for s in reports[1].trace),
        "busy_over_p_makespan": utilisation,
        "closed_form": ideal,
        "share_of_closed_form": utilisation / ideal,
        "speed_up": one / two,
        "two_independent_processes": ceiling,
        "speed_up_over_ceiling": one / two / ceiling,
        "bytes_forward": reports[0].bytes_forward,
        "bytes_forward_formula": _bytes(model, chunks, videos),
    }


def _streams(model: STDiT3, chunks: int, videos: int, first_id: int) -> list[Stream]:
    generator = torch.Generator().manual_seed(1)
    text, null = (torch.randn(TEXT_LEN, model.spec.text_dim, generator=generator) for _ in range(2))
    shape = (model.spec.latent_channels, CELLS, CELLS)
    conditioning = Conditioning.build([(0, text)], null)
    info = FrameInfo(8 * CELLS, 8 * CELLS, 24)
    return [
        Stream(first_id + i, _plan(chunks), NoiseSchedule(12), i, shape, conditioning, info, guidance_scale=3.0)
        for i in range(videos)
    ]


def _run(folder: str, model: STDiT3, stages: int, chunks: int, videos: int) -> tuple[float, list[RunReport]]:
    """Seconds from admission to the last chunk, and the stages' reports without the warm-up."""
    with RayEngine(folder, _split(model, stages), EngineOptions(stages, trace=True)) as engine:
        seconds = _timed(engine, model, chunks, videos)
        reports = engine.finish()
    for report in reports:
        report.trace = [span for span in report.trace if span.unit.stream < WARM_UP_ID]
        report.units = len(report.trace)
    return seconds, reports


def _timed(
    engine: RayEngine, model: STDiT3, chunks: int, videos: int, barrier: threading.Barrier | None = None
) -> float:
    """Warms up with one-chunk videos, then times the run."""
    for _ in engine.run(_streams(model, 1, videos, WARM_UP_ID), videos):
        pass
    if barrier is not None:
        barrier.wait()
    started = time.monotonic()
    for _ in engine.run(_streams(model, chunks, videos, 0), videos):
        pass
    return time.monotonic() - started


def _two_independent(folder: str, model: STDiT3, chunks: int, videos: int, one: float) -> float:
    """Throughput of two one-stage engines at once, over one alone: what the machine gives two busy processes."""
    barrier, times = threading.Barrier(2), list[float]()

    def work() -> None:
        with RayEngine(folder, _split(model, 1), EngineOptions(1)) as engine:
            times.append(_timed(engine, model, chunks, videos, barrier))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 2 * one / max(times)


def _bytes(model: STDiT3, chunks: int, videos: int) -> int:
    """Header, tokens, per-frame modulation and time of every unit that crosses the boundary, warm-up included."""
    dim, patches, total = model.spec.hidden_size, (CELLS // 2) ** 2, 0
    for row in (*_plan(1).rows(), *_plan(chunks).rows()):
        frames = 5 * len(row.window)
        total += BRANCHES * (64 + 4 * frames * dim * (patches + 6 + 1))
    return total * videos


def _plan(chunks: int) -> WindowPlan:
    return WindowPlan(12, 6, 5, 1, num_chunks=chunks)


def _split(model: STDiT3, stages: int) -> list[tuple[int, int]]:
    return partition(estimate_costs(model.spec, model.grid(35, CELLS, CELLS), TEXT_LEN), stages)


def _median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(r[key] for r in rounds), 4) for key in rounds[0]}


def _table(report: dict) -> str:
    lines = [machine_line(report["machine"]), machine_line(report["shape"])]
    for row in report["rows"]:
        lines += ["", *(f"  {key:28} {value}" for key, value in row.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
