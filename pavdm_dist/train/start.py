"""The model with its optimizer under DeepSpeed's engine, as the settings ask for them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pavdm_dist.models.base import Activation, BlockContext
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.train.model import TextToVideo, build
from pavdm_dist.train.optimizer import MuonAdamW
from pavdm_dist.train.processes import World
from pavdm_dist.train.settings import TrainConfig
from pavdm_dist.train.zero import ZeroEngine, gathered, loading_universal, sharded_building
from pavdm_dist.train.zero_settings import engine_settings

# Weight matrices between hidden states; tables, embeddings, the first and the last layer are no such maps.
INNER = re.compile(r"(blocks\.|layers\.|t_block\.).*weight$")


def start_engine(
    config: TrainConfig, channels: int, vocabulary: Sequence[str] | None, world: World, load_universal: bool = False
) -> ZeroEngine:
    """Builds the model and its DeepSpeed engine over ``world``.

    Args:
        config: settings.
        channels: of the latents.
        vocabulary: words of the text encoder that is trained along; None where none is trained.
        world: all processes.
        load_universal: the coming checkpoint was converted for another number of processes.
    """
    settings = engine_settings(config, world.size)
    if load_universal:
        settings = loading_universal(settings)
    torch.manual_seed(config.seed)
    if config.zero.init:
        model = build(config, channels, vocabulary, gathered, sharded_building(settings))
    else:
        model = build(config, channels, vocabulary)
    if config.compile:
        model.transformer.compile_repeated_blocks()
    if config.zero.checkpoint_activations:
        checkpoint_activations(model.transformer)
    model.to(world.device)
    optimizer = None if config.optimizer.name == "deepspeed" else _optimizer(model, config)
    return ZeroEngine(model, optimizer, settings)


def checkpoint_activations(model: STDiT3) -> None:
    """Lets the backward pass compute every block again instead of keeping its insides."""
    plain = model.block

    def block(index: int, activation: Activation, context: BlockContext) -> Activation:
        def hidden(*parts: Tensor) -> Tensor:
            return plain(index, Activation(*parts), context).hidden

        given = (activation.hidden, activation.modulation, activation.time)
        return Activation(checkpoint(hidden, *given, use_reentrant=False), *given[1:])

    model.block = block  # type: ignore[method-assign]


def _optimizer(model: TextToVideo, config: TrainConfig) -> torch.optim.Optimizer:
    o, named = config.optimizer, dict(model.named_parameters())
    betas = (o.betas[0], o.betas[1])
    if o.name == "adamw":
        return torch.optim.AdamW(named.values(), o.lr, betas, weight_decay=o.weight_decay)
    matrices = {name for name, value in named.items() if value.ndim == 2 and INNER.search(name)}
    return MuonAdamW(
        [named[name] for name in named if name in matrices],
        [named[name] for name in named if name not in matrices],
        o.lr,
        betas,
        o.weight_decay,
        o.matrix_ratio,
    )
