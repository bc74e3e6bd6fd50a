"""The backbones this package has, by the class name in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pavdm_dist.errors import CheckpointError
from pavdm_dist.models.base import Backbone
from pavdm_dist.models.skyreels_v2 import SkyReelsV2
from pavdm_dist.models.source import Source, class_names, load_config
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.models.wan import Wan

BACKBONES: dict[str, type[Backbone]] = {
    "STDiT3": STDiT3,
    "SkyReelsV2Transformer3DModel": SkyReelsV2,
    "WanTransformer3DModel": Wan,
}


def backbone_class(config: Mapping[str, Any], where: object) -> type[Backbone]:
    """The class that ``config.json`` names: diffusers' ``_class_name`` or transformers' ``architectures``.

    Files that name none are STDiT3's, the only ones that were ever written so.

    Args:
        config: what the file holds.
        where: it is, for the message.

    Raises:
        CheckpointError: a class this package does not have, or a name that is no text.
    """
    name = next(iter(class_names(config, where)), STDiT3.__name__)
    if name not in BACKBONES:
        raise CheckpointError(f"{where}: transformer is {name}, this version runs {', '.join(BACKBONES)}")
    return BACKBONES[name]


def backbone_shape(source: str | Path | Source) -> Backbone:
    """A component's backbone without its weights, on the meta device.

    Raises:
        CheckpointError: no ``config.json``, or none of a backbone.
    """
    config = load_config(source)
    kind = backbone_class(config, source)
    try:
        return kind.of_shape(config)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def load_backbone(
    source: str | Path | Source,
    blocks: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Backbone:
    """See :meth:`~pavdm_dist.models.base.Backbone.load`."""
    source = Source.of(source)
    return backbone_class(load_config(source), source).load(source, blocks, dtype, device)
