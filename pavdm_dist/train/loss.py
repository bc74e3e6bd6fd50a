"""The PA-VDM objective: ordinary flow matching on frames of unlike noise levels (paper 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from pavdm_dist.models.base import WindowSlice

BANDS = 5  # of levels, in the log


def noised(
    clean: Tensor, levels: Tensor, context: int, context_noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Input and target of a batch.

    Args:
        clean: ``[b, C, F, h, w]``.
        levels: ``[b, F]``.
        context: latent frames of context, at the front.
        context_noise: deviation of the noise added to them at most.
        generator: of the noise, on the device of ``clean``.

    Returns:
        ``(x_t, velocity)``: x_t = (1 - t) x_0 + t eps and x_0 - eps, each ``[b, C, F, h, w]``.
    """
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    t = levels[:, None, :, None, None]
    x = (1 - t) * clean + t * noise
    if context and context_noise:
        amount = context_noise * torch.rand(clean.shape[0], 1, 1, 1, 1, generator=generator, device=clean.device)
        x[:, :, :context] += amount * noise[:, :, :context]
    return x, clean - noise


def velocity_loss(
    velocity: Tensor,
    target: Tensor,
    levels: Tensor,
    context: int,
    window: WindowSlice | None = None,
    shared_by: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared error over the noisy frames, unweighted; the clean context is masked out.

    Args:
        velocity, target: ``[b, C, F, h, w]``.
        levels: ``[b, F]``.
        context: latent frames of context, at the front of the window.
        window: where these frames lie in a window that several processes hold.
        shared_by: how many these are; the mean over all processes' losses, and of their gradients, is then that of
            whole windows, since the exchanges of attention carry each one's loss to the others' frames.

    Returns:
        The loss; the summed error and the number of frames in each fifth of the level range, ``[5]`` each, which add
        up over processes.
    """
    frames = levels.shape[1]
    mine = context if window is None else max(context - window.first_frame, 0)
    error = (velocity - target).square().mean(dim=(1, 3, 4))[:, mine:]
    bands = (levels[:, mine:] * BANDS).clamp(max=BANDS - 1e-3).long().flatten()
    sums = torch.zeros(BANDS, device=error.device).index_add_(0, bands, error.detach().float().flatten())
    if window is not None:
        frames, parts = window.window_frames, shared_by
    else:
        parts = 1
    loss = error.sum() * (parts / (error.shape[0] * (frames - context)))
    # Not bincount, which reads its largest value first: a GPU would be waited for.
    counts = torch.zeros(BANDS, device=error.device).index_add_(0, bands, torch.ones_like(bands, dtype=torch.float32))
    return loss, sums, counts
