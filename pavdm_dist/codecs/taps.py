"""Causal convolutions that look at the current frame only, at a third of the work.

A codec in ``AutoencoderKLWan``'s layout has 3x3x3 kernels whatever it was trained with. One whose ``config.json`` says
``_current_frame_only`` has zeros in them for earlier frames (``digits/clip_vae.py``): a 3x3 kernel on every frame is
the same function up to rounding. The names and shapes of what is saved stay the public layout's.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pavdm_dist.errors import CheckpointError

_EARLIER = 2  # frames that a 3x3x3 kernel sees beside the current one


class CurrentFrameConv(nn.Module):
    """Takes the place of a causal 3x3x3 convolution.

    Args:
        conv: stride 1, padding 1, whose weights for earlier frames are zero.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        weight = conv.weight.detach()[:, :, -1].contiguous()
        self.weight, self.bias = nn.Parameter(weight, conv.weight.requires_grad), conv.bias

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """``[b, c, t, h, w]`` -> as many frames; earlier ones, ``cache_x``, have no weight."""
        frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), self.weight, self.bias, padding=1)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"
        destination[name] = F.pad(destination[name][:, :, None], (0, 0, 0, 0, _EARLIER, 0))


def drop_empty_taps(vae: nn.Module) -> None:
    """Replaces all 3x3x3 convolutions, in place.

    Raises:
        CheckpointError: one of them looks at earlier frames.
    """
    for path, module in list(vae.named_modules()):
        for name, child in module.named_children():
            if not isinstance(child, nn.Conv3d) or child.kernel_size != (3, 3, 3):
                continue
            if not child.weight.is_meta and bool(child.weight[:, :, :_EARLIER].any()):
                raise CheckpointError(
                    f"vae: config.json says _current_frame_only=true, but {path}.{name} has weights for earlier frames;"
                    " take the entry out"
                )
            setattr(module, name, CurrentFrameConv(child))
