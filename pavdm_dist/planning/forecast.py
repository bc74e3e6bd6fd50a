"""How long a pipeline takes for videos, in closed form, row by row; the simulator's figure without simulating.

A row of videos in step takes the longer of all their micro-batches at the pace of the slowest part, and one
micro-batch's way through the stages and back (its next step needs the last one). Growing and draining windows have
fewer micro-batches, or smaller ones; a whole window among single chunks waits until the pipeline has emptied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pavdm_dist.method.microbatches import Displaced, MicroBatches
from pavdm_dist.method.schedule import Mode, WindowPlan


@dataclass(frozen=True)
class Row:
    """Micro-batches of one branch of one row.

    Attributes:
        units: how many.
        chunks: held by each.
        turns: the window has moved since the row before, so that another chunk comes first.
    """

    units: int
    chunks: int
    turns: bool = False


@dataclass(frozen=True)
class Unit:
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


def rows_of(plan: WindowPlan, mode: Mode, displaced: Displaced | None = None) -> list[Row]:
    """All rows of a video; without those that adaptive re-sync would make exact, which nobody knows beforehand."""
    batches, rows = MicroBatches(plan, mode, 0, displaced or Displaced()), list[Row]()
    for row in plan.rows():
        parts = batches.parts(row.index)
        whole = len(parts) == 1 and parts[0][0] not in row.window
        turns = row.index > 0 and row.index % plan.steps_per_shift == 0
        rows.append(Row(len(parts), len(row.window) if whole else 1, turns))
    return rows


def makespan(rows: Sequence[Row], branches: int, streams: int, videos: int, unit: Callable[[int], Unit]) -> float:
    """Time until all videos are done.

    Args:
        rows: of one video.
        branches: guidance branches.
        streams: videos in flight, which go in step.
        videos: in all; the last ones go with fewer in flight where they do not divide.
        unit: what a micro-batch of so many chunks takes.
    """
    rounds, rest = divmod(videos, streams)
    pairs = Counter(pairwise([*rows, rows[0]]))
    units = {chunks: unit(chunks) for chunks in {row.chunks for row in rows}}

    def body(together: int) -> float:
        return sum(_row(row, after, branches, together, units) * count for (row, after), count in pairs.items())

    total = (rounds * body(streams) if rounds else 0.0) + (body(rest) if rest else 0.0)
    return total + _emptying(rows[-1], branches, rest or streams, units, last=True)


def work(rows: Sequence[Row], branches: int, videos: int, unit: Callable[[int], Unit]) -> float:
    """Time of all stages together that is spent computing."""
    held = Counter[int]()
    for row in rows:
        held[row.chunks] += row.units
    return videos * branches * sum(count * sum(unit(chunks).stages) for chunks, count in held.items())


def _row(row: Row, after: Row, branches: int, streams: int, units: dict[int, Unit]) -> float:
    """From the row's first micro-batch on the first stage to that of the row after."""
    unit = units[row.chunks]
    own, trip = _own_and_trip(row, branches, streams, units)
    late = 0.0
    if after.turns and row.units > 1 and own <= trip:
        # The chunk that is first from now on was second: it comes back one micro-batch after the first.
        late = branches * unit.pace
    # A whole window needs all chunks of the row before.
    if row.chunks < after.chunks:
        late = max(late, _emptying(row, branches, streams, units))
    return max(own, trip) + late


def _emptying(row: Row, branches: int, streams: int, units: dict[int, Unit], last: bool = False) -> float:
    """After the row's time is over, until the first video's (or ``last``: the last one's) last micro-batch is through.

    Other videos' micro-batches fill that time.
    """
    own, trip = _own_and_trip(row, branches, streams, units)
    through = trip - branches * units[row.chunks].pace
    return max(0.0, (own if last else own / streams) + through - max(own, trip))


def _own_and_trip(row: Row, branches: int, streams: int, units: dict[int, Unit]) -> tuple[float, float]:
    unit = units[row.chunks]
    return streams * branches * row.units * unit.pace, unit.way + (branches - 1) * unit.pace
