"""The networks that VBench measures with, where the user has them: which measures they make, and of what files."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.evaluate.network_kinds import CLIP_B, CLIP_L, DINO
from pavdm_dist.evaluate.network_meter import Aesthetic, Consistency, NetworkMeter, Score
from pavdm_dist.evaluate.networks import Network, open_network
from pavdm_dist.evaluate.settings import EvalConfig
from pavdm_dist.models.devices import DTYPES, check_dtype, choose_device

_HEAD = "LAION's linear head is a file of weight [1, 768] and bias [1]"


@dataclass(frozen=True)
class Official:
    """A measure of VBench's, on a network of the user's.

    Attributes:
        name: VBench's own, behind what it is taken with.
        field: the setting that names the network.
        network: opened once for all videos.
        score: makes what scores one video.
        rate: frames per second that are looked at; None = all, as VBench.
    """

    name: str
    field: str
    network: Network
    score: Callable[[], Score]
    rate: float | None

    def meter(self, fps: float) -> NetworkMeter:
        """What measures one video of ``fps`` frames per second."""
        return NetworkMeter(self.name, self.network, self.score(), fps, self.rate)


def open_official(config: EvalConfig) -> tuple[Official, ...]:
    """The measures whose networks are named; nothing is loaded before all settings are known to be sound.

    Raises:
        ConfigError: settings that do not go together, transformers is not installed, or the device cannot.
        CheckpointError: a folder or file that holds no such network.
    """
    named = (("dino", config.dino), ("clip", config.clip), ("aesthetic", config.aesthetic))
    if config.pictures_per_second is not None and not any(given for _, given in named):
        raise ConfigError(
            f"pictures_per_second={config.pictures_per_second:g}: is for dino=, clip= and aesthetic=; name one of them"
        )
    if config.aesthetic is not None and config.aesthetic_clip is None:
        raise ConfigError(
            f"aesthetic={config.aesthetic}: reads features of a CLIP; name it, too: aesthetic_clip={CLIP_L.example}"
        )
    if config.aesthetic is None and config.aesthetic_clip is not None:
        raise ConfigError(f"aesthetic_clip={config.aesthetic_clip}: is for aesthetic=, the head that reads it; name it")
    if not any(given for _, given in named):
        return ()
    device = choose_device(config.device)
    check_dtype("dtype", config.dtype, device)
    dtype, rate = DTYPES[config.dtype], config.pictures_per_second
    head = None if config.aesthetic is None else _head(config.aesthetic)
    found = []
    if config.dino is not None:
        network = open_network("dino", config.dino, DINO, device, dtype)
        found.append(Official("dino_subject_consistency", "dino", network, Consistency, rate))
    if config.clip is not None:
        network = open_network("clip", config.clip, CLIP_B, device, dtype)
        found.append(Official("clip_background_consistency", "clip", network, Consistency, rate))
    if head is not None and config.aesthetic_clip is not None:
        network = open_network("aesthetic_clip", config.aesthetic_clip, CLIP_L, device, dtype)
        if network.width != len(head[0]):
            raise ConfigError(
                f"aesthetic={config.aesthetic}: reads {len(head[0])} numbers, aesthetic_clip={config.aesthetic_clip}"
                f" gives {network.width}; LAION's head for {CLIP_L.example} reads 768"
            )
        found.append(Official("clip_aesthetic_quality", "aesthetic_clip", network, lambda: Aesthetic(*head), rate))
    return tuple(found)


def _head(path: str) -> tuple[Any, float]:
    """Weight ``[d]`` and bias of a linear layer with one output."""
    if not os.path.isfile(path):
        raise CheckpointError(f"aesthetic={path}: no such file; {_HEAD}")
    try:
        is_safe = path.endswith(".safetensors")
        found = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"aesthetic={path}: cannot be read ({reason}); {_HEAD}") from error
    weight, bias = (found.get(name) if isinstance(found, dict) else None for name in ("weight", "bias"))
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.ndim != 2 or len(weight) != 1:
        raise CheckpointError(f"aesthetic={path}: holds something else; {_HEAD}")
    if bias.numel() != 1 or not (weight.isfinite().all() and bias.isfinite()):
        raise CheckpointError(f"aesthetic={path}: is not one sum of finite numbers; {_HEAD}")
    return weight[0].double().numpy(), float(bias)
