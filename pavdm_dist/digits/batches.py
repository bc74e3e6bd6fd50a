"""Batches of moving digits: still frames and windows over cached clips, each step's a function of (seed, step)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.digits.world import FPS, SIZE, WORLD_SETTINGS
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.train.batches import Batch, Batches, draw_kind, draw_prompts
from pavdm_dist.train.loss import noised
from pavdm_dist.train.model import Text
from pavdm_dist.train.objective import Objective, draw_levels, draw_window
from pavdm_dist.train.settings import DataConfig

INFO = FrameInfo(SIZE, SIZE, FPS)


class DigitBatches:
    """Moving digits: single latent frames at first, then windows as sampling meets them.

    Args:
        clips: cached latents.
        objective: what windows.
        data: batch sizes and how many single frames.
        seed: of the run.
    """

    def __init__(self, clips: LatentClips, objective: Objective, data: DataConfig, seed: int) -> None:
        self.clips, self.data, self.seed = clips, data, seed
        self.kinds = [(share, kind.at_size(SIZE, SIZE)) for share, kind in objective.kinds()]
        self.channels = clips.latents.shape[1]
        self.identity = {"world": WORLD_SETTINGS}
        self.held_out: Batches | None = None

    def batch(self, step: int, rank: int, size: int) -> Batch:
        """See :class:`Batches`; all processes draw the whole batch, which costs little."""
        seed, d = (self.seed, 11, step), self.data
        rng = np.random.default_rng((self.seed, 12, step))
        still = step < d.still_steps or rng.random() < d.still_share
        objective = draw_kind(self.kinds, rng)
        if still:
            whole = still_batch(self.clips, objective, d.still_batch_size, seed)
        else:
            whole = window_batch(self.clips, objective, d.batch_size, seed)
        return whole.part(slice(rank, None, size))

    def close(self) -> None:
        """Nothing loads ahead here."""


def still_batch(clips: LatentClips, objective: Objective, size: int, seed: tuple[int, ...]) -> Batch:
    """Single latent frames, each at a level of its own, uniform in 0..1.

    What a digit looks like is learned here, where a sample costs a thirty-fifth of a window and nothing but the
    prompt gives the answer away; windows then teach motion.
    """
    rng, generator = _random(seed)
    clean, prompts = clips.stills(rng, size)
    levels = torch.rand(size, 1, generator=generator)
    x, target = noised(clean, levels, 0, 0.0, generator)
    return _batch_of(x, target, levels, prompts, draw_prompts(rng, objective, size), 0, None, "still")


def window_batch(clips: LatentClips, objective: Objective, size: int, seed: tuple[int, ...]) -> Batch:
    """One kind of window over ``size`` clips."""
    rng, generator = _random(seed)
    chunk = objective.latent_chunk_size
    window = draw_window(rng, objective, clips.latents.shape[2] // chunk)
    clean, prompts = clips.batch(rng, size, window.offset * chunk, window.num_chunks * chunk)
    levels = draw_levels(window, objective, size, generator)
    context = len(window.row.context) * chunk
    x, target = noised(clean, levels, context, objective.noise_of_context, generator)
    dropped = draw_prompts(rng, objective, size)
    causal = chunk if window.causal else None
    return _batch_of(x, target, levels, prompts, dropped, context, causal, window.kind)


def _batch_of(
    x: Tensor,
    target: Tensor,
    levels: Tensor,
    prompts: list[str],
    dropped: list[bool],
    context: int,
    causal: int | None,
    kind: str,
) -> Batch:
    return Batch(x, target, levels, Text(prompts), dropped, context, causal, INFO, prompts, kind=kind)


def _random(seed: tuple[int, ...]) -> tuple[np.random.Generator, torch.Generator]:
    rng = np.random.default_rng(seed)
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))
