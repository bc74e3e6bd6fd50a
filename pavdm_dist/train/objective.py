"""The noise levels that training windows have: those that sampling shows the model (paper 3.5; METHOD of levels).

Windows are rows of a real :class:`~pavdm_dist.method.schedule.WindowPlan`, so training and sampling share one
implementation of the levels: growing from text or from a clean chunk, full, and draining windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.baselines import block_chunks, context_follows, settings_of
from pavdm_dist.method.levels import NoiseSchedule, time_shift_ratio
from pavdm_dist.method.schedule import PlanRow, Start, WindowPlan

# linear-shift: the sampler's staircase, moved as a whole, per sample. linear: every latent frame a level of its own,
# evenly spaced up to 1; -variance moves each of them, -variance-shift all of a sample as well. random: every chunk a
# level of its own, uniform (diffusion forcing).
Pattern = Literal["linear-shift", "linear", "linear-variance", "linear-variance-shift", "random"]
# Methods of sampling that windows are like. FIFO-Diffusion is not among them: it takes models as others trained them.
TrainedMethod = Literal["pavdm", "replacement", "replacement-noise", "autoregressive"]


@dataclass
class WindowKind:
    """One kind of windows in a mixture; None = as the objective says.

    Attributes:
        share: weight among the kinds.
        method, pattern, num_inference_steps, window_chunks, latent_chunk_size: as in :class:`Objective`.
    """

    share: float = 1.0
    method: TrainedMethod | None = None
    pattern: Pattern | None = None
    num_inference_steps: int | None = None
    window_chunks: int | None = None
    latent_chunk_size: int | None = None


@dataclass
class Objective:
    """What windows the model is trained on.

    Attributes:
        num_inference_steps, window_chunks, latent_chunk_size, context_chunks: as in sampling.
        time_shift: as in sampling; None = the resolution-dependent ratio of each bucket.
        method: what sampling the windows are rows of. ``pavdm``: as below. The others are what it is compared with: a
            block of W chunks at one level behind clean context (``replacement``), behind context that is noised to the
            block's level (``replacement-noise``), or one chunk behind clean context (``autoregressive``, W = 1). A
            growing window is then the first block of a video, a draining one its last, which may be shorter.
        pattern: how the levels of a window lie; ``linear-shift`` where the method is another.
        full_share, growing_share: share of full windows and of growing ones; the rest drains.
        text_share: share of the growing windows that start from text alone; the others follow a clean chunk. Only
            where no clean chunk shows the answer does the model have to read the prompt.
        shift_scale: deviation of a sample's random shift, in steps of the grid.
        variance_scale: deviation of each frame's own shift in the ``-variance`` patterns, in steps of their grid.
        causal_share: share of batches with the chunk-causal mask.
        prompt_dropout: share of samples that see the null text, for guidance.
        context_noise: deviation of noise added to the clean context at most; a model that only ever saw perfect
            context drifts on its own.
        mixture: kinds of windows that take turns at random; empty = the one described above.
    """

    num_inference_steps: int = 30
    window_chunks: int = 6
    latent_chunk_size: int = 5
    context_chunks: int = 1
    time_shift: float | None = 1.0
    method: TrainedMethod = "pavdm"
    pattern: Pattern = "linear-shift"
    full_share: float = 0.45
    growing_share: float = 0.45
    text_share: float = 0.8
    shift_scale: float = 0.4
    variance_scale: float = 0.1
    causal_share: float = 0.5
    prompt_dropout: float = 0.1
    context_noise: float = 0.1
    mixture: list[WindowKind] = field(default_factory=list)

    @property
    def schedule(self) -> NoiseSchedule:
        """The grid of levels.

        Raises:
            ConfigError: the time shift depends on the bucket and :meth:`at_size` was not called.
        """
        if self.time_shift is None:
            raise ConfigError("objective.time_shift=null: the ratio depends on the bucket's size")
        return NoiseSchedule(self.num_inference_steps, self.time_shift)

    @property
    def window_latents(self) -> int:
        """Latent frames of a full window, context included."""
        return (self.window_chunks + self.context_chunks) * self.latent_chunk_size

    def kinds(self) -> list[tuple[float, Objective]]:
        """The mixture's shares (which sum to 1) and objectives; one when there is no mixture.

        Raises:
            ConfigError: a share or a window that cannot be.
        """
        total = sum(kind.share for kind in self.mixture)
        found = []
        for number, kind in enumerate(self.mixture):
            if not kind.share > 0:
                raise ConfigError(f"objective.mixture[{number}].share={kind.share}: must be above 0")
            names = ("method", "pattern", "num_inference_steps", "window_chunks", "latent_chunk_size")
            changes = {name: value for name in names if (value := getattr(kind, name)) is not None}
            found.append((kind.share / total, replace(self, mixture=[], **changes)))
        kinds = found or [(1.0, self)]
        for _, objective in kinds:
            objective.check()
        return kinds

    def most(self) -> Objective:
        """The kind of the mixture's largest share."""
        return max(self.kinds(), key=lambda kind: kind[0])[1]

    def check(self) -> None:
        """Refuses windows that cannot be.

        Raises:
            ConfigError: naming the field and the nearest legal values.
        """
        try:
            settings_of(self.method, self.window_chunks, {"window_chunks": self.window_chunks})
            self.plan("noise", 1)  # refuses what does not divide
            if self.time_shift is not None:
                NoiseSchedule(self.num_inference_steps, self.time_shift)
        except ConfigError as error:
            raise ConfigError(f"objective.{error}") from error
        drains = self.method != "autoregressive" and (self.method != "pavdm" or self.window_chunks > 1)
        if not drains and self.full_share + self.growing_share < 1 - 1e-9:
            more = "" if self.method == "autoregressive" else ", or window_chunks 2 or more"
            raise ConfigError(
                f"objective.full_share={self.full_share} and growing_share={self.growing_share}: windows of"
                f" objective.method={self.method} with window_chunks={self.window_chunks} do not drain; together they"
                f" must be 1{more}"
            )
        if self.method == "pavdm":
            return
        if self.pattern != "linear-shift":
            raise ConfigError(
                f"objective.pattern={self.pattern}: windows of objective.method={self.method} have one level each; use"
                " objective.pattern=linear-shift"
            )
        if not self.context_chunks:
            raise ConfigError(
                f"objective.context_chunks=0: objective.method={self.method} goes on from clean chunks; use 1 or more"
            )

    def check_clips(self, whose: str, num_latents: int) -> None:
        """Refuses clips that are too short for every window that may be drawn.

        Short clips train the ends of the staircase, as in the paper (App. E): where windows grow or drain, one chunk
        is enough.

        Args:
            whose: the clips, for the message.
            num_latents: latent frames of a clip.

        Raises:
            ConfigError: naming the field and the nearest legal values.
        """
        chunk, full = self.latent_chunk_size, self.full_share >= 1
        if num_latents >= (self.window_latents if full else chunk):
            return
        if full:
            raise ConfigError(
                f"objective.full_share={self.full_share} asks for windows of {self.window_latents // chunk} chunks"
                f" only, clips of {whose} have {num_latents} latents: use {self.window_latents} latents or more, or"
                " let windows grow and drain (objective.growing_share)"
            )
        raise ConfigError(
            f"objective.latent_chunk_size={chunk}: clips of {whose} have {num_latents} latents; use "
            + (f"chunks of at most {num_latents}, or longer clips" if num_latents > 0 else "longer clips")
        )

    def plan(self, start: Start, chunks: int) -> WindowPlan:
        """That of a video of so many chunks."""
        return WindowPlan(
            self.num_inference_steps,
            self.window_chunks,
            self.latent_chunk_size,
            self.context_chunks,
            start,
            "drain",
            chunks,
            block_chunks=block_chunks(self.method, self.window_chunks),
        )

    @property
    def context_follows(self) -> bool:
        """Whether context is noised to the level of the chunks behind it."""
        return context_follows(self.method)

    @property
    def noise_of_context(self) -> float:
        """Deviation at most of what is added to context that is told to be clean."""
        return 0.0 if self.context_follows else self.context_noise

    def at_size(self, height: int, width: int) -> Objective:
        """With the time shift of videos of this size in pixels, where it depends on it."""
        if self.time_shift is not None:
            return self
        return replace(self, time_shift=time_shift_ratio(height, width, self.window_latents))


@dataclass(frozen=True)
class TrainingWindow:
    """One batch's window: rows of a plan, laid over a clip from chunk ``offset`` on.

    Attributes:
        row: chunks and steps left.
        offset: 0 is the start of a video, whose first latent is a single frame.
        causal: whether the mask is chunk-causal.
        kind: ``full``, ``growing`` or ``draining``.
        rows: those with the same chunks, of which every sample gets one; none stands for ``row`` alone.
    """

    row: PlanRow
    offset: int
    causal: bool
    kind: str = "full"
    rows: tuple[PlanRow, ...] = ()

    @property
    def num_chunks(self) -> int:
        return len(self.row.window)


def draw_window(rng: np.random.Generator, objective: Objective, clip_chunks: int) -> TrainingWindow:
    """A random window as sampling meets it: from the start of a video or its middle, with and without context.

    Args:
        rng: the batch's generator.
        objective: shares of the kinds of windows.
        clip_chunks: chunks in a training clip. Where a window would be longer, another is drawn.

    Raises:
        ConfigError: as :meth:`Objective.check_clips`.
    """
    o = objective
    o.check_clips(f"{clip_chunks} chunks", clip_chunks * o.latent_chunk_size)
    growth = o.num_inference_steps
    while True:
        draw, start = rng.random(), _start(o)
        if draw < o.full_share:
            kind, plan, rows = "full", o.plan(start, 4 * o.window_chunks), (growth, growth + o.num_inference_steps)
        elif draw < o.full_share + o.growing_share:
            if rng.random() < o.text_share:
                start = "noise"
            chunks = 4 * o.window_chunks
            if o.method != "pavdm":  # windows do not grow from one chunk on: a clip may be too short for a whole block
                chunks = max(1, min(chunks, clip_chunks - (start == "chunk")))
            kind, plan, rows = "growing", o.plan(start, chunks), (0, growth)
        elif o.method == "pavdm":
            kind, plan = "draining", o.plan(start, 2 * o.window_chunks)
            rows = (plan.num_rows - growth + plan.steps_per_shift, plan.num_rows)
        else:
            kind, plan = "draining", o.plan(start, o.window_chunks + int(rng.integers(1, o.window_chunks + 1)))
            rows = (plan.num_rows - growth, plan.num_rows)
        row = plan.row(int(rng.integers(*rows)))
        spare = clip_chunks - len(row.window)
        if spare >= 0:
            break
        if clip_chunks < 1 + o.context_chunks:  # only the first chunk of a video fits
            plan = o.plan("noise", 1)
            row, start, spare = plan.row(int(rng.integers(growth))), "noise", 0
            break
    from_text = start == "noise" and row.window[0] == 0
    # A window from the middle of a video does not begin with a video's first latent, which is a single frame.
    least = 1 if row.window[0] >= (1 if start == "noise" else 0) else 0
    offset = 0 if from_text or spare == 0 else int(rng.integers(least, spare + 1))
    shift = row.index - row.index % plan.steps_per_shift
    rows_of_shift = tuple(plan.row(shift + step) for step in range(plan.steps_per_shift))
    return TrainingWindow(row, offset, bool(rng.random() < o.causal_share), kind, rows_of_shift)


def draw_levels(window: TrainingWindow, objective: Objective, size: int, generator: torch.Generator) -> Tensor:
    """Levels ``[size, F]`` of a batch in the objective's pattern, float32 in 0..1; context 0, or as the noisy chunks.

    Args:
        window: which row.
        objective: pattern, T, c and the time shift.
        size: samples.
        generator: of the random shifts.
    """
    o, chunk = objective, objective.latent_chunk_size
    if o.pattern == "linear-shift":
        shifts = o.shift_scale * torch.randn(size, generator=generator)
        # Were all samples in one row, a larger batch would not average over levels at all.
        rows = window.rows or (window.row,)
        drawn = torch.randint(len(rows), (size,), generator=generator).tolist()
        return window_levels(window, o, shifts, [rows[place] for place in drawn])
    noisy = len(window.row.chunks) * chunk
    if o.pattern == "random":
        steps = o.num_inference_steps * torch.rand(size, len(window.row.chunks), generator=generator)
        return _levels(steps.double().repeat_interleave(chunk, dim=1), window, o)
    grid = o.num_inference_steps / noisy
    steps = grid * torch.arange(1, noisy + 1, dtype=torch.float64).expand(size, -1)
    if o.pattern in ("linear-variance", "linear-variance-shift"):
        steps = steps + grid * o.variance_scale * torch.randn(size, noisy, generator=generator)
    if o.pattern == "linear-variance-shift":
        steps = steps + grid * o.shift_scale * torch.randn(size, 1, generator=generator)
    return _levels(steps, window, o)


def window_levels(
    window: TrainingWindow, objective: Objective, shifts: Tensor, rows: Sequence[PlanRow] | None = None
) -> Tensor:
    """Levels ``[b, F]``: the row's steps left, moved by each sample's shift, through the time shift; context 0.

    Args:
        window: which row.
        objective: T, c and the time shift.
        shifts: ``[b]``, in steps of the grid.
        rows: of each sample; None = the window's for all.
    """
    left = torch.tensor([row.steps_left for row in rows or [window.row] * len(shifts)], dtype=torch.float64)
    steps = left + shifts[:, None].double()
    return _levels(steps.repeat_interleave(objective.latent_chunk_size, dim=1), window, objective)


def _levels(steps: Tensor, window: TrainingWindow, objective: Objective) -> Tensor:
    """Steps left ``[b, noisy frames]`` -> levels of the whole window."""
    schedule, clamped = objective.schedule, steps.clamp(0, objective.num_inference_steps)
    noisy = torch.tensor([[schedule.level(value) for value in row] for row in clamped.tolist()])
    clean = torch.zeros(len(steps), len(window.row.context) * objective.latent_chunk_size)
    if objective.context_follows:
        clean += noisy[:, :1]
    return torch.cat([clean, noisy], dim=1)


def _start(objective: Objective) -> Start:
    return "chunk" if objective.context_chunks else "noise"
