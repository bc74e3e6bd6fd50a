"""One run of a pipeline: what its videos were asked for, how much of each is still to come, what may be changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pavdm_dist.checkpoint import Checkpoint
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


@dataclass
class _UnderWay:
    """A video: plan, settings, and how many frames are still to come; None = without an end."""

    plan: WindowPlan
    params: SamplingParams
    left: int | None


class Running:
    """The videos of a run, by their numbers. It may last for months: nothing is kept of what is over.

    Args:
        params: settings of the run; a request may have its own.
        checkpoint: the model.
        recovery: with cached context, what is kept for going on.
    """

    def __init__(self, params: SamplingParams, checkpoint: Checkpoint, recovery: Recovers = "keys") -> None:
        self._params, self._checkpoint, self._recovery = params, checkpoint, recovery
        self._videos: dict[int, _UnderWay] = {}
        self._begun = 0  # so many numbers have had their turn
        self._cancelled: set[int] = set()  # before it

    def streams(self, requests: Iterable[VideoRequest]) -> Iterator[Stream | Failed]:
        """What engines take, built as they take it; those that cannot be built say why."""
        for number, request in enumerate(requests):
            own = request.params or self._params
            self._begun = number + 1
            try:
                left = frames_left(request, own, self._checkpoint)
                if number not in self._cancelled:  # else the engine drops it as soon as it comes
                    self._videos[number] = _UnderWay(plan_of(request, own, self._checkpoint), own, left)
                self._cancelled.discard(number)
                yield build_stream(request, number, own, self._checkpoint, self._recovery)
            except PAVDMError as error:
                yield Failed(number, error)

    def forget(self, video: int) -> None:
        """A video that failed or was cancelled."""
        if video >= self._begun:
            self._cancelled.add(video)
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

    def new_prompt(self, video: int, from_chunk: int, text: str) -> NewPrompt:
        """Another prompt for a video, encoded.

        Raises:
            ConfigError: the video is over or has no such chunk, or the text cannot be encoded.
        """
        if type(from_chunk) is not int or from_chunk < 0:
            raise ConfigError(f"from_chunk={from_chunk}: must be a whole number, 0 or more")
        under_way = self._videos.get(video)
        if under_way is None and video < self._begun:
            raise ConfigError(f"video={video}: is over")
        plan = None if under_way is None else under_way.plan
        if plan is not None and plan.num_chunks is not None and from_chunk >= plan.num_born:
            raise ConfigError(f"from_chunk={from_chunk}: video {video} has chunks 0 to {plan.num_born - 1}")
        params = self._params if under_way is None else under_way.params
        return NewPrompt(from_chunk, text, encoded(text, params, self._checkpoint))


def rehearsed(params: SamplingParams, checkpoint: Checkpoint) -> Stream:
    """What stages run before they are linked (:func:`~pavdm_dist.engine.rehearsal.rehearsal`), for such settings."""
    spec = checkpoint.codec_spec
    latent_shape = (spec.latent_channels, *spec.latent_size(params.height, params.width))
    more = {"mode": params.mode, "displaced": params.displaced, "chunks_per_unit": params.chunks_per_unit}
    return rehearsal(checkpoint.shape, params.plan(None), latent_shape, params.info, **more)
