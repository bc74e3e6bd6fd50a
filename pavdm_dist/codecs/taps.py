"""Causal convolutions that look at the current frame only, at a third of the work.

A codec in ``AutoencoderKLWan``'s layout keeps 3x3x3 kernels whatever it was trained with; where those of the earlier
frames are zero, as in the embedded model's (``digits/clip_vae.py``), a 3x3 kernel per frame is the same function.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CurrentFrameConv(nn.Module):
    """Takes the place of a causal 3x3x3 convolution; its parameters stay what they are saved as.

    Args:
        conv: stride 1, padding 1, whose weights for earlier frames are zero.
    """

    current: Tensor

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("current", conv.weight.detach()[:, :, -1].contiguous(), persistent=False)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """``[b, c, t, h, w]`` -> as many frames; earlier ones, ``cache_x``, have no weight."""
        frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), self.current, self.bias, padding=1)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def drop_empty_taps(vae: nn.Module) -> None:
    """Replaces the 3x3x3 convolutions that look at the current frame only, in place."""
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv3d) and child.kernel_size == (3, 3, 3) and not child.weight[:, :, :2].any():
                setattr(module, name, CurrentFrameConv(child))
