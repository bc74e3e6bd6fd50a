"""One run of a pipeline: what its videos were asked for, how much of each is still to come, what may be changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.engine.events import Failed, Finished
from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.method.recovery import Recovers
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import NewPrompt, Stream
from pavdm_dist.outputs import VideoChunk
from pavdm_dist.request import VideoRequest, frames_left, plan_of
from pavdm_dist.sampling import SamplingParams
from pavdm_dist.streams import build_stream
from pavdm_dist.texts import encoded


class Running:
    """The videos of a run, by their numbers.

    Args:
        params: settings of the run; a request may have its own.
        checkpoint: the model.
        recovery: with cached context, what is kept for going on.
    """

    def __init__(self, params: SamplingParams, checkpoint: Checkpoint, recovery: Recovers = "keys") -> None:
        self._params, self._checkpoint, self._recovery = params, checkpoint, recovery
        self._own: dict[int, SamplingParams] = {}
        self._plans: dict[int, WindowPlan] = {}
        self._left: dict[int, int | None] = {}

    def streams(self, requests: Iterable[VideoRequest]) -> Iterator[Stream | Failed]:
        """What engines take, built as they take it; those that cannot be built say why."""
        for number, request in enumerate(requests):
            own = request.params or self._params
            try:
                self._left[number] = frames_left(request, own, self._checkpoint)
                self._plans[number], self._own[number] = plan_of(request, own, self._checkpoint), own
                yield build_stream(request, number, own, self._checkpoint, self._recovery)
            except PAVDMError as error:
                yield Failed(number, error)

    def chunk(self, finished: Finished) -> VideoChunk:
        """What an engine has finished, without the frames behind a video's end."""
        assert finished.frames is not None
        left = self._left[finished.stream]
        frames = finished.frames if left is None else finished.frames[:left]
        self._left[finished.stream] = None if left is None else left - frames.shape[0]
        clean = finished.clean
        return VideoChunk(finished.stream, clean.index, frames, clean.latents, finished.last, finished.resume)

    def new_prompt(self, video: int, from_chunk: int, text: str) -> NewPrompt:
        """Another prompt for a video, encoded.

        Raises:
            ConfigError: the video has no such chunk, or the text cannot be encoded.
        """
        if type(from_chunk) is not int or from_chunk < 0:
            raise ConfigError(f"from_chunk={from_chunk}: must be a whole number, 0 or more")
        plan = self._plans.get(video)
        if plan is not None and plan.num_chunks is not None and from_chunk >= plan.num_born:
            raise ConfigError(f"from_chunk={from_chunk}: video {video} has chunks 0 to {plan.num_born - 1}")
        return NewPrompt(from_chunk, text, encoded(text, self._own.get(video, self._params), self._checkpoint))
