"""The components of a model that are no transformer (codec, text encoder, tokenizer, ...), for a folder beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.folders import check_only
from pavdm_dist.io.storage import same_path
from pavdm_dist.models.source import Source
from pavdm_dist.values.fields import read_object

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def copy_components(base: Source, folder: Path, replaced: Iterable[str] = ()) -> None:
    """All of the base but its transformer, its index and what is ``replaced``, into an empty folder.

    Raises:
        OSError: they cannot be read or written.
        CheckpointError: the hub does not deliver.
    """
    left_out = {"transformer", INDEX, ".git", *replaced}

    def left(place: str, names: list[str]) -> list[str]:
        # The new folder may lie in the base.
        return [name for name in names if name in left_out or same_path(os.path.join(place, name), folder.parent)]

    if base.is_folder:
        shutil.copytree(base.folder(), folder, copy_function=link_or_copy, ignore=left, dirs_exist_ok=True)
        return
    index = read_object(base.file(INDEX), CheckpointError)
    for name, value in index.items():
        is_component = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        if is_component and name not in left_out:
            shutil.copytree(base.part(name).folder(), folder / name, copy_function=link_or_copy)


def check_only_model(folder: Path, base: str | Path | None, field: str) -> None:
    """Refuses to replace a model folder that holds more than the model, and what came with the ``base`` it was made of.

    Raises:
        ConfigError: naming it; or the index cannot be read.
    """
    index = read_object(folder / INDEX, ConfigError)
    known = {INDEX, *(name for name, value in index.items() if isinstance(value, list))}
    if base is not None and os.path.isdir(base):
        known.update(os.listdir(base))
    check_only(folder, known, field, "the model")


def link_or_copy(source: str, target: str) -> str:
    """Weights are linked where the disk allows it, they may be large.

    What somebody may edit is copied: it is not to change in the base, or in the cache of the hub, too.
    """
    if Path(source).suffix in WEIGHTS:
        with suppress(OSError):
            os.link(os.path.realpath(source), target)
            return target
    return shutil.copy2(source, target)
