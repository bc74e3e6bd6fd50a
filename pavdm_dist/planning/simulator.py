"""A discrete-event model of the pipeline: the engine's own order of units over stages, links and queues.

It answers what a cluster would do before there is one. With equal unit costs its makespans are the closed forms of
pipeline scheduling; with given stage times it shows what unequal stages, links and short videos cost.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pavdm_dist.engine.order import Join, Unit, epochs
from pavdm_dist.engine.trace import read_decoder, read_trace
from pavdm_dist.engine.transport import OUTSTANDING
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.microbatches import WHOLE, Displaced, MicroBatches
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.planning.chart import Bar

Key = tuple[int, int, int]
MAX_STAGES = 64


@dataclass(frozen=True)
class Machine:
    """Stages in a row and the links between them.

    Attributes:
        stage_seconds: of one chunk through each stage; a unit costs that times the chunks it holds.
        unit_cost: every unit costs 1 on every stage instead, whatever it holds.
        link_latency_s: from the end of a send to the receiver having it.
        link_chunk_s: time a chunk's hidden states occupy a link; a unit takes that times its chunks.
        outstanding: sends a stage may have under way to its neighbour before it waits.
        unit_seconds: measured seconds of a unit by (stage, chunks it holds); takes the place of ``stage_seconds`` where
            it has an entry.
        decode_seconds: of a finished chunk, by a decoder beside the stages that takes one after another; 0 = none.
    """

    stage_seconds: tuple[float, ...]
    unit_cost: bool = False
    link_latency_s: float = 0.0
    link_chunk_s: float = 0.0
    outstanding: int = OUTSTANDING
    unit_seconds: Mapping[tuple[int, int], float] = field(default_factory=dict)
    decode_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.stage_seconds) <= MAX_STAGES:
            raise ConfigError(f"num_stages={len(self.stage_seconds)}: 1 to {MAX_STAGES} can be simulated")
        if min(self.stage_seconds) <= 0:
            raise ConfigError(f"stage_seconds={list(self.stage_seconds)}: every stage takes time, above 0")
        for name in ("link_latency_s", "link_chunk_s", "decode_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.outstanding < 1:
            raise ConfigError(f"outstanding={self.outstanding}: at least 1")


@dataclass(frozen=True)
class Busy:
    """A stage computed ``unit`` from ``start`` to ``end``."""

    stage: int
    unit: Unit
    start: float
    end: float


@dataclass(frozen=True)
class DecoderBusy:
    """The decoder had a video's chunk from ``start`` to ``end``."""

    stream: int
    chunk: int
    start: float
    end: float


@dataclass
class Result:
    """What happened; times are seconds, or units of cost with ``Machine.unit_cost``.

    Attributes:
        makespan: until the last stage, and the decoder if there is one, has finished everything.
        first_chunk: until the first chunk is clean.
        busy: what every stage did, in order of its end.
        decoded: what the decoder did.
    """

    num_stages: int
    makespan: float = 0.0
    first_chunk: float | None = None
    busy: list[Busy] = field(default_factory=list)
    decoded: list[DecoderBusy] = field(default_factory=list)

    @property
    def utilisation(self) -> float:
        """Busy time of all stages over stages times makespan, 0..1."""
        return sum(part.end - part.start for part in self.busy) / (self.num_stages * self.makespan)

    @property
    def speed_up(self) -> float:
        """Over one device doing all the work without a gap."""
        return self.utilisation * self.num_stages


def simulate(
    plans: Sequence[WindowPlan],
    mode: Mode,
    branches: int,
    streams_in_flight: int,
    machine: Machine,
    displaced: Displaced | None = None,
    chunks_per_unit: int = 1,
) -> Result:
    """Runs videos through a pipeline, strictly in the engine's order.

    Args:
        plans: one per video, in order of arrival; causal needs at most one context chunk.
        mode: ``window``: a unit is a whole window, or a partition; ``causal``: so many chunks; ``displaced``: so many,
            in exact rows all.
        branches: guidance branches, each a unit of its own.
        streams_in_flight: videos in the pipeline at a time.
        machine: stages and links.
        displaced: of mode displaced; None = its defaults.
        chunks_per_unit: noisy chunks of a unit.

    Raises:
        ConfigError: nothing to run, or a plan the mode does not allow.
    """
    if not plans or streams_in_flight < 1 or branches < 1:
        raise ConfigError(f"videos={len(plans)}, streams={streams_in_flight}, branches={branches}: at least 1 each")
    for plan in plans:
        if mode == "causal" and plan.context_chunks > 1:
            raise ConfigError(f"context_chunks={plan.context_chunks}: mode causal has 0 or 1")
    batches = [MicroBatches(plan, mode, 0, displaced or Displaced(), frozenset(), chunks_per_unit) for plan in plans]
    joins = [Join(number, 0, 0, own.plan.num_rows, branches, own) for number, own in enumerate(batches)]
    return _Simulation(batches, joins, streams_in_flight, machine).run()


def of_trace(path: str) -> Result:
    """What a real run did.

    Raises:
        ConfigError: no trace, or one of another version.
    """
    stages = read_trace(path)
    found = [Busy(stage, span.unit, span.start, span.end) for stage, spans in enumerate(stages) for span in spans]
    if not found:
        raise ConfigError(f"trace={path}: holds no units")
    if len({len(spans) for spans in stages}) > 1 or max(p.end for p in found) == min(p.start for p in found):
        raise ConfigError(f"trace={path}: is damaged (stages of different units, or no time at all)")
    begin = min(part.start for part in found)
    busy = sorted((replace(p, start=p.start - begin, end=p.end - begin) for p in found), key=lambda part: part.end)
    decoded = [
        DecoderBusy(span.stream, span.chunk, max(0.0, span.start - begin), max(0.0, span.end - begin))
        for span in read_decoder(path)
    ]
    makespan = max([busy[-1].end, *(one.end for one in decoded)])
    return Result(len(stages), makespan, None, busy, decoded)


def bars(result: Result) -> list[Bar]:
    """What every stage did, and the decoder in the lane behind them, as bars of a chart."""
    decoded = [Bar(result.num_stages, one.start, one.end, one.chunk) for one in result.decoded]
    return [_bar(part) for part in result.busy] + decoded


def _bar(part: Busy) -> Bar:
    unit = part.unit
    # Whole windows are told apart by video, chunks by chunk, partitions by their first chunk.
    colour = unit.stream if unit.chunk == WHOLE else unit.chunk
    return Bar(part.stage, part.start, part.end, colour, unit.branch, unit.context)


class _Simulation:
    def __init__(
        self, batches: Sequence[MicroBatches], joins: Sequence[Join], in_flight: int, machine: Machine
    ) -> None:
        import simpy

        self._batches, self._machine = batches, machine
        self._env = simpy.Environment()
        stages = len(machine.stage_seconds)
        self._inboxes = [simpy.Store(self._env) for _ in range(stages)]
        self._wires = [simpy.Resource(self._env) for _ in range(stages)]  # the last one leads back to the first
        self._finished = simpy.Store(self._env)
        self._room = [simpy.Container(self._env, machine.outstanding, machine.outstanding) for _ in range(stages)]
        # Latents on their way back, as the first stage awaits them and as the last one sends them.
        self._awaited: dict[Key, Any] = {}
        self._due: dict[Key, Any] = {}
        self._result = Result(stages)
        waiting = iter(joins)

        def enter(epoch: int) -> Join | None:
            join = next(waiting, None)
            return None if join is None else replace(join, epoch=epoch)

        self._units = (unit for units in epochs(enter, in_flight) for unit in units)

    def run(self) -> Result:
        for stage in range(1, len(self._inboxes)):
            self._env.process(self._stage(stage))
        self._env.process(self._first_stage())
        self._env.process(self._decoder())
        self._env.run()
        ends = [part.end for part in self._result.busy] + [part.end for part in self._result.decoded]
        self._result.makespan = max(ends)
        return self._result

    def _first_stage(self) -> Generator[Any, Any, None]:
        for unit in self._units:
            for chunk in unit.fed:
                yield self._awaited.pop((unit.stream, unit.row - 1, chunk))
            if unit.feeds:
                key = unit.stream, unit.row, unit.chunk
                self._awaited[key] = self._due[key] = self._env.event()
            yield from self._compute(0, unit)

    def _stage(self, stage: int) -> Generator[Any, Any, None]:
        while True:
            unit = yield self._inboxes[stage].get()
            yield self._room[stage - 1].put(1)
            yield from self._compute(stage, unit)

    def _compute(self, stage: int, unit: Unit) -> Generator[Any, Any, None]:
        start = self._env.now
        yield self._env.timeout(self._seconds(stage, unit))
        self._result.busy.append(Busy(stage, unit, start, self._env.now))
        if stage + 1 < len(self._inboxes):
            yield self._room[stage].get(1)
            self._env.process(self._send(stage, unit))
        elif unit.closes and not unit.context:
            self._env.process(self._feed_back(unit))

    def _send(self, stage: int, unit: Unit) -> Generator[Any, Any, None]:
        yield from self._travel(stage, self._machine.link_chunk_s * self._chunks(unit))
        yield self._inboxes[stage + 1].put(unit)

    def _feed_back(self, unit: Unit) -> Generator[Any, Any, None]:
        """Latents are a few percent of the hidden states: the way back costs its latency."""
        batches = self._batches[unit.stream]
        row = batches.plan.row(unit.row)
        moved = batches.moved(row, unit.chunk)
        for clean in (chunk for chunk in row.emits if chunk in moved):
            if self._result.first_chunk is None:
                self._result.first_chunk = self._env.now
            self._finished.put((unit.stream, clean))
        if len(self._inboxes) > 1:
            yield from self._travel(len(self._inboxes) - 1, 0.0)
        if unit.feeds:
            self._due.pop((unit.stream, unit.row, unit.chunk)).succeed()

    def _decoder(self) -> Generator[Any, Any, None]:
        seconds = self._machine.decode_seconds
        while seconds:
            stream, chunk = yield self._finished.get()
            start = self._env.now
            yield self._env.timeout(seconds)
            self._result.decoded.append(DecoderBusy(stream, chunk, start, self._env.now))

    def _travel(self, wire: int, seconds: float) -> Generator[Any, Any, None]:
        if seconds:
            with self._wires[wire].request() as turn:
                yield turn
                yield self._env.timeout(seconds)
        if self._machine.link_latency_s:
            yield self._env.timeout(self._machine.link_latency_s)

    def _seconds(self, stage: int, unit: Unit) -> float:
        if self._machine.unit_cost:
            return 1.0
        chunks = self._chunks(unit)
        measured = self._machine.unit_seconds.get((stage, chunks))
        return self._machine.stage_seconds[stage] * chunks if measured is None else measured

    def _chunks(self, unit: Unit) -> int:
        batches = self._batches[unit.stream]
        return len(batches.held(batches.plan.row(unit.row), unit.chunk))
