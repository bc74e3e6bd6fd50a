"""The PA-VDM objective: ordinary flow matching, with the noise levels a sampled window would have (paper 3.5).

Windows are rows of a real :class:`~pavdm_dist.schedule.WindowPlan`, so training and sampling share one
implementation of the levels: growing from text or from a clean chunk, full, and draining windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.schedule import NoiseSchedule, PlanRow, Start, WindowPlan


@dataclass(frozen=True)
class Objective:
    """What windows the model is trained on.

    Attributes:
        num_inference_steps, window_chunks, latent_chunk_size, context_chunks, time_shift: as in sampling.
        full_share, growing_share: share of full windows and of growing ones; the rest drains.
        text_share: share of the growing windows that start from text alone; the others follow a clean chunk. Only
            where no clean chunk shows the answer does the model have to read the prompt.
        shift_scale: deviation of the random shift of a sample's levels, in steps of the grid (``linear-shift``).
        causal_share: share of batches with the chunk-causal mask.
        prompt_dropout: share of samples that see the null text, for guidance.
        context_noise: deviation of noise added to the clean context at most; a model that only ever saw perfect
            context drifts on its own.
    """

    num_inference_steps: int = 30
    window_chunks: int = 6
    latent_chunk_size: int = 5
    context_chunks: int = 1
    time_shift: float = 1.0
    full_share: float = 0.45
    growing_share: float = 0.45
    text_share: float = 0.8
    shift_scale: float = 0.4
    causal_share: float = 0.5
    prompt_dropout: float = 0.1
    context_noise: float = 0.1

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule(self.num_inference_steps, self.time_shift)

    @property
    def window_latents(self) -> int:
        """Latent frames of a full window, context included."""
        return (self.window_chunks + self.context_chunks) * self.latent_chunk_size


@dataclass(frozen=True)
class TrainingWindow:
    """One batch's window: a row of a plan, laid over a clip from chunk ``offset`` on.

    ``offset`` 0 is the start of a video, whose first latent is a single frame.
    """

    row: PlanRow
    offset: int
    causal: bool

    @property
    def num_chunks(self) -> int:
        return len(self.row.window)


def draw_window(rng: np.random.Generator, objective: Objective, clip_chunks: int) -> TrainingWindow:
    """A random window as sampling meets it: from the start of a video or its middle, with and without context.

    Args:
        rng: the batch's generator.
        objective: shares of the kinds of windows.
        clip_chunks: chunks in a training clip; at least a full window with context.
    """
    o, kind = objective, rng.random()
    growth = o.num_inference_steps
    start: Start = "chunk" if o.context_chunks else "noise"
    if kind < o.full_share:
        plan, rows = _plan(o, start, 4 * o.window_chunks), (growth, growth + o.num_inference_steps)
    elif kind < o.full_share + o.growing_share:
        if rng.random() < o.text_share:
            start = "noise"
        plan, rows = _plan(o, start, 4 * o.window_chunks), (0, growth)
    else:
        plan = _plan(o, start, 2 * o.window_chunks)
        rows = (plan.num_rows - growth + plan.steps_per_shift, plan.num_rows)
    row = plan.row(int(rng.integers(*rows)))
    from_text = start == "noise" and row.window[0] == 0
    spare = clip_chunks - len(row.window)
    offset = 0 if from_text or spare == 0 else int(rng.integers(0, spare + 1))
    return TrainingWindow(row, offset, bool(rng.random() < o.causal_share))


def window_levels(window: TrainingWindow, objective: Objective, shifts: Tensor) -> Tensor:
    """Levels ``[b, F]``: the row's steps left, moved by each sample's shift, through the time shift; context 0.

    Args:
        window: which row.
        objective: T, c and the time shift.
        shifts: ``[b]``, in steps of the grid.
    """
    left = torch.tensor(window.row.steps_left, dtype=torch.float64)
    steps = (left[None, :] + shifts[:, None].double()).clamp(0, objective.num_inference_steps)
    schedule = objective.schedule
    noisy = torch.tensor([[schedule.level(value) for value in row] for row in steps.tolist()])
    levels = torch.cat([torch.zeros(len(shifts), len(window.row.context)), noisy], dim=1)
    return levels.float().repeat_interleave(objective.latent_chunk_size, dim=1)


def noised(
    clean: Tensor, levels: Tensor, context: int, context_noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Input and target of a batch.

    Args:
        clean: ``[b, C, F, h, w]``.
        levels: ``[b, F]``.
        context: latent frames of context, at the front.
        context_noise: deviation of the noise added to them at most.
        generator: of the noise.

    Returns:
        ``(x_t, velocity)``: x_t = (1 - t) x_0 + t eps and x_0 - eps, each ``[b, C, F, h, w]``.
    """
    noise = torch.randn(clean.shape, generator=generator)
    t = levels[:, None, :, None, None]
    x = (1 - t) * clean + t * noise
    if context and context_noise:
        amount = context_noise * torch.rand(clean.shape[0], 1, 1, 1, 1, generator=generator)
        x[:, :, :context] += amount * noise[:, :, :context]
    return x, clean - noise


def velocity_loss(velocity: Tensor, target: Tensor, levels: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Mean squared error over the noisy frames, unweighted; the clean context is masked out.

    Args:
        velocity, target: ``[b, C, F, h, w]``.
        levels: ``[b, F]``.
        context: latent frames of context, at the front.

    Returns:
        The loss, and its mean in each fifth of the level range ``[5]`` (NaN where no frame fell).
    """
    error = (velocity - target).square().mean(dim=(1, 3, 4))[:, context:]
    bins = (levels[:, context:] * 5).clamp(max=4.999).long()
    per_level = torch.stack([error.detach()[bins == i].mean() for i in range(5)])
    return error.mean(), per_level


def _plan(objective: Objective, start: Start, chunks: int) -> WindowPlan:
    o = objective
    return WindowPlan(
        o.num_inference_steps, o.window_chunks, o.latent_chunk_size, o.context_chunks, start, "drain", chunks
    )
