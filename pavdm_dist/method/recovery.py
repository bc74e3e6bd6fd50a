"""What it takes to go on where context is cached: kept keys and values, clean chunks' calls run again, or neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.models.base import Backbone

Recovers = Literal["keys", "replay", "none"]


@dataclass(frozen=True)
class Recovery:
    """How a video with cached context goes on after an end; no bit of it depends on that.

    Attributes:
        by: ``keys``: keys and values of clean chunks are kept beside the latents in flight. ``replay``: clean latents
            are, and their chunks' own calls are run again. ``none``: neither, so that the video begins anew.
        layers: of ``replay``, blocks that leave keys and values in the whole model.
    """

    by: Recovers = "keys"
    layers: int = 0

    def __post_init__(self) -> None:
        if self.by not in get_args(Recovers):
            raise ConfigError(f"recovery={self.by!r}: must be keys, replay or none")


def mixing_layers(backbone: Backbone, latent_shape: tuple[int, int, int]) -> int:
    """Blocks of a model, on whatever stage, that leave keys and values for other chunks."""
    grid = backbone.grid(1, *latent_shape[1:])
    return sum(backbone.kv_values(grid, block) > 0 for block in range(backbone.spec.num_blocks))


def replayed(plan: WindowPlan, n: int, layers: int) -> tuple[int, ...]:
    """Clean chunks whose own calls, run again in this order, give all that rows from ``n`` on read.

    What a chunk leaves in block l depends on what ``context_chunks`` chunks before it left in block l - 1. So
    ``layers`` times as many chunks before the newest make it right, however long the video is; what the first of them
    leave in later blocks is wrong, and nothing reads it that is read itself. What anchors leave depends on the anchors.
    """
    if not plan.kept(n):
        return ()
    newest = plan.row(n).chunks[0] - 1
    recent = range(max(0, newest - plan.context_chunks * layers), newest)
    return tuple(sorted({*range(min(plan.anchor_chunks, newest)), *recent}))


def own_row(plan: WindowPlan, chunk: int) -> PlanRow:
    """The row that begins with a clean chunk's own call."""
    return plan.row((chunk + plan.window_chunks) * plan.steps_per_shift)
