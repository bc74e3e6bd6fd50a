"""The reference loop, in one process: plan x denoiser -> clean chunks. Every engine must equal it bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from pavdm_dist.method.schedule import PlanRow
from pavdm_dist.method.window import CleanChunk, Window, not_finite_error

# Guidance branches, in the order in which they are evaluated. They are separate calls everywhere: a batch of
# two is not bit-equal to two calls, and as separate micro-batches they fill a pipeline.
CONDITIONAL, UNCONDITIONAL = 0, 1


class Denoiser(Protocol):
    """Velocity of the whole window for one guidance branch."""

    def __call__(self, x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        """``x [1, C, F, h, w]``, ``levels [1, F]`` -> velocity ``[1, C, F, h, w]``, float32."""


StepCallback = Callable[[PlanRow, Window, Sequence[CleanChunk]], None]


def num_branches(guidance_scale: float) -> int:
    """1 without guidance (scale 1), else 2."""
    return 1 if guidance_scale == 1 else 2


def guide(velocities: list[Tensor], guidance_scale: float) -> Tensor:
    """Classifier-free guidance, v_null + g (v_text - v_null), of velocities ordered by branch."""
    if len(velocities) == 1:
        return velocities[0]
    conditional, unconditional = velocities[CONDITIONAL], velocities[UNCONDITIONAL]
    return unconditional + guidance_scale * (conditional - unconditional)


def sample(
    window: Window, denoise: Denoiser, guidance_scale: float = 1.0, callback: StepCallback | None = None
) -> Iterator[CleanChunk]:
    """Runs a window to the end of its plan and yields its chunks as they become clean.

    Args:
        window: fresh, or restored from a snapshot. An endless one ends when its ``plan`` is replaced by a stopped one.
        denoise: the model, called once per branch and row.
        guidance_scale: g; 1 evaluates the conditional branch only.
        callback: called after every row with the row, the window, and the chunks that became clean.

    Raises:
        VideoError: at the end of a shift latents are not finite.
    """
    branches = range(num_branches(guidance_scale))
    while not window.plan.is_over(window.row):
        row = window.plan.row(window.row)
        x, levels = window.inputs(row)
        velocity = guide([denoise(x, levels, row, branch) for branch in branches], guidance_scale)
        clean = window.update(row, velocity)
        if window.plan.closes_shift(row.index) and (bad := window.not_finite(clean)) is not None:
            raise not_finite_error(bad, row.index)
        if callback is not None:
            callback(row, window, clean)
        yield from clean
