"""The ``sample`` and ``plan`` commands: settings in, video files or a report out."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.config import ClusterConfig, PlanConfig, SampleConfig, to_dict
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.encode import as_rate, check_size, require_libx264
from pavdm_dist.io.latents import LatentsHash, LatentsWriter
from pavdm_dist.io.metadata import Sidecar, sidecar_path
from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.io.storage import check_output, exists, join, remove
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.models.devices import DTYPES
from pavdm_dist.pipeline import PAVDMPipeline, VideoChunk
from pavdm_dist.planning import planner
from pavdm_dist.planning.forecast import pipeline_utilisation, useful_stages
from pavdm_dist.planning.partition import layer_split
from pavdm_dist.request import SamplingParams, VideoRequest, check_prompts, clip_frames_needed, input_frames
from pavdm_dist.validate import frames_wanted

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
    pipeline = _pipeline(config)
    params = _params(config, pipeline.checkpoint)
    as_rate(params.fps)
    check_size(params.height, params.width)
    require_libx264()
    if pipeline.engine is not None:
        pipeline.split(params)
    requests = _requests(config, params, pipeline.checkpoint)
    outputs = _outputs(config, requests)
    for output in outputs:
        check_output(output, overwrite)
        if not overwrite and exists(sidecar_path(output)):
            raise ConfigError(f"output={output}: its sidecar {sidecar_path(output)} exists; pass --overwrite")
        if config.save_latents and not overwrite and exists(_latents_path(output)):
            raise ConfigError(f"output={output}: its latents {_latents_path(output)} exist; pass --overwrite")
    if config.trace is not None:
        check_output(config.trace, overwrite, field="trace")
        if any(str(config.trace) in (sidecar_path(output), output) for output in outputs):
            raise ConfigError(f"trace={config.trace}: is the name of a video's sidecar; choose another")
    writers: dict[int, _VideoWriter] = {}
    identity = pipeline.checkpoint.identity
    bar = progress(requests[0].num_frames, params.fps, len(requests))
    started = time.monotonic()
    results: list[dict[str, Any]] = [{} for _ in requests]
    try:
        for chunk in pipeline.iter_chunks(requests, params, config.streams):
            number = chunk.video
            try:
                if number not in writers:
                    writers[number] = _VideoWriter(
                        outputs[number], requests[number], config, params, pipeline, overwrite
                    )
                writers[number].write(chunk)
                if chunk.last:
                    # Rows that adaptive re-sync of mode displaced has made exact.
                    rows = list(pipeline.resyncs.get(number, ()))
                    results[number] = writers[number].finish(identity, {"resyncs": rows} if rows else {})
                    del writers[number]
            except OSError as error:  # a full disk, a name too long, a share that went away
                raise MediaError(f"output={outputs[number]}: cannot be written: {error}") from error
            bar.chunk(number, chunk.index, chunk.frames.shape[0])
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("; ".join(filter(None, [w.abort() for w in writers.values()]))) from interrupt
    except BaseException:
        for left in filter(None, [writer.abort() for writer in writers.values()]):
            logger.warning("stopped: %s", left)
        raise
    finally:
        bar.close()
    seconds = time.monotonic() - started
    frames = sum(request.num_frames for request in requests)
    for result in results:
        logger.info("wrote %s (%d frames)", result["output"], result["num_frames"])
    return {"videos": results, "seconds": round(seconds, 3), "frames_per_second": round(frames / seconds, 3)}


def plan_report(config: SampleConfig, chunks: int | None = None) -> dict[str, Any]:
    """What a run would do: window plan, cost, layer split. Reads shapes, no weights.

    Args:
        config: validated settings.
        chunks: new chunks, instead of a length in frames.

    With ``cluster.devices`` the planner says how to use them (:mod:`pavdm_dist.planning.planner`).
    """
    checkpoint = Checkpoint.open(config.model, config.revision)
    params = _params(config, checkpoint)
    spec, size = checkpoint.codec_spec, params.latent_chunk_size
    if chunks is None:
        frames = frames_wanted(config, params.fps)
        chunks = spec.chunks_for_frames(frames, size, params.warm)
    else:
        frames = spec.frames_in_chunk(size, first=not params.warm) + (chunks - 1) * spec.frames_in_chunk(size, False)
    plan = params.plan(chunks)
    branches = 1 if params.guidance_scale == 1 else 2
    split = [(0, checkpoint.shape.spec.num_blocks)]
    if config.num_stages:
        split = layer_split(checkpoint, params, _options(config))
    utilisation = pipeline_utilisation(params, plan, max(config.num_stages, 1), config.streams)
    cluster = config.cluster if isinstance(config, PlanConfig) and config.cluster.devices is not None else None
    return {
        "chunks": chunks,
        "num_frames": frames,
        "seconds": round(frames / params.fps, 3),
        "model_calls": plan.num_rows,
        "guidance_branches": branches,
        "latent_evaluations": plan.latent_evaluations,
        "latent_evaluations_per_new_latent": round(plan.latent_evaluations / (chunks * size), 3),
        "first_chunk_after_calls": plan.first_chunk_after_calls,
        "calls_per_chunk": plan.steps_per_shift,
        "window_latents": (params.window_chunks + params.context_chunks) * size,
        "levels": [round(level, 6) for level in reversed(params.schedule.levels)],
        "layer_split": [list(blocks) for blocks in split],
        "pipeline_utilisation": round(utilisation, 4),
        "useful_stages": useful_stages(params, config.streams),
        "sampling": asdict(params),
        **({} if cluster is None else {"cluster": _cluster_report(config, cluster, checkpoint, params, plan)}),
    }


def _cluster_report(
    config: SampleConfig, cluster: ClusterConfig, checkpoint: Checkpoint, params: SamplingParams, plan: WindowPlan
) -> dict[str, Any]:
    """What the planner says; a cluster's devices are GPUs, which hold the weights as they are stored."""
    dtype = checkpoint.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    return planner.report(checkpoint, params, plan, cluster, dtype, _decoder(config))


class _VideoWriter:
    """One video's files: segments while it grows, then mp4, latents and, last, the sidecar."""

    def __init__(
        self,
        output: str,
        request: VideoRequest,
        config: SampleConfig,
        params: SamplingParams,
        pipeline: PAVDMPipeline,
        overwrite: bool,
    ) -> None:
        self._output, self._request, self._config, self._params = output, request, config, params
        self._pipeline = pipeline
        if overwrite:
            # The sidecar says "complete"; it must not outlive the video it speaks of.
            remove(sidecar_path(output))
        self._segments = SegmentWriter(
            output, params.fps, params.height, params.width, config.chunks_per_segment, overwrite=overwrite
        )
        self._latents = LatentsWriter(_latents_path(output)) if config.save_latents else None
        self._hash = LatentsHash()
        self._chunk_seconds: list[float] = []
        self._clock = time.monotonic()
        self._before: Tensor | None = None
        if config.include_input:
            self._before = input_frames(request, params, pipeline.checkpoint)
        if self._before is not None:
            self._segments.write_chunk(0, self._before)

    def write(self, chunk: VideoChunk) -> None:
        """Takes the next chunk."""
        offset = 0 if self._before is None else 1
        self._segments.write_chunk(chunk.index + offset, chunk.frames)
        self._hash.update(chunk.latents)
        if self._latents is not None:
            self._latents.write_chunk(chunk.index, chunk.latents)
        now = time.monotonic()
        self._chunk_seconds.append(round(now - self._clock, 4))
        self._clock = now

    def finish(self, identity: str, extra: dict[str, Any]) -> dict[str, Any]:
        """Joins the segments; the sidecar comes last: it exists exactly when the video is complete."""
        request, params = self._request, self._params
        tag = {"software": "pavdm_dist", "prompt": request.prompt, "seed": request.seed}
        frames = self._segments.finish(metadata=tag)
        if self._latents is not None:
            self._latents.finish()
        Sidecar(
            config=to_dict(self._config),
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            num_frames=frames,
            fps=params.fps,
            height=params.height,
            width=params.width,
            device=self._pipeline.device_name,
            threads=self._config.threads_per_stage,
            chunk_seconds=self._chunk_seconds,
            latents_sha256=self._hash.hexdigest(),
            weights=identity,
            extra={"sampling": asdict(params), **extra},
        ).write(self._output)
        return {"output": self._output, "num_frames": frames, "latents_sha256": self._hash.hexdigest()}

    def abort(self) -> str | None:
        """Leaves what is finished playable and says where; None when nothing is."""
        left = self._segments.abort()
        if self._latents is not None:
            self._latents.abort()
        if left.playlist is None:
            return None
        return f"{left.num_frames} frames of {self._output} are playable in {left.playlist}"


def _pipeline(config: SampleConfig) -> PAVDMPipeline:
    checkpoint = Checkpoint.open(config.model, config.revision)
    engine = _options(config) if config.num_stages else None
    return PAVDMPipeline(
        checkpoint,
        config.num_stages,
        config.threads_per_stage,
        engine,
        config.dtype,
        config.device,
        config.decoder,
        config.decoder_dtype,
    )


def _options(config: SampleConfig) -> EngineOptions:
    return EngineOptions(
        num_stages=config.num_stages,
        layers_per_stage=config.layers_per_stage,
        balance=config.balance,
        compile=config.compile,
        dtype=config.dtype,
        threads_per_stage=config.threads_per_stage,
        cpus_per_stage=config.cpus_per_stage,
        gpus_per_stage=config.gpus_per_stage or float(config.device == "cuda"),
        decoder=_decoder(config),
        decoder_dtype=config.decoder_dtype,
        threads_per_decoder=config.threads_per_decoder,
        cpus_per_decoder=config.cpus_per_decoder,
        gpus_per_decoder=config.gpus_per_decoder,
        backend=config.backend,
        link_timeout_s=config.link_timeout_s,
        ray_address=config.ray_address,
        trace_file=config.trace,
    )


def _decoder(config: SampleConfig) -> str:
    """Where chunks from stages are decoded."""
    return "cpu" if config.decoder == "auto" else config.decoder


def _params(config: SampleConfig, checkpoint: Checkpoint) -> SamplingParams:
    chosen = {name: getattr(config, name) for name in SamplingParams.__dataclass_fields__}
    chosen["displaced"] = Displaced(**asdict(config.displaced))
    params = SamplingParams.resolve(checkpoint, config.allow_untrained_causal, **chosen)
    trained = checkpoint.defaults
    if (params.height, params.width) != (trained.height, trained.width):
        logger.warning(
            "the model was trained at %dx%d (height x width); %dx%d may look wrong",
            trained.height, trained.width, params.height, params.width,
        )  # fmt: skip
    return params


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


def _latents_path(output: str) -> str:
    return output[: -len(".mp4")] + ".safetensors"
