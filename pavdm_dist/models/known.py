"""What is known of public models beyond what their folders say: sampling defaults and licences.

The shapes in ``configs/model`` hold it. A model is told by its hub id, or by a transformer of the same shape.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pavdm_dist.errors import CheckpointError
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.models.source import Source
from pavdm_dist.values.fields import made, read_object

# Diffusers' pipelines for weights of a trained-per-frame class that met one level a window all the same.
ONE_LEVEL = ("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline")
# What training on levels per frame makes of them.
PER_FRAME = "SkyReelsV2DiffusionForcingPipeline"
# Of a place's names, the last ones: the hub's cache has a model under its id, "snapshots" and a commit.
_PARTS = 3


@dataclass(frozen=True)
class _Said:
    """What a ``model_index.json`` says of a model."""

    hub: str | None = None
    license: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Known(_Said):
    """What ``model_index.json`` says of a model, or that of its public sibling.

    Attributes:
        hub: id of the public model that has this shape.
        license: of its weights, where it restricts their use.
        sampling: defaults.
        doubt: a sentence where other public models have the shape and other defaults, and nothing tells which it is.
    """

    doubt: str | None = None


def known_model(source: Source, index: Mapping[str, Any], transformer: Mapping[str, Any], where: object) -> Known:
    """What a model's own index says; what it leaves out is that of the public model with its hub id or shape, default
    by default. Of several with its shape it is the one whose size its folder's name tells, as ``720P`` does.

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
    names = [str(index.get("_name_or_path") or ""), *reversed(Path(source.location).parts[-_PARTS:])]
    siblings = [other for other in others if other.hub in (source.location, own.hub)] or _named(others, names)
    complete = bool(own.sampling) and "training" in index
    found = [own.sampling if complete else other.sampling | own.sampling for other in siblings or [_Said()]]
    doubt = None
    if any(sampling != found[0] for sampling in found):
        hubs = [str(other.hub) for other in siblings]
        doubt = (
            f"has the shape of {' and '.join(hubs)}, whose defaults differ; those of the first are taken, and"
            f' "hub": "{hubs[-1]}" in its model_index.json says that it is the other'
        )
    sampling, sibling = found[0], siblings[0] if siblings else _Said()
    if "levels" in own.sampling and "time_shift" not in own.sampling:  # levels are made of no other's shift
        sampling = {name: value for name, value in sampling.items() if name != "time_shift"}
    return Known(own.hub or (None if doubt else sibling.hub), own.license or sibling.license, sampling, doubt)


def _named(others: list[_Said], names: Iterable[str]) -> list[_Said]:
    """Those that the first name tells which has a word of one's hub id that no other's has; all where none has."""
    words = [_words(str(other.hub)) for other in others]
    counts = Counter(word for some in words for word in some)
    for name in names:
        telling = {word for word in _words(name) if counts[word] == 1}
        found = [other for other, some in zip(others, words, strict=True) if some & telling]
        if len(found) == 1:
            return found
    return others


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9.]+", name.lower()))


def _read(index: Mapping[str, Any], where: object) -> _Said:
    return made(_Said, index, where, ignore_unknown=True, error=CheckpointError)
