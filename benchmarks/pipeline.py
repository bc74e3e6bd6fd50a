"""Two stage actors on one machine: how busy the trace says they are, and what the wall clock makes of it.

    python benchmarks/pipeline.py [--quick] [--json] [--rounds N]

For 1 and 2 videos in mode window and 1 in mode causal, with guidance, latents only: busy time over (P x makespan)
against the closed form min(1, M B / (M + P - 1)), with M W for M in causal, and against the simulator with equal unit
costs, which knows the ends; the wall-clock speed-up over one stage actor, beside what two independent one-stage engines
reach together in the same round (the machine's own ceiling); the share of wall time that stages wait beyond the
simulated idle time; bytes per hop against the formula. ``efficiency`` is busy time over the closed form.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from dataclasses import replace

import torch
from common import machine, machine_line, parser, random_model, small_config

from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.partition import estimate_costs, partition
from pavdm_dist.engine.renderer import RayEngine
from pavdm_dist.engine.runner import RunReport
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.schedule import Mode, NoiseSchedule, WindowPlan
from pavdm_dist.simulate import Machine, simulate
from pavdm_dist.stream import Conditioning, Stream
from pavdm_dist.units import MicroBatches

BRANCHES, STAGES, TEXT_LEN, CELLS = 2, 2, 16, 16
CASES: tuple[tuple[Mode, int], ...] = (("window", 1), ("window", 2), ("causal", 1))
PLAN = WindowPlan(12, 6, 5, 1)
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
        rows = []
        for mode, videos in CASES:
            found = _median([_round(folder, model, chunks, videos, mode) for _ in range(rounds)])
            rows.append({"mode": mode, "videos": videos, **found})
    ray.shutdown()
    shape = {"depth": depth, "hidden_size": hidden, "latents": [8, CELLS, CELLS], "window_latents": 35}
    report = {
        "machine": {**machine(), "ray": ray.__version__},
        "shape": {**shape, "chunks": chunks, "threads_per_stage": 1},
        "rounds": rounds,
        "rows": rows,
        "efficiency": {f"{row['mode']}_{row['videos']}": row["share_of_closed_form"] for row in rows},
    }
    print(json.dumps(report) if arguments.json else _table(report))


def _round(folder: str, model: STDiT3, chunks: int, videos: int, mode: Mode) -> dict[str, float]:
    """One measurement of everything; ratios are taken within it."""
    two, reports = _run(folder, model, STAGES, chunks, videos, mode)
    one, _ = _run(folder, model, 1, chunks, videos, mode)
    ceiling = _two_independent(folder, model, chunks, videos, mode, one)
    spans = [span for report in reports for span in report.trace]
    makespan = max(span.end for span in spans) - min(span.start for span in spans)
    utilisation = sum(span.end - span.start for span in spans) / (STAGES * makespan)
    units = BRANCHES * videos * (PLAN.window_chunks if mode == "causal" else 1)
    ideal = min(1.0, units / (BRANCHES + STAGES - 1))
    machine = Machine((1.0,) * STAGES, unit_cost=True)
    simulated = simulate([_plan(chunks)] * videos, mode, BRANCHES, videos, machine).utilisation
    waited = sum(span.start - span.ready for span in spans) / (STAGES * makespan)
    return {
        "hops": reports[0].units,
        "unit_ms_stage_0": 1000 * statistics.median(s.end - s.start for s in reports[0].trace),
        "unit_ms_stage_1": 1000 * statistics.median(s.end - s.start for s in reports[1].trace),
        "busy_over_p_makespan": utilisation,
        "closed_form": ideal,
        "share_of_closed_form": utilisation / ideal,
        "simulated": simulated,
        "waiting_beyond_simulated": max(0.0, waited - (1 - simulated)),
        "speed_up": one / two,
        "two_independent_processes": ceiling,
        "speed_up_over_ceiling": one / two / ceiling,
        "bytes_forward": reports[0].bytes_forward,
        "bytes_forward_formula": _bytes(model, chunks, videos, mode),
    }


def _streams(model: STDiT3, chunks: int, videos: int, mode: Mode, first_id: int) -> list[Stream]:
    generator = torch.Generator().manual_seed(1)
    text, null = (torch.randn(TEXT_LEN, model.spec.text_dim, generator=generator) for _ in range(2))
    shape = (model.spec.latent_channels, CELLS, CELLS)
    conditioning = Conditioning.build([(0, text)], null)
    info = FrameInfo(8 * CELLS, 8 * CELLS, 24)
    schedule = NoiseSchedule(PLAN.num_inference_steps)
    return [
        Stream(first_id + i, _plan(chunks), schedule, i, shape, conditioning, info, guidance_scale=3.0, mode=mode)
        for i in range(videos)
    ]


def _run(
    folder: str, model: STDiT3, stages: int, chunks: int, videos: int, mode: Mode
) -> tuple[float, list[RunReport]]:
    """Seconds from admission to the last chunk, and the stages' reports without the warm-up."""
    with RayEngine(folder, _split(model, stages), EngineOptions(stages, trace=True)) as engine:
        seconds = _timed(engine, model, chunks, videos, mode)
        reports = engine.finish()
    for report in reports:
        report.trace = [span for span in report.trace if span.unit.stream < WARM_UP_ID]
        report.units = len(report.trace)
    return seconds, reports


def _timed(
    engine: RayEngine, model: STDiT3, chunks: int, videos: int, mode: Mode, barrier: threading.Barrier | None = None
) -> float:
    """Warms up with one-chunk videos, then times the run."""
    for _ in engine.run(_streams(model, 1, videos, mode, WARM_UP_ID), videos):
        pass
    if barrier is not None:
        barrier.wait()
    started = time.monotonic()
    for _ in engine.run(_streams(model, chunks, videos, mode, 0), videos):
        pass
    return time.monotonic() - started


def _two_independent(folder: str, model: STDiT3, chunks: int, videos: int, mode: Mode, one: float) -> float:
    """Throughput of two one-stage engines at once, over one alone: what the machine gives two busy processes."""
    barrier, times = threading.Barrier(2), list[float]()

    def work() -> None:
        with RayEngine(folder, _split(model, 1), EngineOptions(1)) as engine:
            times.append(_timed(engine, model, chunks, videos, mode, barrier))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 2 * one / max(times)


def _bytes(model: STDiT3, chunks: int, videos: int, mode: Mode) -> int:
    """Header, tokens, per-frame modulation and time of every unit that crosses the boundary, warm-up included."""
    dim, patches, total = model.spec.hidden_size, (CELLS // 2) ** 2, 0
    for plan in (_plan(1), _plan(chunks)):
        for row in plan.rows():
            parts = [1] * len(MicroBatches(plan, mode).parts(row.index)) if mode == "causal" else [len(row.window)]
            total += sum(BRANCHES * (64 + 4 * 5 * part * dim * (patches + 6 + 1)) for part in parts)
    return total * videos


def _plan(chunks: int) -> WindowPlan:
    return replace(PLAN, num_chunks=chunks)


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
