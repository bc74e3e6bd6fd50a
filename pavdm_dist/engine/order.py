"""The one order in which all stages work, computed and never communicated.

A unit is one micro-batch of one (stream, guidance branch) at one row: its whole window, or a single chunk of it.
Every stage derives the same list from an append-only log of joins, so no driver sits in the data path and no
message needs a tag. Oldest row first, then streams by age, chunks cleanest first, branches innermost: sending one
branch of all streams before the other costs 18-34 % of the pipeline's throughput.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pavdm_dist.schedule import WindowPlan

# Rows every stream advances in one epoch. A log entry takes effect at an epoch's first row; the driver seals
# epochs ahead of the stages, so more rows mean fewer control messages and later joins.
ROWS_PER_EPOCH = 4
# The chunk of a unit that is a whole window.
WHOLE = -(2**31)


@dataclass(frozen=True)
class Join:
    """A stream enters the pipeline: its row ``first_row`` is the first one of epoch ``epoch``.

    ``end_row`` is one past its last row; it leaves by itself after that. With a ``chunk_plan`` its units are single
    chunks of that plan's rows, preceded by the clean context chunk in the first row that has it; else whole windows.
    """

    stream: int
    epoch: int
    first_row: int
    end_row: int
    branches: int
    chunk_plan: WindowPlan | None = None


@dataclass(frozen=True)
class Unit:
    """One micro-batch of the order.

    Attributes:
        order: position in the run's order, from 0.
        stream: stream id.
        row: row of the stream's plan.
        branch: guidance branch.
        opens_row, closes_row: first or last branch of the row (of the row's chunk, where units are chunks).
        starts_stream, ends_stream: the row is the first or last one the stream runs here.
        chunk: index of the chunk; ``WHOLE`` when the unit is the whole window.
        context: the chunk is clean: it gets no update, later units of the shift attend to it.
    """

    order: int
    stream: int
    row: int
    branch: int
    opens_row: bool
    closes_row: bool
    starts_stream: bool
    ends_stream: bool
    chunk: int = WHOLE
    context: bool = False


def epoch_units(log: Sequence[Join], epoch: int, first_order: int) -> list[Unit]:
    """Units of one epoch, in order.

    Args:
        log: all joins so far, in the order in which they were sealed.
        epoch: which one.
        first_order: number of units in all earlier epochs.
    """
    return [
        Unit(first_order + offset, join.stream, row, branch, branch == 0, branch == join.branches - 1,
             row == join.first_row, row == join.end_row - 1, chunk, context)
        for offset, (join, row, chunk, context, branch) in enumerate(_slots(log, epoch))
    ]  # fmt: skip


def _slots(log: Sequence[Join], epoch: int) -> Iterator[tuple[Join, int, int, bool, int]]:
    for tick in range(ROWS_PER_EPOCH):
        for join in log:
            row = join.first_row + (epoch - join.epoch) * ROWS_PER_EPOCH + tick
            if join.epoch <= epoch and row < join.end_row:
                for chunk, context in _parts(join, row):
                    for branch in range(join.branches):
                        yield join, row, chunk, context, branch


def _parts(join: Join, row: int) -> Iterator[tuple[int, bool]]:
    """Chunks of a row in order, and whether each is context."""
    if join.chunk_plan is None:
        yield WHOLE, False
        return
    now = join.chunk_plan.row(row)
    known = join.chunk_plan.row(row - 1).context if row > join.first_row else ()
    yield from ((chunk, True) for chunk in now.context if chunk not in known)
    yield from ((chunk, False) for chunk in now.chunks)


def epochs(enter: Callable[[int], Join | None], streams_in_flight: int) -> Iterator[list[Unit]]:
    """Units of all epochs, with streams taken as places become free.

    Args:
        enter: called with an epoch; the next stream's join at that epoch, None when there is none left.
        streams_in_flight: places.
    """
    log, epoch, order = list[Join](), 0, 0
    while True:
        log = [join for join in log if is_active(join, epoch)]
        while len(log) < streams_in_flight and (join := enter(epoch)) is not None:
            log.append(join)
        if not log:
            return
        units = epoch_units(log, epoch, order)
        yield units
        epoch, order = epoch + 1, order + len(units)


def is_active(join: Join, epoch: int) -> bool:
    """Whether a stream still has units in ``epoch``."""
    return join.first_row + (epoch - join.epoch) * ROWS_PER_EPOCH < join.end_row
