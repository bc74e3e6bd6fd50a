"""The loop of one stage: sealed epochs in, units through the stage, messages out.

Knows links but not what carries them, so the same loop runs in an actor and in a thread of a test.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.engine.clock import Clock
from pavdm_dist.engine.events import EpochDone, Event, KeysChanged, Left, Shift
from pavdm_dist.engine.feed import Epoch, EpochFeed
from pavdm_dist.engine.lines import of_video
from pavdm_dist.engine.messages import ACTIVATION, LATENTS, Header, Layout
from pavdm_dist.engine.order import Unit
from pavdm_dist.engine.readback import Readback, Teller
from pavdm_dist.engine.spans import RunReport, Span
from pavdm_dist.engine.stage import RowDone, Stage
from pavdm_dist.engine.transport import Link
from pavdm_dist.errors import EngineError
from pavdm_dist.models.base import Activation


@dataclass
class Links:
    """A stage's neighbours: activations from ``upstream`` and to ``downstream``, latents over ``feedback``.

    ``feedback`` is the receiving end on the first stage and the sending end on the last; with one stage it is
    a :class:`~pavdm_dist.engine.transport.LocalLink` and both.
    """

    upstream: Link | None
    downstream: Link | None
    feedback: Link | None


def events_of(unit: Unit, done: RowDone, left: Mapping[str, Tensor]) -> list[Event]:
    """What the driver is told of a unit of the last stage: something at the end of a shift only. Waits for the device.

    Args:
        unit: which.
        done: by the last stage.
        left: keys and values that clean chunks left since the shift before.
    """
    events: list[Event] = []
    if done.change is not None:
        events.append(KeysChanged(unit.stream, unit.row, done.change))
    if (snapshot := done.snapshot) is not None:
        events.append(Shift(unit.stream, replace(snapshot, left=left), done.clean, done.not_finite))
    return events


@dataclass
class _Awaited:
    """Latents on their way back to the first stage: which message its oldest posted receive will get.

    Where the stream has left meanwhile, nobody wants them; its id may be another's by now.
    """

    header: Header
    layout: Layout
    wanted: bool = True


@dataclass(frozen=True)
class _Messages:
    """What a unit receives from or sends to a neighbour: ``activation`` between all stages, ``latents`` from the last
    back to the first, for the next row; None where it sends none."""

    unit: Unit
    activation: tuple[Header, Layout]
    latents: tuple[Header, Layout] | None


@dataclass(frozen=True)
class _Ahead:
    """An epoch that comes next, with what its units send and receive; None where that is only known at its beginning,
    because something else than new streams changes there."""

    epoch: Epoch
    messages: list[_Messages] | None


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
        last: the unit that was finished last; None before the first. Any thread may read it.
        units, busy_s: how many were finished, and how long the stage computed. Any thread may read them.
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
        self._ahead: _Ahead | None = None
        self._posted_until = 0
        self._awaited: deque[_Awaited] = deque()
        self._teller, self._readback = Teller(stage.device, feed.break_off), Readback(stage.device)
        self.last: Unit | None = None
        self.units, self.busy_s = 0, 0.0

    @torch.inference_mode()  # so that what comes by a link is what compiled blocks were rehearsed on
    def run(self) -> RunReport:
        """Blocks until the feed stops; raises what the stage or a link raises."""
        report, clock = RunReport(time.time() - time.monotonic()), Clock(self._stage.device)
        marks = list[tuple[Unit, Any, Any, Any]]()
        while (ahead := self._ahead or self._prepared(self._feed.next(block=True))) is not None:
            self._ahead, epoch = None, ahead.epoch
            for stream in epoch.entry.leaves:
                self._leave(stream)
            for stream, plan in epoch.entry.stops.items():
                self._stage.stop(stream, plan)
            for stream, changes in epoch.entry.prompts.items():
                for new in changes:
                    self._stage.change(stream, new)
            messages = ahead.messages
            if messages is None:
                messages = self._begun(epoch)
            self._announce(messages)
            for position, own in enumerate(messages):
                times = self._run_unit(own, messages[position + 1 : position + 2], clock)
                report.units += 1
                if self._trace:
                    marks.append((own.unit, *times))
            self._end(epoch.number)
        while self._awaited:  # of streams that left: their latents were sent before anybody knew
            self._take_back()
        for link in (self._links.downstream, self._links.feedback if self._stage.last else None):
            if link is not None:
                link.close()
        self._teller.close()
        report.trace = [Span(unit, *map(clock.seconds, times)) for unit, *times in marks]
        report.bytes_forward = self._links.downstream.bytes_sent if self._links.downstream else 0
        report.bytes_feedback = self._links.feedback.bytes_sent if self._stage.last and self._links.feedback else 0
        return report

    def _leave(self, stream: int) -> None:
        self._stage.leave(stream)
        for awaited in self._awaited:
            awaited.wanted = awaited.wanted and awaited.header.stream != stream

    def _look_ahead(self) -> None:
        """Gets ready for the next epoch where that is already sealed: called where a message is waited for anyway."""
        self._ahead = self._ahead or self._prepared(self._feed.next(block=False))

    def _prepared(self, epoch: Epoch | None) -> _Ahead | None:
        if epoch is None:
            return None
        entry = epoch.entry
        return _Ahead(epoch, None if entry.leaves or entry.stops or entry.prompts else self._begun(epoch))

    def _begun(self, epoch: Epoch) -> list[_Messages]:
        self._stage.begin(epoch.units)
        return [self._messages(unit) for unit in epoch.units]

    def _next(self) -> list[_Messages]:
        """Messages of the first unit of the next epoch, where that is already sealed."""
        self._look_ahead()
        if self._ahead is None:
            return []
        return (self._ahead.messages or [self._messages(unit) for unit in self._ahead.epoch.units[:1]])[:1]

    def _messages(self, unit: Unit) -> _Messages:
        layout, latents = self._stage.activation_layout(unit), None
        if unit.feeds and (self._stage.first or self._stage.last):
            back = self._stage.latents_layout(unit.stream, unit.row + 1, unit.chunk)
            latents = self._header(LATENTS, unit, back, branch=0), back
        return _Messages(unit, (self._header(ACTIVATION, unit, layout), layout), latents)

    def _announce(self, messages: Sequence[_Messages]) -> None:
        forward = [own.activation[0] for own in messages]
        back = [own.latents[0] for own in messages if own.latents is not None]
        links = self._links
        for link, headers in ((links.upstream, forward), (links.downstream, forward), (links.feedback, back)):
            if link is not None:
                link.announce(headers)

    def _run_unit(self, own: _Messages, following: Sequence[_Messages], clock: Clock) -> tuple[Any, Any, Any]:
        """Returns the marks of its being awaited, its start and its end."""
        unit, upstream = own.unit, self._links.upstream
        late = upstream is not None and upstream.posts_late
        ready = clock.mark()
        incoming = self._receive(own, following, late)
        start = clock.mark()
        back = self._feedback() if self._stage.first and own.latents is not None else None
        if back is not None and not back.posts_late:
            self._await(back, own)
        with of_video(unit.stream):
            result = self._stage.run(unit, incoming)
        if back is not None and back.posts_late:
            self._await(back, own)
        if late:
            self._post(following or self._next())
        end = clock.mark()
        self._send(own, result)
        self._teller.then(partial(self._finished, unit, partial(clock.between, start, end)))
        return ready, start, end

    def _finished(self, unit: Unit, busy_s: Callable[[], float]) -> None:
        self.last = unit
        self.units, self.busy_s = self.units + 1, self.busy_s + busy_s()

    def _await(self, back: Link, own: _Messages) -> None:
        """Gets ready for the latents of a unit that come back."""
        assert own.latents is not None
        self._awaited.append(_Awaited(*own.latents))
        back.post(own.latents[1])

    def _post(self, messages: Sequence[_Messages]) -> None:
        assert self._links.upstream is not None
        for own in messages:
            if own.unit.order >= self._posted_until:
                self._links.upstream.post(own.activation[1])
                self._posted_until = own.unit.order + 1

    def _receive(self, own: _Messages, following: Sequence[_Messages], late: bool) -> Activation | None:
        unit, upstream = own.unit, self._links.upstream
        if upstream is not None:
            self._post([own] if late else [own, *(following or self._next())])
            self._look_ahead()
            return Activation(*upstream.receive(*own.activation))
        if unit.fed:
            self._look_ahead()
        for chunk in unit.fed:
            awaited, latents = self._take_back()
            while not awaited.wanted:
                awaited, latents = self._take_back()
            found = awaited.header.stream, awaited.header.chunk
            assert found == (unit.stream, chunk), "latents come back in the order in which they are awaited"
            self._stage.feed(unit.stream, unit.row, chunk, latents)
        return None

    def _end(self, epoch: int) -> None:
        """Tells of the end of an epoch once it has been reached, and no message was another than expected."""
        links = (self._links.upstream, self._links.feedback)
        verdicts = [verdict for link in links if link is not None and (verdict := link.verdict()) is not None]
        copies = self._readback(verdicts)

        def tell() -> None:
            if any(int(differ) for differ in copies.take()):
                raise EngineError(f"link out of order: a message of epoch {epoch} was another than expected")
            self._tell(EpochDone(epoch))

        self._teller.then(tell)

    def _take_back(self) -> tuple[_Awaited, Tensor]:
        """The oldest latents on their way back."""
        awaited = self._awaited.popleft()
        (latents,) = self._feedback().receive(awaited.header, awaited.layout)
        return awaited, latents

    def _send(self, own: _Messages, result: Activation | RowDone | None) -> None:
        unit, left = own.unit, self._stage.newly_left(own.unit)
        if left is not None and not self._stage.last:
            self._teller.then(lambda: self._tell(Left(unit.stream, unit.row, left())))
        if isinstance(result, Activation):
            assert self._links.downstream is not None
            header, layout = own.activation
            self._links.downstream.send(header, (result.hidden, result.modulation, result.time), layout)
        elif isinstance(result, RowDone):
            if result.latents is not None:
                assert own.latents is not None
                header, layout = own.latents
                self._feedback().send(header, [result.latents], layout)
            if result.end is not None:
                self._teller.then(partial(self._tell_shift, unit, result, left))

    def _tell_shift(self, unit: Unit, done: RowDone, left: Callable[[], dict[str, Tensor]] | None) -> None:
        for event in events_of(unit, done, {} if left is None else left()):
            self._tell(event)

    def _header(self, kind: int, unit: Unit, layout: Layout, branch: int | None = None) -> Header:
        branch = unit.branch if branch is None else branch
        return Header(self._generation, kind, unit.order, unit.stream, unit.row, unit.chunk, branch, layout.numel)

    def _feedback(self) -> Link:
        assert self._links.feedback is not None, "only the first and last stage have a feedback link"
        return self._links.feedback
