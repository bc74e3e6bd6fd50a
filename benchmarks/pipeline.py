"""Stage actors on one machine: how busy the trace says they are, and what the wall clock makes of it.

    python benchmarks/pipeline.py [--quick] [--json] [--rounds N] [--chunks K]

For two stages, latents only, with guidance: 1 and 2 videos in mode window, 1 in modes causal and displaced. Per case:

* busy time over (P x makespan) against the closed form min(1, M B / (M + P - 1)), M W for M where units are chunks,
  and against the simulator with equal unit costs, which knows the ends;
* makespan against the simulator with this run's own mean unit costs, on one stage and on two;
* waiting on links beyond the simulator's idle time, and control cost (from a unit's end to asking for the next input);
* wall-clock speed-up over one stage actor, beside what two independent one-stage engines reach together in the same
  round (the machine's own ceiling); bytes per hop against the formula.

With more stages than cores (3, 4) only the trace's order and its summed costs can be compared. ``efficiency``:
busy time over the closed form; for displaced, its speed over causal. ``cached_context``: CPU time of mode causal
in one process with the clean chunk's keys and values kept over a shift, over making them at every row.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from common import machine, machine_line, parser, random_model, small_config

from pavdm_dist.denoiser import StreamDenoiser
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.partition import estimate_costs, partition
from pavdm_dist.engine.renderer import RayEngine
from pavdm_dist.engine.runner import RunReport, Span
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.sampler import sample
from pavdm_dist.schedule import Mode, NoiseSchedule, WindowPlan
from pavdm_dist.simulate import Machine, Result, simulate
from pavdm_dist.stream import Conditioning, Stream
from pavdm_dist.units import WHOLE, Displaced, MicroBatches

BRANCHES, STAGES, TEXT_LEN, CELLS = 2, 2, 16, 16
CASES: tuple[tuple[Mode, int], ...] = (("window", 1), ("window", 2), ("causal", 1), ("displaced", 1))
NEVER_EXACT = Displaced(None, exact_growing=False)
PLAN = WindowPlan(12, 6, 5, 1)
# Streams of the warm-up carry ids from here on and are left out of every figure.
WARM_UP_ID = 100


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, help="rounds to take medians over (3; 1 with --quick)")
    options.add_argument("--chunks", type=int, help="chunks per video (10; 3 with --quick)")
    arguments = options.parse_args()
    depth, hidden, heads, chunks = (4, 192, 6, 3) if arguments.quick else (8, 256, 8, 10)
    chunks = arguments.chunks or chunks
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    config = small_config(depth, hidden, heads, 64, TEXT_LEN)
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(config)
        model.save_pretrained(folder)
        found = [_measure(folder, model, chunks) for _ in range(rounds)]
        rows = [
            {"mode": mode, "videos": videos, **_median([one[mode, videos] for one in found])} for mode, videos in CASES
        ]
        more = [] if arguments.quick else [_more_stages(folder, model, mode, stages) for mode, stages in _MORE]
    ray.shutdown()
    shape = {"depth": depth, "hidden_size": hidden, "latents": [8, CELLS, CELLS], "window_latents": 35}
    report = {
        "machine": {**machine(), "ray": ray.__version__},
        "shape": {**shape, "chunks": chunks, "threads_per_stage": 1},
        "rounds": rounds,
        "rows": rows,
        "more_stages_than_cores": more,
        "cached_context": _cached_context(model, 2 if arguments.quick else 4),
        "efficiency": {
            f"{row['mode']}_{row['videos']}": row.get("speed_over_causal", row["share_of_closed_form"]) for row in rows
        },
    }
    print(json.dumps(report) if arguments.json else _table(report))


_MORE: tuple[tuple[Mode, int], ...] = (("window", 3), ("causal", 3), ("displaced", 3), ("causal", 4))


def _measure(folder: str, model: STDiT3, chunks: int) -> dict[tuple[Mode, int], dict[str, float]]:
    """One round over all cases; ratios are taken within it."""
    found = {(mode, videos): _case(folder, model, chunks, videos, mode) for mode, videos in CASES}
    found["displaced", 1]["speed_over_causal"] = found["causal", 1]["seconds"] / found["displaced", 1]["seconds"]
    return found


def _case(folder: str, model: STDiT3, chunks: int, videos: int, mode: Mode) -> dict[str, float]:
    two, reports = _run(folder, model, STAGES, chunks, videos, mode)
    one, single = _run(folder, model, 1, chunks, videos, mode)
    ceiling = _two_independent(folder, model, chunks, videos, mode, one)
    makespan = _makespan(reports)
    spans = [span for report in reports for span in report.trace]
    utilisation = sum(span.end - span.start for span in spans) / (STAGES * makespan)
    units = BRANCHES * videos * (1 if mode == "window" else PLAN.window_chunks)
    ideal = min(1.0, units / (BRANCHES + STAGES - 1))
    equal = _simulated(mode, chunks, videos, Machine((1.0,) * STAGES, unit_cost=True))
    priced = _simulated(mode, chunks, videos, _priced(reports, chunks))
    waited = sum(span.start - span.ready for span in spans) / (STAGES * makespan)
    return {
        "seconds": two,
        "hops": len(reports[0].trace),
        "unit_ms_stage_0": 1000 * statistics.median(s.end - s.start for s in reports[0].trace),
        "unit_ms_stage_1": 1000 * statistics.median(s.end - s.start for s in reports[1].trace),
        "busy_over_p_makespan": utilisation,
        "closed_form": ideal,
        "share_of_closed_form": utilisation / ideal,
        "simulated": equal.utilisation,
        "makespan_over_simulated_p2": makespan / priced.makespan,
        "makespan_over_simulated_p1": _makespan(single)
        / _simulated(mode, chunks, videos, _priced(single, chunks)).makespan,
        "waiting_beyond_simulated": max(0.0, waited - (1 - priced.utilisation)),
        "control_ms_per_hop": 1000 * statistics.median(_control(reports)),
        "speed_up": one / two,
        "two_independent_processes": ceiling,
        "speed_up_over_ceiling": one / two / ceiling,
        "bytes_forward": reports[0].bytes_forward,
        "bytes_forward_formula": _bytes(model, chunks, videos, mode),
    }


def _makespan(reports: list[RunReport]) -> float:
    spans = [span for report in reports for span in report.trace]
    return max(span.end for span in spans) - min(span.start for span in spans)


def _control(reports: list[RunReport]) -> list[float]:
    """Seconds from each unit's end until the stage asks for the next one's input: sending and bookkeeping."""
    return [b.ready - a.end for report in reports for a, b in zip(report.trace, report.trace[1:], strict=False)]


def _simulated(mode: Mode, chunks: int, videos: int, machine: Machine) -> Result:
    return simulate([_plan(chunks)] * videos, mode, BRANCHES, videos, machine, NEVER_EXACT)


def _priced(reports: list[RunReport], chunks: int) -> Machine:
    """The stages of a run with the mean cost of every kind of unit it had."""
    costs = defaultdict[tuple[int, int], list[float]](list)
    for stage, report in enumerate(reports):
        for span in report.trace:
            costs[stage, _chunks(span, chunks)].append(span.end - span.start)
    means = {key: statistics.fmean(values) for key, values in costs.items()}
    return Machine((1.0,) * len(reports), unit_seconds=means)


def _chunks(span: Span, chunks: int) -> int:
    return len(_plan(chunks).row(span.unit.row).window) if span.unit.chunk == WHOLE else 1


def _more_stages(folder: str, model: STDiT3, mode: Mode, stages: int) -> dict[str, Any]:
    """More stages than cores: the trace's order and its summed costs beside the simulator's."""
    _, reports = _run(folder, model, stages, 3, 1, mode)
    result = _simulated(mode, 3, 1, _priced(reports, 3))
    busy = sum(span.end - span.start for report in reports for span in report.trace)
    keys = [[(s.unit.row, s.unit.chunk, s.unit.branch, s.unit.context) for s in report.trace] for report in reports]
    order = [
        [(b.unit.row, b.unit.chunk, b.unit.branch, b.unit.context) for b in result.busy if b.stage == stage]
        for stage in range(stages)
    ]
    return {
        "mode": mode,
        "num_stages": stages,
        "trace_is_the_order": keys == order,
        "summed_costs_over_simulated": round(busy / sum(part.end - part.start for part in result.busy), 4),
    }


def _cached_context(model: STDiT3, chunks: int) -> dict[str, float]:
    """Mode causal in one process, with the context run once a shift and at every row."""

    class AtEveryRow(MicroBatches):
        def parts(self, n: int) -> tuple[tuple[int, bool], ...]:
            row = self.plan.row(n)
            return tuple((k, True) for k in row.context) + tuple((k, False) for k in row.chunks)

    (stream,) = _streams(model, chunks, 1, "causal", 0)
    seconds, units = dict[str, float](), dict[str, int]()
    torch.set_num_threads(1)
    for name, kind in (("kept", MicroBatches), ("every_row", AtEveryRow)):
        batches = kind(stream.plan, "causal")
        denoiser = StreamDenoiser(model, stream)
        denoiser.batches = batches
        started = time.process_time()
        for _ in sample(stream.window(), denoiser, stream.guidance_scale):
            pass
        seconds[name] = time.process_time() - started
        units[name] = sum(len(batches.parts(row.index)) for row in stream.plan.rows())
    measured, formula = seconds["kept"] / seconds["every_row"], units["kept"] / units["every_row"]
    return {
        "time_over_every_row": round(measured, 4),
        "units_over_every_row": round(formula, 4),
        "ratio": round(measured / formula, 4),
    }


def _streams(model: STDiT3, chunks: int, videos: int, mode: Mode, first_id: int) -> list[Stream]:
    generator = torch.Generator().manual_seed(1)
    text, null = (torch.randn(TEXT_LEN, model.spec.text_dim, generator=generator) for _ in range(2))
    return [
        Stream(
            id=first_id + i,
            plan=_plan(chunks),
            schedule=NoiseSchedule(PLAN.num_inference_steps),
            seed=i,
            latent_shape=(model.spec.latent_channels, CELLS, CELLS),
            conditioning=Conditioning.build([(0, text)], null),
            info=FrameInfo(8 * CELLS, 8 * CELLS, 24),
            guidance_scale=3.0,
            mode=mode,
            displaced=NEVER_EXACT,
        )
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
            for chunk, _ in MicroBatches(plan, mode, 0, NEVER_EXACT).parts(row.index):
                frames = plan.latent_chunk_size * (len(row.window) if chunk == WHOLE else 1)
                total += BRANCHES * (64 + 4 * frames * dim * (patches + 6 + 1))
    return total * videos


def _plan(chunks: int) -> WindowPlan:
    return replace(PLAN, num_chunks=chunks)


def _split(model: STDiT3, stages: int) -> list[tuple[int, int]]:
    return partition(estimate_costs(model.spec, model.grid(35, CELLS, CELLS), TEXT_LEN), stages)


def _median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(r[key] for r in rounds), 4) for key in rounds[0]}


def _table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), machine_line(report["shape"])]
    for row in [*report["rows"], *report["more_stages_than_cores"], report["cached_context"]]:
        lines += ["", *(f"  {key:28} {value}" for key, value in row.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
