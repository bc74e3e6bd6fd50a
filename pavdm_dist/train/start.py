"""The model with its optimizer under DeepSpeed's engine, as the settings ask for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pavdm_dist.models.compiling import keep_on_disk
from pavdm_dist.train.model import TextToVideo, build
from pavdm_dist.train.optimizer import MuonAdamW
from pavdm_dist.train.ranks import World
from pavdm_dist.train.recompute import Recompute, recompute_blocks
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.zero import ZeroEngine, gathered, loading_universal, sharded_building
from pavdm_dist.train.zero_refusals import refusals
from pavdm_dist.train.zero_settings import engine_settings, pinning

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

    Raises:
        ConfigError: settings of DeepSpeed's that it does not take.
    """
    settings = engine_settings(config, world.size)
    if world.device.type == "cuda":
        settings = pinning(settings)
    if load_universal:
        settings = loading_universal(settings)
    torch.manual_seed(config.seed)
    if config.zero.init:
        with refusals(config):
            sharded = sharded_building(settings)
        model = build(config, channels, vocabulary, gathered, sharded)
        if model.text_encoder is not None and config.zero.precision == "bfloat16":
            model.text_encoder.bfloat16()  # DeepSpeed takes all to have the type of what was sharded
    else:
        model = build(config, channels, vocabulary, device=world.device)
    if config.compile:
        keep_on_disk()
        model.transformer.compile_repeated_blocks()
    recompute_blocks(model.transformer, Recompute.parse(config.zero.recompute))
    model.to(world.device)
    optimizer = None if config.optimizer.name == "deepspeed" else _optimizer(model, config)
    with refusals(config):
        return ZeroEngine(model, optimizer, settings, waits=world.device.type == "cpu")


def group_settings(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a new optimizer's groups were made with, whichever it is; the rate, which moves, is not of it."""
    return [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]


def keep_settings(groups: Iterable[dict[str, Any]], asked: Iterable[Mapping[str, Any]]) -> None:
    """Gives groups that a checkpoint has brought back what this run asks for (:func:`group_settings` of before)."""
    for group, settings in zip(groups, asked, strict=True):
        group.update(settings)


def _optimizer(model: TextToVideo, config: TrainConfig) -> torch.optim.Optimizer:
    o = config.optimizer
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    betas = (o.betas[0], o.betas[1])
    if o.name == "adamw":
        # One pass over weights and moments, also in main memory, where it takes an eighth of the time of several.
        return torch.optim.AdamW(named.values(), o.lr, betas, weight_decay=o.weight_decay, fused=True)
    matrices = {name for name, value in named.items() if value.ndim == 2 and INNER.search(name)}
    return MuonAdamW(
        [named[name] for name in named if name in matrices],
        [named[name] for name in named if name not in matrices],
        o.lr,
        betas,
        o.weight_decay,
        o.matrix_ratio,
    )
