"""What is known of public models beyond what their folders say: sampling defaults and licences.

The shapes in ``configs/model`` hold it. A model is told by its hub id, or by a transformer of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pavdm_dist.errors import CheckpointError
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.models.source import Source
from pavdm_dist.values.fields import made, read_object

# Diffusers' pipelines for weights of a trained-per-frame class that met one level a window all the same.
ONE_LEVEL = ("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline")
# What training on levels per frame makes of them.
PER_FRAME = "SkyReelsV2DiffusionForcingPipeline"


@dataclass(frozen=True)
class Known:
    """What ``model_index.json`` says of a model, or that of its public sibling.

    Attributes:
        hub: id of the public model that has this shape.
        license: of its weights, where it restricts their use.
        sampling: defaults.
    """

    hub: str | None = None
    license: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


def known_model(source: Source, index: Mapping[str, Any], transformer: Mapping[str, Any], where: object) -> Known:
    """What a model's own index says; what it leaves out is that of the public model with its hub id or shape, default
    by default.

    What was trained here says all of its own defaults, and none of the public model it may have begun as.

    Args:
        source: the model.
        index: its ``model_index.json``.
        transformer: its transformer's ``config.json``.
        where: the index is, for messages.

    Raises:
        CheckpointError: an entry of a wrong kind.
    """
    own = _read(index, where)
    others = []
    for folder in shipped_models().values():
        other = _read(read_object(folder / "model_index.json", CheckpointError), folder)
        shape = read_object(folder / "transformer" / "config.json", CheckpointError) if other.hub else {}
        if shape and all(transformer.get(name) == value for name, value in shape.items()):
            others.append(other)
    named = [other for other in others if other.hub == source.location] or others
    sibling = named[0] if named else Known()
    sampling = own.sampling
    if not (sampling and "training" in index):
        sampling = sibling.sampling | sampling
    if "levels" in own.sampling and "time_shift" not in own.sampling:  # levels are made of no other's shift
        sampling = {name: value for name, value in sampling.items() if name != "time_shift"}
    return Known(own.hub or sibling.hub, own.license or sibling.license, sampling)


def _read(index: Mapping[str, Any], where: object) -> Known:
    return made(Known, index, where, ignore_unknown=True, error=CheckpointError)
