"""The one order in which all stages work, computed and never communicated.

A unit is one micro-batch of one (stream, guidance branch) at one row: its whole window, a partition of it, or so many
chunks. Every stage derives the same list from an append-only log of entries, so no driver sits in the data path and no
message needs a tag. Oldest row first, then streams by age, chunks cleanest first (partitions noisiest first), branches
innermost: sending one branch of all streams before the other costs 18-34 % of the pipeline's throughput.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pavdm_dist.method.microbatches import LEAST_ADAPTIVE_STEPS, WHOLE, MicroBatches, check_adaptive
from pavdm_dist.method.recovery import own_row
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import NewPrompt, Stream

# Rows every stream advances in one epoch. A log entry takes effect at an epoch's first row; the driver seals
# epochs ahead of the stages, so more rows mean fewer control messages and later joins. A row's report of adaptive
# re-sync must not be awaited within the row's own epoch.
ROWS_PER_EPOCH = 2 * LEAST_ADAPTIVE_STEPS


@dataclass(frozen=True)
class Join:
    """A stream enters the pipeline: its row ``first_row`` is the first one of epoch ``epoch``.

    ``end_row`` is one past its last row, None while it is endless; it leaves by itself after that. ``batches`` cuts its
    rows into micro-batches; without it each row is one whole window. ``again`` are clean chunks whose own calls, by the
    rows that they were in, come once more before the first row.
    """

    stream: int
    epoch: int
    first_row: int
    end_row: int | None
    branches: int
    batches: MicroBatches | None = None
    again: tuple[tuple[int, int], ...] = ()

    def row_at(self, epoch: int) -> int:
        """The stream's row that is the first one of ``epoch``; past ``end_row`` once it has left."""
        return self.first_row + (epoch - self.epoch) * ROWS_PER_EPOCH

    def has_row(self, row: int) -> bool:
        """Whether ``row`` is before its end."""
        return self.end_row is None or row < self.end_row

    def stopped(self, plan: WindowPlan) -> Join:
        """With the end that an endless stream was given."""
        assert self.batches is not None, "only streams are stopped"
        return replace(self, end_row=plan.num_rows, batches=replace(self.batches, plan=plan))


@dataclass(frozen=True)
class LogEntry:
    """What changes at the first row of an epoch.

    Attributes:
        joins: streams that enter.
        leaves: streams that end where they are: their units are gone from this epoch on, what stages hold of them too.
        stops: endless streams whose end is known now, with the plan they follow from here.
        exact: by stream, the rows that adaptive re-sync has made exact so far.
        prompts: by stream, other prompts for chunks that are born from here on.
    """

    joins: tuple[Join, ...] = ()
    leaves: tuple[int, ...] = ()
    stops: Mapping[int, WindowPlan] = field(default_factory=dict)
    exact: Mapping[int, frozenset[int]] = field(default_factory=dict)
    prompts: Mapping[int, tuple[NewPrompt, ...]] = field(default_factory=dict)

    def applied(self, log: Sequence[Join], epoch: int) -> list[Join]:
        """The log of the streams that have units in ``epoch``, after this entry."""
        kept = [join for join in log if is_active(join, epoch) and join.stream not in self.leaves]
        changed = [join.stopped(self.stops[join.stream]) if join.stream in self.stops else join for join in kept]
        return with_exact([*changed, *self.joins], self.exact)


@dataclass(frozen=True)
class Unit:
    """One micro-batch of the order.

    Attributes:
        order: position in the run's order, from 0.
        stream: stream id.
        row: row of the stream's plan.
        branch: guidance branch.
        opens, closes: first or last branch of the micro-batch.
        fed: micro-batches of the row before whose latents come back from the last stage before this one can begin, by
            their first chunks; none in a stream's first row and for newborn chunks.
        feeds: the last stage sends the latents it updates back, for the next row.
        ends_stream: nothing of the stream follows its last branch.
        chunk: index of the first chunk that it moves, or of its clean one; ``WHOLE`` when the unit is the whole window.
        context: its chunk is clean: it gets no update, later units of the shift attend to it.
    """

    order: int
    stream: int
    row: int
    branch: int
    opens: bool
    closes: bool
    fed: tuple[int, ...]
    feeds: bool
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
             part.fed if branch == 0 else (), part.feeds and branch == join.branches - 1,
             part.last and not join.has_row(row + 1), part.chunk, part.context)
        for offset, (join, row, part, branch) in enumerate(_slots(log, epoch))
    ]  # fmt: skip


def _slots(log: Sequence[Join], epoch: int) -> Iterator[tuple[Join, int, _Part, int]]:
    for tick in range(ROWS_PER_EPOCH):
        for join in log:
            row = join.row_at(epoch) + tick
            if join.epoch == epoch and not tick:
                for at, chunk in join.again:
                    for branch in range(join.branches):
                        yield join, at, _Part(chunk, True, (), False, False), branch
            if join.epoch <= epoch and join.has_row(row):
                for part in _parts(join, row):
                    for branch in range(join.branches):
                        yield join, row, part, branch


@dataclass(frozen=True)
class _Part:
    """A micro-batch of a row; ``last`` of it."""

    chunk: int
    context: bool
    fed: tuple[int, ...]
    feeds: bool
    last: bool


def _parts(join: Join, row: int) -> list[_Part]:
    starts, ends, batches = row == join.first_row, not join.has_row(row + 1), join.batches
    if batches is None:
        return [_Part(WHOLE, False, () if starts else (WHOLE,), not ends, True)]
    parts = batches.parts(row)
    fed = ((),) * len(parts) if starts else batches.fed(row)
    sent = () if ends else batches.sent(row)
    return [
        _Part(chunk, context, fed[i], chunk in sent and not context, i == len(parts) - 1)
        for i, (chunk, context) in enumerate(parts)
    ]


def with_exact(log: Sequence[Join], rows: Mapping[int, frozenset[int]]) -> list[Join]:
    """The log with the rows that adaptive re-sync has made exact, by stream."""
    return [
        replace(join, batches=replace(join.batches, exact_rows=rows[join.stream]))
        if join.batches is not None and join.stream in rows
        else join
        for join in log
    ]


def undecided(log: Sequence[Join], epoch: int, reported: Mapping[int, int]) -> bool:
    """Whether ``epoch`` holds a row of which adaptive re-sync has not yet said whether it is exact.

    Args:
        log: streams in flight.
        epoch: which one.
        reported: by stream, the last row whose report is there.
    """
    for join in log:
        if join.batches is None or not join.batches.adaptive:
            continue
        first = join.row_at(epoch)
        for row in filter(join.has_row, range(first, first + ROWS_PER_EPOCH)):
            needed = join.batches.decided_by(row)
            if needed is not None and reported.get(join.stream, -1) < needed:
                return True
    return False


def epochs(
    enter: Callable[[int], Join | None],
    streams_in_flight: int,
    exact: Mapping[int, frozenset[int]] | None = None,
) -> Iterator[list[Unit]]:
    """Units of all epochs, with streams taken as places become free.

    Args:
        enter: called with an epoch; the next stream's join at that epoch, None when there is none left.
        streams_in_flight: places.
        exact: rows that adaptive re-sync has made exact, by stream; read anew at every epoch.
    """
    log, epoch, order = list[Join](), 0, 0
    while True:
        log = [join for join in log if is_active(join, epoch)]
        while len(log) < streams_in_flight and (join := enter(epoch)) is not None:
            log.append(join)
        if not log:
            return
        log = with_exact(log, exact or {})
        units = epoch_units(log, epoch, order)
        yield units
        epoch, order = epoch + 1, order + len(units)


def is_active(join: Join, epoch: int) -> bool:
    """Whether a stream still has units in ``epoch``."""
    return join.has_row(join.row_at(epoch))


def join_of(stream: Stream, epoch: int) -> Join:
    """A stream's entry at the first row of ``epoch``.

    Raises:
        ConfigError: see :func:`~pavdm_dist.method.microbatches.check_adaptive`.
    """
    check_adaptive(stream.batches)
    end = None if stream.plan.num_chunks is None else stream.plan.num_rows
    again = tuple((own_row(stream.plan, chunk).index, chunk) for chunk in stream.replayed)
    return Join(stream.id, epoch, stream.first_row, end, stream.branches, stream.batches, again)
