"""The videos of one command: what of them is there already, what becomes of each while it is made."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pavdm_dist.codecs.catalog import RGB
from pavdm_dist.commands.origin import Origin, OtherMachineError, difference, is_of_machine
from pavdm_dist.commands.points import resume_point, saved_point
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError, PAVDMError, VideoError
from pavdm_dist.io.leftovers import check_recording, recording_facts, remove_parts
from pavdm_dist.io.lock import clear_locks
from pavdm_dist.io.metadata import is_complete, read_sidecar, sidecar_path
from pavdm_dist.io.recording import Recorded, Recording
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.io.state import BegunOtherwiseError
from pavdm_dist.io.storage import is_remote
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.pipeline import PAVDMPipeline, VideoChunk
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import input_frames
from pavdm_dist.request.video_request import VideoRequest, frames_left
from pavdm_dist.values.merging import to_yaml

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WantedVideo:
    """One video of a command: what is different between them."""

    prompt: str
    seed: int
    output: str
    where: str = ""  # what is said before a message about its prompt


@dataclass
class Video:
    """One output of a command.

    Attributes:
        number: its place in the command.
        request: what is asked for.
        output: its mp4.
        recording: its files while they are made.
        result: once it is complete.
        error: why it never will be.
        changes: ``(first chunk, prompt)`` of what was changed while it ran.
        unsaved: why the newest state of what was begun of it could not be written.
        found: new frames that were there already when it was opened.
    """

    number: int
    request: VideoRequest
    output: str
    recording: Recording | None = field(default=None, repr=False)
    result: Recorded | None = None
    error: VideoError | None = None
    changes: tuple[tuple[int, str], ...] = ()
    unsaved: str = ""
    found: int = 0


@dataclass(frozen=True)
class Videos:
    """All of them, with what they have in common.

    Complete videos that were made with the same settings, prompt, seed and weights are left alone, whatever versions
    made them; of unfinished ones that are there, what is missing is made, by the same versions on the same kinds of
    device.

    Args:
        all: one per output.
        config, params, pipeline: of the command.
        weights: identity of the model.
        overwrite: begin all anew.
        advice: for whoever asks for an unfinished video otherwise than it was begun, as the end of a sentence; None =
            that of a command that can be told to overwrite it.
    """

    all: Sequence[Video]
    config: SampleConfig
    params: SamplingParams
    pipeline: PAVDMPipeline
    weights: str
    overwrite: bool
    advice: str | None = None
    # With stages files are opened in a thread of their own, which may be at it when another ends everything.
    _opening: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    _over: threading.Event = field(default_factory=threading.Event, init=False, repr=False, compare=False)
    _being_opened: list[Video] = field(default_factory=list, init=False, repr=False, compare=False)

    def check(self) -> None:
        """Refuses outputs that cannot be written or would be lost, and takes note of complete ones.

        Raises:
            ConfigError: naming the process that is writing, the file that is in the way, or what was different when it
                was made.
        """
        clear_locks([video.output for video in self.all])  # all together: locks of other machines take minutes
        for video in self.all:
            try:
                if not self.overwrite and self._is_made(video):
                    continue
                facts = recording_facts(self._origin.identity(video.request), **self._shape)
                check_recording(video.output, self.overwrite, self.config.save_latents, facts)
            except OSError as error:  # this one cannot be written; others may
                self.fail(video, error)

    def begun(self, taken: list[Video]) -> Iterator[VideoRequest]:
        """Requests of what is to be made, each with the place where it goes on; opens files as they are asked for, and
        none any more after :meth:`abort`.

        Args:
            taken: gets the video of every request, in order.
        """
        for video in self.all:
            if video.result is not None or video.error is not None:
                continue
            with self._opening:
                if self._over.is_set():
                    return
                self._being_opened.append(video)
                try:
                    recording = self._open(video)
                    if recording.complete:  # all that is left of it
                        self.finish(video)
                        video.found = video.request.num_frames or 0
                        continue
                    request = replace(video.request, resume=resume_point(recording))
                    left = frames_left(request, self.params, self.pipeline.checkpoint)
                    video.found = 0 if left is None else (request.num_frames or 0) - left
                except (PAVDMError, OSError) as error:
                    self.fail(video, error)
                    continue
                finally:
                    self._being_opened.clear()
            taken.append(video)
            yield request

    def write(self, video: Video, chunk: VideoChunk) -> bool:
        """Takes a chunk; whether the video is still well.

        A disk that is full, a share that went away, or parts that were damaged there end this one only.
        """
        assert video.recording is not None
        video.changes = video.changes if chunk.resume is None else chunk.resume.prompts
        try:
            video.recording.write(chunk.index, chunk.frames, chunk.latents, saved_point(chunk.resume))
            if chunk.last:
                self.finish(video, self.pipeline.resyncs.get(chunk.video, ()))
        except (PAVDMError, OSError) as error:
            self.fail(video, error)
        return video.error is None

    def grown(self, video: Video, resume: ResumePoint) -> None:
        """A shift without a chunk: from here the video goes on, too."""
        if video.recording is not None:
            try:
                point = saved_point(resume)
                assert point is not None
                video.recording.grown(point)
            except OSError as error:
                self.fail(video, error)

    def finish(self, video: Video, resyncs: Sequence[int] = ()) -> None:
        """Makes the mp4, latents and sidecar of a video all of whose chunks are there.

        Args:
            video: which.
            resyncs: rows that adaptive re-sync of mode displaced has made exact.
        """
        recording, request = video.recording, video.request
        assert recording is not None
        comment = {"software": "pavdm_dist", "prompt": request.prompt, "seed": request.seed}
        video.result = recording.finish(self._origin.facts(request, resyncs, video.changes), comment)
        video.recording = None

    def fail(self, video: Video, error: PAVDMError | OSError) -> None:
        """Ends a video; what is finished of it stays."""
        recording, video.recording = video.recording, None
        left = self._abort(video, recording)
        what = f"cannot be written: {error}" if isinstance(error, OSError) else str(error)
        message = what if what.startswith("output=") else f"output={video.output}: {what}"
        video.error = VideoError(message)
        video.error.__cause__ = error
        logger.warning("%s%s", video.error, f"; {left}" if left else "")

    def abort(self) -> list[str]:
        """Leaves all that is unfinished playable and ready to go on; says where. What is just being opened, which may
        take its time, is waited for when all others are safe."""
        self._over.set()
        opened = list(self._being_opened)  # at most one
        left = [self._leave(video) for video in self.all if all(video is not one for one in opened)]
        with self._opening:
            left += [self._leave(video) for video in self.all]
        return [sentence for sentence in left if sentence is not None]

    @staticmethod
    def _abort(video: Video, recording: Recording | None) -> str | None:
        if recording is None:
            return None
        left = recording.abort()
        video.unsaved = recording.unsaved
        return left

    @classmethod
    def _leave(cls, video: Video) -> str | None:
        """Says where one is left; None of one that has nothing open."""
        recording, video.recording = video.recording, None
        try:
            return cls._abort(video, recording)
        except Exception:  # a fault of this program in one must not cost the others what they have
            logger.exception("%s may have lost its last chunks", video.output)
            return None

    def _is_made(self, video: Video) -> bool:
        """Whether a video is complete, as this command would make it.

        Raises:
            ConfigError: it is complete but was made otherwise.
        """
        if not is_complete(video.output):
            return False
        sidecar = read_sidecar(video.output)
        identity = sidecar.get("identity") if isinstance(sidecar, Mapping) else None
        if not isinstance(identity, Mapping):  # somebody else's file, or of a version that kept no record
            return False
        if other := difference(video.output, identity, self._origin.identity(video.request), self.config):
            raise ConfigError(
                f"output={video.output} {other}, and its sidecar {sidecar_path(video.output)} exists; choose another"
                " name or pass --overwrite"
            )
        frames, checksum = sidecar.get("num_frames"), sidecar.get("latents_sha256")
        if type(frames) is not int or not isinstance(checksum, str):
            raise ConfigError(
                f"output={video.output}: its sidecar {sidecar_path(video.output)} lacks num_frames or latents_sha256;"
                " choose another name or pass --overwrite"
            )
        remove_parts(video.output)  # of a process that died between the sidecar and the end
        video.result = Recorded(video.output, frames, checksum)
        logger.info("%s is complete already", video.output)
        return True

    def _open(self, video: Video) -> Recording:
        try:
            video.recording = Recording.open(
                video.output,
                identity=self._origin.identity(video.request),
                **self._shape,
                overwrite=self.overwrite,
                resume=not self.overwrite,
                settings=to_yaml(_own_settings(self.config, video, self.params)),
            )
        except BegunOtherwiseError as error:
            of_machine = bool(error.names) and all(is_of_machine(name, self.config) for name in error.names)
            kind = OtherMachineError if of_machine else BegunOtherwiseError
            raise kind(error.begun, error.advice if self.advice is None else self.advice, error.names) from error
        if video.recording.next_chunk or video.recording.point is not None:
            logger.info("%s goes on at chunk %d", video.output, video.recording.next_chunk)
        frames = input_frames(video.request, self.params, self.pipeline.checkpoint)
        if self.config.include_input and frames is not None:
            video.recording.write_input(frames)
        return video.recording

    @property
    def _shape(self) -> dict[str, Any]:
        params, config = self.params, self.config
        size = {"fps": params.fps, "height": params.height, "width": params.width}
        return {**size, "chunks_per_segment": config.chunks_per_segment, "save_latents": config.save_latents}

    @property
    def _origin(self) -> Origin:
        return Origin(self.config, self.params, self.pipeline, self.weights)


def _own_settings(config: SampleConfig, video: Video, params: SamplingParams) -> SampleConfig:
    """Settings that make one video of a command alone, and mean the same in every working directory and on any number
    of stages."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or path == RGB or is_remote(path) else os.path.abspath(path)

    def weights(name: str) -> str:
        return os.path.abspath(name) if name not in shipped_models() and os.path.isdir(name) else name

    return replace(
        config,
        prompt=video.request.prompt,
        prompts=None,
        seed=video.request.seed,
        output=absolute(video.output) or "",
        model=weights(config.model),
        lora=[replace(entry, model=weights(entry.model)) for entry in config.lora],
        video=absolute(config.video),
        image=absolute(config.image),
        preview_decoder=absolute(config.preview_decoder),
        text_cache=absolute(config.text_cache),
        trace=absolute(config.trace),
        chunks_per_unit=params.chunks_per_unit,
    )
