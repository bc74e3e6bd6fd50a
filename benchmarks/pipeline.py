"""Stage actors on one machine: how busy the trace says they are, and what the wall clock makes of it.

    python benchmarks/pipeline.py [--quick] [--json] [--shape small|wide|large] [--rounds N] [--chunks K]

For two stages, latents only, with guidance: 1 and 2 videos in mode window, 1 in modes causal and displaced. Per case:

* busy time over (P x makespan) against the closed form min(1, M B / (M + P - 1)), M W for M where units are chunks,
  and against the simulator with equal unit costs, which knows the ends;
* makespan against the simulator with this run's own mean unit costs, on one stage and on two;
* waiting on links beyond the simulator's idle time, and control cost (from a unit's end to asking for the next input);
* wall-clock speed-up over one stage actor, beside what two independent one-stage engines reach together in the same
  round (the machine's own ceiling; not with --quick); bytes per hop against the formula.

With more stages than cores (3, 4) only the trace's order and its summed costs can be compared. ``efficiency``:
busy time over the closed form; for displaced, its speed over causal. ``cached_context``: CPU time of mode causal
in one process with the clean chunk's keys and values kept over a shift, over making them at every row. ``decoded``:
whole videos with decoder and writer (``decoded.py``).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from common import machine, machine_line, parser, random_model, small_config
from decoded import decoded_rows

from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.order import Unit
from pavdm_dist.engine.ray_engine import RayEngine
from pavdm_dist.engine.spans import Span
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.microbatches import WHOLE, Displaced, MicroBatches
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.planning.partition import partition
from pavdm_dist.planning.simulator import Machine, Result, simulate

BRANCHES, STAGES, TEXT_LEN = 2, 2, 16
# Depth, width, heads, latent height and width.
SHAPES = {"small": (4, 192, 6, 16), "wide": (4, 384, 12, 8), "large": (8, 256, 8, 16)}
CASES: tuple[tuple[Mode, int], ...] = (("window", 1), ("window", 2), ("causal", 1), ("displaced", 1))
NEVER_EXACT = Displaced(None, exact_growing=False)
PLAN = WindowPlan(12, 6, 5, 1)
# Ids of a case's streams begin at so many times its number; those of warm-ups are left out of every figure.
CASE_IDS, WARM_UP_ID = 100, 100_000
Traces = list[list[Span]]


@dataclass(frozen=True)
class Bench:
    """What all cases share: the model, its folder, latent height and width, and chunks per video."""

    folder: str
    model: STDiT3
    cells: int
    chunks: int


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, help="rounds to take medians over (3; 1 with --quick)")
    options.add_argument("--shape", choices=SHAPES, help="of the model and its latents (large; small with --quick)")
    options.add_argument("--chunks", type=int, help="chunks per video (10; 3 with --quick)")
    arguments = options.parse_args()
    chosen = arguments.shape or ("small" if arguments.quick else "large")
    depth, hidden, heads, cells = SHAPES[chosen]
    chunks = arguments.chunks or (3 if arguments.quick else 10)
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    config = small_config(depth, hidden, heads, 64, TEXT_LEN)
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(config)
        model.save_pretrained(folder)
        bench = Bench(folder, model, cells, chunks)
        found = [_measure(bench, not arguments.quick) for _ in range(rounds)]
        rows = [
            {"mode": mode, "videos": videos, **_median([one[mode, videos] for one in found])} for mode, videos in CASES
        ]
        more = (
            []
            if arguments.quick
            else [row for stages, cases in _MORE.items() for row in _more_stages(bench, stages, cases)]
        )
    ray.shutdown()
    shape = {"name": chosen, "depth": depth, "hidden_size": hidden, "latents": [8, cells, cells], "window_latents": 35}
    report = {
        "machine": {**machine(), "ray": ray.__version__},
        "shape": {**shape, "chunks": chunks, "threads_per_stage": 1},
        "rounds": rounds,
        "rows": rows,
        "more_stages_than_cores": more,
        "decoded": decoded_rows(arguments.quick),
        "cached_context": _cached_context(
            replace(bench, chunks=2 if arguments.quick else 4), 1.0 if arguments.quick else 3.0
        ),
        "efficiency": {
            f"{row['mode']}_{row['videos']}": row.get("speed_over_causal", row["share_of_closed_form"]) for row in rows
        },
    }
    print(json.dumps(report) if arguments.json else _table(report))


_MORE: dict[int, tuple[tuple[Mode, int], ...]] = {
    3: (("window", 1), ("causal", 1), ("displaced", 1)),
    4: (("window", 1), ("causal", 1), ("displaced", 1)),
}


def _measure(bench: Bench, with_ceiling: bool) -> dict[tuple[Mode, int], dict[str, float]]:
    """One round over all cases; ratios are taken within it."""
    two, one = _run(bench, STAGES), _run(bench, 1)
    ceilings = _two_independent(bench) if with_ceiling else {}
    found = {}
    for case in CASES:
        alone = one.seconds[case]
        found[case] = _figures(bench, case, two.traces[case], one.traces[case]) | {
            "seconds": two.seconds[case],
            "speed_up": alone / two.seconds[case],
            "all_bytes_forward": two.bytes_forward,
            "all_bytes_forward_formula": sum(_bytes(bench, videos, mode) for mode, videos in CASES),
        }
        if case in ceilings:
            found[case]["two_independent_processes"] = 2 * alone / ceilings[case]
            found[case]["speed_up_over_ceiling"] = ceilings[case] / (2 * two.seconds[case])
    found["displaced", 1]["speed_over_causal"] = found["causal", 1]["seconds"] / found["displaced", 1]["seconds"]
    return found


def _figures(bench: Bench, case: tuple[Mode, int], traces: Traces, single: Traces) -> dict[str, float]:
    """What the traces of two stages, and of a single one, say."""
    mode, videos = case
    makespan = _makespan(traces)
    spans = [span for trace in traces for span in trace]
    utilisation = sum(span.end - span.start for span in spans) / (STAGES * makespan)
    units = BRANCHES * videos * (1 if mode == "window" else PLAN.window_chunks)
    ideal = min(1.0, units / (BRANCHES + STAGES - 1))
    equal = _simulated(mode, bench.chunks, videos, Machine((1.0,) * STAGES, unit_cost=True))
    priced, priced_single = (
        _simulated(mode, bench.chunks, videos, _priced(found, bench.chunks)) for found in (traces, single)
    )
    waited = sum(span.start - span.ready for span in spans) / (STAGES * makespan)
    return {
        "hops": len(traces[0]),
        "unit_ms_stage_0": 1000 * statistics.median(s.end - s.start for s in traces[0]),
        "unit_ms_stage_1": 1000 * statistics.median(s.end - s.start for s in traces[1]),
        "busy_over_p_makespan": utilisation,
        "closed_form": ideal,
        "share_of_closed_form": utilisation / ideal,
        "simulated": equal.utilisation,
        "makespan_over_simulated_p2": makespan / priced.makespan,
        "makespan_over_simulated_p1": _makespan(single) / priced_single.makespan,
        "waiting_beyond_simulated": max(0.0, waited - (1 - priced.utilisation)),
        "control_ms_per_hop": 1000 * statistics.median(_control(traces)),
        # A stage that sends activations and one that sends small latents have nothing in common: of both together the
        # median is the shortest of the one or the longest of the other.
        **{f"control_ms_stage_{rank}": 1000 * statistics.median(_control([own])) for rank, own in enumerate(traces)},
    }


def _makespan(traces: Traces) -> float:
    spans = [span for trace in traces for span in trace]
    return max(span.end for span in spans) - min(span.start for span in spans)


def _control(traces: Traces) -> list[float]:
    """Seconds from each unit's end until the stage asks for the next one's input: sending and bookkeeping."""
    return [b.ready - a.end for trace in traces for a, b in pairwise(trace)]


def _simulated(mode: Mode, chunks: int, videos: int, machine: Machine) -> Result:
    return simulate([_plan(chunks)] * videos, mode, BRANCHES, videos, machine, NEVER_EXACT)


def _priced(traces: Traces, chunks: int) -> Machine:
    """The stages of a run with the mean cost of every kind of unit it had."""
    costs = defaultdict[tuple[int, int], list[float]](list)
    for stage, trace in enumerate(traces):
        for span in trace:
            costs[stage, _chunks(span, chunks)].append(span.end - span.start)
    means = {key: statistics.fmean(values) for key, values in costs.items()}
    return Machine((1.0,) * len(traces), unit_seconds=means)


def _chunks(span: Span, chunks: int) -> int:
    return len(_plan(chunks).row(span.unit.row).window) if span.unit.chunk == WHOLE else 1


def _more_stages(bench: Bench, stages: int, cases: Sequence[tuple[Mode, int]]) -> list[dict[str, Any]]:
    """More stages than cores: the trace's order and its summed costs beside the simulator's."""
    bench, rows = replace(bench, chunks=3), []
    ran = _run(bench, stages, cases)
    for mode, videos in cases:
        traces = ran.traces[mode, videos]
        result = _simulated(mode, bench.chunks, videos, _priced(traces, bench.chunks))
        busy = sum(span.end - span.start for trace in traces for span in trace)
        orders = [[_named(span.unit) for span in trace] for trace in traces]
        simulated = [[_named(part.unit) for part in result.busy if part.stage == stage] for stage in range(stages)]
        rows.append(
            {
                "mode": mode,
                "num_stages": stages,
                "trace_is_the_order": orders == simulated,
                "summed_costs_over_simulated": round(busy / sum(part.end - part.start for part in result.busy), 4),
            }
        )
    return rows


def _named(unit: Unit) -> tuple[int, int, int, bool]:
    return unit.row, unit.chunk, unit.branch, unit.context


def _cached_context(bench: Bench, guidance: float) -> dict[str, float]:
    """Mode causal in one process, with the context run once a shift and at every row."""

    class AtEveryRow(MicroBatches):
        def parts(self, n: int) -> tuple[tuple[int, bool], ...]:
            row = self.plan.row(n)
            return tuple((k, True) for k in row.context) + tuple((k, False) for k in row.chunks)

    stream = replace(_streams(bench, 1, "causal", 0)[0], guidance_scale=guidance)
    seconds, units, runs = defaultdict[str, float](float), dict[str, int](), dict[str, Iterator[CleanChunk]]()
    torch.set_num_threads(1)
    for name, kind in (("kept", MicroBatches), ("every_row", AtEveryRow)):
        denoiser = StreamDenoiser(bench.model, stream)
        denoiser.batches = kind(stream.plan, "causal")
        runs[name] = sample(stream.window(), denoiser, stream.guidance_scale)
        units[name] = sum(len(denoiser.batches.parts(row.index)) for row in stream.plan.rows())
    for _ in range(bench.chunks):  # in turns, as the machine's speed changes
        for name, run in runs.items():
            started = time.process_time()
            next(run)
            seconds[name] += time.process_time() - started
    measured, formula = seconds["kept"] / seconds["every_row"], units["kept"] / units["every_row"]
    return {
        "time_over_every_row": round(measured, 4),
        "units_over_every_row": round(formula, 4),
        "ratio": round(measured / formula, 4),
    }


def _streams(bench: Bench, videos: int, mode: Mode, first_id: int) -> list[Stream]:
    generator = torch.Generator().manual_seed(1)
    text, null = (torch.randn(TEXT_LEN, bench.model.spec.text_dim, generator=generator) for _ in range(2))
    return [
        Stream(
            id=first_id + i,
            plan=_plan(bench.chunks),
            schedule=NoiseSchedule(PLAN.num_inference_steps),
            seed=i,
            latent_shape=(bench.model.spec.latent_channels, bench.cells, bench.cells),
            conditioning=Conditioning.build([(0, text)], null),
            info=FrameInfo(8 * bench.cells, 8 * bench.cells, 24),
            guidance_scale=3.0,
            mode=mode,
            displaced=NEVER_EXACT,
        )
        for i in range(videos)
    ]


@dataclass
class Ran:
    """All cases on one engine: seconds from admission to the last chunk, and spans per stage without warm-ups."""

    seconds: dict[tuple[Mode, int], float]
    traces: dict[tuple[Mode, int], Traces]
    bytes_forward: int


def _run(bench: Bench, stages: int, cases: Sequence[tuple[Mode, int]] = CASES) -> Ran:
    with RayEngine(bench.folder, _split(bench, stages), EngineOptions(stages, trace=True)) as engine:
        seconds = {case: _timed(engine, bench, number, case) for number, case in enumerate(cases)}
        reports = engine.finish()
    traces = {
        case: [[span for span in report.trace if span.unit.stream // CASE_IDS == number] for report in reports]
        for number, case in enumerate(cases)
    }
    return Ran(seconds, traces, reports[0].bytes_forward)


def _timed(
    engine: RayEngine, bench: Bench, number: int, case: tuple[Mode, int], barrier: threading.Barrier | None = None
) -> float:
    """Warms up with one-chunk videos, then times the run of case ``number``."""
    mode, videos = case
    for _ in engine.run(_streams(replace(bench, chunks=1), videos, mode, WARM_UP_ID), videos):
        pass
    if barrier is not None:
        barrier.wait()
    started = time.monotonic()
    for _ in engine.run(_streams(bench, videos, mode, CASE_IDS * number), videos):
        pass
    return time.monotonic() - started


def _two_independent(bench: Bench) -> dict[tuple[Mode, int], float]:
    """Seconds of every case on two one-stage engines at once: what the machine gives two busy processes."""
    barrier, times = threading.Barrier(2), defaultdict[tuple[Mode, int], list[float]](list)

    def work() -> None:
        with RayEngine(bench.folder, _split(bench, 1), EngineOptions(1)) as engine:
            for number, case in enumerate(CASES):
                times[case].append(_timed(engine, bench, number, case, barrier))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {case: max(seconds) for case, seconds in times.items()}


def _bytes(bench: Bench, videos: int, mode: Mode) -> int:
    """Header, tokens, per-frame modulation and time of every unit that crosses the boundary, warm-up included."""
    dim, patches, total = bench.model.spec.hidden_size, (bench.cells // 2) ** 2, 0
    for plan in (_plan(1), _plan(bench.chunks)):
        for row in plan.rows():
            for chunk, _ in MicroBatches(plan, mode, 0, NEVER_EXACT).parts(row.index):
                frames = plan.latent_chunk_size * (len(row.window) if chunk == WHOLE else 1)
                total += BRANCHES * (64 + 4 * frames * dim * (patches + 6 + 1))
    return total * videos


def _plan(chunks: int) -> WindowPlan:
    return replace(PLAN, num_chunks=chunks)


def _split(bench: Bench, stages: int) -> list[tuple[int, int]]:
    return partition(bench.model.costs(bench.model.grid(35, bench.cells, bench.cells), TEXT_LEN), stages)


def _median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(r[key] for r in rounds), 4) for key in rounds[0]}


def _table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), machine_line(report["shape"])]
    for row in [*report["rows"], *report["more_stages_than_cores"], *report["decoded"], report["cached_context"]]:
        lines += ["", *(f"  {key:28} {value}" for key, value in row.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
