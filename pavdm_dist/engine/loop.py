"""The loop of one stage: sealed epochs in, units through the stage, messages out.

Knows links but not what carries them, so the same loop runs in an actor and in a thread of a test.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pavdm_dist.engine.messages import ACTIVATION, LATENTS, Header, Layout
from pavdm_dist.engine.order import Join, Unit, epoch_units, is_active, with_exact
from pavdm_dist.engine.stage import RowDone, Stage
from pavdm_dist.engine.transport import Link
from pavdm_dist.models.base import Activation


class EpochFeed:
    """Sealed epochs, handed from the control thread to the stage's loop in order.

    An epoch that is not sealed is never started: its log entries might still change.
    """

    def __init__(self) -> None:
        self._sealed: dict[int, tuple[Sequence[Join], Mapping[int, frozenset[int]]]] = {}
        self._log: list[Join] = []
        self._stop_at: int | None = None
        self._changed = threading.Condition()
        self.epoch = 0
        self._order = 0

    def seal(self, epoch: int, joins: Sequence[Join], exact: Mapping[int, frozenset[int]] | None = None) -> None:
        """Fixes the joins that take effect at ``epoch``, and the rows that adaptive re-sync has made exact so far.

        Epochs may be sealed in any order of arrival.
        """
        with self._changed:
            self._sealed[epoch] = joins, exact or {}
            self._changed.notify_all()

    def stop(self, epoch: int) -> None:
        """No epoch from ``epoch`` on will be sealed: the loop ends there."""
        with self._changed:
            self._stop_at = epoch
            self._changed.notify_all()

    def next(self, block: bool) -> list[Unit] | None:
        """Units of the next epoch; None at the stop, or (without ``block``) when it is not sealed yet."""
        with self._changed:
            while self.epoch not in self._sealed:
                if not block or self._stop_at == self.epoch:
                    return None
                self._changed.wait()
            self._log = [join for join in self._log if is_active(join, self.epoch)]
            joins, exact = self._sealed.pop(self.epoch)
            self._log = with_exact([*self._log, *joins], exact)
            units = epoch_units(self._log, self.epoch, self._order)
            self.epoch += 1
            self._order += len(units)
            return units


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


Emit = Callable[[Unit, RowDone], None]


class StageRunner:
    """Runs a stage until its feed stops.

    Args:
        stage: what computes.
        links: how it is connected.
        feed: the order.
        generation: stamped on and demanded of every message.
        emit: called on the last stage with (unit, result) after every row that made a chunk clean, and after every
            shift of an adaptive stream.
        epoch_done: called with the epoch after its last unit.
        trace: keep a :class:`Span` per unit (unbounded memory: for measurements only).
    """

    def __init__(
        self,
        stage: Stage,
        links: Links,
        feed: EpochFeed,
        generation: int,
        emit: Emit,
        epoch_done: Callable[[int], None],
        trace: bool = False,
    ) -> None:
        self._stage, self._links, self._feed, self._generation = stage, links, feed, generation
        self._emit, self._epoch_done, self._trace = emit, epoch_done, trace
        self._pending: deque[Unit] = deque()
        self._ends: deque[int] = deque()
        self._posted_until = 0
        self._closing_order: dict[tuple[int, int], int] = {}

    def run(self) -> RunReport:
        """Blocks until the feed stops; raises what the stage or a link raises."""
        report, epoch = RunReport(time.time() - time.monotonic()), 0
        while self._refill():
            unit = self._pending.popleft()
            ready = time.monotonic()
            incoming = self._receive(unit)
            start = time.monotonic()
            if self._stage.first and unit.feeds:
                self._closing_order[unit.stream, unit.chunk] = unit.order
                self._feedback().post(self._stage.latents_layout(unit.stream, unit.row + 1, unit.chunk))
            layouts = self._layouts(unit)
            result = self._stage.run(unit, incoming)
            end = time.monotonic()
            self._send(unit, result, layouts)
            report.units += 1
            if self._trace:
                report.trace.append(Span(unit, ready, start, end))
            if unit.order == self._ends[0]:
                self._ends.popleft()
                self._epoch_done(epoch)
                epoch += 1
        for link in (self._links.downstream, self._links.feedback if self._stage.last else None):
            if link is not None:
                link.close()
        report.bytes_forward = self._links.downstream.bytes_sent if self._links.downstream else 0
        report.bytes_feedback = self._links.feedback.bytes_sent if self._stage.last and self._links.feedback else 0
        return report

    def _refill(self) -> bool:
        """Keeps one unit of lookahead where the next epoch is already sealed; False at the stop."""
        while len(self._pending) < 2:
            units = self._feed.next(block=not self._pending)
            if units is None:
                break
            self._pending.extend(units)
            if units:
                self._ends.append(units[-1].order)
        return bool(self._pending)

    def _receive(self, unit: Unit) -> Activation | None:
        upstream = self._links.upstream
        if upstream is not None:
            for ahead in (unit, *list(self._pending)[:1]):
                if ahead.order >= self._posted_until:
                    upstream.post(self._stage.activation_layout(ahead))
                    self._posted_until = ahead.order + 1
            layout = self._stage.activation_layout(unit)
            header = self._header(ACTIVATION, unit, unit.order, layout.numel)
            return Activation(*upstream.receive(header, layout))
        for chunk in unit.fed:
            order = self._closing_order.pop((unit.stream, chunk))
            layout = self._stage.latents_layout(unit.stream, unit.row, chunk)
            header = self._header(LATENTS, replace(unit, row=unit.row - 1, chunk=chunk), order, layout.numel, branch=0)
            (latents,) = self._feedback().receive(header, layout)
            self._stage.feed(unit.stream, unit.row, chunk, latents)
        return None

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
        if isinstance(result, Activation):
            assert self._links.downstream is not None
            assert forward is not None
            tensors = (result.hidden, result.modulation, result.time)
            self._links.downstream.send(self._header(ACTIVATION, unit, unit.order, forward.numel), tensors, forward)
        elif isinstance(result, RowDone):
            if result.latents is not None:
                assert back is not None
                header = self._header(LATENTS, unit, unit.order, back.numel, branch=0)
                self._feedback().send(header, [result.latents], back)
            if result.clean is not None or result.change is not None:
                self._emit(unit, result)

    def _header(self, kind: int, unit: Unit, order: int, numel: int, branch: int | None = None) -> Header:
        branch = unit.branch if branch is None else branch
        return Header(self._generation, kind, order, unit.stream, unit.row, unit.chunk, branch, numel)

    def _feedback(self) -> Link:
        assert self._links.feedback is not None, "only the first and last stage have a feedback link"
        return self._links.feedback
