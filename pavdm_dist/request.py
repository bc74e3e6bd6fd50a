"""From what a user asks for (prompt, frames, clip) to what samplers run (:class:`~pavdm_dist.method.stream.Stream`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, get_args

from torch import Tensor

from pavdm_dist.arguments import check_names, checked_seed
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.receptive import encoder_receptive_latents
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.fields import is_writable, show
from pavdm_dist.method.microbatches import Displaced, MicroBatches, check_adaptive, check_displaced
from pavdm_dist.method.schedule import End, Mode, NoiseSchedule, Start, WindowPlan, time_shift_ratio
from pavdm_dist.method.stream import Conditioning, ResumePoint, Stream
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.devices import intra_op_threads
from pavdm_dist.rates import as_rate
from pavdm_dist.timed import chunk_schedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingParams:
    """Resolved settings of a run: nothing is left to a default.

    Attributes:
        num_inference_steps, window_chunks, latent_chunk_size, context_chunks: T, W, c and the clean chunks.
        start, end: see :class:`~pavdm_dist.method.schedule.WindowPlan`.
        guidance_scale: g; 1 = none, 0 = without the prompt.
        time_shift: r of :func:`~pavdm_dist.method.schedule.shift_time`.
        height, width, fps: of the frames.
        mode: which chunks of a window see each other (:attr:`~pavdm_dist.method.stream.Stream.mode`).
        displaced: when mode displaced is exact.
        context_noise: level to which clean context is noised again; 0 = it stays clean.
        prompt_suffix: words behind every prompt but the negative one.
    """

    num_inference_steps: int
    window_chunks: int
    latent_chunk_size: int
    context_chunks: int
    start: Start
    end: End
    guidance_scale: float
    time_shift: float
    height: int
    width: int
    fps: float
    mode: Mode = "window"
    displaced: Displaced = field(default_factory=Displaced)
    context_noise: float = 0.0
    prompt_suffix: str = ""

    @classmethod
    def resolve(cls, checkpoint: Checkpoint, allow_untrained_causal: bool = False, **chosen: Any) -> SamplingParams:
        """Chosen values, the checkpoint's defaults for those that are None.

        Args:
            checkpoint: the model.
            allow_untrained_causal: take mode causal although the weights never met its mask.
            chosen: fields of this class.

        Raises:
            ConfigError: an impossible combination, naming the nearest legal values, or a name that is no field.
        """
        check_names(chosen, cls.__dataclass_fields__, "sampling")
        defaults = checkpoint.defaults
        names = set(cls.__dataclass_fields__) - {"start", "end", "time_shift", "mode", "displaced"}
        values = {name: chosen[name] if chosen.get(name) is not None else getattr(defaults, name) for name in names}
        if not isinstance(values["fps"], int | float):
            values["fps"] = float(as_rate(values["fps"]))
        shift = chosen.get("time_shift") or defaults.time_shift
        if shift is None:
            latents = (values["window_chunks"] + values["context_chunks"]) * values["latent_chunk_size"]
            shift = time_shift_ratio(values["height"], values["width"], latents)
        words = {"start": "noise", "end": "drain", "mode": "window"}
        values |= {name: chosen.get(name) or default for name, default in words.items()}
        if values["mode"] not in get_args(Mode):
            raise ConfigError(
                f"mode={values['mode']!r}: must be {', '.join(get_args(Mode)[:-1])} or {get_args(Mode)[-1]}"
            )
        displaced = chosen.get("displaced") or Displaced()
        if not isinstance(displaced, Displaced):
            raise ConfigError(f"displaced={displaced!r}: must be a pavdm_dist.method.microbatches.Displaced")
        params = cls(time_shift=shift, displaced=displaced, **values)
        if params.guidance_scale < 1:
            logger.warning(
                "guidance_scale=%g: below 1 the prompt counts for less than it does without guidance, and at 0 for"
                " nothing; 1 is no guidance",
                params.guidance_scale,
            )
        check_displaced(params.mode, displaced)
        check_adaptive(MicroBatches(params.plan(None), params.mode, 0, displaced))
        if params.mode == "causal":
            _check_causal(params, checkpoint, allow_untrained_causal)
        spec = checkpoint.codec_spec
        spec.latent_size(params.height, params.width)
        spec.check_chunk(params.latent_chunk_size)
        if params.context_noise and not params.context_chunks:
            raise ConfigError(
                f"context_noise={params.context_noise:g}: context_chunks=0 leaves no context; use 1, or context_noise=0"
            )
        params.plan(None)
        return params

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule(self.num_inference_steps, self.time_shift)

    @property
    def info(self) -> FrameInfo:
        return FrameInfo(self.height, self.width, self.fps)

    @property
    def warm(self) -> bool:
        """Whether a clip precedes the first chunk, so that it gives no fewer frames than the others."""
        return self.start != "noise"

    @property
    def clip_latents(self) -> int:
        """Latents of the conditioning clip that take part: context, and with ``start="clip"`` slots 0..W-2."""
        plan = self.plan(None)
        return (plan.given_context + plan.given_clip) * self.latent_chunk_size

    def plan(self, num_chunks: int | None) -> WindowPlan:
        """The plan for so many new chunks."""
        return WindowPlan(
            self.num_inference_steps,
            self.window_chunks,
            self.latent_chunk_size,
            self.context_chunks,
            self.start,
            self.end,
            num_chunks,
        )


@dataclass(frozen=True)
class VideoRequest:
    """One video a user asks for.

    Attributes:
        prompt: text of the first chunk.
        seed: 0 or more; noise of chunk k is a function of (seed, k).
        num_frames: new frames; the last chunk is trimmed. None = endless, until it is stopped.
        negative_prompt: text of the unconditional branch; None, or a blank one, = the model's learned null text.
        prompt_schedule: ``(first chunk, prompt)`` of later prompts.
        clip: conditioning frames, uint8 ``[t, H, W, 3]`` at the run's size and rate, as many as the codec encodes.
        image: picture that the video begins with, uint8 ``[H, W, 3]`` at the run's size; needs ``start="noise"``.
        resume: where to go on instead of at the beginning; all else must be as it was.
        before: frames of the clip's film that come before the clip, one by one, for whoever shows the whole film.

    Raises:
        ConfigError: a prompt that is no text, or a seed that is no whole number from 0 on.
    """

    prompt: str
    seed: int
    num_frames: int | None
    negative_prompt: str | None = None
    prompt_schedule: tuple[tuple[int, str], ...] = ()
    clip: Tensor | None = None
    image: Tensor | None = None
    resume: ResumePoint | None = None
    before: Callable[[], Iterable[Any]] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str) and (name == "prompt" or text is not None):
                raise ConfigError(f"{name}={show(text)}: must be text, one for each video")
        object.__setattr__(self, "seed", checked_seed(self.seed))
        # What forms and other programs send where nothing was written.
        if self.negative_prompt is not None and not self.negative_prompt.strip():
            object.__setattr__(self, "negative_prompt", None)


def build_stream(request: VideoRequest, stream_id: int, params: SamplingParams, checkpoint: Checkpoint) -> Stream:
    """Encodes texts and clip and lays out the plan.

    Always on one thread, so that the same request gives the same bits wherever it is built.

    Raises:
        ConfigError: a prompt that is too long or never used, or frames that cannot be made.
        MediaError: the clip is too short.
    """
    plan = plan_of(request, params, checkpoint)
    height, width = checkpoint.codec_spec.latent_size(params.height, params.width)
    with intra_op_threads(1):
        given, warm = ({}, None) if request.resume else _clip_latents(request, params, checkpoint)
        image = _image_latents(request, params, checkpoint)
        conditioning = _conditioning(request, params, checkpoint)
    return Stream(
        id=stream_id,
        plan=plan,
        schedule=params.schedule,
        seed=request.seed,
        latent_shape=(checkpoint.codec_spec.latent_channels, height, width),
        conditioning=conditioning,
        info=params.info,
        guidance_scale=params.guidance_scale,
        given=given,
        warm=warm,
        resume=request.resume,
        mode=params.mode,
        displaced=params.displaced,
        image=image,
        context_noise=params.context_noise,
    )


def plan_of(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> WindowPlan:
    """A request's plan; endless where it is.

    Raises:
        ConfigError: ``num_frames`` is below 1.
    """
    if request.num_frames is None:
        return params.plan(None)
    spec = checkpoint.codec_spec
    return params.plan(spec.chunks_for_frames(request.num_frames, params.latent_chunk_size, params.warm))


def frames_left(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> int | None:
    """Frames that a request is still to give, those of undecoded chunks included; None = endless.

    Raises:
        ConfigError: ``num_frames`` is below 1.
    """
    if request.num_frames is None:
        return None
    spec, size = checkpoint.codec_spec, params.latent_chunk_size
    plan = plan_of(request, params, checkpoint)
    if request.resume is None:
        return request.num_frames
    row = request.resume.snapshot.row
    done = (plan.num_chunks or 0) if plan.is_over(row) else plan.row(row).chunks[0]
    done -= len(request.resume.undecoded)
    before = sum(spec.frames_in_chunk(size, first=index == 0 and not params.warm) for index in range(done))
    return request.num_frames - before


def _check_causal(params: SamplingParams, checkpoint: Checkpoint, allow_untrained: bool) -> None:
    if params.context_chunks > 1:
        raise ConfigError(f"context_chunks={params.context_chunks}: mode=causal takes 0 or 1")
    if not (checkpoint.shape.spec.causal_trained or allow_untrained):
        raise ConfigError(
            "mode=causal: this checkpoint declares no training with the chunk-causal mask; use mode=window, or"
            " allow_untrained_causal=true to see what it does"
        )


def check_prompts(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> None:
    """Refuses texts that the model cannot take or would never read, without running anything.

    Raises:
        ConfigError: a prompt has too many tokens, or characters that no file can hold; one begins behind the video's
            end; a negative prompt without guidance.
    """
    check_schedule([start for start, _ in request.prompt_schedule], plan_of(request, params, checkpoint))
    if request.negative_prompt is not None and params.guidance_scale == 1:
        raise ConfigError(
            f"negative_prompt={request.negative_prompt!r}: guidance_scale=1 uses none; set another, or drop the prompt"
        )
    for prompt in texts_of(request, params):
        _check_text(prompt, checkpoint)


def _check_text(prompt: str, checkpoint: Checkpoint) -> None:
    if not is_writable(prompt):
        raise ConfigError(f"prompt {show(prompt)!r} is not text: a file can hold neither NUL nor half a character")
    checkpoint.text_encoder.check(prompt, checkpoint.shape.spec.text_len)


def spoken(prompt: str, params: SamplingParams) -> str:
    """A prompt with the words that are said behind it, unless it has them already."""
    suffix = params.prompt_suffix.strip()
    return prompt if not suffix or suffix in prompt else f"{prompt} {suffix}"


def prompts_of(request: VideoRequest) -> list[tuple[int, str]]:
    """``(first chunk, prompt)`` in rising order, with what was changed while the video ran."""
    changes = () if request.resume is None else request.resume.prompts
    return sorted({0: request.prompt, **dict(request.prompt_schedule), **dict(changes)}.items())


def texts_of(request: VideoRequest, params: SamplingParams) -> list[str]:
    """All that is encoded for a video."""
    texts = [spoken(prompt, params) for _, prompt in prompts_of(request)]
    return texts if request.negative_prompt is None else [*texts, request.negative_prompt]


def encoded(prompt: str, params: SamplingParams, checkpoint: Checkpoint) -> Tensor:
    """A prompt, with what is said behind it, as ``[L, text_dim]``; always on one thread, see :func:`build_stream`.

    Raises:
        ConfigError: it is no text, or too long.
    """
    _check_text(spoken(prompt, params), checkpoint)
    with intra_op_threads(1):
        return checkpoint.text_encoder.encode(spoken(prompt, params))


def prepare_texts(requests: Iterable[VideoRequest], params: SamplingParams, checkpoint: Checkpoint) -> None:
    """Encodes what is not cached of these videos' texts; a large encoder is loaded once for all of them.

    Raises:
        CheckpointError: the encoder cannot be loaded.
    """
    texts = [text for request in requests for text in texts_of(request, params)]
    if params.guidance_scale != 1 and checkpoint.shape.null_text_tensor is None:
        texts.append("")
    checkpoint.text_encoder.prepare(texts)


def timed_prompts(
    prompts: Mapping[str, str], params: SamplingParams, checkpoint: Checkpoint
) -> tuple[tuple[int, str], ...]:
    """The prompt schedule that prompts by time make, without the one of second 0.

    Raises:
        ConfigError: see :func:`~pavdm_dist.timed.chunk_schedule`.
    """
    spec, size = checkpoint.codec_spec, params.latent_chunk_size
    frames = (spec.frames_in_chunk(size, first=not params.warm), spec.frames_in_chunk(size, first=False))
    return chunk_schedule(prompts, params.fps, *frames)


def check_schedule(starts: Sequence[int], plan: WindowPlan) -> None:
    """Refuses prompts that no chunk of a video would follow.

    Args:
        starts: first chunk of each prompt after the first one.
        plan: of the video; with ``end="cut"`` the chunks that are discarded count, they have a say in the last frames.

    Raises:
        ConfigError: naming the first of them.
    """
    for number, start in enumerate(starts):
        if plan.num_chunks is not None and start >= plan.num_born:
            last = plan.num_born - 1
            legal = f"use {last} or less" if last else "one chunk has one prompt"
            raise ConfigError(
                f"prompt_schedule[{number}].from_chunk={start}: the video has chunks 0 to {last}, none would follow"
                f" this prompt; {legal}, or make the video longer"
            )


def clip_frames_needed(params: SamplingParams, checkpoint: Checkpoint) -> int:
    """Fewest frames of a conditioning clip: its latents are the start of a video (1, 4, 4, ... frames)."""
    spec = checkpoint.codec_spec
    # Without context chunks one latent more: the decoder must have a past to go on from, where it looks at any.
    past = params.context_chunks == 0 and not spec.group
    return spec.frames_in_chunk(params.clip_latents + past, first=True)


def clip_frames_used(params: SamplingParams, checkpoint: Checkpoint) -> int:
    """Most frames at the end of a conditioning clip on which anything can depend, to the bit.

    Latents that take part, and those that the decoder is warmed on, must be what they would be in the whole film;
    before them come those that the encoder makes without having seen enough.
    """
    codec, rerendered = checkpoint.codec, params.plan(None).given_clip * params.latent_chunk_size
    latents = max(params.clip_latents, rerendered + codec.receptive_latents())
    # A group is coded without a look at others.
    if codec.spec.group:
        latents += -latents % codec.spec.group
    else:
        assert isinstance(codec, WanCodec), "the one kind without groups that can be asked"
        latents += encoder_receptive_latents(codec)
    return codec.spec.frames_in_chunk(latents, first=True)


def input_frames(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> Iterable[Any] | None:
    """Frames of the film that come before the first new frame (what ``include_input`` shows), ``[H, W, 3]`` each."""
    if request.clip is None:
        return None
    latents = params.plan(None).given_clip * params.latent_chunk_size
    rerendered = checkpoint.codec_spec.frames_in_chunk(latents, first=False)
    before = () if request.before is None else request.before()
    return chain(before, request.clip[: request.clip.shape[0] - rerendered])


def _conditioning(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> Conditioning:
    check_prompts(request, params, checkpoint)
    prepare_texts([request], params, checkpoint)
    encode = checkpoint.text_encoder.encode
    null: Tensor | None = None
    if params.guidance_scale != 1:
        null = checkpoint.null_text if request.negative_prompt is None else encode(request.negative_prompt)
    return Conditioning.build([(start, encode(spoken(prompt, params))) for start, prompt in prompts_of(request)], null)


def _image_latents(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> Tensor | None:
    """Latents of the picture that chunk 0 begins with, ``[C, 1, h, w]``."""
    if request.image is None:
        return None
    if params.start != "noise":
        raise ConfigError(f"start={params.start} begins with a clip; set start=noise, or drop the image")
    size = (params.height, params.width, 3)
    if tuple(request.image.shape) != size:
        raise ConfigError(f"image: must be uint8 {list(size)}, got {request.image.dtype} {list(request.image.shape)}")
    return checkpoint.codec.encode(request.image[None]).cpu()


def _clip_latents(
    request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Given chunks by index, and the latents the decoder is warmed on.

    The clip's end is encoded in one causal pass; the decoder sees what it can remember up to the context, so that the
    first new chunk goes on where the clip's last frame was. Both are the same to the bit as if all of it were read.
    """
    if params.start == "noise":
        if request.clip is not None:
            raise ConfigError("start=noise uses no clip; set start=clip or start=chunk")
        return {}, None
    if request.clip is None:
        raise ConfigError(f"start={params.start} needs a conditioning clip: video=FILE")
    needed = clip_frames_needed(params, checkpoint)
    if request.clip.shape[0] < needed:
        raise MediaError(
            f"start={params.start} needs a clip of at least {needed} frames at {params.fps:g} fps "
            f"({params.clip_latents} latents), this one has {request.clip.shape[0]}"
        )
    codec, frames = checkpoint.codec, request.clip.shape[0]
    if codec.spec.group and (usable := codec.spec.usable_frames(frames)) != frames:
        raise MediaError(
            f"a clip of {frames} frames is no whole number of the video codec's groups; use {usable} of them"
        )
    codec.spec.latents_in_clip(frames)
    latents = codec.encode(request.clip[-clip_frames_used(params, checkpoint) :]).cpu()
    plan, size = params.plan(None), params.latent_chunk_size
    used = latents[:, latents.shape[1] - params.clip_latents :]
    given = {
        index: used[:, (index + plan.given_context) * size :][:, :size].clone()
        for index in range(-plan.given_context, plan.given_clip)
    }
    behind = latents.shape[1] - plan.given_clip * size
    past = min(behind, codec.receptive_latents())
    return given, latents[:, behind - past : behind].clone() if past else None
