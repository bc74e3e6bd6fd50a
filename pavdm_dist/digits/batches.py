"""Batches of moving digits: still frames and windows over cached clips, each step's a function of (seed, step).

They are made where the clips lie. Which clips, windows, levels and dropped prompts is drawn on the host, the same
everywhere; only the noise is the device's own, a function of the same numbers, so that nothing is waited for and little
is copied. On a CPU all of it is one generator's.
"""

from __future__ import annotations

import numpy as np
import torch

from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.digits.settings import FPS, SHIPPED, DigitWorld
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.devices import to_device
from pavdm_dist.train.batch import Batch, Batches, draw_kind, draw_prompts
from pavdm_dist.train.loss import noised
from pavdm_dist.train.model import Text
from pavdm_dist.train.objective import Objective, draw_levels, draw_window
from pavdm_dist.train.train_settings import DataConfig


def info_of(world: DigitWorld) -> FrameInfo:
    """Size and rate of a world's videos."""
    return FrameInfo(world.size, world.size, FPS)


INFO = info_of(SHIPPED)
# Settings of the single frames.
_DRAWN = ("still_steps", "still_share", "still_batch_size")


class DigitBatches:
    """Moving digits: single latent frames at first, then windows as sampling meets them.

    Args:
        clips: cached latents.
        objective: what windows.
        data: batch sizes and how many single frames.
        seed: of the run.
        world: of the clips.
    """

    def __init__(
        self, clips: LatentClips, objective: Objective, data: DataConfig, seed: int, world: DigitWorld = SHIPPED
    ) -> None:
        self.clips, self.data, self.seed, self.info = clips, data, seed, info_of(world)
        self.kinds = [(share, kind.at_size(world.size, world.size)) for share, kind in objective.kinds()]
        self.channels = clips.latents.shape[1]
        # With those that a world's settings leave out where they are the shipped one's.
        self.identity = {
            "world": {**world.settings, **world.later},
            "data": {**{name: getattr(data, name) for name in ("clips", *_DRAWN)}, "clips_used": len(clips.prompts)},
            # All that the folder held, whatever data.clips said.
            "older": {"data": {"clips_used": clips.there}},
        }
        self.held_out: Batches | None = None

    def batch(self, step: int, rank: int, size: int) -> Batch:
        """See :class:`Batches`; all processes draw the whole batch, which costs little."""
        seed, d = (self.seed, 11, step), self.data
        rng = np.random.default_rng((self.seed, 12, step))
        still = step < d.still_steps or rng.random() < d.still_share
        objective = draw_kind(self.kinds, rng)
        if still:
            whole = still_batch(self.clips, objective, d.still_batch_size, seed, self.info)
        else:
            whole = window_batch(self.clips, objective, d.batch_size, seed, self.info)
        return whole.part(slice(rank, None, size))

    def close(self) -> None:
        """Nothing loads ahead here."""


def still_batch(
    clips: LatentClips, objective: Objective, size: int, seed: tuple[int, ...], info: FrameInfo = INFO
) -> Batch:
    """Single latent frames, each at a level of its own, uniform in 0..1.

    What a digit looks like is learned here, where a sample costs a thirty-fifth of a window and nothing but the
    prompt gives the answer away; windows then teach motion.
    """
    device = clips.latents.device
    rng, generator, of_noise = _random(seed, device)
    clean, prompts = clips.stills(rng, size)
    levels = to_device(torch.rand(size, 1, generator=generator), device)
    x, target = noised(clean, levels, 0, 0.0, of_noise)
    dropped = draw_prompts(rng, objective, size)
    return Batch(x, target, levels, Text(prompts), dropped, 0, None, info, prompts, kind="still")


def window_batch(
    clips: LatentClips, objective: Objective, size: int, seed: tuple[int, ...], info: FrameInfo = INFO
) -> Batch:
    """One kind of window over ``size`` clips."""
    device = clips.latents.device
    rng, generator, of_noise = _random(seed, device)
    chunk = objective.latent_chunk_size
    window = draw_window(rng, objective, clips.latents.shape[2] // chunk)
    clean, prompts = clips.batch(rng, size, window.offset * chunk, window.num_chunks * chunk)
    levels = to_device(draw_levels(window, objective, size, generator), device)
    context = len(window.row.context) * chunk
    x, target = noised(clean, levels, context, objective.noise_of_context, of_noise)
    dropped = draw_prompts(rng, objective, size)
    causal = chunk if window.causal else None
    return Batch(x, target, levels, Text(prompts), dropped, context, causal, info, prompts, kind=window.kind)


def _random(
    seed: tuple[int, ...], device: torch.device
) -> tuple[np.random.Generator, torch.Generator, torch.Generator]:
    """Of indices; of levels, on the host; of noise, on the device."""
    rng = np.random.default_rng(seed)
    number = int(rng.integers(2**62))
    generator = torch.Generator().manual_seed(number)
    return rng, generator, generator if device.type == "cpu" else torch.Generator(device).manual_seed(number)
