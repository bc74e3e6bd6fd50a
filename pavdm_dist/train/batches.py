"""Batches for the model: single latent frames for the first steps, then windows as sampling meets them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.train.data import LatentClips
from pavdm_dist.train.loss import Objective, draw_window, noised, window_levels


@dataclass(frozen=True)
class Batch:
    """What one optimizer step sees.

    Attributes:
        x, target: noisy latents and their velocity, ``[b, C, F, h, w]``.
        levels: ``[b, F]``.
        prompts: one per sample.
        dropped: which samples see the null text.
        context: clean latent frames at the front, which carry no loss.
        chunk_causal: chunk size when the mask is chunk-causal.
    """

    x: Tensor
    target: Tensor
    levels: Tensor
    prompts: list[str]
    dropped: list[bool]
    context: int
    chunk_causal: int | None

    def share(self, rank: int, size: int) -> Batch:
        """The samples of process ``rank`` of ``size``: all draw the same batch and take turns, so that their mean
        gradient is that of one process. The batch must divide by ``size``."""
        part = slice(rank, None, size)
        x, target, levels = self.x[part], self.target[part], self.levels[part]
        return replace(self, x=x, target=target, levels=levels, prompts=self.prompts[part], dropped=self.dropped[part])


def still_batch(clips: LatentClips, objective: Objective, size: int, seed: tuple[int, ...]) -> Batch:
    """Single latent frames, each at a level of its own, uniform in 0..1.

    What a digit looks like is learned here, where a sample costs a thirty-fifth of a window and nothing but the
    prompt gives the answer away; windows then teach motion.
    """
    rng, generator = _random(seed)
    clean, prompts = clips.stills(rng, size)
    levels = torch.rand(size, 1, generator=generator)
    x, target = noised(clean, levels, 0, 0.0, generator)
    return Batch(x, target, levels, prompts, _dropped(rng, objective, size), 0, None)


def window_batch(clips: LatentClips, objective: Objective, size: int, seed: tuple[int, ...]) -> Batch:
    """One kind of window over ``size`` clips, its levels shifted at random per sample (``linear-shift``)."""
    rng, generator = _random(seed)
    chunk = objective.latent_chunk_size
    window = draw_window(rng, objective, clips.latents.shape[2] // chunk)
    clean, prompts = clips.batch(rng, size, window.offset * chunk, window.num_chunks * chunk)
    shifts = objective.shift_scale * torch.randn(size, generator=generator)
    levels = window_levels(window, objective, shifts)
    context = len(window.row.context) * chunk
    x, target = noised(clean, levels, context, objective.context_noise, generator)
    dropped = _dropped(rng, objective, size)
    return Batch(x, target, levels, prompts, dropped, context, chunk if window.causal else None)


def _random(seed: tuple[int, ...]) -> tuple[np.random.Generator, torch.Generator]:
    rng = np.random.default_rng(seed)
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def _dropped(rng: np.random.Generator, objective: Objective, size: int) -> list[bool]:
    return (rng.random(size) < objective.prompt_dropout).tolist()
