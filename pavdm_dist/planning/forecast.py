"""How long a pipeline takes for videos, in closed form, row by row; the simulator's figure without simulating.

A row of videos in step takes the longer of all their micro-batches at the pace of the slowest part, and one
micro-batch's way through the stages and back (its next step needs the last one). Growing and draining windows have
fewer micro-batches, or smaller ones; a whole window among single chunks waits until the pipeline has emptied. A decoder
beside the stages takes finished chunks one after another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from pavdm_dist.engine.transport import OUTSTANDING
from pavdm_dist.method.microbatches import Displaced, MicroBatches
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.request.sampling import SamplingParams


@dataclass(frozen=True)
class RowShape:
    """Micro-batches of one branch of one row.

    Attributes:
        held: chunks that each holds, in order of work.
        needs: how many micro-batches of the row before each waits for; 0 = none.
        finishes: chunks are clean after so many of them; 0 = none is.
        clean: how many.
    """

    held: tuple[int, ...]
    needs: tuple[int, ...] = (1,)
    finishes: int = 0
    clean: int = 0


@dataclass(frozen=True)
class UnitTime:
    """What a micro-batch of some number of chunks takes, in any one unit of time.

    Attributes:
        stages: on each stage.
        link: time it occupies the link between two stages.
        latency: from the end of a send to the receiver having it.
        outstanding: sends a stage may have under way before it waits.
    """

    stages: Sequence[float]
    link: float = 0.0
    latency: float = 0.0
    outstanding: int = OUTSTANDING

    @property
    def pace(self) -> float:
        """From one micro-batch to the next."""
        if len(self.stages) == 1:
            return self.stages[0]
        return max(*self.stages, self.link, (self.link + self.latency) / self.outstanding)

    @property
    def way(self) -> float:
        """Through all stages, and its latents' way back to the first."""
        hops = len(self.stages) - 1
        return sum(self.stages) + hops * (self.link + self.latency) + (self.latency if hops else 0.0)


def rows_of(
    plan: WindowPlan, mode: Mode, displaced: Displaced | None = None, chunks_per_unit: int = 1
) -> list[RowShape]:
    """All rows of a video; without those that adaptive re-sync would make exact, which nobody knows beforehand."""
    batches = MicroBatches(plan, mode, 0, displaced or Displaced(), chunks_per_unit=chunks_per_unit)
    rows, before, earlier = list[RowShape](), list[int](), list[int]()
    for row in plan.rows():
        parts = [chunk for chunk, _ in batches.parts(row.index)]
        held = tuple(len(batches.held(row, chunk)) for chunk in parts)
        needs, finishes = tuple(range(1, len(parts) + 1)), 0
        if parts == before == earlier:
            needs = rows[-1].needs
        elif before and (plan.is_partitioned or parts != before):
            needs = tuple(before.index(fed[-1]) + 1 if fed else 0 for fed in batches.fed(row.index))
        if row.emits:
            finishes = next(i for i, chunk in enumerate(parts, 1) if row.emits[0] in batches.moved(row, chunk))
        rows.append(RowShape(held, needs, finishes, len(row.emits)))
        before, earlier = parts, before
    return rows


@dataclass(frozen=True)
class Calls:
    """What the model is called for, of one guidance branch.

    Attributes:
        calls: micro-batches, those of single chunks and of clean ones included.
        latents: latent frames that they hold together.
        first: calls until the first chunk is clean.
        per_chunk: calls of full windows for each new chunk.
    """

    calls: int
    latents: int
    first: int
    per_chunk: float


def calls_of(params: SamplingParams, plan: WindowPlan) -> Calls:
    """The calls of a whole video; without those that adaptive re-sync would join, which nobody knows beforehand."""
    batches = MicroBatches(plan, params.mode, 0, params.displaced, chunks_per_unit=params.chunks_per_unit)
    step, calls, chunks, first = plan.steps_per_shift, 0, 0, 0
    # Which rows of mode displaced are exact goes by their numbers.
    shifts = ((n, step) for n in range(0, plan.num_rows, step)) if params.mode == "displaced" else _shifts(plan)
    for begin, rows in shifts:
        for row in map(plan.row, range(begin, begin + step)):
            for part, _ in batches.parts(row.index):
                calls, chunks = calls + rows // step, chunks + rows // step * len(batches.held(row, part))
                if not first and row.emits and row.emits[0] in batches.moved(row, part):
                    first = calls
    return Calls(calls, chunks * plan.latent_chunk_size, first, _per_chunk(batches))


def most_units(plan: WindowPlan, mode: Mode, displaced: Displaced | None = None, chunks_per_unit: int = 1) -> int:
    """Micro-batches of one branch of a video; in mode displaced at most, as if no row but the first were exact."""
    refresh = (displaced or Displaced()).context_refresh
    never = Displaced(resync_every_steps=None, exact_growing=False, context_refresh=refresh)
    batches = MicroBatches(plan, mode, 0, never, chunks_per_unit=chunks_per_unit)
    step = plan.steps_per_shift
    return sum(
        len(batches.parts(n)) * (rows // step) for begin, rows in _shifts(plan) for n in range(begin, begin + step)
    )


def _shifts(plan: WindowPlan) -> Iterator[tuple[int, int]]:
    return ((row.index, rows) for row, rows in plan.shifts(plan.num_rows))


def _per_chunk(batches: MicroBatches) -> float:
    plan, every = batches.plan, batches.displaced.resync_every_steps
    endless = replace(batches, plan=replace(plan, num_chunks=None))
    step = plan.steps_per_shift
    # Rows are alike from shift to shift, but for exact ones among stale ones.
    alike = math.lcm(step, every) if batches.mode == "displaced" and every else step
    begin = step * (plan.window_chunks + plan.joint_context) + batches.displaced.exact_steps
    begin, count = -(-begin // step) * step, min(alike, -(-plan.num_rows // step) * step)
    return sum(len(endless.parts(n)) for n in range(begin, begin + count)) * step / (count * plan.block_chunks)


def makespan(
    rows: Sequence[RowShape],
    branches: int,
    streams: int,
    videos: int,
    unit: Callable[[int], UnitTime],
    decode: float = 0.0,
) -> float:
    """Time until all videos are done, and decoded.

    Args:
        rows: of one video.
        branches: guidance branches.
        streams: videos in flight, which go in step.
        videos: in all; the last ones go with fewer in flight where they do not divide.
        unit: what a micro-batch of so many chunks takes.
        decode: what a chunk takes a decoder beside the stages; 0 where there is none.
    """
    rounds, rest = divmod(videos, streams)
    pairs = Counter(pairwise([*rows, rows[0]]))
    units = {chunks: unit(chunks) for chunks in {chunks for row in rows for chunks in row.held}}

    def body(together: int) -> float:
        return sum(_row(row, after, branches, together, units) * count for (row, after), count in pairs.items())

    total = (rounds * body(streams) if rounds else 0.0) + (body(rest) if rest else 0.0)
    together, last = rest or streams, rows[-1]
    through = _own(last, branches, together - 1, units) + _arrival(last, len(last.held), branches, units)
    sampled = total + max(0.0, through - _row(last, rows[0], branches, together, units))
    return max(sampled, _decoded(rows, branches, [streams] * rounds + [rest] * (rest > 0), units, decode))


def work(rows: Sequence[RowShape], branches: int, videos: int, unit: Callable[[int], UnitTime]) -> float:
    """Time of all stages together that is spent computing."""
    held = Counter[int]()
    for row in rows:
        held.update(row.held)
    return videos * branches * sum(count * sum(unit(chunks).stages) for chunks, count in held.items())


def _row(row: RowShape, after: RowShape, branches: int, streams: int, units: dict[int, UnitTime]) -> float:
    """From the row's first micro-batch on the first stage to that of the row after.

    All that a micro-batch of the row after waits for must be back when its own turn comes.
    """
    ahead, longest = 0.0, _own(row, branches, streams, units)
    for chunks, count in zip(after.held, after.needs, strict=True):
        if count:
            longest = max(longest, _arrival(row, count, branches, units) - ahead)
        ahead += branches * units[chunks].pace
    return longest


def _decoded(
    rows: Sequence[RowShape], branches: int, rounds: Sequence[int], units: dict[int, UnitTime], decode: float
) -> float:
    """When the last chunk is decoded, the decoder working whenever there is one; ``rounds``: videos of each."""

    @cache
    def alone(together: int) -> tuple[float, float, float]:
        """One round's length, its chunks' time on the decoder, and when one that was free would have done them."""
        seconds = {pair: _row(*pair, branches, together, units) for pair in set(pairwise([*rows, rows[0]]))}
        now = busy = done = 0.0
        for row, after in pairwise([*rows, rows[0]]):
            own = _own(row, branches, together, units)
            for video in range(together if row.finishes else 0):
                clean = _arrival(row, row.finishes, branches, units) + own * video / together
                done = max(done, now + clean) + decode * row.clean
                busy += decode * row.clean
            now += seconds[row, after]
        return now, busy, done

    begin = done = 0.0
    for together in rounds if decode else ():
        length, busy, finished = alone(together)
        done, begin = max(done + busy, begin + finished), begin + length
    return done


def _own(row: RowShape, branches: int, streams: int, units: dict[int, UnitTime]) -> float:
    """Time of all videos' micro-batches at the pace of the slowest part."""
    return streams * branches * sum(units[chunks].pace for chunks in row.held)


def _arrival(row: RowShape, count: int, branches: int, units: dict[int, UnitTime]) -> float:
    """From a video's first micro-batch of a row until so many of them have come back to the first stage."""
    first = [units[chunks] for chunks in row.held[:count]]
    # None overtakes another, so the one with the longest way holds up those behind it.
    return branches * sum(unit.pace for unit in first) + max(unit.way - unit.pace for unit in first)


def useful_stages(params: SamplingParams, streams: int) -> int:
    """Stages beyond which another one brings next to nothing: the micro-batches under way at a time in full windows.

    That is M B in mode window (and displaced with every step exact), else M U B, for M guidance branches, U
    micro-batches of a full window (W where each is a chunk) and B ``streams``. Of n partitions it is M n B, with
    lookahead M (2 n - 1) B; of cached context 2 M B, since a clean chunk's own call is ahead of its window's.
    """
    whole = params.mode == "window" or (params.mode == "displaced" and params.displaced.resync_every_steps == 1)
    # With lookahead a call waits for two of the row before.
    whole_units = params.calls_per_row - params.lookahead + (params.context == "cached")
    units = whole_units if whole else -(-params.window_chunks // params.chunks_per_unit)
    return num_branches(params.guidance_scale) * units * streams


def pipeline_utilisation(params: SamplingParams, plan: WindowPlan, stages: int, streams: int) -> float:
    """Share of the time that equal stages compute, 0..1, for ``streams`` videos of one plan side by side."""
    rows = rows_of(plan, params.mode, params.displaced, params.chunks_per_unit)
    branches = num_branches(params.guidance_scale)

    def unit(chunks: int) -> UnitTime:
        return UnitTime((float(chunks),) * stages)

    return work(rows, branches, streams, unit) / (stages * makespan(rows, branches, streams, streams, unit))
