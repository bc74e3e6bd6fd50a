"""Batches for the model; every one is a function of (seed, step), which is what makes resumed runs exact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.models.base import FrameInfo, WindowSlice
from pavdm_dist.train.model import Text
from pavdm_dist.train.objective import Objective


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
        kind: of window, for the log.
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
    kind: str = "window"

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
        """On another device; from pinned memory this process does not wait for it."""
        x, target, levels = (value.to(device, non_blocking=True) for value in (self.x, self.target, self.levels))
        return replace(self, x=x, target=target, levels=levels, text=self.text.to(device))

    def pinned(self) -> Batch:
        """In memory that a GPU reads by itself; for the thread that loads ahead."""
        x, target, levels = (value.pin_memory() for value in (self.x, self.target, self.levels))
        return replace(self, x=x, target=target, levels=levels, text=self.text.pinned())


class Batches(Protocol):
    """Where batches come from.

    Attributes:
        channels: of the latents.
        identity: what batches depend on besides the settings, by part and name; a run must not go on with another one.
            Its part ``older`` says what that was in checkpoints that do not name it.
        held_out: batches of clips that are not trained on; None = there are none.
    """

    channels: int
    identity: dict[str, Any]
    held_out: Batches | None

    def batch(self, step: int, rank: int, size: int) -> Batch:
        """Process ``rank``'s share of step ``step``'s batch: every ``size``-th sample, so that the processes' mean
        gradient is that of one process."""

    def close(self) -> None:
        """Ends what loads ahead."""


def draw_kind(kinds: list[tuple[float, Objective]], rng: np.random.Generator) -> Objective:
    """One of a mixture's objectives."""
    if len(kinds) == 1:
        return kinds[0][1]
    return kinds[rng.choice(len(kinds), p=[share for share, _ in kinds])][1]


def draw_prompts(rng: np.random.Generator, objective: Objective, size: int) -> list[bool]:
    """Which samples see the null text."""
    return (rng.random(size) < objective.prompt_dropout).tolist()
