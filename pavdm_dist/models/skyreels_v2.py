"""SkyReels-V2: Wan's blocks, trained with a level of its own for every latent frame (the "DF" weights).

Some of its weights are told the frame rate, as one of two kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pavdm_dist.models.base import FrameInfo, LevelSupport
from pavdm_dist.models.wan import Heads, Layers, Wan, WanConfig, Width, diffusers_arguments

# The rate of the first kind of its two; every other is the second.
SLOW_FPS = 16


@dataclass(frozen=True)
class SkyReelsV2Config(WanConfig):
    """As :class:`~pavdm_dist.models.wan.WanConfig`.

    Attributes:
        inject_sample_info: whether the frame rate is an input.
    """

    num_attention_heads: Heads = 16
    ffn_dim: Width = 8192
    num_layers: Layers = 32
    inject_sample_info: bool = False


class SkyReelsV2(Wan):
    """A :class:`~pavdm_dist.models.base.Backbone`; its own sampler runs it with the chunk-causal mask, too."""

    config_class: ClassVar[type[WanConfig]] = SkyReelsV2Config
    class_name: ClassVar[str] = "SkyReelsV2Transformer3DModel"

    def of_diffusers(self) -> Any:
        from diffusers import SkyReelsV2Transformer3DModel

        return SkyReelsV2Transformer3DModel(**diffusers_arguments(self.config))

    def _take(self, model: Any) -> None:
        super()._take(model)
        if model.config.inject_sample_info:
            self.fps_embedding, self.fps_projection = model.fps_embedding, model.fps_projection

    def _training(self) -> tuple[LevelSupport, bool]:
        return "staircase-trained", True

    def _with_info(self, modulation: Tensor, info: FrameInfo) -> Tensor:
        if not hasattr(self, "fps_embedding"):
            return modulation
        kind = torch.tensor([int(round(info.fps) != SLOW_FPS)], device=modulation.device)
        return modulation + self.fps_projection(self.fps_embedding(kind))
