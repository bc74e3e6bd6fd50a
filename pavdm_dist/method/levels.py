"""The noise levels that a chunk walks through: pure arithmetic, no tensors (paper section 3.1).

A level is a float in [0, 1]: 1 is pure noise, 0 is clean.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from pavdm_dist.errors import ConfigError

# The resolution at which the time shift is 1 for a single image (SD3-style shift as Open-Sora v1.2 uses it).
BASE_RESOLUTION = 512


def _float32(value: float) -> float:
    """The nearest float32, as a Python float: levels must be the same number on every device."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def time_shift_ratio(height: int, width: int, num_latents: int, scale: float = 1.0) -> float:
    """Ratio r of the resolution-dependent time shift.

    Args:
        height, width: frame size in pixels.
        num_latents: latent frames of the *nominal* window (context included): 35 for 119 frames of the
            Open-Sora codec. It stays the same while the window grows and drains.
        scale: extra factor, 1 as published.
    """
    return math.sqrt(height * width) / BASE_RESOLUTION * math.sqrt(num_latents) * scale


def shift_time(t: float, ratio: float) -> float:
    """t' = r t / (1 + (r - 1) t); keeps 0 and 1, monotone for r > 0, so it commutes with moving the window."""
    return ratio * t / (1 + (ratio - 1) * t)


@dataclass(frozen=True)
class NoiseSchedule:
    """The T + 1 levels a chunk walks through, from pure noise to clean.

    Attributes:
        num_inference_steps: T, model calls that take a chunk from level 1 to level 0.
        time_shift: r of :func:`shift_time`; 1 leaves the grid linear.
        table: the T levels above 0, noisiest first, of a model that was distilled to just these; None makes them of
            ``time_shift``, which is not read otherwise.
    """

    num_inference_steps: int
    time_shift: float = 1.0
    table: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps={self.num_inference_steps}: at least 1 is needed")
        if not (math.isfinite(self.time_shift) and self.time_shift > 1e-6):
            raise ConfigError(f"time_shift={self.time_shift}: must be a finite number above 0 (1 = no shift)")
        if self.table is None:
            return
        falling = all(before > after for before, after in pairwise((*self.table, 0.0)))
        if not (self.table and falling and self.table[0] <= 1):
            raise ConfigError(f"levels={list(self.table)}: must fall from at most 1 to above 0")
        if len(self.table) != self.num_inference_steps:
            raise ConfigError(
                f"num_inference_steps={self.num_inference_steps}: the model knows {len(self.table)} levels alone; use"
                f" num_inference_steps={len(self.table)}"
            )

    def level(self, steps_left: float) -> float:
        """Level of a chunk that still has ``steps_left`` updates to go: 0..T, fractions without a table."""
        if self.table is not None:
            return _float32((*self.table, 0.0)[self.num_inference_steps - int(steps_left)])
        return _float32(shift_time(steps_left / self.num_inference_steps, self.time_shift))

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """``levels[j]`` for j = 0..T steps left; every value is exactly a float32."""
        return tuple(self.level(j) for j in range(self.num_inference_steps + 1))
