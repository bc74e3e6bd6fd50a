"""From a request to what samplers run: its texts, clip and picture are encoded, its plan is laid out."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.receptive import encoder_receptive_latents
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.method.recovery import Recovers, Recovery, mixing_layers
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.devices import intra_op_threads
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.texts import conditioning_of
from pavdm_dist.request.video_request import VideoRequest, plan_of


def build_stream(
    request: VideoRequest,
    stream_id: int,
    params: SamplingParams,
    checkpoint: Checkpoint,
    recovery: Recovers = "keys",
) -> Stream:
    """Encodes texts and clip and lays out the plan.

    Always on one thread, so that the same request gives the same bits wherever it is built.

    Args:
        request: what is asked for.
        stream_id: its name in the run.
        params: settings of the video.
        checkpoint: the model.
        recovery: with cached context, what is kept for going on. A video that goes on from keys and values keeps them,
            where clean latents are asked for: those that came before it are gone.

    Raises:
        ConfigError: a prompt that is too long or never used, or frames that cannot be made.
        MediaError: the clip is too short.
    """
    plan = plan_of(request, params, checkpoint)
    settings = {"seed": request.seed, **vars(params)}
    if request.resume is not None:
        request.resume.check(settings)
    height, width = checkpoint.codec_spec.latent_size(params.height, params.width)
    with intra_op_threads(1):
        given, warm = ({}, None) if request.resume else _clip_latents(request, params, checkpoint)
        image = _image_latents(request, params, checkpoint)
        conditioning = conditioning_of(request, params, checkpoint)
    latent_shape = (checkpoint.codec_spec.latent_channels, height, width)
    for latents in request.resume.snapshot.latents.values() if request.resume else ():
        if latents.shape != (wanted := (latent_shape[0], params.latent_chunk_size, height, width)):
            raise ConfigError(
                f"resume: its latents are {list(latents.shape)}, those of height={params.height} width={params.width}"
                f" are {list(wanted)}; give the size as it was, or begin anew"
            )
    return Stream(
        id=stream_id,
        plan=plan,
        schedule=params.schedule,
        seed=request.seed,
        latent_shape=latent_shape,
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
        step=params.step,
        context_follows=params.context_follows,
        chunks_per_unit=params.chunks_per_unit,
        recovery=_recovery(recovery, request.resume, params, checkpoint, latent_shape),
        settings=settings,
    )


def _recovery(
    by: Recovers,
    resume: ResumePoint | None,
    params: SamplingParams,
    checkpoint: Checkpoint,
    latent_shape: tuple[int, int, int],
) -> Recovery:
    if params.context == "joint" or (by == "replay" and resume is not None and resume.snapshot.left):
        return Recovery()
    return Recovery(by, mixing_layers(checkpoint.shape, latent_shape))


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
    latents = max(params.clip_latents, rerendered + codec.receptive_latents()) + encoder_receptive_latents(codec)
    return codec.spec.frames_in_chunk(latents, first=True)


def input_frames(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> Iterable[Any] | None:
    """Frames of the film that come before the first rendered one (what ``include_input`` shows), ``[H, W, 3]`` each.

    With ``start="clip"`` the first W-1 chunks of the video (``given_clip`` of its plan) begin as the film's last ones,
    noised to the window's levels, and take their place: those frames are left out here. A video that is no longer than
    these chunks adds nothing to the film.
    """
    if request.clip is None:
        return None
    latents = params.plan(None).given_clip * params.latent_chunk_size
    rerendered = checkpoint.codec_spec.frames_in_chunk(latents, first=False)
    before = () if request.before is None else request.before()
    return chain(before, request.clip[: request.clip.shape[0] - rerendered])


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
    _check_frames("video", request.clip, ("t", params.height, params.width, 3))
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


def _image_latents(request: VideoRequest, params: SamplingParams, checkpoint: Checkpoint) -> Tensor | None:
    """Latents of the picture that chunk 0 begins with, ``[C, 1, h, w]``."""
    if request.image is None:
        return None
    if params.start != "noise":
        raise ConfigError(f"start={params.start} begins with a clip; set start=noise, or drop the image")
    if params.context == "cached":
        raise ConfigError("image: with context=cached videos begin from text alone; drop the image")
    _check_frames("image", request.image, (params.height, params.width, 3))
    return checkpoint.codec.encode(request.image[None]).cpu()


def _check_frames(name: str, given: Tensor, size: tuple[int | str, ...]) -> None:
    """Refuses pictures of another type or size; a word in ``size`` stands for any number."""
    shape = tuple(given.shape)
    fits = len(shape) == len(size) and all(isinstance(b, str) or a == b for a, b in zip(shape, size, strict=True))
    if given.dtype != torch.uint8 or not fits:
        wanted, got = ", ".join(map(str, size)), str(given.dtype).removeprefix("torch.")
        raise ConfigError(f"{name}: must be uint8 [{wanted}], got {got} {list(shape)}")
