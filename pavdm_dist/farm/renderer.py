"""A renderer: one gang, with its weights loaded once, that is given shot after shot and keeps several in flight.

It belongs to the process of the farm, which writes the files; what computes is on the cluster. A shot is taken when a
place is free, and is this renderer's from the moment at which the lock in its parts is (:mod:`pavdm_dist.io.lock`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pavdm_dist.commands.videos import Video, Videos
from pavdm_dist.errors import ConfigError, EngineError, PAVDMError, TraceError
from pavdm_dist.farm.begun import check_unchanged
from pavdm_dist.farm.desk import Desk, Ended, Sight, end_of, one_line
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.logs import of_shot
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.traces import keep_shots, trace_path
from pavdm_dist.farm.tree import Tree
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.redaction import hide_secrets
from pavdm_dist.request.outputs import VideoChunk
from pavdm_dist.request.video_request import VideoRequest

logger = logging.getLogger(__name__)

# Shots that a warning about many of them names.
_NAMED = 5


@dataclass
class _Flight:
    """A shot in a renderer's hands."""

    shot: Shot
    videos: Videos
    video: Video
    number: int
    frames: int = 0
    outputs: int = 0  # chunks, and shifts before the first one, that have come here
    due: int | None = None  # when told to end: after so many
    cancelled: bool = False
    begun_at: float = field(default_factory=time.monotonic)


class Renderer:
    """Made at once; :meth:`run` brings the gang up.

    Args:
        name: in logs.
        kinds: settings of all shots.
        tree: where their files are.
        desk: where shots come from.

    Attributes:
        up_since: when the gang asked for its first shot, so that its weights were loaded; of the monotonic clock.
    """

    def __init__(self, name: str, kinds: Kinds, tree: Tree, desk: Desk) -> None:
        self.name, self._kinds, self._tree, self._desk = name, kinds, tree, desk
        self._trace = trace_path(tree, name) if kinds.config.farm.trace else None
        self._traced: dict[int, str] = {}  # its shots by number, where they are traced
        self.pipeline = kinds.pipeline(self._trace)
        self.up_since = math.inf
        self._flights: dict[int, _Flight] = {}
        self._numbers = 0
        self._turn = threading.RLock()  # of what the thread that begins shots and the one that writes them share
        self._draining = self._stopping = self._over = False

    @property
    def is_up(self) -> bool:
        """Whether it has asked for shots."""
        return self.up_since < math.inf

    def run(self) -> None:
        """Renders what the desk gives until it gives no more. Whatever ends it, all shots are left in order.

        Raises:
            PAVDMError: the gang did not come up, or was lost for good; shots were given back.
        """
        streams = self._kinds.config.streams
        error: BaseException | None = None
        try:
            with self.pipeline:
                on_step = self._step if self.pipeline.engine is None else None
                chunks = self.pipeline.iter_chunks(
                    self._requests(), self._kinds.base.params, streams, on_step, self._failed, self._grown
                )
                try:
                    for chunk in chunks:
                        self._take(chunk)
                    if self._trace is not None:
                        keep_shots(self._trace, self._traced)
                except TraceError as fault:  # all shots have ended as they would without
                    self._untraced(fault)
        except _Told:
            pass
        except EngineError as lost:
            error = lost
            if not self._stopping:
                raise
        except BaseException as fault:
            error = fault
            raise
        finally:
            self._leave_all(error)

    def drain(self) -> None:
        """Ends every shot at its next chunk, saved; :meth:`run` returns then. From any thread.

        One that has given nothing yet has nothing to lose, and is not waited for.
        """
        with self._turn:
            self._draining = True
            for flight in self._flights.values():
                flight.due = flight.outputs + 1 if flight.outputs else 0

    def stop(self) -> None:
        """Ends every shot where it is, saved up to its last chunk. From any thread."""
        self._draining = self._stopping = True
        if self.pipeline.engine is not None:
            self.pipeline.close()

    def cancel(self, id: str) -> None:
        """Ends a shot when next something comes of any here. From any thread."""
        with self._turn:
            for flight in self._flights.values():
                flight.cancelled = flight.cancelled or flight.shot.id == id

    def sight(self, id: str) -> Sight | None:
        """Where a shot is that is rendered here. From any thread."""
        with self._turn:
            shots = {number: flight.shot.id for number, flight in self._flights.items()}
        number = next((number for number, shot in shots.items() if shot == id), None)
        at = None if number is None else self.pipeline.at_work(number)
        return None if at is None else Sight(at, shots)

    def set_prompt(self, id: str, from_chunk: int, text: str) -> bool:
        """Another prompt for a shot; see :meth:`~pavdm_dist.pipeline.PAVDMPipeline.set_prompt`. From any thread.

        Returns:
            Whether it is here.

        Raises:
            ConfigError: it has no such chunk, or the text cannot be encoded.
        """
        with self._turn:
            number = next((flight.number for flight in self._flights.values() if flight.shot.id == id), None)
        if number is not None:
            self.pipeline.set_prompt(number, from_chunk, text)
        return number is not None

    # --- the thread that begins shots ------------------------------------------------------------------------

    def _requests(self) -> Iterator[VideoRequest]:
        self.up_since = time.monotonic()
        while not self._draining and (shot := self._desk.take(self)) is not None:
            with of_shot(shot.id):  # also while it is made ready: its texts and its clip are encoded meanwhile
                request = self._begin(shot)
                if request is not None:
                    yield request

    def _begin(self, shot: Shot) -> VideoRequest | None:
        """Locks a shot and opens its files; None where it is not to be rendered, which the desk is told."""
        output = self._tree.output(shot.id)
        try:
            if (settled := self._settled(shot)) is not None:
                self._desk.ended(self, shot, settled)
                return None
            videos = self._kinds.videos(shot, output, self.pipeline)
            taken: list[Video] = []
            requests = list(videos.begun(taken))
        except Exception as error:
            self._desk.ended(self, shot, end_of(error))
            return None
        (video,) = videos.all
        if video.error is not None:
            cause = video.error.__cause__
            # Another farm may have finished it, or begun it, in this moment.
            is_done = self._tree.is_done(shot.id)
            ended = self._made_elsewhere(shot) if is_done else end_of(cause or video.error, video.error)
            self._desk.ended(self, shot, ended)
            return None
        if not requests:  # only its end was missing
            self._desk.ended(self, shot, Ended("done"))
            return None
        with self._turn:
            if not self._over and not self._draining:
                assert video.recording is not None
                next_chunk = video.recording.next_chunk
                self._flights[self._numbers] = _Flight(shot, videos, video, self._numbers)
                if self._trace is not None:
                    self._traced[self._numbers] = shot.id
                self._numbers += 1
                self._desk.begun(self, shot, next_chunk, self._numbers - 1)
                return requests[0]
        videos.abort()
        self._desk.ended(
            self, shot, Ended("saved") if self._draining else Ended("again", "lost", "its renderer was lost")
        )
        return None

    def _settled(self, shot: Shot) -> Ended | None:
        """What others have made of a shot since it was queued; None where it is to be rendered here."""
        state = self._tree.state(shot.id)
        if state.standing == "failed":
            return Ended("failed", "elsewhere", "" if state.failure is None else state.failure.error)
        if state.standing in ("skipped", "cancelled"):
            return Ended("cancelled")
        if state.standing == "done":
            return self._made_elsewhere(shot)
        return None if self._desk.is_free(shot) else Ended("aside")

    def _made_elsewhere(self, shot: Shot) -> Ended:
        """Another process has completed a shot since it was queued: as it is asked for here, or otherwise."""
        try:
            check_unchanged(shot, self._tree, self._kinds)
        except ConfigError as error:
            return Ended("failed", "otherwise", one_line(error))
        except Exception as error:  # stores that are away have errors of kinds of their own
            return end_of(error)
        return Ended("done", "elsewhere")

    # --- the thread that writes them -------------------------------------------------------------------------

    def _take(self, chunk: VideoChunk) -> None:
        flight = self._flights.get(chunk.video)
        if flight is not None:
            flight.outputs += 1
            with of_shot(flight.shot.id):
                well = flight.videos.write(flight.video, chunk)
            if not well:
                self.pipeline.cancel(chunk.video)
                error = flight.video.error
                assert error is not None
                self._end(flight, end_of(error.__cause__ or error, error))
            else:
                flight.frames += chunk.frames.shape[0]
                self._desk.grew(self, flight.shot, chunk)
                if flight.video.result is not None:
                    self._end(flight, Ended("done"))
        self._look_round()

    def _grown(self, number: int, resume: ResumePoint) -> None:
        flight = self._flights.get(number)
        if flight is not None:
            flight.outputs += 1
            with of_shot(flight.shot.id):
                flight.videos.grown(flight.video, resume)
            if (error := flight.video.error) is not None:
                self.pipeline.cancel(number)
                self._end(flight, end_of(error.__cause__ or error, error))
        self._look_round()

    def _failed(self, number: int, error: PAVDMError) -> None:
        flight = self._flights.get(number)
        if flight is not None:
            with of_shot(flight.shot.id):
                flight.videos.fail(flight.video, error)
            self._end(flight, end_of(error, flight.video.error))
        self._look_round()

    def _look_round(self) -> None:
        """Ends what was cancelled, and what was to go on to its next chunk only."""
        for flight in list(self._flights.values()):
            if flight.cancelled or (flight.due is not None and flight.outputs >= flight.due):
                self.pipeline.cancel(flight.number)
                with of_shot(flight.shot.id):
                    flight.videos.abort()
                self._end(flight, Ended("cancelled") if flight.cancelled else _saved(flight))
        if self._draining and not self._flights:
            raise _Told

    def _untraced(self, fault: TraceError) -> None:
        """Whose charts are lost, and why."""
        shots = list(self._traced.values())
        more = f" and {len(shots) - _NAMED} more" if len(shots) > _NAMED else ""
        named = ", ".join(shots[:_NAMED]) + more or "any shot"
        said = "%s: the report will have no chart of what its stages did of %s: %s"
        logger.warning(said, self.name, named, fault, extra={"renderer": self.name})

    def _step(self, *_: Any) -> None:
        """Without stages nothing else comes between two chunks."""
        if self._stopping:
            raise _Told

    def _end(self, flight: _Flight, ended: Ended) -> None:
        with self._turn:
            self._flights.pop(flight.number, None)
        self.pipeline.resyncs.pop(flight.number, None)  # a run of thousands of shots is one run of the pipeline
        ended = replace(ended, frames=flight.frames)
        self._desk.ended(self, flight.shot, ended)

    def _leave_all(self, error: BaseException | None) -> None:
        """What is unfinished stays playable and ready to go on, wherever."""
        with self._turn:
            self._over = True
            left = list(self._flights.values())
            self._flights.clear()
        told = self._draining and not isinstance(error, Exception)
        for flight in left:
            with of_shot(flight.shot.id):
                for sentence in flight.videos.abort():
                    logger.info("%s", sentence)
            if told or self._stopping:
                ended = replace(_saved(flight), frames=flight.frames)
            else:
                ended = Ended("again", "lost", one_line(error), flight.frames)
            self._desk.ended(self, flight.shot, ended)


def _saved(flight: _Flight) -> Ended:
    """The end of a shot that was left where it was; on a full disk its newest state is not saved."""
    return Ended("saved", "storage" if flight.video.unsaved else "", hide_secrets(flight.video.unsaved))


class _Told(Exception):
    """The renderer was told to end, and has nothing left to do."""
