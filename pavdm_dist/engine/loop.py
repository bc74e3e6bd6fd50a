"""The loop of one stage: sealed epochs in, units through the stage, messages out.

Knows links but not what carries them, so the same loop runs in an actor and in a thread of a test.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from pavdm_dist.engine.events import EpochDone, Event, KeysChanged, Left, Shift
from pavdm_dist.engine.messages import ACTIVATION, LATENTS, Header, Layout
from pavdm_dist.engine.order import Join, LogEntry, Unit, epoch_units
from pavdm_dist.engine.stage import RowDone, Stage
from pavdm_dist.engine.transport import Link
from pavdm_dist.models.base import Activation


@dataclass(frozen=True)
class Epoch:
    """A sealed epoch: what changes at its beginning, and its units in order."""

    number: int
    entry: LogEntry
    units: Sequence[Unit]


class EpochFeed:
    """Sealed epochs, handed from the control thread to the stage's loop in order.

    An epoch that is not sealed is never started: its log entry might still change.
    """

    def __init__(self) -> None:
        self._sealed: dict[int, LogEntry] = {}
        self._log: list[Join] = []
        self._stop_at: int | None = None
        self._changed = threading.Condition()
        self._epoch = 0
        self._order = 0

    def seal(self, epoch: int, entry: LogEntry) -> None:
        """Fixes what changes at ``epoch``; epochs may be sealed in any order of arrival."""
        with self._changed:
            self._sealed[epoch] = entry
            self._changed.notify_all()

    def stop(self, epoch: int) -> None:
        """No epoch from ``epoch`` on will be sealed: the loop ends there."""
        with self._changed:
            self._stop_at = epoch
            self._changed.notify_all()

    def next(self, block: bool) -> Epoch | None:
        """The next epoch; None at the stop, or (without ``block``) when it is not sealed yet."""
        with self._changed:
            while self._epoch not in self._sealed:
                if not block or self._stop_at == self._epoch:
                    return None
                self._changed.wait()
            number, entry = self._epoch, self._sealed.pop(self._epoch)
            self._log = entry.applied(self._log, number)
            units = epoch_units(self._log, number, self._order)
            self._epoch += 1
            self._order += len(units)
            return Epoch(number, entry, units)


@dataclass
class Links:
    """A stage's neighbours: activations from ``upstream`` and to ``downstream``, latents over ``feedback``.

    ``feedback`` is the receiving end on the first stage and the sending end on the last; with one stage it is
    a :class:`~pavdm_dist.engine.transport.LocalLink` and both.
    """

    upstream: Link | None
    downstream: Link | None
    feedback: Link | None


@dataclass(frozen=True)
class Span:
    """One traced unit: compute from ``start`` to ``end``, after waiting for its input since ``ready``.

    Times are seconds of the machine's monotonic clock, comparable between processes of one machine.
    """

    unit: Unit
    ready: float
    start: float
    end: float


@dataclass
class RunReport:
    """What a stage did: units, bytes handed to links, and the trace when it was asked for.

    ``clock`` added to a span's times makes them seconds of the time of day, comparable between machines.
    """

    clock: float
    units: int = 0
    bytes_forward: int = 0
    bytes_feedback: int = 0
    trace: list[Span] = field(default_factory=list)


def events_of(unit: Unit, done: RowDone, left: Mapping[str, Tensor]) -> list[Event]:
    """What the driver is told of a unit of the last stage: something at the end of a shift only.

    Args:
        unit: which.
        done: by the last stage.
        left: keys and values that clean chunks left since the shift before.
    """
    events: list[Event] = []
    if done.change is not None:
        events.append(KeysChanged(unit.stream, unit.row, done.change))
    if done.snapshot is not None:
        events.append(Shift(unit.stream, replace(done.snapshot, left=left), done.clean, done.not_finite))
    return events


@dataclass
class _Awaited:
    """Latents on their way back to the first stage: which message its oldest posted receive will get.

    Where the stream has left meanwhile, nobody wants them; its id may be another's by now.
    """

    header: Header
    layout: Layout
    wanted: bool = True


class StageLoop:
    """Runs a stage until its feed stops.

    Args:
        stage: what computes.
        links: how it is connected.
        feed: the order.
        generation: stamped on and demanded of every message.
        tell: called with what has happened: the end of every epoch, what clean chunks left here in a shift and, on the
            last stage, the end of every stream's shift.
        trace: keep a :class:`Span` per unit (unbounded memory: for measurements only).

    Attributes:
        last: the unit that was run last; None before the first. Any thread may read it.
        units, busy_s: how many were run, and how long the stage computed. Any thread may read them.
    """

    def __init__(
        self,
        stage: Stage,
        links: Links,
        feed: EpochFeed,
        generation: int,
        tell: Callable[[Event | Left], None],
        trace: bool = False,
    ) -> None:
        self._stage, self._links, self._feed, self._generation = stage, links, feed, generation
        self._tell, self._trace = tell, trace
        self._ahead: Epoch | None = None
        self._posted_until = 0
        self._awaited: deque[_Awaited] = deque()
        self.last: Unit | None = None
        self.units, self.busy_s = 0, 0.0

    def run(self) -> RunReport:
        """Blocks until the feed stops; raises what the stage or a link raises."""
        report = RunReport(time.time() - time.monotonic())
        while (epoch := self._ahead or self._feed.next(block=True)) is not None:
            self._ahead = None
            for stream in epoch.entry.leaves:
                self._leave(stream)
            for stream, plan in epoch.entry.stops.items():
                self._stage.stop(stream, plan)
            for stream, changes in epoch.entry.prompts.items():
                for new in changes:
                    self._stage.change(stream, new)
            for position, unit in enumerate(epoch.units):
                self._run_unit(unit, epoch.units[position + 1 :][:1] or self._first_of_next(), report)
            self._tell(EpochDone(epoch.number))
        while self._awaited:  # of streams that left: their latents were sent before anybody knew
            self._take_back()
        for link in (self._links.downstream, self._links.feedback if self._stage.last else None):
            if link is not None:
                link.close()
        report.bytes_forward = self._links.downstream.bytes_sent if self._links.downstream else 0
        report.bytes_feedback = self._links.feedback.bytes_sent if self._stage.last and self._links.feedback else 0
        return report

    def _leave(self, stream: int) -> None:
        self._stage.leave(stream)
        for awaited in self._awaited:
            awaited.wanted = awaited.wanted and awaited.header.stream != stream

    def _first_of_next(self) -> Sequence[Unit]:
        """The first unit of the next epoch where that is already sealed."""
        self._ahead = self._ahead or self._feed.next(block=False)
        return [] if self._ahead is None else self._ahead.units[:1]

    def _run_unit(self, unit: Unit, following: Sequence[Unit], report: RunReport) -> None:
        ready = time.monotonic()
        incoming = self._receive(unit, following)
        start = time.monotonic()
        if self._stage.first and unit.feeds:
            layout = self._stage.latents_layout(unit.stream, unit.row + 1, unit.chunk)
            self._awaited.append(_Awaited(self._header(LATENTS, unit, layout, branch=0), layout))
            self._feedback().post(layout)
        layouts = self._layouts(unit)
        result = self._stage.run(unit, incoming)
        end = time.monotonic()
        self._send(unit, result, layouts)
        self.last = unit
        report.units += 1
        self.units, self.busy_s = self.units + 1, self.busy_s + end - start
        if self._trace:
            report.trace.append(Span(unit, ready, start, end))

    def _receive(self, unit: Unit, following: Sequence[Unit]) -> Activation | None:
        upstream = self._links.upstream
        if upstream is not None:
            for ahead in (unit, *following):
                if ahead.order >= self._posted_until:
                    upstream.post(self._stage.activation_layout(ahead))
                    self._posted_until = ahead.order + 1
            layout = self._stage.activation_layout(unit)
            return Activation(*upstream.receive(self._header(ACTIVATION, unit, layout), layout))
        for chunk in unit.fed:
            awaited, latents = self._take_back()
            while not awaited.wanted:
                awaited, latents = self._take_back()
            found = awaited.header.stream, awaited.header.chunk
            assert found == (unit.stream, chunk), "latents come back in the order in which they are awaited"
            self._stage.feed(unit.stream, unit.row, chunk, latents)
        return None

    def _take_back(self) -> tuple[_Awaited, Tensor]:
        """The oldest latents on their way back."""
        awaited = self._awaited.popleft()
        (latents,) = self._feedback().receive(awaited.header, awaited.layout)
        return awaited, latents

    def _layouts(self, unit: Unit) -> tuple[Layout | None, Layout | None]:
        """What this unit may send, computed while the stage still knows the stream."""
        forward = self._stage.activation_layout(unit) if self._links.downstream is not None else None
        back = None
        if self._stage.last and unit.feeds:
            back = self._stage.latents_layout(unit.stream, unit.row + 1, unit.chunk)
        return forward, back

    def _send(
        self, unit: Unit, result: Activation | RowDone | None, layouts: tuple[Layout | None, Layout | None]
    ) -> None:
        forward, back = layouts
        left = self._stage.newly_left(unit)
        if left is not None and not self._stage.last:
            self._tell(Left(unit.stream, unit.row, left))
        if isinstance(result, Activation):
            assert self._links.downstream is not None
            assert forward is not None
            tensors = (result.hidden, result.modulation, result.time)
            self._links.downstream.send(self._header(ACTIVATION, unit, forward), tensors, forward)
        elif isinstance(result, RowDone):
            if result.latents is not None:
                assert back is not None
                self._feedback().send(self._header(LATENTS, unit, back, branch=0), [result.latents], back)
            for event in events_of(unit, result, left or {}):
                self._tell(event)

    def _header(self, kind: int, unit: Unit, layout: Layout, branch: int | None = None) -> Header:
        branch = unit.branch if branch is None else branch
        return Header(self._generation, kind, unit.order, unit.stream, unit.row, unit.chunk, branch, layout.numel)

    def _feedback(self) -> Link:
        assert self._links.feedback is not None, "only the first and last stage have a feedback link"
        return self._links.feedback
