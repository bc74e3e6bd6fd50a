"""How long a pipeline takes for videos, in closed form, row by row; the simulator's figure without simulating.

A row of videos in step takes the longer of all their micro-batches at the pace of the slowest part, and one
micro-batch's way through the stages and back (its next step needs the last one). Growing and draining windows have
fewer micro-batches, or smaller ones; a whole window among single chunks waits until the pipeline has emptied. A decoder
beside the stages takes finished chunks one after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from pavdm_dist.method.microbatches import WHOLE, Displaced, MicroBatches, slots_of
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.request import SamplingParams


@dataclass(frozen=True)
class RowShape:
    """Micro-batches of one branch of one row.

    Attributes:
        sizes: chunks that each of them holds, in order.
        turns: the window has moved since the row before, so that another chunk comes first.
        finishes: a chunk is clean after it.
    """

    sizes: tuple[int, ...]
    turns: bool = False
    finishes: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is one micro-batch, which needs all chunks of the row before."""
        return len(self.sizes) == 1

    @property
    def lead(self) -> int:
        """Chunks of the first micro-batch that the next row waits for; a clean chunk may come before it."""
        return max(self.sizes[:2])


@dataclass(frozen=True)
class UnitTime:
    """What a micro-batch of some number of chunks takes, in any one unit of time.

    Attributes:
        stages: on each stage.
        link: time it occupies the link between two stages.
        latency: from the end of a send to the receiver having it.
    """

    stages: Sequence[float]
    link: float = 0.0
    latency: float = 0.0

    @property
    def pace(self) -> float:
        """From one micro-batch to the next."""
        return max(*self.stages, self.link if len(self.stages) > 1 else 0.0)

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
    rows = list[RowShape]()
    for row in plan.rows():
        parts = batches.parts(row.index)
        if parts[-1][0] == WHOLE:
            held = slots_of(plan, row, WHOLE)
            # A clean chunk's own call comes right before the window's, on every stage: as one.
            sizes: tuple[int, ...] = (held.stop - held.start + len(parts) - 1,)
        else:
            sizes = tuple(len(batches.held(row.index, chunk)) for chunk, _ in parts)
        turns = row.index > 0 and row.index % plan.steps_per_shift == 0
        rows.append(RowShape(sizes, turns, row.emit is not None))
    return rows


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
    units = {chunks: unit(chunks) for chunks in {size for row in rows for size in row.sizes}}

    def body(together: int) -> float:
        return sum(_row(row, after, branches, together, units) * count for (row, after), count in pairs.items())

    total = (rounds * body(streams) if rounds else 0.0) + (body(rest) if rest else 0.0)
    sampled = total + _emptying(rows[-1], branches, rest or streams, units, last=True)
    return max(sampled, _decoded(rows, branches, [streams] * rounds + [rest] * (rest > 0), units, decode))


def work(rows: Sequence[RowShape], branches: int, videos: int, unit: Callable[[int], UnitTime]) -> float:
    """Time of all stages together that is spent computing."""
    held = Counter[int]()
    for row in rows:
        held.update(row.sizes)
    return videos * branches * sum(count * sum(unit(chunks).stages) for chunks, count in held.items())


def _row(row: RowShape, after: RowShape, branches: int, streams: int, units: dict[int, UnitTime]) -> float:
    """From the row's first micro-batch on the first stage to that of the row after."""
    own, trip = _own_and_trip(row, branches, streams, units)
    late = 0.0
    if after.turns and not row.whole and own <= trip:
        # The chunk that is last in the first micro-batch from now on came back with the second.
        late = branches * units[row.sizes[1]].pace
    # A whole window needs all chunks of the row before.
    if after.whole and max(row.sizes) < after.sizes[0]:
        late = max(late, _emptying(row, branches, streams, units))
    return max(own, trip) + late


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
            own, trip = _own_and_trip(row, branches, together, units)
            for video in range(together if row.finishes else 0):
                done = max(done, now + trip + own * video / together) + decode
                busy += decode
            now += seconds[row, after]
        return now, busy, done

    begin = done = 0.0
    for together in rounds if decode else ():
        length, busy, finished = alone(together)
        done, begin = max(done + busy, begin + finished), begin + length
    return done


def _emptying(row: RowShape, branches: int, streams: int, units: dict[int, UnitTime], last: bool = False) -> float:
    """After the row's time is over, until the first video's (or ``last``: the last one's) last micro-batch is through.

    Other videos' micro-batches fill that time.
    """
    own, trip = _own_and_trip(row, branches, streams, units)
    through = trip - branches * units[row.lead].pace
    return max(0.0, (own if last else own / streams) + through - max(own, trip))


def _own_and_trip(row: RowShape, branches: int, streams: int, units: dict[int, UnitTime]) -> tuple[float, float]:
    unit = units[row.lead]
    own = streams * branches * sum(units[size].pace for size in row.sizes)
    return own, unit.way + (branches - 1) * unit.pace


def useful_stages(params: SamplingParams, streams: int) -> int:
    """Stages beyond which another one brings next to nothing: the micro-batches under way at a time in full windows.

    That is M B in mode window (and displaced with every step exact), else M U B, for M guidance branches, U
    micro-batches of a full window (W where each is a chunk) and B ``streams``.
    """
    whole = params.mode == "window" or (params.mode == "displaced" and params.displaced.resync_every_steps == 1)
    units = 1 if whole else -(-params.window_chunks // params.chunks_per_unit)
    return num_branches(params.guidance_scale) * units * streams


def pipeline_utilisation(params: SamplingParams, plan: WindowPlan, stages: int, streams: int) -> float:
    """Share of the time that equal stages compute, 0..1, for ``streams`` videos of one plan side by side."""
    rows = rows_of(plan, params.mode, params.displaced, params.chunks_per_unit)
    branches = num_branches(params.guidance_scale)

    def unit(chunks: int) -> UnitTime:
        return UnitTime((float(chunks),) * stages)

    return work(rows, branches, streams, unit) / (stages * makespan(rows, branches, streams, streams, unit))
