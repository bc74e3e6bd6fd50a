"""One run of a pipeline: what its videos were asked for, how much of each is still to come, what may be changed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.engine.asked import Asked, ended_by_a_later_run
from pavdm_dist.engine.events import Failed, Finished
from pavdm_dist.engine.rehearsal import rehearsal
from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.method.recovery import Recovers
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import NewPrompt, Stream
from pavdm_dist.request.outputs import VideoChunk
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream
from pavdm_dist.request.texts import encoded
from pavdm_dist.request.video_request import VideoRequest, frames_left, plan_of
from pavdm_dist.values.fields import Within, fault

if TYPE_CHECKING:
    from pavdm_dist.engine.inline import InlineEngine
    from pavdm_dist.engine.ray_engine import RayEngine


_NUMBER = Annotated[int, Within(0)]
_ASKED = {"video": _NUMBER, "from_chunk": _NUMBER, "text": str}


class TooLateError(ConfigError):
    """Something is asked of a video of which no chunk is left that it could change."""


@dataclass
class _UnderWay:
    """A video: plan, settings, how many frames are still to come (None = without an end), the row at which it begins or
    goes on, whether an engine has it."""

    plan: WindowPlan
    params: SamplingParams
    left: int | None
    row: int = 0
    is_handed_over: bool = False


class Running:
    """The videos of a run, by their numbers. It may last for months: nothing is kept of what is over.

    What is asked of a video is held here until an engine gets it, which may take minutes to come up, and is for no
    other run. From any thread.

    Args:
        params: settings of the run; a request may have its own.
        checkpoint: the model.
        recovery: with cached context, what is kept for going on.

    Attributes:
        is_over: nobody consumes it any more.
    """

    def __init__(self, params: SamplingParams, checkpoint: Checkpoint, recovery: Recovers = "keys") -> None:
        self._params, self._checkpoint, self._recovery = params, checkpoint, recovery
        self._videos: dict[int, _UnderWay] = {}
        self._begun = 0  # so many numbers have had their turn
        self._asked = Asked()  # of videos that no engine has got yet
        self._engine: RayEngine | InlineEngine | None = None
        self._lock = threading.RLock()
        self.is_over = False

    def streams(self, requests: Iterable[VideoRequest], engine: RayEngine | InlineEngine) -> Iterator[Stream | Failed]:
        """What ``engine`` takes, built as it takes it, but for those that were cancelled before; those that cannot be
        built say why.

        Raises:
            ConfigError: another run has taken this one's place.
        """
        self._engine = engine
        for number, request in enumerate(requests):
            own = request.params or self._params
            built: Stream | Failed
            try:
                if not self._begins(number, request, own):
                    continue
                built = build_stream(request, number, own, self._checkpoint, self._recovery)
            except PAVDMError as error:
                built = Failed(number, error)
            if self._hands_over(number):
                yield built

    def _begins(self, number: int, request: VideoRequest, params: SamplingParams) -> bool:
        """A video's turn; False where it was cancelled before."""
        with self._lock:
            if self._asked.is_cancelled(number):
                self._begun = number + 1
                self._asked.ends(number)
                return False
        under_way = None
        try:
            left = frames_left(request, params, self._checkpoint)
            row = 0 if request.resume is None else request.resume.snapshot.row
            under_way = _UnderWay(plan_of(request, params, self._checkpoint), params, left, row)
        finally:
            with self._lock:
                self._begun = number + 1
                if under_way is not None:
                    self._videos[number] = under_way
        return True

    def _hands_over(self, number: int) -> bool:
        """Tells the engine what was asked of a video that it gets next; False where it was cancelled while it was
        built."""
        with self._lock:
            if self.is_over:
                raise ended_by_a_later_run()
            is_wanted = not self._asked.is_cancelled(number)
            if is_wanted and number in self._videos:
                self._videos[number].is_handed_over = True
                if self._asked.is_stopping(number):
                    self._tell.stop(number)
                for new in self._asked.take_prompts(number):
                    self._tell.set_prompt(number, new)
            if not is_wanted:
                self._videos.pop(number, None)
            self._asked.ends(number)
            return is_wanted

    @property
    def _tell(self) -> RayEngine | InlineEngine:
        assert self._engine is not None, "what an engine has, it was given"
        return self._engine

    def stop(self, video: int) -> None:
        """Lets an endless video end after what is in flight; others, and those that are over, are left alone.

        Raises:
            ConfigError: no number of a video.
        """
        _checked(video=video)
        with self._lock:
            if self._has_engine(video):
                self._tell.stop(video)
            elif self._is_coming(video):
                self._asked.stop(video)

    def cancel(self, video: int) -> None:
        """Ends a video where it is; nothing more of it comes out. One that is over is left alone.

        Raises:
            ConfigError: no number of a video.
        """
        _checked(video=video)
        with self._lock:
            if self._has_engine(video):
                self._tell.cancel(video)
            elif self._is_coming(video):
                self._asked.cancel(video)
            self._videos.pop(video, None)

    def set_prompt(self, video: int, from_chunk: int, text: str) -> None:
        """Another prompt for a video.

        Raises:
            ConfigError: no number or no text, the video is over or has no such chunk, or the text cannot be encoded.
            TooLateError: all its chunks are born, as far as is known here: rows are handed out ahead of that, so that
                a change may still come too late, which the log says.
        """
        _checked(video=video, from_chunk=from_chunk, text=text)
        new = self._new_prompt(video, from_chunk, text)
        with self._lock:
            if self._has_engine(video):
                self._tell.set_prompt(video, new)
            elif self._is_coming(video):
                self._asked.set_prompt(video, new)

    def end(self) -> None:
        """Nothing that is asked of its videos reaches an engine any more: it is another run's now, or over.

        Without the lock: a finaliser may do it in a thread that holds the engine's, which comes second everywhere else.
        """
        self.is_over = True

    def _has_engine(self, video: int) -> bool:
        return not self.is_over and video in self._videos and self._videos[video].is_handed_over

    def _is_coming(self, video: int) -> bool:
        return not self.is_over and (video in self._videos or video >= self._begun)

    def forget(self, video: int) -> None:
        """A video is over, or has failed."""
        with self._lock:
            self._videos.pop(video, None)

    def chunk(self, finished: Finished) -> VideoChunk | None:
        """What an engine has finished, without the frames behind a video's end; None of one that was forgotten."""
        assert finished.frames is not None
        video = self._videos.get(finished.stream)
        if video is None:
            return None
        frames = finished.frames[: video.left]
        video.left = None if video.left is None else video.left - frames.shape[0]
        if finished.last:
            self.forget(finished.stream)
        clean = finished.clean
        return VideoChunk(finished.stream, clean.index, frames, clean.latents, finished.last, finished.resume)

    def _new_prompt(self, video: int, from_chunk: int, text: str) -> NewPrompt:
        with self._lock:
            under_way, is_over = self._videos.get(video), video < self._begun
        if under_way is None and is_over:
            raise ConfigError(f"video={video}: is over")
        plan = None if under_way is None else under_way.plan
        if plan is not None and plan.num_chunks is not None and from_chunk >= plan.num_born:
            raise ConfigError(f"from_chunk={from_chunk}: video {video} has chunks 0 to {plan.num_born - 1}")
        params = self._params if under_way is None else under_way.params
        new = NewPrompt(from_chunk, text, encoded(text, params, self._checkpoint))
        # Looked at last: a large encoder takes longer than many rows.
        if plan is not None and new.at(plan, self._row(video)) is None:
            raise TooLateError(f"video={video}: all its chunks are born; none is left that another prompt could change")
        return new

    def _row(self, video: int) -> int:
        """The row of a video that comes next, as far as is known here."""
        with self._lock:
            under_way, has_engine = self._videos.get(video), self._has_engine(video)
        # Without the lock: stages may be asked for it.
        at = self._tell.at_work(video) if has_engine else None
        return max(0 if under_way is None else under_way.row, 0 if at is None else at.row)


def _checked(**given: object) -> None:
    for name, value in given.items():
        found = fault(_ASKED[name], name, value)
        if found is not None:
            raise ConfigError(found)


def rehearsed(params: SamplingParams, checkpoint: Checkpoint) -> Stream:
    """What stages run before they are linked (:func:`~pavdm_dist.engine.rehearsal.rehearsal`), for such settings."""
    spec = checkpoint.codec_spec
    latent_shape = (spec.latent_channels, *spec.latent_size(params.height, params.width))
    more = {"mode": params.mode, "displaced": params.displaced, "chunks_per_unit": params.chunks_per_unit}
    return rehearsal(checkpoint.shape, params.plan(None), latent_shape, params.info, **more)
