"""How much one request may ask for: seconds, pixels, and the work that frame rates and steps make of seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from pavdm_dist.config import frames_wanted
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.shot import Shot
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.serve.request_fields import nearest_size
from pavdm_dist.serve.settings import HttpConfig

# A picture that is asked for may have so many times the pixels of the server's own; and a video may be so many times
# the work of the longest one with the server's own settings.
_TIMES_ITS_OWN = 4


def check_bounds(shot: Shot, kinds: Kinds, http: HttpConfig) -> None:
    """Refuses a video that is longer, larger or more work than a client may ask for.

    Raises:
        ConfigError: naming the field, its value and what is legal; or as :meth:`~pavdm_dist.farm.kinds.Kinds.kind_of`.
    """
    seconds = kinds.seconds(shot)
    if seconds > http.max_seconds:
        raise ConfigError(f"seconds={seconds:g}: at most {http.max_seconds:g} (http.max_seconds)")
    _check_pixels(shot, kinds, http)
    _check_work(shot, kinds, http)


def _check_pixels(shot: Shot, kinds: Kinds, http: HttpConfig) -> None:
    params, base, most = kinds.kind_of(shot).params, kinds.base.params, http.max_pixels
    if most is None:
        most = _TIMES_ITS_OWN * base.height * base.width
    pixels = params.height * params.width
    if pixels > most:
        checkpoint = kinds.checkpoint
        units = [checkpoint.codec_spec.spatial_stride * side for side in checkpoint.shape.spec.patch[1:]]
        height, width = nearest_size((params.height, params.width), most, units)
        raise ConfigError(
            f"size={params.width}x{params.height}: has {pixels} pixels, and may have {most} at most"
            f" (http.max_pixels); nearest legal: size={width}x{height}"
        )


def _check_work(shot: Shot, kinds: Kinds, http: HttpConfig) -> None:
    """By latent frames over all calls: what rows cost, however many they are and whatever a window sees."""
    params, base, config = kinds.kind_of(shot).params, kinds.base.params, kinds.config_of(shot, "-")
    longest = max(1, round(http.max_seconds * base.fps))
    most = _TIMES_ITS_OWN * _work(kinds, base, longest)
    by_rate = config.num_frames is None  # else the rate only says how fast these are shown
    length = "fps" if by_rate else "num_frames"
    own = {"num_inference_steps": base.num_inference_steps, length: base.fps if by_rate else longest}
    asked = {"num_inference_steps": params.num_inference_steps, length: params.fps if by_rate else kinds.frames(shot)}
    plan = base.plan(None)
    units = {"num_inference_steps": plan.window_chunks // plan.block_chunks, length: 1}

    def is_legal(given: Mapping[str, float]) -> bool:
        frames = frames_wanted(config, given["fps"]) if by_rate else int(given[length])
        return _work(kinds, replace(params, num_inference_steps=int(given["num_inference_steps"])), frames) <= most

    def largest(name: str, given: Mapping[str, float]) -> int:
        """Of a value, a whole number, with the other as given; 0 = none is small enough."""
        least, above = 0, math.ceil(given[name] / units[name])
        while above - least > 1:
            middle = (least + above) // 2
            legal = is_legal({**given, name: middle * units[name]})
            least, above = (middle, above) if legal else (least, middle)
        return least * units[name]

    raised = [name for name, value in asked.items() if value > own[name]]
    if not raised or is_legal(asked):
        return
    alone = {name: largest(name, asked) for name in raised}
    enough = {name: value for name, value in alone.items() if value >= own[name]}
    if enough:
        nearest = " or ".join(f"{name}={value}" for name, value in enough.items())
    else:  # each is too much beside the other
        given = {**asked, "num_inference_steps": base.num_inference_steps}
        nearest = f"num_inference_steps={base.num_inference_steps}, {length}={largest(length, given)}"
    wanted = ", ".join(f"{name}={asked[name]:g}" for name in raised)
    raise ConfigError(
        f"{wanted}: is more than {_TIMES_ITS_OWN} times the work of http.max_seconds={http.max_seconds:g} with the"
        f" server's own settings; nearest legal: {nearest}"
    )


def _work(kinds: Kinds, params: SamplingParams, frames: int) -> int:
    chunks = kinds.checkpoint.codec_spec.chunks_for_frames(frames, params.latent_chunk_size, params.warm)
    return params.plan(chunks).latent_evaluations * num_branches(params.guidance_scale)
