"""One video as the driver knows it: what it takes to go on with it in another gang of actors."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from weakref import WeakSet

import torch
from torch import Tensor

from pavdm_dist.engine.events import AtWork, Decoded, Finished, KeysChanged, Shift
from pavdm_dist.engine.order import Join
from pavdm_dist.errors import PAVDMError
from pavdm_dist.method.microbatches import MicroBatches
from pavdm_dist.method.recovery import replayed
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.saved_keys import chunks_in, of_chunks
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import NewPrompt, Stream
from pavdm_dist.method.window import CleanChunk, WindowSnapshot

logger = logging.getLogger(__name__)


class Stand(Enum):
    """How far a flight has come in its gang."""

    WAITING = "waiting"  # for a place
    PREPARING = "preparing"  # on all stages
    READY = "ready"  # to join at the next epoch
    JOINED = "joined"  # rows are being run
    SAMPLED = "sampled"  # every chunk is clean
    FAILED = "failed"  # the stages have no more of it; chunks that were clean before are with the decoder


@dataclass
class Flight:
    """State of one stream, outside any gang.

    Attributes:
        stream: what is sampled, with the place where it began.
        keep: how many clean latents a decoder is warmed on.
        stand: in the present gang.
        join: its place in the present gang's order.
        batches: how its rows are cut, with what adaptive re-sync has decided.
        reported: of an adaptive stream, the last row whose report is there.
        next_chunk: the first chunk that has not become clean.
        row: the row behind the last shift that was told of.
        undecoded: clean chunks whose frames are still to come, oldest first, with their resume points.
        past: clean latents ``[C, n, h, w]`` right before the oldest of these, for a decoder that takes the stream over.
        error: what ends it once all that was clean before has been given out.
        stopping: an endless stream's end is asked for.
        told: prompts that were asked for, whatever became of them, as long as somebody might say them again.
        asked: those of them that the stages do not know yet.
        prompts: ``(first chunk, prompt)`` of those that it follows since it began.
    """

    stream: Stream
    keep: int
    stand: Stand = Stand.WAITING
    join: Join | None = None
    reported: int = -1
    error: PAVDMError | None = None
    stopping: bool = False
    told: WeakSet[NewPrompt] = field(default_factory=WeakSet)
    asked: list[NewPrompt] = field(default_factory=list)
    prompts: tuple[tuple[int, str], ...] = field(init=False)
    batches: MicroBatches = field(init=False)
    next_chunk: int = field(init=False)
    undecoded: deque[tuple[CleanChunk, ResumePoint | None]] = field(default_factory=deque)
    past: Tensor | None = field(init=False)
    row: int = 0
    _resynced: frozenset[int] = frozenset()
    _latest: WindowSnapshot | None = None
    _left: dict[str, Tensor] = field(default_factory=dict)
    _new_bytes: int = 0  # of what was left since the last point
    _clean: dict[int, Tensor] = field(default_factory=dict)
    _tail: Tensor | None = field(init=False)
    _was_stopped: bool = False

    def __post_init__(self) -> None:
        stream, resume = self.stream, self.stream.resume
        self.batches = stream.batches
        self._tail = self.past = stream.decoder_warm
        self.next_chunk = 0
        self.prompts = () if resume is None else resume.prompts
        if resume is None:
            return
        self._latest, row = resume.snapshot, resume.snapshot.row
        self._left, self._clean = dict(resume.snapshot.left), _clean_of(stream, resume.snapshot)
        self.row, self._was_stopped = row, resume.was_stopped
        self._resynced = frozenset(resume.resyncs)
        chunks = stream.plan.num_chunks
        self.next_chunk = chunks if chunks is not None and stream.is_sampled else stream.plan.row(row).chunks[0]
        for clean in resume.undecoded:
            self._tail = self._behind(self._tail, clean)
            self.undecoded.append((clean, None))
        if self.undecoded:  # the resume point itself is behind all of them
            self.undecoded[-1] = (self.undecoded[-1][0], self._point(resume.snapshot))

    @property
    def id(self) -> int:
        return self.stream.id

    @property
    def is_over(self) -> bool:
        """Whether all frames have been given out."""
        return self.stand is Stand.SAMPLED and not self.undecoded

    @property
    def at_work(self) -> AtWork:
        """Where it is. Any thread may ask."""
        decoding = tuple(clean.index for clean, _ in tuple(self.undecoded))  # once: the driver goes on meanwhile
        places = {
            Stand.WAITING: f"chunk {self.next_chunk}: the video waits for a place",
            Stand.PREPARING: f"chunk {self.next_chunk}: the stages are taking the video in",
            Stand.READY: f"chunk {self.next_chunk}: the video is to join the pipeline",
        }
        awaited = places.get(self.stand, f"chunk {self.next_chunk} is with the stages")
        if decoding:
            behind = f", and {len(decoding) - 1} behind it" if len(decoding) > 1 else ""
            awaited = f"chunk {decoding[0]} is with the decoder{behind}"
        return AtWork(awaited, self.row, decoding)

    @property
    def undecoded_bytes(self) -> int:
        """Of the resume points of chunks whose frames are still to come, but for the newest, which it has anyway."""
        points = [point for _, point in self.undecoded if point is not None]
        return sum(point.num_bytes for point in points[:-1])

    @property
    def resyncs(self) -> tuple[int, ...]:
        """Rows that adaptive re-sync has made exact so far."""
        return tuple(sorted(self._resynced | self.batches.exact_rows))

    def shifted(self, shift: Shift) -> tuple[list[CleanChunk], ResumePoint | None]:
        """Takes the end of a shift in.

        Returns:
            The chunks that are new (a gang that began at an earlier row repeats some), and where the stream goes on;
            None where it could not, or where that is known already.
        """
        self.row = shift.snapshot.row
        new = [clean for clean in shift.clean if clean.index >= self.next_chunk]
        for clean in new:
            self._tail = self._behind(self._tail, clean)
        self.next_chunk += len(new)
        if self.stream.plan.is_over(shift.snapshot.row):
            self.stand = Stand.SAMPLED
        point, kept = None, self.stream.plan.kept(self.row)
        self._left = of_chunks({**self._left, **shift.snapshot.left}, kept)
        self._new_bytes += sum(tensor.nbytes for tensor in shift.snapshot.left.values())
        again = self._replayable(shift.clean)
        if self.batches.durable(self.row, kept if again else chunks_in(self._left)):
            left = {} if again else dict(self._left)
            exact = self.batches.exact_from(self.row)
            self._latest = replace(shift.snapshot, exact_rows=exact, left=left, clean=again)
            point = replace(self._point(self._latest), left_bytes=self._new_bytes if left else 0)
            self._new_bytes = 0
        if shift.clean and not new:
            return [], None
        for clean in new:  # the point is behind all of them
            self.undecoded.append((clean, point if clean is new[-1] else None))
        return new, point

    def changed(self, event: KeysChanged) -> None:
        """A shift of an adaptive stream is over: what follows from it enters the log with the next epoch."""
        self.batches = self.batches.reported(event.row, event.change)
        self._resynced |= self.batches.exact_rows
        self.reported = event.row

    def finished(self, decoded: Decoded | None) -> Finished:
        """The oldest undecoded chunk, with its frames if there is a decoder."""
        clean, point = self.undecoded.popleft()
        self.past = self._behind(self.past, clean)
        chunks = self.stream.plan.num_chunks
        last = chunks is not None and clean.index == chunks - 1
        return Finished(self.id, clean, decoded.frames if decoded else None, last, point, self.resyncs)

    def stopped(self, plan: WindowPlan) -> None:
        """An endless stream follows ``plan`` from now on."""
        self.stream, self.stopping, self._was_stopped = replace(self.stream, plan=plan), False, True
        self.batches = replace(self.batches, plan=plan)
        if self.join is not None:
            self.join = self.join.stopped(plan)

    def change(self, row: int) -> tuple[NewPrompt, ...]:
        """Takes what was asked for into force before ``row``; what the stages must be told."""
        asked, self.asked = self.asked, []
        told = []
        for new in asked:
            at = new.at(self.stream.plan, row)
            if at is None:
                said = "video %d: %r comes too late, no chunk is left to be born"
                logger.warning(said, self.id, new.prompt, extra={"video": self.id})
                continue
            if row == self.stream.first_row:  # calls that are run again come behind what is told now
                at = replace(at, oldest=min([at.oldest, *self.stream.replayed]))
            told.append(at)
            self.stream = self.stream.changed(at)
            self.prompts += ((at.from_chunk, at.prompt),)
        if told:  # an endless video's texts are gigabytes in the end
            read = self.stream.conditioning.since(self._oldest_read())
            self.stream = replace(self.stream, conditioning=read)
        return tuple(told)

    def _oldest_read(self) -> int:
        """The first chunk whose text is read when another gang goes on from here."""
        snapshot, stream = self._latest, self.stream
        row, again = (stream.first_row, stream.replayed) if snapshot is None else (snapshot.row, snapshot.clean.keys())
        return min([stream.plan.row(row).window[0], *again])

    def restarted(self) -> None:
        """For another gang: goes on at the last shift from which it goes on bit for bit, or at its beginning."""
        self.stand, self.join, self.reported, self.error = Stand.WAITING, None, -1, None
        if self._latest is not None:
            self.stream = replace(self.stream, resume=ResumePoint(self._latest))
        self._left, self._new_bytes = {} if self._latest is None else dict(self._latest.left), 0
        self._clean = {} if self._latest is None else _clean_of(self.stream, self._latest)
        self.batches = self.stream.batches

    def _replayable(self, clean: Sequence[CleanChunk]) -> dict[int, Tensor]:
        """Takes clean chunks in; latents of those whose calls would be run again from here, where all are there."""
        if self.stream.recovery.by != "replay":
            return {}
        plan, row = self.stream.plan, self.row
        again = replayed(plan, row, self.stream.recovery.layers)
        newest = plan.num_born if plan.is_over(row) else plan.row(row).chunks[0] - 1
        held = {**self._clean, **{chunk.index: chunk.latents for chunk in clean}}
        self._clean = {index: latents for index, latents in held.items() if index in again or index >= newest}
        return {index: self._clean[index] for index in again} if set(again) <= self._clean.keys() else {}

    def _point(self, snapshot: WindowSnapshot) -> ResumePoint:
        return ResumePoint(
            snapshot,
            self._tail,
            resyncs=self.resyncs,
            prompts=self.prompts,
            plan=self.stream.plan,
            was_stopped=self._was_stopped,
            settings=self.stream.settings,
        )

    def _behind(self, before: Tensor | None, clean: CleanChunk) -> Tensor | None:
        """What a decoder must have seen behind ``clean``, which follows ``before``."""
        if not self.keep:
            return None
        held = clean.latents if before is None else torch.cat([before, clean.latents], dim=1)
        return held[:, max(0, held.shape[1] - self.keep) :].clone()


def _clean_of(stream: Stream, snapshot: WindowSnapshot) -> dict[int, Tensor]:
    """Clean latents that a snapshot holds: those whose calls are run again, and the newest, whose call comes first."""
    if stream.recovery.by != "replay" or stream.plan.is_over(snapshot.row):
        return {}
    context = stream.plan.row(snapshot.row).context
    return {**snapshot.clean, **{chunk: snapshot.latents[chunk] for chunk in context}}
