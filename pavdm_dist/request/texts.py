"""What of a request is said in words: prompts in order, by time, with what is said behind them; encoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import Conditioning
from pavdm_dist.models.devices import intra_op_threads
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.video_request import VideoRequest, plan_of
from pavdm_dist.values.fields import is_writable, show
from pavdm_dist.values.timed import chunk_schedule, first_prompt


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


def timed_prompts(
    prompts: Mapping[str, str], params: SamplingParams, checkpoint: Checkpoint
) -> tuple[tuple[int, str], ...]:
    """The prompt schedule that prompts by time make, without the one of second 0.

    Raises:
        ConfigError: see :func:`~pavdm_dist.values.timed.chunk_schedule`.
    """
    return chunk_schedule(prompts, params.fps, *_chunk_frames(params, checkpoint))


def _chunk_frames(params: SamplingParams, checkpoint: Checkpoint) -> tuple[int, int]:
    """Frames of the first chunk, and of every other."""
    spec, size = checkpoint.codec_spec, params.latent_chunk_size
    return spec.frames_in_chunk(size, first=not params.warm), spec.frames_in_chunk(size, first=False)


def first_and_later(
    prompt: str | Mapping[str, str], params: SamplingParams, checkpoint: Checkpoint
) -> tuple[str, tuple[tuple[int, str], ...]]:
    """The prompt that a video begins with, and ``(first chunk, prompt)`` of later ones, from a text or prompts by time.

    Raises:
        ConfigError: prompts by time without one for second 0; else as :func:`timed_prompts`.
    """
    if not isinstance(prompt, Mapping):
        return prompt, ()
    first = first_prompt(prompt)
    if first is None:
        raise ConfigError(f"prompt={dict(prompt)}: needs one for 0s, which the video begins with")
    return first, timed_prompts(prompt, params, checkpoint)


def check_prompts(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> None:
    """Refuses texts that the model cannot take or would never read, without running anything.

    Raises:
        ConfigError: a prompt has too many tokens, or characters that no file can hold; one begins behind the video's
            end; a negative prompt without guidance.
    """
    starts = [start for start, _ in request.prompt_schedule]
    check_schedule(starts, plan_of(request, params, checkpoint), params, checkpoint)
    if request.negative_prompt is not None and params.guidance_scale == 1:
        raise ConfigError(
            f"negative_prompt={request.negative_prompt!r}: guidance_scale=1 uses none; set another, or drop the prompt"
        )
    for prompt in texts_of(request, params):
        _check_text(prompt, checkpoint)


def check_schedule(starts: Sequence[int], plan: WindowPlan, params: SamplingParams, checkpoint: Checkpoint) -> None:
    """Refuses prompts that no chunk of a video would follow.

    Args:
        starts: first chunk of each prompt after the first one.
        plan: of the video; with ``end="cut"`` the chunks that are discarded count, they have a say in the last frames.
        params: of the video.
        checkpoint: the model.

    Raises:
        ConfigError: naming the first of them.
    """
    for number, start in enumerate(starts):
        if plan.num_chunks is not None and start >= plan.num_born:
            last = plan.num_born - 1
            legal = f"let it begin with chunk {last} or before" if last else "one chunk has one prompt"
            first, other = _chunk_frames(params, checkpoint)
            begins = (first + (start - 1) * other) / params.fps
            raise ConfigError(
                f"prompt_schedule[{number}].from_chunk={start} (of timed_prompts the one of this time), which begins at"
                f" {begins:.4g} s: the video has chunks 0 to {last}, none would follow this prompt; {legal}, or make"
                " the video longer"
            )


def _check_text(prompt: str, checkpoint: Checkpoint) -> None:
    if not is_writable(prompt):
        raise ConfigError(f"prompt {show(prompt)!r} is not text: a file can hold neither NUL nor half a character")
    checkpoint.text_encoder.check(prompt, checkpoint.shape.spec.text_len)


def needed_texts(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> list[str]:
    """All that must be encoded before a video is sampled: its texts, and what stands for no prompt where it is read."""
    texts = texts_of(request, params)
    if params.guidance_scale != 1 and checkpoint.shape.null_text_tensor is None:
        texts.append("")
    return texts


def prepare_texts(requests: Iterable[VideoRequest], params: SamplingParams, checkpoint: Checkpoint) -> None:
    """Encodes what is not cached of these videos' texts; a large encoder is loaded once for all of them.

    Raises:
        CheckpointError: the encoder cannot be loaded.
    """
    texts = [text for request in requests for text in needed_texts(request, params, checkpoint)]
    checkpoint.text_encoder.prepare(dict.fromkeys(texts))


def encoded(prompt: str, params: SamplingParams, checkpoint: Checkpoint) -> Tensor:
    """A prompt, with what is said behind it, as ``[L, text_dim]``; always on one thread, as a stream is built.

    Raises:
        ConfigError: it is no text, or too long.
    """
    _check_text(spoken(prompt, params), checkpoint)
    with intra_op_threads(1):
        return checkpoint.text_encoder.encode(spoken(prompt, params))


def conditioning_of(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> Conditioning:
    check_prompts(request, params, checkpoint)
    prepare_texts([request], params, checkpoint)
    encode = checkpoint.text_encoder.encode
    null: Tensor | None = None
    if params.guidance_scale != 1:
        null = checkpoint.null_text if request.negative_prompt is None else encode(request.negative_prompt)
    texts = [(start, encode(spoken(prompt, params))) for start, prompt in prompts_of(request)]
    return Conditioning.build(texts, null, request.negative_prompt is None and checkpoint.shape.spec.null_text_as_long)
