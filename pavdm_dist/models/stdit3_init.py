"""What the weights of an STDiT3 are before its first step of training."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from pavdm_dist.models.stdit3 import STDiT3

# Residual branches that start silent: text everywhere, attention and MLP over time.
_SILENT = re.compile(r"cross_attn\.proj|temporal_blocks\.\d+\.(attn\.proj|mlp\.fc2)|final_layer\.linear")
_NARROW = re.compile(r"(t_embedder|fps_embedder)\.mlp\.|t_block\.")


def init_weights(
    model: STDiT3, whole: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] | None = None
) -> None:
    """Initial weights for training from scratch: quiet residual branches, zero output.

    Args:
        model: what is filled.
        whole: entered around the filling of one module's own parameters; where the weights are sharded, it makes
            these few whole and shards them again.
    """
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear | nn.Conv3d):
            with whole(own) if whole else nullcontext():
                _init_map(name, module)


def _init_map(name: str, module: nn.Linear | nn.Conv3d) -> None:
    if _SILENT.search(name):
        nn.init.zeros_(module.weight)
    elif _NARROW.match(name):
        nn.init.normal_(module.weight, std=0.02)
    else:
        nn.init.xavier_uniform_(module.weight.flatten(1))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
