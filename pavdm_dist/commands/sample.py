"""``pavdm sample``: settings in, video files out."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.progress import Progress
from pavdm_dist.commands.prompt_files import PromptLine, read_prompts
from pavdm_dist.commands.resolve import check_recovery, open_pipeline, sampling_params, say_cost, say_what_to_expect
from pavdm_dist.commands.signals import Signals, Stopped
from pavdm_dist.commands.videos import Video, Videos, WantedVideo
from pavdm_dist.config import SampleConfig, frames_wanted
from pavdm_dist.errors import ConfigError, FailedVideosError, PAVDMError
from pavdm_dist.io.encode import check_size, require_libx264
from pavdm_dist.io.image import read_image
from pavdm_dist.io.metadata import sidecar_path
from pavdm_dist.io.parts import check_output, parts_folder
from pavdm_dist.io.storage import exists, is_remote, join, local_copy, same_path
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.texts import check_prompts, prepare_texts, timed_prompts
from pavdm_dist.request.video_request import VideoRequest, plan_of
from pavdm_dist.values.rates import as_rate
from pavdm_dist.values.timed import first_prompt

logger = logging.getLogger(__name__)

# Bytes of the prompt that a generated file name carries; names end at 255 bytes on most file systems.
SLUG_BYTES = 40


def render_command(
    config: SampleConfig,
    overwrite: bool,
    progress: Callable[..., Progress],
    wanted: Sequence[WantedVideo] | None = None,
) -> dict[str, Any]:
    """Renders what the settings say, writing each video as it grows.

    The same command again leaves complete videos alone, goes on with unfinished ones and makes the rest.

    Args:
        config: validated settings.
        overwrite: begin anew and replace existing outputs.
        progress: makes a :class:`~pavdm_dist.commands.progress.ChunkProgress`-like object.
        wanted: the videos; None = those that the settings name.

    Returns:
        ``videos`` (path, frames, latents_sha256 of each), ``seconds`` and ``frames_per_second``.

    Raises:
        FailedVideosError: some could not be made, all others are complete.
        PAVDMError: bad input, before anything is written; or the engine's end. What is finished stays playable, and
            the same command goes on.
        Stopped: a signal; the same holds.
    """
    videos = check_videos(config, overwrite, wanted)
    made, pipeline = videos.all, videos.pipeline
    bar = progress(made[0].request.num_frames, videos.params.fps, sum(video.result is None for video in made))
    started = time.monotonic()
    frames = 0
    try:
        if left := [video.request for video in made if video.result is None and video.error is None]:
            with Signals() as signals, pipeline:
                prepare_texts(left, videos.params, pipeline.checkpoint)  # before a worker or the model is loaded
                frames = _render(videos, bar, signals)
    finally:
        bar.close()
    seconds = time.monotonic() - started
    failed = [str(video.error) for video in made if video.error is not None]
    if failed:
        of_how_many = f"{len(failed)} of {len(made)} videos failed, the others are complete: " if len(made) > 1 else ""
        raise FailedVideosError(of_how_many + "; ".join(failed), len(failed))
    results = [asdict(video.result) for video in made if video.result is not None]
    for result in results:
        logger.info("wrote %s (%d frames)", result["output"], result["num_frames"])
    return {"videos": results, "seconds": round(seconds, 3), "frames_per_second": round(frames / seconds, 3)}


def check_videos(config: SampleConfig, overwrite: bool, wanted: Sequence[WantedVideo] | None = None) -> Videos:
    """All that can be refused before anything is computed, written or taken from a cluster.

    Args:
        config: validated settings.
        overwrite: existing outputs may be replaced; what is none of this program never is.
        wanted: the videos; None = those that the settings name.

    Returns:
        What is to be made, and what is there already.

    Raises:
        ConfigError: settings, prompts, a clip, outputs or a model that cannot be used.
    """
    pipeline = open_pipeline(config)
    params = sampling_params(config, pipeline.checkpoint)
    check_recovery(config, params)
    pipeline.checkpoint.check_text()
    as_rate(params.fps)
    check_size(params.height, params.width)
    require_libx264()
    if pipeline.engine is not None:
        pipeline.split(params)
    wanted = _wanted(config) if wanted is None else wanted
    outputs = [one.output for one in wanted]
    check_clip(config, outputs)
    requests = requests_of(config, wanted, params, pipeline.checkpoint)
    weights = pipeline.checkpoint.identity
    made = [Video(number, *pair) for number, pair in enumerate(zip(requests, outputs, strict=True))]
    videos = Videos(made, config, params, pipeline, weights, overwrite)
    videos.check()
    if config.trace is not None:
        check_output(config.trace, overwrite=True, field="trace")
        if exists(config.trace) and not _is_trace(config.trace):
            raise ConfigError(f"trace={config.trace} exists and is no trace of this program; choose another name")
        if any(same_path(config.trace, sidecar_path(output)) for output in outputs):
            raise ConfigError(f"trace={config.trace}: is the name of a video's sidecar; choose another")
    say_what_to_expect(params, pipeline.checkpoint)
    say_cost(params, plan_of(requests[0], params, pipeline.checkpoint), pipeline.checkpoint)
    return videos


def check_clip(config: SampleConfig, outputs: Sequence[str]) -> None:
    """Refuses a clip that making the videos would replace or remove."""
    clip = config.video
    if clip is None:
        return
    for output in outputs:
        if same_path(clip, output) or same_path(os.path.dirname(clip), parts_folder(output)):
            raise ConfigError(f"output={output} would replace video={clip}; choose another name")


def _is_trace(path: str) -> bool:
    """Whether a run wrote it: the same command again, which goes on with what failed then, writes it anew."""
    from pavdm_dist.engine.trace import read_trace

    try:
        if not exists(path) or not (is_remote(path) or os.path.isfile(path)):
            return False
        with local_copy(path) as file:
            read_trace(file)
    except (ConfigError, OSError):
        return False
    return True


def _render(videos: Videos, bar: Any, signals: Signals) -> int:
    """Makes what is missing; the number of new frames."""
    taken: list[Video] = []
    frames = 0

    def failed(number: int, error: PAVDMError) -> None:
        with signals.shield():
            videos.fail(taken[number], error)

    def grown(number: int, resume: ResumePoint) -> None:
        with signals.shield():
            videos.grown(taken[number], resume)
            if taken[number].error is not None:
                videos.pipeline.cancel(number)

    try:
        chunks = videos.pipeline.iter_chunks(
            videos.begun(taken), videos.params, videos.config.streams, on_failed=failed, on_grown=grown
        )
        for chunk in chunks:
            video = taken[chunk.video]
            if video.error is not None:
                continue
            with signals.shield():
                if not videos.write(video, chunk):
                    videos.pipeline.cancel(chunk.video)
                    continue
            frames += chunk.frames.shape[0]
            bar.found(sum(video.found for video in videos.all))
            bar.chunk(video.number, chunk.index, chunk.frames.shape[0])
        bar.found(sum(video.found for video in videos.all))  # of those that needed no new chunk, too
    except BaseException as error:
        left: list[str] = []
        with suppress(Stopped), signals.shield():
            left = videos.abort()
        again = "the same command without --overwrite goes on" if videos.overwrite else "the same command again goes on"
        goes_on = "; ".join([*left, again]) if left else "nothing was finished"
        if isinstance(error, Stopped):
            raise Stopped(error.number, goes_on) from error
        if isinstance(error, PAVDMError) and left:
            raise type(error)(f"{error}; {goes_on}") from error
        if left:
            logger.warning("stopped: %s", goes_on)
        raise
    return frames


def _wanted(config: SampleConfig) -> list[WantedVideo]:
    """One per prompt, line i of a prompt file with ``seed + i``; in the file named by ``output``, or in that folder as
    ``NNNN-words-sSEED.mp4``."""
    first = config.prompt or first_prompt(config.timed_prompts) or ""
    lines = [PromptLine(0, first)] if config.prompts is None else read_prompts(config.prompts)
    if config.output.lower().endswith(".mp4"):
        return [WantedVideo(lines[0].prompt, config.seed, config.output)]
    wanted = []
    for number, (line, prompt) in enumerate(lines):
        seed = config.seed + number
        output = join(config.output, f"{number:04d}-{_slug(prompt)}-s{seed}.mp4")
        wanted.append(WantedVideo(prompt, seed, output, f"prompts={config.prompts}: line {line}: " if line else ""))
    return wanted


def requests_of(
    config: SampleConfig, wanted: Sequence[WantedVideo], params: SamplingParams, checkpoint: Checkpoint
) -> list[VideoRequest]:
    """What videos of one command ask for, with the clip or the picture that they begin with.

    Raises:
        ConfigError: a clip, a picture or a prompt that cannot be used.
    """
    clip = before = None
    if config.video is not None:
        from pavdm_dist.commands.clip import open_film

        film = open_film(config, params, checkpoint)
        clip, before = film.clip, film.before
    picture = None
    if config.image is not None:
        picture = torch.from_numpy(read_image(config.image, params.height, params.width))
    schedule = tuple((change.from_chunk, change.prompt) for change in config.prompt_schedule)
    schedule = schedule or timed_prompts(config.timed_prompts, params, checkpoint)
    length = frames_wanted(config, params.fps)
    requests = [
        VideoRequest(one.prompt, one.seed, length, config.negative_prompt, schedule, clip, picture, before=before)
        for one in wanted
    ]
    # A prompt that is refused in the middle of a batch would end the videos beside it.
    for one, request in zip(wanted, requests, strict=True):
        try:
            check_prompts(request, params, checkpoint)
        except ConfigError as error:
            raise ConfigError(f"{one.where}{error}") from error
    return requests


def _slug(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:SLUG_BYTES].strip("-") or "video"
