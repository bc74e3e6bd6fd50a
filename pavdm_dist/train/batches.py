"""Batches for the model; every one is a function of (seed, step), which is what makes resumed runs exact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.digits.world import FPS, SIZE, WORLD_SETTINGS
from pavdm_dist.models.base import FrameInfo, WindowSlice
from pavdm_dist.train.loss import noised
from pavdm_dist.train.model import Text
from pavdm_dist.train.objective import Objective, draw_levels, draw_window
from pavdm_dist.train.settings import DataConfig


@dataclass(frozen=True)
class Batch:
    """What one optimizer step sees, or one process' share of it.

    Attributes:
        x, target: noisy latents and their velocity, ``[b, C, F, h, w]``.
        levels: ``[b, F]``.
        text: one prompt per sample.
        dropped: which samples see the null text.
        context: clean latent frames at the front, which carry no loss.
        chunk_causal: chunk size when the mask is chunk-causal.
        info: size in pixels and frames per second.
        ids: which clips, for messages.
        window: of which window these frames are a slice; None when they are all of it.
    """

    x: Tensor
    target: Tensor
    levels: Tensor
    text: Text
    dropped: list[bool]
    context: int
    chunk_causal: int | None
    info: FrameInfo
    ids: list[str]
    window: WindowSlice | None = None

    def part(self, rows: slice) -> Batch:
        """Some of the samples."""
        return replace(
            self,
            x=self.x[rows],
            target=self.target[rows],
            levels=self.levels[rows],
            text=self.text.part(rows),
            dropped=self.dropped[rows],
            ids=self.ids[rows],
        )

    def parts(self, count: int) -> list[Batch]:
        """``count`` equal parts, worked off one after another."""
        return [self.part(slice(number, None, count)) for number in range(count)]

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        x, target, levels = (value.to(device) for value in (self.x, self.target, self.levels))
        return replace(self, x=x, target=target, levels=levels, text=self.text.to(device))


class Batches(Protocol):
    """Where batches come from.

    Attributes:
        channels: of the latents.
        identity: what batches depend on besides the settings; a run must not go on with another one.
    """

    channels: int
    identity: dict[str, Any]

    def batch(self, step: int, rank: int, size: int) -> Batch:
        """Process ``rank``'s share of step ``step``'s batch: every ``size``-th sample, so that the processes' mean
        gradient is that of one process."""

    def close(self) -> None:
        """Ends what loads ahead."""


class WorldBatches:
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
    return _world_batch(x, target, levels, prompts, draw_prompts(rng, objective, size), 0, None)


def window_batch(clips: LatentClips, objective: Objective, size: int, seed: tuple[int, ...]) -> Batch:
    """One kind of window over ``size`` clips."""
    rng, generator = _random(seed)
    chunk = objective.latent_chunk_size
    window = draw_window(rng, objective, clips.latents.shape[2] // chunk)
    clean, prompts = clips.batch(rng, size, window.offset * chunk, window.num_chunks * chunk)
    levels = draw_levels(window, objective, size, generator)
    context = len(window.row.context) * chunk
    x, target = noised(clean, levels, context, objective.context_noise, generator)
    dropped = draw_prompts(rng, objective, size)
    return _world_batch(x, target, levels, prompts, dropped, context, chunk if window.causal else None)


def _world_batch(
    x: Tensor, target: Tensor, levels: Tensor, prompts: list[str], dropped: list[bool], context: int, causal: int | None
) -> Batch:
    info = FrameInfo(SIZE, SIZE, FPS)
    return Batch(x, target, levels, Text(prompts), dropped, context, causal, info, prompts)


def draw_kind(kinds: list[tuple[float, Objective]], rng: np.random.Generator) -> Objective:
    """One of a mixture's objectives."""
    if len(kinds) == 1:
        return kinds[0][1]
    return kinds[rng.choice(len(kinds), p=[share for share, _ in kinds])][1]


def _random(seed: tuple[int, ...]) -> tuple[np.random.Generator, torch.Generator]:
    rng = np.random.default_rng(seed)
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def draw_prompts(rng: np.random.Generator, objective: Objective, size: int) -> list[bool]:
    """Which samples see the null text."""
    return (rng.random(size) < objective.prompt_dropout).tolist()
