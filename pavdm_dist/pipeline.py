"""What users hold: a model, and calls that turn prompts into frames, in this process or on a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.codecs.pretrained_text import TextOptions
from pavdm_dist.engine.events import AtWork
from pavdm_dist.engine.in_process import InProcess
from pavdm_dist.engine.kept import Engines, OnFailed, OnGrown
from pavdm_dist.engine.options import EngineOptions, options_of
from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.method.recovery import Recovers, Recovery
from pavdm_dist.models.devices import device_model, idle_gpus, idle_on_stages, named_dtype
from pavdm_dist.models.source import Adapter
from pavdm_dist.planning.forecast import useful_stages
from pavdm_dist.planning.partition import layer_split
from pavdm_dist.request.call import Prompt, check_tensor_inputs, requests_of_call
from pavdm_dist.request.outputs import OUTPUTS, PAVDMPipelineOutput, VideoChunk, WholeVideos
from pavdm_dist.request.running import Running, rehearsed
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.steps import step_callback
from pavdm_dist.request.texts import prepare_texts
from pavdm_dist.request.video_request import VideoRequest
from pavdm_dist.values.arguments import check_names
from pavdm_dist.values.fields import StageCount, Threads, TileSide, Within, checked_arguments, show

if TYPE_CHECKING:
    from pavdm_dist.engine.inline import InlineEngine
    from pavdm_dist.engine.ray_engine import RayEngine

logger = logging.getLogger(__name__)

_FROM_PRETRAINED = (
    "model", "num_stages", "threads_per_stage", "engine", "torch_dtype", "device", "revision", "lora", "text",
    "decoder_tile", "preview_decoder", "recovery",
)  # fmt: skip
_COUNTS = {
    "num_stages": StageCount,
    "threads_per_stage": Threads,
    "decoder_tile": TileSide,
    "streams": Annotated[int, Within(0, 1024, above=True)],
}


class PAVDMPipeline:
    """Text (and a clip) to videos of any length.

    With stages it owns them from the first call on, so that later calls find the weights loaded; :meth:`close` ends
    them, and so does ``with pipeline:``.

    Args:
        checkpoint: the model.
        num_stages: 0 samples in this process, or on as many stages as ``engine`` says; 1 or more stage actors on Ray.
        threads_per_stage: intra-op threads, also of this process without stages; None = as ``engine`` says, else 1.
            Part of what makes results reproducible to the bit on a CPU.
        engine: further options of the engine; what is said here too must be the same.
        dtype: of the weights; ``auto`` is what the checkpoint holds on a GPU, and float32 on a CPU.
        device: ``auto`` is this process' GPU where it has one, and with stages what ``engine`` says; ``cuda`` gives
            every stage a GPU.
        decoder: without stages, the device that decodes; ``shared`` (or ``auto``) is the one that samples.
        decoder_dtype: without stages, what the codec computes in.
        decoder_tile: large frames are decoded in blended tiles of so many pixels a side; None = whole.
        preview_decoder: what makes frames instead of the codec: ``rgb``, or the file of a tiny decoder.
        recovery: with cached context, what is kept for going on (:class:`~pavdm_dist.method.recovery.Recovery`).

    Attributes:
        resyncs: by video of the last run, rows that adaptive re-sync of mode displaced has made exact, where it has.
        device_name: model of what samples, once it does.
        relative_error: of compiled blocks against plain ones, once they were compared; None where none are compiled.
        kernels: of attention where blocks are compiled, by shape.
        num_stages, threads_per_stage: as settled.

    Raises:
        CheckpointError: a model without weights.
        ConfigError: a device that is not there, a type it cannot compute in, something else here than in ``engine``, or
            a decoder beside stages that is not said there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        num_stages: int = 0,
        threads_per_stage: int | None = None,
        engine: EngineOptions | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        decoder: str = "auto",
        decoder_dtype: str = "float32",
        decoder_tile: int | None = None,
        preview_decoder: str | None = None,
        recovery: Recovers = "keys",
    ) -> None:
        counts = {"num_stages": num_stages, "threads_per_stage": threads_per_stage, "decoder_tile": decoder_tile}
        num_stages, threads_per_stage, decoder_tile = checked_arguments(_COUNTS, counts).values()
        if engine is not None and not isinstance(engine, EngineOptions):
            raise ConfigError(f"engine={show(engine)}: must be pavdm_dist.engine.options.EngineOptions, or None")
        checkpoint.require_weights()
        settled = options_of(engine, num_stages or 0, threads_per_stage, decoder, decoder_dtype)
        self._options, self.threads_per_stage = settled
        self.checkpoint, self.num_stages = checkpoint, 0 if self._options is None else self._options.num_stages
        self.engine: EngineOptions | None = None
        self._computes: InProcess | EngineOptions
        self.resyncs: dict[int, tuple[int, ...]] = {}
        self.relative_error: float | None = None
        self.kernels: dict[str, str] = {}
        self._engines = Engines()
        self._decoder, self._decoder_dtype, self._told = decoder, decoder_dtype, False
        self._recovery = Recovery(recovery).by
        self._frames = FrameMaker(checkpoint.vae, decoder_tile, preview_decoder)
        self._frames.check()
        self._running: Running | None = None
        self._use(dtype, device)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "embedded",
        *,
        num_stages: int = 0,
        threads_per_stage: int | None = None,
        engine: EngineOptions | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        lora: Sequence[Adapter] | None = None,
        text: TextOptions | None = None,
        decoder_tile: int | None = None,
        preview_decoder: str | None = None,
        recovery: Recovers = "keys",
        **unknown: object,
    ) -> PAVDMPipeline:
        """Opens the model that ships with the package (``embedded``), a folder or a hub id.

        Args:
            model: which.
            revision: of a hub id: branch, tag or commit.
            lora: changes of the weights; None = there are none.
            num_stages, threads_per_stage, engine, torch_dtype, device: of this class; ``torch_dtype`` is its ``dtype``,
                None is ``auto``.
            text: where a pretrained text encoder computes, and where what it gives is kept.
            decoder_tile, preview_decoder, recovery: of this class.
            unknown: any other argument is refused by name.

        Raises:
            CheckpointError: not a model this package runs.
            ConfigError: an argument that is none, a device that is not there, or a type it cannot compute in.
        """
        check_names(unknown, _FROM_PRETRAINED, "from_pretrained")
        if not isinstance(model, str | Path):
            raise ConfigError(f"model={show(model)}: must be the name of a model, a folder or a hub id")
        adapters = () if lora is None else lora
        if not isinstance(adapters, list | tuple) or not all(isinstance(one, Adapter) for one in adapters):
            raise ConfigError(f"lora={show(lora)}: must be a list of pavdm_dist.models.source.Adapter")
        checkpoint = Checkpoint.open(model, revision, adapters)
        return cls(
            checkpoint if text is None else replace(checkpoint, text=text),
            num_stages,
            threads_per_stage,
            engine,
            torch_dtype or "auto",
            device or "auto",
            decoder_tile=decoder_tile,
            preview_decoder=preview_decoder,
            recovery=recovery,
        )

    def to(
        self,
        *targets: str | torch.device | torch.dtype | None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> PAVDMPipeline:
        """Another device, another type, or both, from the next call on; None changes nothing. Returns itself, as
        diffusers' pipelines do."""
        dtype, device = dtype or self._wanted[0], device or self._wanted[1]
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target or device
        self._use(dtype, device)
        return self

    def _use(self, dtype: str | torch.dtype, device: str | torch.device) -> None:
        """Settles where what is computed, and refuses what cannot be, which changes nothing; nothing is loaded yet."""
        transformer = self.checkpoint.transformer
        computes: InProcess | EngineOptions
        if self._options is None:
            computes = InProcess.chosen(
                transformer, device, dtype, self._decoder, self._decoder_dtype, self.threads_per_stage
            )
            weights, name, on_stages = computes.dtype, device_model(computes.device), False
            if str(computes.decoder_device) != self.checkpoint.codec_device:
                self.checkpoint = replace(self.checkpoint, codec_device=str(computes.decoder_device))
        else:
            computes = self._options.on(str(device), str(dtype).removeprefix("torch."))
            weights = named_dtype(computes.dtype, torch.device(computes.device), transformer)
            self.engine, name, on_stages = computes, computes.device, True
        self.close()
        self._wanted, self._computes, self._weights, self.device_name = (dtype, device), computes, weights, name
        self._tell(idle_gpus(on_stages) if computes.computed_on["device"] == "cpu" else "")

    def _tell(self, idle: str) -> None:
        """Says once what device=auto leaves idle."""
        if idle and str(self._wanted[1]) == "auto" and not self._told:
            self._told = True
            logger.warning("%s", idle)

    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 97,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int = 0,
        video: Tensor | np.ndarray | None = None,
        image: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_chunk: Callable[[VideoChunk], None] | None = None,
        callback_on_step_end: Callable[[PAVDMPipeline, int, float, dict[str, Tensor]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **sampling: Any,
    ) -> PAVDMPipelineOutput | tuple[list[Any]]:
        """Renders whole videos into memory; argument names are those of diffusers.

        Args:
            prompt: one text or several; each gives ``num_videos_per_prompt`` videos. A text may change with time:
                ``{"0s": "a red three", "20s": "a blue seven"}``.
            negative_prompt: text of the unconditional branch, or a list with one for each prompt; None, or a blank
                one, = the model's learned null text.
            height, width, num_inference_steps, guidance_scale: None = the checkpoint's default.
            num_frames: rendered frames per video; with ``start="clip"`` the first W-1 chunks are the clip's end again.
            generator: what seeds come from (:func:`~pavdm_dist.values.arguments.seeds_of`); a list has one per video.
            seed: used without a generator; video i of the call gets ``seed + i``.
            video: conditioning clip, uint8 ``[t, H, W, 3]``; needs ``start="chunk"`` or ``"clip"``.
            image: picture that the videos begin with: a file, a PIL image, or uint8 ``[H, W, 3]``, scaled to cover the
                frame and cut to its centre.
            output_type: ``np`` (float ``[t, H, W, 3]`` in 0..1), ``pt`` (float ``[t, 3, H, W]``), ``pil`` or
                ``latent`` (``[C, N, h, w]``).
            return_dict: False returns ``(frames,)``.
            callback_on_chunk: called with every finished chunk.
            callback_on_step_end: called with (pipeline, row, level of the noisiest chunk, {"latents": ``[1, C, F, h,
                w]``, the window's input of the next row, behind the last row its own chunks as they have become}), to
                look at; only with ``num_stages=0``.
            callback_on_step_end_tensor_inputs: diffusers' list of what it is shown; the latents are all there is.
            sampling: ``window_chunks``, ``latent_chunk_size``, ``context_chunks``, ``context``, ``anchor_chunks``,
                ``method``, ``partitions``, ``lookahead``, ``step``, ``start``, ``end``, ``fps``, ``time_shift``,
                ``mode``, ``displaced``, ``chunks_per_unit``, ``allow_untrained_causal``, ``streams`` (videos in
                flight).

        Raises:
            ConfigError: impossible arguments, or a result that would not fit in memory (use :meth:`iter_chunks`).
            VideoError: a video could not be finished, or was cancelled meanwhile.
        """
        if not isinstance(output_type, str) or output_type not in OUTPUTS:
            raise ConfigError(f"output_type={output_type!r}: must be one of {', '.join(OUTPUTS)}")
        check_tensor_inputs(callback_on_step_end_tensor_inputs)
        streams = sampling.pop("streams", 1)
        params = self.params(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            **sampling,
        )
        requests = requests_of_call(
            prompt,
            params,
            self.checkpoint,
            negative_prompt=negative_prompt,
            num_frames=num_frames,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            seed=seed,
            video=video,
            image=image,
            keeps_frames=output_type != "latent",
        )
        prepare_texts(requests, params, self.checkpoint)
        whole = WholeVideos(len(requests), output_type)
        for chunk in self.iter_chunks(requests, params, streams, callback_on_step_end):
            whole.add(chunk)
            if callback_on_chunk is not None:
                callback_on_chunk(chunk)
        frames = whole.videos()
        return PAVDMPipelineOutput(frames) if return_dict else (frames,)

    def params(self, **chosen: Any) -> SamplingParams:
        """Settings of a run: chosen values over the checkpoint's defaults (see :class:`SamplingParams`)."""
        params = SamplingParams.resolve(self.checkpoint, **chosen)
        self.checkpoint.check_size(params.height, params.width)
        return params

    def iter_chunks(
        self,
        requests: Iterable[VideoRequest],
        params: SamplingParams,
        streams: int = 1,
        callback_on_step_end: Callable[[PAVDMPipeline, int, float, dict[str, Tensor]], Any] | None = None,
        on_failed: OnFailed | None = None,
        on_grown: OnGrown | None = None,
    ) -> Iterator[VideoChunk]:
        """Renders at constant memory: yields each video's chunks in order as they are decoded.

        Abandoning the iterator takes its videos out of the pipeline; the stages stay up for the next call.

        Args:
            requests: taken as places become free, so a generator of thousands is fine; with stages in a thread of its
                own, where texts and clips are encoded too.
            params: settings of the run, which the stages are cut for; a request may have its own.
            streams: videos in flight in the pipeline of stages, 1 to 1024; without stages one after another.
            callback_on_step_end: see :meth:`__call__`.
            on_failed: called with (video, error) for a video that cannot be made or finished, while the others go on;
                without it the error is raised.
            on_grown: called with (video, resume point) for shifts that finish no chunk, while the first window grows.

        Raises:
            ConfigError: impossible arguments, or a later run on this pipeline has ended this one.
            EngineError: the engine as a whole has ended.
            TraceError: everything was given out, and only the trace of the stages cannot be kept.
        """
        streams = checked_arguments(_COUNTS, {"streams": streams})["streams"] or 1
        if callback_on_step_end is not None and not isinstance(self._computes, InProcess):
            raise ConfigError("callback_on_step_end needs num_stages=0: steps end on the stages, not here")
        self.resyncs.clear()
        before, self._running = self._running, (running := Running(params, self.checkpoint, self._recovery))
        if before is not None:
            before.end()

        def failed(video: int, error: PAVDMError) -> None:
            running.forget(video)
            if on_failed is None:
                raise error
            on_failed(video, error)

        try:
            if isinstance(self._computes, InProcess):
                on_step = None if callback_on_step_end is None else partial(step_callback, self, callback_on_step_end)
                inline = self._engines.inline(self._load)
                finished = inline.run(running.streams(requests, inline), on_grown, failed, on_step)
            else:
                staged = self._stages(self._computes, params, streams)
                finished = self._engines.run(staged, running.streams(requests, staged), streams, on_grown, failed)
            for chunk in finished:
                shown = running.chunk(chunk)
                if shown is None:  # cancelled while this was on its way
                    continue
                if chunk.resyncs:
                    self.resyncs[chunk.stream] = chunk.resyncs
                yield shown
        finally:
            running.end()

    def _stages(self, options: EngineOptions, params: SamplingParams, streams: int) -> RayEngine:
        """The engine of stages for a run, that of the run before where it fits; says what it leaves idle."""
        from pavdm_dist.engine.placement import gpus_of_cluster

        engine = self._engines.on_stages(
            self.checkpoint.transformer,
            options,
            self._frames,
            partial(layer_split, self.checkpoint, params, preview=self._frames.preview),
            rehearsed(params, self.checkpoint) if options.rehearses else None,
        )
        self.device_name = ", ".join(engine.devices)
        self.relative_error, self.kernels = engine.relative_error, engine.kernels
        if options.device == "cpu" and (gpus := gpus_of_cluster()):
            self._tell(idle_on_stages(gpus, "the cluster"))
        if len(engine.blocks) > (useful := useful_stages(params, streams)):
            logger.warning(
                "num_stages=%d: with streams=%d and mode=%s at most %d are useful, the others will idle",
                len(engine.blocks), streams, params.mode, useful,
            )  # fmt: skip
        return engine

    def stop(self, video: int) -> None:
        """Lets an endless video of the running :meth:`iter_chunks` end: what is in flight is finished.

        As what is asked by the two methods below, from any thread, and from the first chunk that is asked for on: a
        video that is still to come ends as soon as it may. What comes too late is for no later run.

        Raises:
            ConfigError: ``video`` is no whole number from 0 on.
        """
        if self._running is not None:
            self._running.stop(video)

    def set_prompt(self, video: int, from_chunk: int, text: str) -> None:
        """Another prompt for a video of the running :meth:`iter_chunks`.

        It is in force from ``from_chunk`` on, or where that is born already from the next chunk that is born, up to
        where the prompt schedule has another. Resume points hold it (:attr:`ResumePoint.prompts
        <pavdm_dist.method.resume.ResumePoint.prompts>`), with the chunk that it came to.

        Args:
            video: its number in the run.
            from_chunk: 0-based.
            text: the prompt.

        Raises:
            ConfigError: nothing is running, the video is over or has no such chunk, or the text cannot be encoded.
        """
        if self._running is None or self._running.is_over:
            raise ConfigError("set_prompt: no video is running")
        self._running.set_prompt(video, from_chunk, text)

    def cancel(self, video: int) -> None:
        """Ends a video of the running :meth:`iter_chunks` where it is; the others go on.

        Raises:
            ConfigError: ``video`` is no whole number from 0 on.
        """
        if self._running is not None:
            self._running.cancel(video)

    def at_work(self, video: int) -> AtWork | None:
        """Where a video of the running :meth:`iter_chunks` is; None of one that is not there. From any thread."""
        engine = self._engines.current
        return None if engine is None else engine.at_work(video)

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled."""
        return self.engine is not None and self.engine.compiled

    @property
    def dtype_name(self) -> str:
        """Type of the weights, and of what travels between stages."""
        return str(self._weights).removeprefix("torch.")

    @property
    def computed_on(self) -> dict[str, str | int]:
        """What bits depend on of where they are computed: the types of devices that sample and decode, and of a decoder
        on CPUs its intra-op threads. The number of stages is none of it."""
        return self._computes.computed_on

    @property
    def preview_identity(self) -> str | None:
        """What tells the decoder of previews from others; None = the codec itself decodes."""
        return self._frames.preview_identity

    def split(self, params: SamplingParams) -> list[tuple[int, int]]:
        """Block range of each stage, balanced by estimated cost for the run's full window."""
        assert self.engine is not None
        return layer_split(self.checkpoint, params, self.engine, self._frames.preview)

    def close(self) -> None:
        """Ends the stages and gives their resources back; the next call starts new ones. Safe to call twice."""
        self._engines.close()

    def __enter__(self) -> PAVDMPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self) -> InlineEngine:
        assert isinstance(self._computes, InProcess)
        return self._computes.load(self.checkpoint.transformer, self._frames)
