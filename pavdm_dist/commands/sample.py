"""``pavdm sample``: settings in, video files out."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.resolve import device_name, engine_options, sampling_params
from pavdm_dist.config import SampleConfig, frames_wanted
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.encode import as_rate, check_size, require_libx264
from pavdm_dist.io.metadata import sidecar_path, versions, weights_identity
from pavdm_dist.io.recording import Recording, check_recording
from pavdm_dist.io.storage import check_output, join, same_path
from pavdm_dist.merging import to_dict
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.request import SamplingParams, VideoRequest, check_prompts, clip_frames_needed, input_frames

logger = logging.getLogger(__name__)

# Bytes of the prompt that a generated file name carries; names end at 255 bytes on most file systems.
SLUG_BYTES = 40


def render_command(config: SampleConfig, overwrite: bool, progress: Callable[..., Any]) -> dict[str, Any]:
    """Renders what the settings say, writing each video as it grows.

    Args:
        config: validated settings.
        overwrite: replace existing outputs.
        progress: makes a :class:`~pavdm_dist.commands.progress.ChunkProgress`-like object.

    Returns:
        ``videos`` (path, frames, latents_sha256 of each), ``seconds`` and ``frames_per_second``.

    Raises:
        PAVDMError: bad input, before anything is written; or the engine's end, after which the finished
            segments stay playable.
    """
    engine = engine_options(config) if config.num_stages else None
    pipeline = PAVDMPipeline(Checkpoint.open(config.model), config.num_stages, config.threads_per_stage, engine)
    params = sampling_params(config, pipeline.checkpoint)
    as_rate(params.fps)
    check_size(params.height, params.width)
    require_libx264()
    if pipeline.engine is not None:
        pipeline.split(params)
    requests = _requests(config, params, pipeline.checkpoint)
    outputs = _outputs(config, requests)
    for output in outputs:
        check_recording(output, overwrite, config.save_latents)
    if config.trace is not None:
        check_output(config.trace, overwrite, field="trace")
        if any(same_path(config.trace, sidecar_path(output)) for output in outputs):
            raise ConfigError(f"trace={config.trace}: is the name of a video's sidecar; choose another")
    run = _Run(config, params, pipeline, weights_identity(pipeline.checkpoint.folder), overwrite)
    recordings: dict[int, Recording] = {}
    results: list[dict[str, Any]] = [{} for _ in requests]
    bar = progress(requests[0].num_frames, params.fps, len(requests))
    started = time.monotonic()
    try:
        for chunk in pipeline.iter_chunks(requests, params, config.streams):
            number, request = chunk.video, requests[chunk.video]
            try:
                if number not in recordings:
                    recordings[number] = run.open(outputs[number], request)
                    run.write_input(recordings[number], request)
                recordings[number].write(chunk.index, chunk.frames, chunk.latents)
                if chunk.last:
                    results[number] = run.finish(recordings[number], request, number)
                    del recordings[number]
            except OSError as error:  # a full disk, a name too long, a share that went away
                raise MediaError(f"output={outputs[number]}: cannot be written: {error}") from error
            bar.chunk(number, chunk.index, chunk.frames.shape[0])
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("; ".join(_abort(recordings))) from interrupt
    except BaseException:
        for left in _abort(recordings):
            logger.warning("stopped: %s", left)
        raise
    finally:
        bar.close()
    seconds = time.monotonic() - started
    frames = sum(request.num_frames or 0 for request in requests)
    for result in results:
        logger.info("wrote %s (%d frames)", result["output"], result["num_frames"])
    return {"videos": results, "seconds": round(seconds, 3), "frames_per_second": round(frames / seconds, 3)}


@dataclass(frozen=True)
class _Run:
    """What the videos of one command have in common, and how each is recorded."""

    config: SampleConfig
    params: SamplingParams
    pipeline: PAVDMPipeline
    weights: str
    overwrite: bool

    def open(self, output: str, request: VideoRequest) -> Recording:
        return Recording.open(
            output,
            fps=self.params.fps,
            height=self.params.height,
            width=self.params.width,
            identity=self._identity(request),
            chunks_per_segment=self.config.chunks_per_segment,
            save_latents=self.config.save_latents,
            overwrite=self.overwrite,
        )

    def write_input(self, recording: Recording, request: VideoRequest) -> None:
        if self.config.include_input:
            frames = input_frames(request, self.params, self.pipeline.checkpoint)
            if frames is not None:
                recording.write_input(frames)

    def finish(self, recording: Recording, request: VideoRequest, number: int) -> dict[str, Any]:
        # Rows that adaptive re-sync of mode displaced has made exact.
        resyncs = list(self.pipeline.resyncs.get(number, ()))
        facts = {
            "config": to_dict(self.config),
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "device": device_name(self.pipeline.engine),
            "threads": self.config.threads_per_stage,
            "weights": self.weights,
            "extra": {"sampling": asdict(self.params), **({"resyncs": resyncs} if resyncs else {})},
        }
        comment = {"software": "pavdm_dist", "prompt": request.prompt, "seed": request.seed}
        return asdict(recording.finish(facts, comment))

    def _identity(self, request: VideoRequest) -> dict[str, Any]:
        """What a video's bits depend on, except for the device that they are computed on."""
        clip = None if request.clip is None else hashlib.sha256(request.clip.contiguous().numpy().data).hexdigest()
        found = versions()
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "prompt_schedule": request.prompt_schedule,
            "seed": request.seed,
            "num_frames": request.num_frames,
            "clip": clip,
            "include_input": self.config.include_input,
            "sampling": asdict(self.params),
            "weights": self.weights,
            "threads": self.config.threads_per_stage,
            "compile": self.config.compile,
            "versions": {name: found[name] for name in ("pavdm_dist", "torch", "av")},
        }


def _abort(recordings: dict[int, Recording]) -> list[str]:
    """Where the finished parts of unfinished videos are."""
    return [left for left in [recording.abort() for recording in recordings.values()] if left is not None]


def _requests(config: SampleConfig, params: SamplingParams, checkpoint: Checkpoint) -> list[VideoRequest]:
    """One request per prompt; line i of a prompt file gets ``seed + i``."""
    prompts = [config.prompt or ""]
    if config.prompts is not None:
        try:
            lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts={config.prompts}: is no readable UTF-8 text file ({error})") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ConfigError(f"prompts={config.prompts}: has no prompt, one a line is expected")
    clip = None
    if config.video is not None:
        from pavdm_dist.io.video import read_clip

        fewest = clip_frames_needed(params, checkpoint)
        frames = read_clip(
            config.video, None, params.height, params.width, params.fps, "last", checkpoint.codec_spec.temporal_stride
        )
        if len(frames) < fewest:
            raise ConfigError(
                f"video={config.video}: has {len(frames)} usable frames at {params.fps:g} fps, "
                f"start={params.start} needs at least {fewest}"
            )
        clip = torch.from_numpy(frames)
    schedule = tuple((change.from_chunk, change.prompt) for change in config.prompt_schedule)
    length = frames_wanted(config, params.fps)
    requests = [
        VideoRequest(prompt, config.seed + i, length, config.negative_prompt, schedule, clip)
        for i, prompt in enumerate(prompts)
    ]
    # A prompt that is refused in the middle of a batch would end the videos beside it.
    for request in requests:
        check_prompts(request, checkpoint)
    return requests


def _outputs(config: SampleConfig, requests: list[VideoRequest]) -> list[str]:
    """The file named by ``output``, or ``NNNN-words-sSEED.mp4`` in that folder."""
    if config.output.lower().endswith(".mp4"):
        return [config.output]
    return [
        join(config.output, f"{i:04d}-{_slug(request.prompt)}-s{request.seed}.mp4")
        for i, request in enumerate(requests)
    ]


def _slug(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:SLUG_BYTES].strip("-") or "video"
