"""Who decides: which streams enter the pipeline when, which epochs are sealed, what becomes of what comes back.

A state machine without threads and without Ray: :meth:`Driver.step` seals what may be sealed, takes the gang's events
and says what is new. It is not in the data path; as long as it seals ahead of the stages they never wait for it.
"""

from __future__ import annotations

import logging

from pavdm_dist.engine.blame import log_note
from pavdm_dist.engine.events import (
    DECODER_STAGE,
    AtWork,
    Decoded,
    DecoderLost,
    EpochDone,
    Event,
    Failed,
    GangLost,
    Grown,
    KeysChanged,
    Output,
    Prepared,
    Shift,
)
from pavdm_dist.engine.flight import Flight, Stand
from pavdm_dist.engine.gang import Gang
from pavdm_dist.engine.order import Join, LogEntry, is_active, join_of, undecided
from pavdm_dist.engine.watchdog import Patience, Watchdog
from pavdm_dist.errors import PAVDMError, StalledError
from pavdm_dist.method.microbatches import check_adaptive
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import NewPrompt, Stream
from pavdm_dist.method.window import CleanChunk, not_finite_error

logger = logging.getLogger(__name__)

# Epochs sealed beyond the last finished one. Two keep the stages from ever waiting for the driver.
SEALED_AHEAD = 2


class Driver:
    """Takes streams through a gang.

    Args:
        gang: what computes.
        places: streams in the pipeline at a time.
        backlog_bytes: of frames and resume points that wait for the decoder or the consumer, before no more work is
            handed out. Something is always handed out when nothing waits.
        max_restarts: decoders that may be lost one after the other, with no chunk decoded between; then the gang is.
        watchdog: says which videos give nothing any more.
    """

    def __init__(
        self,
        gang: Gang,
        places: int = 1,
        backlog_bytes: int = 256 * 2**20,
        max_restarts: int = 3,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.places = places
        self._max_restarts, self._decoders_lost = max_restarts, 0
        self._gang, self._backlog_bytes = gang, backlog_bytes
        self._watchdog = watchdog or Watchdog(Patience())
        self._flights: dict[int, Flight] = {}  # in order of submission
        self._doomed: set[int] = set()  # cancelled while they were being prepared
        self._leaves: list[int] = []
        self._leaving: dict[int, int] = {}  # by stream, the epoch at which the stages forget it
        self._epoch, self._done = 0, -1
        self._outputs: list[Output] = []

    # --- what is asked for ---------------------------------------------------------------------------------

    def submit(self, stream: Stream) -> None:
        """Queues a stream; ids are free again when a stream has ended.

        Raises:
            ConfigError: adaptive re-sync that could not be decided in time.
            ValueError: a stream of this id is here.
        """
        if stream.id in self._flights:
            raise ValueError(f"stream {stream.id} is here already")
        check_adaptive(stream.batches)
        self._flights[stream.id] = Flight(stream, self._gang.keep)

    def cancel(self, stream: int) -> None:
        """Ends a stream where it is; nothing more of it comes out. Unknown ids are ignored."""
        if stream in self._flights:
            self._drop(self._flights[stream])
            self._outputs = [output for output in self._outputs if output.stream != stream]

    def stop(self, stream: int) -> None:
        """Lets an endless stream end: what is in flight is finished. Others are left alone."""
        flight = self._flights.get(stream)
        if flight is not None and flight.stream.plan.num_chunks is None:
            flight.stopping = True

    def set_prompt(self, stream: int, new: NewPrompt) -> None:
        """Another prompt for a stream; others are left alone, and so is one that has been told it already."""
        flight = self._flights.get(stream)
        if flight is not None and new not in flight.told:
            flight.told.add(new)
            flight.asked.append(new)

    # --- what happens --------------------------------------------------------------------------------------

    def at_work(self, stream: int) -> AtWork | None:
        """Where a stream is; None of one that is not here. Any thread may ask."""
        flight = self._flights.get(stream)
        return None if flight is None else flight.at_work

    def step(self, timeout: float, held_bytes: int = 0) -> list[Output]:
        """Hands out work, waits up to ``timeout`` seconds for something to happen, and says what is new.

        Args:
            timeout: seconds.
            held_bytes: of earlier outputs that the consumer has not taken yet.

        Raises:
            GangLost: see :meth:`adopt`.
        """
        self._admit()
        self._seal(held_bytes)
        for event in self._gang.poll(0.0 if self._outputs else timeout):
            self._take(event)
        self._watch(held_bytes)
        outputs, self._outputs = self._outputs, []
        return outputs

    def adopt(self, gang: Gang) -> None:
        """Goes on in another gang after one was lost: every stream from its last shift; nothing is given out twice."""
        self._gang = gang
        self._watchdog.anew()
        self._epoch, self._done, self._leaving, self._leaves = 0, -1, {}, []
        self._doomed.clear()
        for flight in self._flights.values():
            flight.restarted()

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._flights or self._outputs or self._leaves or self._doomed) and self._done == self._epoch - 1

    @property
    def streams(self) -> set[int]:
        """Ids of the streams that are not over."""
        return set(self._flights)

    @property
    def wants(self) -> int:
        """How many streams more are of use: for the free places, and one in reserve."""
        waiting = sum(flight.stand is Stand.WAITING for flight in self._flights.values())
        return self.places - self._taken() + 1 - waiting

    def _admit(self) -> None:
        """Streams for the free places, however much the decoder has to do."""
        free = self.places - self._taken()
        for flight in self._flights.values():
            blocked = flight.id in self._leaving or flight.id in self._doomed  # an earlier stream of that id
            if free > 0 and flight.stand is Stand.WAITING and not blocked:
                flight.stand = Stand.PREPARING
                self._watchdog.starts(flight.id, flight.stream.plan.block_chunks)
                self._gang.prepare(flight.stream, flight.past)
                free -= 1

    def _taken(self) -> int:
        """Places that are taken in the epoch that is sealed next."""
        coming = sum(flight.stand in (Stand.PREPARING, Stand.READY) for flight in self._flights.values())
        return coming + len(self._active())

    def _active(self) -> list[tuple[Flight, Join]]:
        """Flights with rows in the epoch that is sealed next."""
        return [
            (flight, flight.join)
            for flight in self._flights.values()
            if flight.join is not None and is_active(flight.join, self._epoch)
        ]

    def _seal(self, held_bytes: int) -> None:
        while self._epoch <= self._done + SEALED_AHEAD and self._has_room(held_bytes):
            active = self._active()
            reported = {flight.id: flight.reported for flight, _ in active}
            if undecided([join for _, join in active], self._epoch, reported):
                return
            stops = {
                flight.id: self._stopped(flight, join)
                for flight, join in active
                if flight.stopping and flight.batches.may_end(join.row_at(self._epoch))
            }
            joins = self._join()
            if not (active or joins or self._leaves):
                return
            prompts = {
                flight.id: told
                for flight, join in self._active()
                if flight.asked and (told := flight.change(join.row_at(self._epoch)))
            }
            # The row before this epoch's first one says which latents are on their way back.
            exact = {
                flight.id: flight.batches.exact_from(join.row_at(self._epoch) - 1)
                for flight, join in self._active()
                if flight.batches.adaptive
            }
            self._gang.seal(self._epoch, LogEntry(tuple(joins), tuple(self._leaves), stops, exact, prompts))
            self._leaves = []
            self._epoch += 1

    def _stopped(self, flight: Flight, join: Join) -> WindowPlan:
        plan = flight.stream.plan.stopped(join.row_at(self._epoch))
        flight.stopped(plan)
        return plan

    def _has_room(self, held_bytes: int) -> bool:
        waiting = held_bytes
        # What a stream without a place has brought along will not become less before others make room for it.
        for flight in (one for one in self._flights.values() if one.stand is not Stand.WAITING):
            info, frames = flight.stream.info, self._gang.frames_per_latent * flight.stream.plan.latent_chunk_size
            waiting += len(flight.undecoded) * 3 * frames * info.height * info.width + flight.undecoded_bytes
        return not waiting or waiting < self._backlog_bytes

    def _join(self) -> list[Join]:
        """Streams that enter at the epoch that is sealed next, in order of submission.

        While the pipeline is empty all that are being prepared are awaited: what begins together stays in step.
        """
        flights = [flight for flight in self._flights.values() if flight.stand in (Stand.PREPARING, Stand.READY)]
        late = any(flight.stand is Stand.PREPARING for flight in flights)
        if late and not self._active():
            return []
        joins = []
        for flight in flights:
            if flight.stand is Stand.PREPARING:
                break
            flight.stand, flight.join = Stand.JOINED, join_of(flight.stream, self._epoch)
            joins.append(flight.join)
        return joins

    def _take(self, event: Event) -> None:
        if isinstance(event, EpochDone):
            self._done = event.epoch
            self._leaving = {stream: epoch for stream, epoch in self._leaving.items() if epoch > event.epoch}
        elif isinstance(event, DecoderLost):
            self._renew_decoder(event)
        elif isinstance(event, Prepared) and event.stream in self._doomed:
            self._doomed.remove(event.stream)
            self._leave(event.stream)
        elif (flight := self._flights.get(event.stream)) is None or self._is_stale(flight, event):
            pass  # of a stream that was dropped meanwhile
        elif isinstance(event, Prepared):
            self._prepared(flight, event.error)
        elif isinstance(event, KeysChanged):
            flight.changed(event)
        elif isinstance(event, Shift):
            self._shifted(flight, event)
        elif event.error is not None:
            self._fail(flight, event.error)
        else:
            self._finish(flight, event)

    def _is_stale(self, flight: Flight, event: Event) -> bool:
        """Whether an event is of an earlier stream of a flight's id, or of rows behind those that it failed at."""
        if flight.stand is Stand.FAILED:
            return not isinstance(event, Decoded)
        return flight.id in self._leaving

    def _renew_decoder(self, lost: DecoderLost) -> None:
        """What the decoder had not given back is decoded again; the stages notice nothing."""
        self._decoders_lost += 1
        if self._decoders_lost > self._max_restarts:
            said = f"{lost.cause} ({self._decoders_lost} times in a row)"
            raise GangLost(said, place=lost.place, cause=lost.cause, stage=DECODER_STAGE)
        said = "%s; another takes over%s"
        logger.warning(said, lost.cause, log_note(lost.place), extra={"stage": DECODER_STAGE})
        flights = [flight for flight in self._flights.values() if flight.stand is not Stand.WAITING]
        self._watchdog.anew()
        self._gang.renew_decoder({flight.id: flight.past for flight in flights})
        for flight in flights:
            for clean, _ in flight.undecoded if flight.stand is not Stand.PREPARING else ():
                self._decode(flight, clean)

    def _prepared(self, flight: Flight, error: PAVDMError | None) -> None:
        flight.stand = Stand.SAMPLED if flight.stream.is_sampled else Stand.READY
        if error is not None:
            self._fail(flight, error)
            return
        for clean, _ in list(flight.undecoded):
            self._made(flight, clean)
        self._end_if_over(flight)

    def _shifted(self, flight: Flight, event: Shift) -> None:
        if event.not_finite is not None:
            flight.error = not_finite_error(event.not_finite, event.snapshot.row - 1)
            flight.stand, flight.join = Stand.FAILED, None
            self._leave(flight.id)
            self._end_if_over(flight)
            return
        new, point = flight.shifted(event)
        for clean in new:
            self._made(flight, clean)
        if not new:
            self._watchdog.shifted(flight.id)
            if point is not None:
                self._outputs.append(Grown(flight.id, point))
        self._end_if_over(flight)

    def _made(self, flight: Flight, clean: CleanChunk) -> None:
        """A chunk is clean: its frames are made, where somebody makes frames."""
        if self._gang.decodes:
            self._decode(flight, clean)
        else:
            self._finish(flight, None)

    def _decode(self, flight: Flight, clean: CleanChunk) -> None:
        self._watchdog.handed(flight.id)
        self._gang.decode(flight.id, clean)

    def _finish(self, flight: Flight, decoded: Decoded | None) -> None:
        self._decoders_lost = 0
        self._watchdog.gave(flight.id)
        self._outputs.append(flight.finished(decoded))
        self._end_if_over(flight)

    def _end_if_over(self, flight: Flight) -> None:
        if flight.error is not None and not flight.undecoded:  # what was clean before is as good as ever
            self._fail(flight, flight.error)
        elif flight.is_over and self._flights.pop(flight.id, None) is not None:
            self._watchdog.forget(flight.id)
            self._gang.forget(flight.id)

    def _fail(self, flight: Flight, error: PAVDMError) -> None:
        self._drop(flight)
        self._outputs.append(Failed(flight.id, error))

    def _drop(self, flight: Flight) -> None:
        """Takes a stream out of the pipeline, at whatever point it is."""
        del self._flights[flight.id]
        self._watchdog.forget(flight.id)
        if flight.stand is Stand.PREPARING:
            self._doomed.add(flight.id)
        elif flight.stand in (Stand.READY, Stand.JOINED):
            self._leave(flight.id)
        if flight.stand is not Stand.WAITING:
            self._gang.forget(flight.id)

    def _watch(self, held_bytes: int) -> None:
        """Reports videos that give nothing any more, and ends those that are past the limit."""
        if held_bytes >= self._backlog_bytes:
            self._watchdog.excuse()
        awaited = [flight.id for flight in self._flights.values() if flight.stand is not Stand.WAITING]
        overdue = False
        for late in self._watchdog.late(awaited, held_up=not self._has_room(held_bytes)):
            flight = self._flights[late.stream]
            at = flight.at_work
            what = f"nothing has come for {late.seconds:.0f} s{late.usually}; {at.awaited}, row {at.row} comes next"
            if not late.over:
                logger.warning("video %d: %s", late.stream, what, extra={"video": late.stream})
            elif not overdue:
                overdue = True
                self._fail(flight, StalledError(f"{what} (stall_limit_s)"))
        if overdue:  # the others may have waited for this one alone
            self._watchdog.excuse()

    def _leave(self, stream: int) -> None:
        """Stages forget a stream at the beginning of the epoch that is sealed next."""
        self._leaves.append(stream)
        self._leaving[stream] = self._epoch
