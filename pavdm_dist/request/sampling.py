"""How videos are sampled: settings of a run, with nothing left to a default."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_args, get_type_hints

from pavdm_dist.checkpoint import Checkpoint, SamplingDefaults
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.baselines import CONTINUES, Method, block_chunks, context_follows, settings_of
from pavdm_dist.method.levels import NoiseSchedule, time_shift_ratio
from pavdm_dist.method.microbatches import (
    Displaced,
    MicroBatches,
    check_adaptive,
    check_chunks_per_unit,
    check_displaced,
)
from pavdm_dist.method.schedule import Context, End, Mode, Start, WindowPlan
from pavdm_dist.method.window import Step
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.values.arguments import check_names
from pavdm_dist.values.fields import (
    ChunkLatents,
    ContextChunks,
    ContextNoise,
    FrameRate,
    Guidance,
    Side,
    Steps,
    TimeShift,
    WindowChunks,
    checked_arguments,
)
from pavdm_dist.values.rates import as_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingParams:
    """Resolved settings of a run: nothing is left to a default.

    Attributes:
        num_inference_steps, window_chunks, latent_chunk_size, context_chunks: T, W, c and the clean chunks.
        start, end: see :class:`~pavdm_dist.method.schedule.WindowPlan`.
        guidance_scale: g; 1 = none, 0 = without the prompt.
        time_shift: r of :func:`~pavdm_dist.method.levels.shift_time`.
        height, width, fps: of the frames.
        mode: which chunks of a window see each other (:attr:`~pavdm_dist.method.stream.Stream.mode`).
        displaced: when mode displaced is exact.
        context_noise: level to which clean context is noised again; 0 = it stays clean.
        prompt_suffix: words behind every prompt but the negative one.
        step: how a chunk comes to its next level.
        context, anchor_chunks: see :class:`~pavdm_dist.method.schedule.WindowPlan`.
        levels: the model's own, noisiest first; None makes them of the time shift.
        partitions, lookahead: see :class:`~pavdm_dist.method.schedule.WindowPlan`.
        method: PA-VDM, or what it is compared with (:data:`~pavdm_dist.method.baselines.Method`).
        chunks_per_unit: of modes causal and displaced, neighbouring noisy chunks that are one micro-batch; another
            number gives the same up to rounding.
    """

    num_inference_steps: Steps
    window_chunks: WindowChunks
    latent_chunk_size: ChunkLatents
    context_chunks: ContextChunks
    start: Start
    end: End
    guidance_scale: Guidance
    time_shift: TimeShift
    height: Side
    width: Side
    fps: FrameRate
    mode: Mode = "window"
    displaced: Displaced = field(default_factory=Displaced)
    context_noise: ContextNoise = 0.0
    prompt_suffix: str = ""
    step: Step = "euler"
    context: Context = "joint"
    anchor_chunks: ContextChunks = 0
    levels: tuple[float, ...] | None = None
    partitions: WindowChunks = 1
    lookahead: bool = False
    method: Method = "pavdm"
    chunks_per_unit: int = 1

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
        chosen = checked_arguments(_kinds(), chosen)
        defaults = checkpoint.defaults
        own: dict[str, Any] = {"start": "noise", "end": "drain", "mode": "window", "method": "pavdm"}
        own |= {"partitions": 1, "lookahead": False, "chunks_per_unit": 1}
        names = set(cls.__dataclass_fields__) - {*own, "time_shift", "displaced"}
        values = {name: chosen[name] if chosen.get(name) is not None else getattr(defaults, name) for name in names}
        values["fps"] = float(as_rate(values["fps"]))  # what files have: 23.98 would count other frames in an hour
        shift = chosen.get("time_shift") or defaults.time_shift
        if values["levels"] is not None:
            if chosen.get("time_shift"):
                raise ConfigError(f"time_shift={shift:g}: the model has levels of its own; leave it out")
            shift, values["levels"] = 1.0, tuple(values["levels"])
        values |= {name: default if chosen.get(name) is None else chosen[name] for name, default in own.items()}
        for name, legal in (("mode", get_args(Mode)), ("method", get_args(Method))):
            if values[name] not in legal:
                raise ConfigError(f"{name}={values[name]!r}: must be {', '.join(legal[:-1])} or {legal[-1]}")
        picked = {name: chosen.get(name) for name in ("window_chunks", "partitions", "lookahead")}
        values |= settings_of(values["method"], values["window_chunks"], picked)
        displaced = chosen.get("displaced") or Displaced()
        if not isinstance(displaced, Displaced):
            raise ConfigError(f"displaced={displaced!r}: must be a pavdm_dist.method.microbatches.Displaced")
        params = cls(time_shift=1.0 if shift is None else shift, displaced=displaced, **values)
        if params.lookahead and chosen.get("context_chunks") is None:
            params = replace(params, context_chunks=params.plan(None).window_chunks // params.partitions // 2)
        if shift is None:
            latents = params.nominal_chunks * params.latent_chunk_size
            params = replace(params, time_shift=time_shift_ratio(params.height, params.width, latents))
        if params.guidance_scale < 1:
            logger.warning(
                "guidance_scale=%g: below 1 the prompt counts for less than it does without guidance, and at 0 for"
                " nothing; 1 is no guidance",
                params.guidance_scale,
            )
        check_displaced(params.mode, displaced)
        check_chunks_per_unit(params.mode, params.plan(None), params.chunks_per_unit)
        check_adaptive(MicroBatches(params.plan(None), params.mode, 0, displaced))
        _check_step(params, defaults)
        _check_method(params)
        if params.mode == "causal":
            _check_causal(params, checkpoint, allow_untrained_causal)
        spec = checkpoint.codec_spec
        spec.latent_size(params.height, params.width)
        spec.check_chunk(params.latent_chunk_size)
        if params.context_noise and not params.context_chunks:
            raise ConfigError(
                f"context_noise={params.context_noise:g}: context_chunks=0 leaves no context; use 1, or context_noise=0"
            )
        return params

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule(self.num_inference_steps, self.time_shift, self.levels)

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
            self.context,
            self.anchor_chunks,
            self.partitions,
            self.lookahead,
            block_chunks(self.method, self.window_chunks),
        )

    @property
    def context_follows(self) -> bool:
        """Whether clean context is noised to the level of the chunks behind it, at every step."""
        return context_follows(self.method)

    @property
    def cached(self) -> int:
        """Clean chunks whose keys and values are kept at most: while the newest one leaves its own, one more."""
        return 0 if self.context == "joint" else self.anchor_chunks + self.context_chunks + 1

    @property
    def span(self) -> int:
        """Most chunks that one call sees."""
        return self.plan(None).span

    @property
    def widest(self) -> int:
        """Most chunks that one micro-batch holds."""
        return self.span if self.context == "joint" else self.window_chunks + 1

    @property
    def calls_per_row(self) -> int:
        """Model calls of a row of a full window, without guidance branches."""
        return self.partitions * (2 if self.lookahead else 1)

    @property
    def nominal_chunks(self) -> int:
        """Chunks of the window that the time shift is for: what a call sees of a full one, context included."""
        plan = self.plan(None)
        return plan.span if plan.is_partitioned else self.window_chunks + self.context_chunks


def tier(params: SamplingParams, compiled: bool) -> str:
    """How what is computed relates to plain blocks, chunk by chunk, in a mode that leaves nothing out.

    ``same bits``: it is that; ``same mathematics``: sums in another order, or fused; ``approximate``: some of what is
    read is a step old.
    """
    if params.mode == "displaced" and params.displaced.resync_every_steps != 1:
        return "approximate"
    return "same mathematics" if compiled or params.chunks_per_unit > 1 else "same bits"


@cache
def _kinds() -> dict[str, Any]:
    """What settings may be; a dataclass, and words with sentences of their own, are checked where they are read."""
    hints = get_type_hints(SamplingParams, include_extras=True)
    return {name: kind for name, kind in hints.items() if name not in ("mode", "method", "displaced")}


def _check_step(params: SamplingParams, defaults: SamplingDefaults) -> None:
    """Refuses what students of few levels, or a cache of clean chunks, cannot do.

    Raises:
        ConfigError: naming the first of it.
    """
    assert params.schedule  # a table of other levels is refused
    if params.step not in get_args(Step):
        raise ConfigError(f"step={params.step!r}: must be euler or renoise")
    if params.context == "cached" and params.mode != "window":
        raise ConfigError(f"mode={params.mode}: with context=cached noisy chunks see each other; use mode=window")
    if params.step == "euler":
        return
    if params.mode == "displaced":
        raise ConfigError(
            "mode=displaced: step=renoise gives a chunk other noise at every step, keys of the step before are of no"
            " use; use mode=window or causal"
        )
    if params.guidance_scale != 1:
        raise ConfigError(
            f"guidance_scale={params.guidance_scale:g}: step=renoise is for models that were distilled with guidance in"
            " them; use guidance_scale=1"
        )
    if defaults.step == "renoise" and params.latent_chunk_size != defaults.latent_chunk_size:
        raise ConfigError(
            f"latent_chunk_size={params.latent_chunk_size}: the model was distilled with chunks of"
            f" {defaults.latent_chunk_size}; use latent_chunk_size={defaults.latent_chunk_size}"
        )


def _check_method(params: SamplingParams) -> None:
    """Refuses what leaves a method nothing to go on from.

    Raises:
        ConfigError: naming it.
    """
    if params.method not in CONTINUES:
        return
    if not params.context_chunks:
        raise ConfigError(
            f"context_chunks=0: method={params.method} goes on from clean chunks, none would be there; use 1 or more"
        )
    # Whose own calls are run once, in a block's first row: what is kept of it would be noise alone.
    for name, needed in (("mode", "window"), ("context", "joint")):
        if params.context_follows and (found := getattr(params, name)) != needed:
            raise ConfigError(
                f"{name}={found}: method=replacement-noise noises context to each step's level, what is kept of a clean"
                f" chunk has one; use {name}={needed}"
            )
    if params.context_follows and params.context_noise:
        raise ConfigError(
            f"context_noise={params.context_noise:g}: method=replacement-noise noises context to each step's"
            " level; use context_noise=0"
        )


def _check_causal(params: SamplingParams, checkpoint: Checkpoint, allow_untrained: bool) -> None:
    if params.context_chunks > 1:
        raise ConfigError(f"context_chunks={params.context_chunks}: mode=causal takes 0 or 1")
    if not (checkpoint.shape.spec.causal_trained or allow_untrained):
        raise ConfigError(
            "mode=causal: this checkpoint declares no training with the chunk-causal mask; use mode=window, or"
            " allow_untrained_causal=true to see what it does"
        )
