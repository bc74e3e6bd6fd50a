"""Low-rank changes of a model's linear maps, trained while the weights themselves stay as they are (LoRA).

A changed map keeps its name and its weight; in it lie ``lora_A`` and ``lora_B``, under the names that diffusers and
peft give them. So the base is filled, sharded and checked as without them, and what is saved is read by
:mod:`pavdm_dist.models.lora` and by diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pavdm_dist.errors import ConfigError
from pavdm_dist.models.lora import FILES, METADATA
from pavdm_dist.train.train_settings import LowRankConfig

# Linear maps of blocks, and of nothing before or behind them.
_INNER = re.compile(r"(^|[._])blocks\.\d+\.")
_PREFIX = "transformer."


class LoraLinear(nn.Linear):
    """A linear map with a change beside it, in the place of the map and with its very parameters.

    It is a class, and no hook on the map: one compiled function serves all blocks, and torch compiles it anew for
    another class of map, but not for another hook.

    Args:
        linear: the map.
        rank: of the change.
        strength: of it.
    """

    def __init__(self, linear: nn.Linear, rank: int, strength: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.strength = linear.in_features, linear.out_features, strength
        self.weight, self.bias = linear.weight, linear.bias
        # Drawn as torch draws maps.
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.train(linear.training)

    def forward(self, given: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        return F.linear(given, self.weight, self.bias) + self.strength * self.lora_B(self.lora_A(given))


def add_lora(
    model: nn.Module,
    config: LowRankConfig,
    whole: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] | None = None,
) -> None:
    """Freezes a backbone's weights and puts maps with changes, silent at first, in the place of its maps.

    Args:
        model: the backbone.
        config: rank, strength and which maps.
        whole: given where weights are sharded as they are made.

    Raises:
        ConfigError: a target that no map has, with those there are.
    """
    model.requires_grad_(False)
    for name, linear in _targets(model, config).items():
        changed = LoraLinear(linear, config.rank, _alpha(config) / config.rank)
        # Zero, so that training starts at the base.
        with whole([*changed.lora_B.parameters()]) if whole else nullcontext():
            nn.init.zeros_(changed.lora_B.weight)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, changed)


def ends_outside(model: nn.Module, config: LowRankConfig) -> bool:
    """Whether some target is the end of a map's name outside blocks, too, where it changes nothing.

    Args:
        model: the backbone, without changes.
        config: which maps.
    """
    changed = _targets(model, config)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in changed]
    return any(name.endswith(f".{target}") for name in names for target in config.targets)


def save_lora(
    weights: Mapping[str, Tensor], config: LowRankConfig, folder: Path, dtype: torch.dtype, steps: int
) -> None:
    """Writes the changes as ``pytorch_lora_weights.safetensors`` into a folder that is there.

    Args:
        weights: of the backbone, by name; what is no change is left out.
        config: as they were added.
        folder: where.
        dtype: on disk.
        steps: of the optimizer, for whoever looks.
    """
    changes = {name: value for name, value in weights.items() if ".lora_" in name}
    modules = sorted({name.partition(".lora_")[0] for name in changes})
    # What diffusers makes peft's configuration of; each of its names bears the component's.
    about = {"r": config.rank, "lora_alpha": _alpha(config), "target_modules": modules}
    header = {"format": "pt", "steps": str(steps), METADATA: json.dumps({_PREFIX + k: v for k, v in about.items()})}
    tensors = {_PREFIX + name: value.to("cpu", dtype).contiguous() for name, value in changes.items()}
    save_file(tensors, folder / FILES[0], header)


def is_own_lora(file: Path) -> bool:
    """Whether a file is one that :func:`save_lora` has written."""
    try:
        with safe_open(file, framework="pt") as reader:
            return "steps" in (reader.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _alpha(config: LowRankConfig) -> float:
    return float(config.rank if config.alpha is None else config.alpha)


def _targets(model: nn.Module, config: LowRankConfig) -> dict[str, nn.Linear]:
    maps = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inner = {name: module for name, module in maps.items() if _INNER.search(name)}
    if not config.targets:
        return inner
    found: dict[str, nn.Linear] = {}
    for target in config.targets:
        ends = {name: module for name, module in inner.items() if name.endswith(f".{target}")}
        named = ends | ({target: maps[target]} if target in maps else {})
        if not named:
            there = ", ".join(sorted({_INNER.split(name)[-1] for name in inner}))
            raise ConfigError(f"model.lora.targets: no linear map is called {target}; there are {there}")
        found |= named
    return found
