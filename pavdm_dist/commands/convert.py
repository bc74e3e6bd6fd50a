"""``pavdm convert``: a published file of weights becomes a model folder that everything here takes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint, SamplingDefaults
from pavdm_dist.commands.convert_parts import Component, check_fit, published_file
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.folders import check_no_link, touches, whole_folder
from pavdm_dist.io.shipped import place_of
from pavdm_dist.io.storage import disk_errors
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.models.base import Backbone
from pavdm_dist.models.catalog import BACKBONES, backbone_shape
from pavdm_dist.models.components import INDEX, check_only_model, copy_components
from pavdm_dist.models.devices import DTYPES
from pavdm_dist.models.known import known_model
from pavdm_dist.models.loading import as_stored, check_stored, has_weights
from pavdm_dist.models.nearby import hidden_folder
from pavdm_dist.models.published import read_published
from pavdm_dist.models.saving import save_tensors
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.values.fields import made, read_object


@dataclass
class ConvertConfig:
    """Everything ``pavdm convert`` knows."""

    # the published file (.pt, .pth, .ckpt, .bin or .safetensors), a folder or hub id of the last, or owner/name/FILE
    source: str | None = None
    weights: str | None = None  # one of several sets in it; None = generator_ema, generator, ... or the file itself
    base: str | None = None  # model folder or hub id of that shape, for all but the transformer's weights
    revision: str | None = None  # of the base: branch, tag or commit
    # folder or hub id of a component alone, or of a model that has it; None = the base's
    vae: str | None = None  # the codec
    text_encoder: str | None = None  # the pretrained text encoder
    tokenizer: str | None = None  # None = what lies with the text encoder
    output: str | None = None  # the new model folder
    dtype: Literal["as stored", "bfloat16", "float16", "float32"] = "as stored"  # of the transformer's weights
    # what the folder says of these weights; None = as of the base
    level_support: Literal["staircase-trained", "mixed-trained", "accepts"] | None = None  # levels they met in training
    causal_trained: bool | None = None  # whether they met the chunk-causal mask
    license: str | None = None  # said whenever the model is opened
    sampling: dict[str, Any] = field(default_factory=dict)  # defaults, as in a model_index.json


def convert_command(config: ConvertConfig, overwrite: bool) -> dict[str, Any]:
    """Writes the folder; it appears whole or not at all.

    Args:
        config: settings.
        overwrite: an earlier folder of a model may be replaced.

    Returns:
        ``output``, ``tensors``, ``bytes``.

    Raises:
        ConfigError: a setting is missing, or sampling's defaults are none, or the folder is a link, holds more than a
            model or what is read, or it cannot be written.
        CheckpointError: the file cannot be read, or its tensors are not those of the base's transformer; a component
            is not where it is said to be; what came of it is no model that can be sampled.
    """
    for name in ("source", "base", "output"):
        if not getattr(config, name):
            raise ConfigError(f"{name}: must be given; pavdm convert FILE base=MODEL output=FOLDER")
    assert config.source and config.base and config.output
    folder = Path(config.output)
    check_no_link(folder, "output")
    if os.path.lexists(folder) and not overwrite:
        raise ConfigError(f"output={folder}: exists already; --overwrite replaces it")
    for name in ("source", "base", "vae", "text_encoder", "tokenizer"):
        place = getattr(config, name)
        path = None if place is None else place_of(place)
        relation = touches(folder, path) if path is not None and os.path.lexists(path) else ""
        if relation in ("is", "holds"):
            raise ConfigError(f"output={folder}: {relation} {name}={place}, which is read; name another")
    if os.path.lexists(folder) and not (folder / INDEX).is_file():
        raise ConfigError(f"output={folder}: holds no model that could be replaced; name another")
    if os.path.lexists(folder):
        check_only_model(folder, config.base, "output")
    base = Source.of(config.base, config.revision, field="base")
    shape = backbone_shape(base.part("transformer"))
    components = _components(config, base)
    check_fit(components, shape.spec.latent_channels, shape.spec.text_dim)
    values, index = _values(config, base), _index(config, base, shape, components)
    _check_sampling(config, Source(os.path.abspath(folder)), index, values)
    tensors = read_published(published_file(config.source), config.weights)
    stored = {name: as_stored(value) for name, value in tensors.items()}
    check_stored(shape.state_dict(), stored, config.source, shape.optional_tensors)
    try:
        with whole_folder(folder, replaces=overwrite) as partial, disk_errors():
            copy_components(base, partial, [component.name for component in components])
            for component in components:
                component.write(partial)
            size = _write(config, shape, tensors, values, partial / "transformer")
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            _check_model(partial, folder)
    except OSError as error:
        raise ConfigError(f"output={folder}: cannot be written ({error.strerror or error})") from error
    return {"output": str(folder), "tensors": len(tensors), "bytes": size}


def _components(config: ConvertConfig, base: Source) -> list[Component]:
    """What does not come from the base.

    Raises:
        ConfigError: the base has no codec, and none is named.
    """
    if config.vae is None and not has_weights(base.part("vae")):
        raise ConfigError(
            f"base={config.base}: holds no weights of a codec; vae=FOLDER or a hub id names them"
            f"{hidden_folder(base.location)}"
        )
    named = {"vae": config.vae, "text_encoder": config.text_encoder, "tokenizer": config.tokenizer}
    found = [Component.of(name, place) for name, place in named.items() if place]
    # Publishers put a tokenizer beside its encoder, or among the encoder's files.
    if config.text_encoder and not config.tokenizer:
        beside = Component.in_place("tokenizer", config.text_encoder)
        found += [] if beside is None else [beside]
    return found


def _values(config: ConvertConfig, base: Source) -> dict[str, Any]:
    """The transformer's ``config.json``."""
    said = {"level_support": config.level_support, "causal_trained": config.causal_trained}
    return load_config(base.part("transformer")) | {name: value for name, value in said.items() if value is not None}


def _index(config: ConvertConfig, base: Source, shape: Backbone, components: Sequence[Component]) -> dict[str, Any]:
    """The model's index."""
    index = read_object(base.file(INDEX), CheckpointError)
    # Which of several public models of its shape it is: the new folder's name need not tell.
    hub = known_model(base, index, load_config(base.part("transformer")), INDEX).hub
    index |= {} if hub is None else {"hub": hub}
    index.pop("training", None)  # these weights come from elsewhere
    # Which a config.json names in one of two ways, or not at all.
    index["transformer"] = ["diffusers", next(name for name, kind in BACKBONES.items() if kind is type(shape))]
    for component in components:
        if component.name in index and component.name != "tokenizer":
            index[component.name] = [index[component.name][0], component.kind() or index[component.name][1]]
    index |= {"sampling": {**index.get("sampling", {}), **config.sampling}} if config.sampling else {}
    return index | ({"license": config.license} if config.license else {})


def _check_sampling(
    config: ConvertConfig, model: Source, index: Mapping[str, Any], transformer: Mapping[str, Any]
) -> None:
    """Refuses defaults for sampling that are none, alone or beside the base's.

    Raises:
        ConfigError: naming the first.
    """
    if not config.sampling:
        return
    made(SamplingDefaults, config.sampling, "sampling", prefix="sampling.")
    every = made(
        SamplingDefaults, known_model(model, index, transformer, INDEX).sampling, "sampling", prefix="sampling."
    )
    try:
        WindowPlan(
            every.num_inference_steps, every.window_chunks, every.latent_chunk_size, every.context_chunks,
            context=every.context, anchor_chunks=every.anchor_chunks,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"sampling: {error}") from error


def _check_model(partial: Path, folder: Path) -> None:
    """Refuses to call a model what cannot be opened, and sampled with its own defaults; reads headers of weights.

    Args:
        partial: where it is.
        folder: where it is to be, for messages.

    Raises:
        CheckpointError: naming what is wrong.
    """
    try:
        model = Checkpoint.open(partial, quietly=True)
        model.require_weights()
        params = SamplingParams.resolve(model)
        model.check_size(params.height, params.width)
    except ConfigError as error:
        said = str(error).replace(str(partial), str(folder))
        raise CheckpointError(f"output={folder}: would be no model that can be sampled: {said}") from error


def _write(
    config: ConvertConfig, shape: Backbone, tensors: dict[str, Tensor], values: Mapping[str, Any], folder: Path
) -> int:
    """The transformer; bytes of its weights."""

    def kind(name: str, tensor: Tensor) -> torch.dtype:
        if config.dtype == "as stored" or not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if shape.keeps_float32(name) else DTYPES[config.dtype]

    converted = {name: value.to(kind(name, value)).contiguous() for name, value in tensors.items()}
    save_tensors(converted, folder, values)
    return sum(value.nbytes for value in converted.values())
