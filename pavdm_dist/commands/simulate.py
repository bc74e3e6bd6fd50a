"""``pavdm simulate``: a pipeline that is described, or the trace of a real run, summed up and drawn."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from pavdm_dist.config import DisplacedConfig
from pavdm_dist.engine.transport import OUTSTANDING
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.baselines import CONTINUES, block_chunks, settings_of
from pavdm_dist.method.microbatches import Displaced, check_chunks_per_unit, check_displaced
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.planning.chart import check_chart, draw_chart
from pavdm_dist.planning.forecast import most_units
from pavdm_dist.planning.simulator import MAX_STAGES, Machine, Result, bars, of_trace, simulate
from pavdm_dist.values.fields import Steps, UnitChunks, WindowChunks, Within

# W where nothing is said.
_WINDOW = 6
# Some 50,000 a second.
MAX_UNITS = 2_000_000
_Wait = Annotated[float, Within(0, 1_000_000)]  # seconds
_Time = Annotated[float, Within(0, 1_000_000, above=True)]


@dataclass
class SimulateConfig:
    """Everything ``pavdm simulate`` knows."""

    # the videos
    num_inference_steps: Steps = 30  # T
    # pavdm: a staircase of levels; the others are what it is compared with (docs/modes.md)
    method: Literal["pavdm", "replacement", "replacement-noise", "fifo", "autoregressive"] = "pavdm"
    window_chunks: WindowChunks | None = None  # W; None = 6, with method=autoregressive 1
    chunks: Annotated[int, Within(1, 1_000_000)] = 84  # new chunks per video
    context: bool = True  # one clean chunk in front of the window
    partitions: WindowChunks | None = None  # model calls a row is cut into; None = 1, or as the method has it
    lookahead: bool | None = None  # each moves half of its chunks; with context, W / 2n chunks of it
    branches: Annotated[int, Within(1, 2)] = 2  # guidance branches
    videos: Annotated[int, Within(1, 10_000)] | None = None  # in all; None = as many as are in flight
    streams: Annotated[int, Within(1, 10_000)] = 1  # videos in flight
    # the pipeline
    mode: Literal["window", "causal", "displaced"] = "window"  # which chunks see each other; see README
    chunks_per_unit: UnitChunks = 1  # of mode=causal, displaced: noisy chunks of a unit
    displaced: DisplacedConfig = field(default_factory=DisplacedConfig)  # of mode=displaced
    num_stages: Annotated[int, Within(1, MAX_STAGES)] = 2  # in a row
    unit_cost: bool = False  # every unit costs 1 on every stage, whatever it holds
    stage_seconds: list[_Time] | None = None  # of one chunk through each stage; None = 1 through all, evenly
    link_latency_s: _Wait = 0.0  # of one message between two stages
    link_chunk_s: _Wait = 0.0  # time one chunk's hidden states occupy a link
    outstanding: Annotated[int, Within(1)] = OUTSTANDING  # sends under way before a stage waits
    decode_seconds: _Wait = 0.0  # of a finished chunk, in a decoder beside the stages; 0 = without one
    chart: str | None = None  # .png of what every stage did when
    trace: str | None = None  # of a real run (pavdm sample ... trace=FILE): sum that up and draw it instead


def simulate_report(config: SimulateConfig) -> dict[str, Any]:
    """Runs the simulation of a command, draws its chart, and returns what to print.

    Raises:
        ConfigError: impossible settings.
    """
    if config.chart is not None:
        check_chart(config.chart, "chart")
    if config.trace is not None:
        for setting in fields(SimulateConfig):
            value = getattr(config, setting.name)
            if setting.name not in ("trace", "chart") and value != getattr(SimulateConfig(), setting.name):
                raise ConfigError(f"{setting.name}={value}: a trace says what was; give it chart=FILE.png or nothing")
        result = of_trace(config.trace)
        return {"trace": config.trace, **_report(result, config.chart)}
    stages = config.num_stages
    if config.stage_seconds is not None and len(config.stage_seconds) != stages:
        raise ConfigError(f"stage_seconds={config.stage_seconds}: needs num_stages={stages} entries")
    if config.stage_seconds is not None and config.unit_cost:
        raise ConfigError(
            f"unit_cost=true: every unit costs 1, and stage_seconds={config.stage_seconds} would not count; give one"
        )
    seconds = config.stage_seconds or [1 / stages] * stages
    machine = Machine(
        tuple(seconds),
        config.unit_cost,
        config.link_latency_s,
        config.link_chunk_s,
        config.outstanding,
        decode_seconds=config.decode_seconds,
    )
    plan = _plan(config)
    videos = config.streams if config.videos is None else config.videos
    displaced = Displaced(**asdict(config.displaced))
    check_displaced(config.mode, displaced)
    check_chunks_per_unit(config.mode, plan, config.chunks_per_unit)
    if displaced.adaptive is not None:
        raise ConfigError(
            f"displaced.adaptive={displaced.adaptive}: depends on what the model computes; give"
            " displaced.resync_every_steps as often as you expect it"
        )
    _check_units(config, plan, displaced, videos)
    together = config.chunks_per_unit
    result = simulate([plan] * videos, config.mode, config.branches, config.streams, machine, displaced, together)
    settings: dict[str, Any] = {
        "mode": config.mode, "context": config.context, "unit_cost": config.unit_cost, "videos": videos,
    }  # fmt: skip
    if config.method != "pavdm":
        settings |= {"method": config.method}
    if plan.is_partitioned:
        settings |= {"partitions": plan.partitions, "lookahead": plan.lookahead}
    return {**settings, **_report(result, config.chart)}


def _check_units(config: SimulateConfig, plan: WindowPlan, displaced: Displaced, videos: int) -> None:
    """Refuses what would take minutes, with the most that is simulated."""

    def units(chunks: int) -> int:
        """Of one video of so many chunks, on all stages."""
        shorter = replace(plan, num_chunks=chunks)
        micro_batches = most_units(shorter, config.mode, displaced, config.chunks_per_unit)
        return micro_batches * config.branches * config.num_stages

    wanted = units(config.chunks) * videos
    if wanted <= MAX_UNITS:
        return
    most = bisect_right(range(1, config.chunks), MAX_UNITS, key=lambda chunks: units(chunks) * videos)
    name = "streams" if config.videos is None else "videos"
    use = f"chunks={most} or less, or fewer videos" if most else f"{name}={max(1, MAX_UNITS // units(1))} or less"
    if not most and config.chunks > 1:
        use += " with chunks=1"
    raise ConfigError(
        f"chunks={config.chunks}: {wanted} units of {videos} video(s) are too many to simulate one by one; use {use}"
    )


def _plan(config: SimulateConfig) -> WindowPlan:
    picked = {name: getattr(config, name) for name in ("window_chunks", "partitions", "lookahead")}
    given = {name: value for name, value in picked.items() if value is not None}
    own = {"window_chunks": _WINDOW, "partitions": 1, "lookahead": False, **given}
    own |= settings_of(config.method, own["window_chunks"], picked)
    if config.method in CONTINUES and not config.context:
        raise ConfigError(
            f"context=false: method={config.method} goes on from clean chunks, none would be there; use context=true"
        )
    plan = WindowPlan(
        config.num_inference_steps,
        latent_chunk_size=1,
        context_chunks=int(config.context),
        num_chunks=config.chunks,
        block_chunks=block_chunks(config.method, own["window_chunks"]),
        **own,
    )
    if not (plan.lookahead and config.context):
        return plan
    return replace(plan, context_chunks=plan.window_chunks // plan.partitions // 2)


def _report(result: Result, chart: str | None) -> dict[str, Any]:
    stages = result.num_stages
    if chart is not None:
        draw_chart(chart, stages, bars(result), decoder=bool(result.decoded))
    busy = [sum(part.end - part.start for part in result.busy if part.stage == stage) for stage in range(stages)]
    return {
        "num_stages": stages,
        "units": len(result.busy) // stages,
        "makespan": _whole(result.makespan),
        "first_chunk": None if result.first_chunk is None else _whole(result.first_chunk),
        "utilisation": result.utilisation,
        "speed_up": result.speed_up,
        "stage_busy": [_whole(seconds) for seconds in busy],
        **({"decoder_busy": _whole(sum(one.end - one.start for one in result.decoded))} if result.decoded else {}),
        **({} if chart is None else {"chart": chart}),
    }


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
