"""What a run has made, as a folder: a whole model that ``pavdm sample model=FOLDER`` takes at once, or the low-rank
changes of one (``pavdm sample model=BASE lora=[{model: FOLDER}]``)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.pretrained_text import TextOptions
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.folders import check_no_link, check_only, touches, whole_folder
from pavdm_dist.io.shipped import place_of
from pavdm_dist.io.storage import remove_staged
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.components import INDEX, check_only_model, copy_components
from pavdm_dist.models.devices import DTYPES
from pavdm_dist.models.known import ONE_LEVEL, PER_FRAME
from pavdm_dist.models.lora import FILES
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.train.lora_training import is_own_lora, save_lora
from pavdm_dist.train.model import filled
from pavdm_dist.train.objective import Objective
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.fields import read_object

# Of models that are trained from nothing, unless ``sampling`` says otherwise.
GUIDANCE = 3.0
# The pipeline of models that diffusers has none for.
_OWN = "PAVDMPipeline"
# Folders of ``run_dir`` that a run keeps what it goes on from in.
_OF_RUN = ("checkpoints", "clips", "codec", "vae")


@dataclass(frozen=True)
class Parts:
    """What a whole model needs besides the trained modules.

    Attributes:
        vae: folder of the codec.
        base: the model that codec, text encoder, tokenizer and all else are of; None when a text encoder is trained.
        info: size and rate of the videos, the defaults for sampling.
        prompts: of contact sheets.
        vocabulary: words of the text encoder that is trained along; None where none is trained.
        world_settings: of the made world that the videos show, kept with the model; empty for real video.
        quality: how good a model in a folder is, sampled on a device; None where nothing can tell.
        text: of ``base``, where its text encoder is a pretrained one.
    """

    vae: Path
    base: Source | None
    info: FrameInfo
    prompts: tuple[str, ...]
    vocabulary: tuple[str, ...] | None = None
    world_settings: dict[str, Any] = field(default_factory=dict)
    quality: Callable[[Path, torch.device], dict[str, Any]] | None = None
    text: TextOptions = field(default_factory=TextOptions)


def check_target(config: TrainConfig, folder: Path) -> None:
    """Refuses to replace what is no earlier export of such a run, or what the run reads.

    Raises:
        ConfigError: a file, a link, a folder that holds something else or more, or one that is, holds or lies in what
            the settings name, but for the run's own folder, in which it may lie beside what the run goes on from.
    """
    check_no_link(folder, "export")
    if folder.is_file():
        raise ConfigError(f"export={folder}: is a file; name a new folder, or one that holds an exported model")
    for field_name, place in _read_places(config):
        relation = touches(folder, place)
        if relation and not (field_name == "run_dir" and relation == "lies in"):  # as it does by default
            raise ConfigError(f"export={folder}: {relation} {field_name}={place}, which this run needs; name another")
    for name in _OF_RUN:
        if relation := touches(folder, Path(os.path.realpath(config.run_dir)) / name):
            raise ConfigError(
                f"export={folder}: {relation} {name} in run_dir={config.run_dir}, which the run goes on from; name"
                " another, such as model"
            )
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    is_model, is_lora = (folder / INDEX).is_file(), (folder / FILES[0]).is_file()
    found = next(folder.iterdir()).name
    if not is_model and not is_lora:
        raise ConfigError(f"export={folder}: holds {found} and no model; name a new folder")
    if config.model.lora.rank and is_model:
        raise ConfigError(f"export={folder}: holds a whole model, this run makes a LoRA; name a new folder")
    if not config.model.lora.rank and not is_model:
        raise ConfigError(f"export={folder}: holds a LoRA, this run makes a whole model; name a new folder")
    kind = "model" if is_model else "LoRA"
    if not ("training" in read_object(folder / INDEX, ConfigError) if is_model else is_own_lora(folder / FILES[0])):
        raise ConfigError(f"export={folder}: holds a {kind} that no training run has written; name a new folder")
    if is_model:
        check_only_model(folder, config.model.pretrained or config.data.model, "export")
    else:
        check_only(folder, FILES[:1], "export", "the LoRA")


def _read_places(config: TrainConfig) -> Iterator[tuple[str, Path]]:
    """Folders on this machine that a run reads or writes, by setting."""
    named = [
        ("model.pretrained", config.model.pretrained),
        ("data.model", config.data.model),
        ("codec.folder", config.codec.folder),
        ("data.text_cache", config.data.text_cache),
        *(("data.folder", place) for place in config.data.folder),
    ]
    for name, place in named:
        path = None if place is None else place_of(place)
        if path is not None and path.is_dir():
            yield name, Path(os.path.realpath(path))
    yield "run_dir", Path(os.path.realpath(config.run_dir))


def export_model(
    config: TrainConfig, weights: dict[str, Tensor], channels: int, parts: Parts, folder: Path, step: int
) -> None:
    """Writes the folder; it appears whole or not at all.

    Args:
        config: of the run.
        weights: state dict of the trained modules.
        channels: of the latents.
        parts: the other components.
        folder: where; an earlier export there is replaced.
        step: number of optimizer steps done.

    Raises:
        ConfigError: see :func:`check_target`.
        OSError: it cannot be written.
    """
    check_target(config, folder)
    with whole_folder(folder, replaces=True) as partial:
        if config.model.lora.rank:
            backbone = {name.removeprefix("transformer."): value for name, value in weights.items()}
            save_lora(backbone, config.model.lora, partial, DTYPES[config.export_dtype], step)
        else:
            _write_model(config, weights, channels, parts, partial, step)
    if Path(config.run_dir).absolute() in folder.absolute().parents:  # nobody else writes there
        remove_staged(folder)  # of processes that were killed in an export


def _write_model(
    config: TrainConfig, weights: dict[str, Tensor], channels: int, parts: Parts, folder: Path, step: int
) -> None:
    model, dtype = filled(config, channels, parts.vocabulary, weights), DTYPES[config.export_dtype]
    if parts.base is not None:
        copy_components(parts.base, folder)
        index = read_object(parts.base.file(INDEX), CheckpointError)
    else:
        assert model.text_encoder is not None
        model.text_encoder.save_pretrained(folder / "text_encoder", dtype)
        shutil.copytree(parts.vae, folder / "vae")
        index = {"vae": ["diffusers", "AutoencoderKLWan"], "text_encoder": ["pavdm_dist", "WordTextEncoder"]}
    model.transformer.save_pretrained(folder / "transformer", dtype)
    is_own = isinstance(model.transformer, STDiT3)
    pipeline = _OWN if is_own else index.get("_class_name", _OWN)
    index |= {
        "_class_name": PER_FRAME if pipeline in ONE_LEVEL else pipeline,
        "transformer": [
            "pavdm_dist" if is_own else "diffusers",
            load_config(folder / "transformer")["_class_name"],
        ],
        "sampling": sampling_defaults(config, asdict(parts.info)),
        "training": {"steps": step, "world": parts.world_settings},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def sampled_as(objective: Objective) -> dict[str, Any]:
    """Defaults for sampling: as was trained."""
    return {
        "num_inference_steps": objective.num_inference_steps,
        "window_chunks": objective.window_chunks,
        "latent_chunk_size": objective.latent_chunk_size,
        "context_chunks": objective.context_chunks,
        "time_shift": objective.time_shift,
    }


def sampling_defaults(config: TrainConfig, size: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults for sampling: as was trained, at that ``size`` and rate, with what the model trained from says of
    guidance and prompts, and what the settings say over all of it."""
    kept = dict[str, Any](guidance_scale=GUIDANCE)
    if config.model.pretrained is not None:
        defaults = Checkpoint.open(config.model.pretrained).defaults
        kept = {"guidance_scale": defaults.guidance_scale}
        kept |= {"prompt_suffix": defaults.prompt_suffix} if defaults.prompt_suffix else {}
    return {**sampled_as(config.objective.most()), **kept, **size, **config.sampling}
