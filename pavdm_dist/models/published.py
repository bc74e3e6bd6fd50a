"""Files of weights as authors publish them (``.pt``, ``.pth``, ``.ckpt``, ``.bin``, ``.safetensors``), under any of the
names that :mod:`pavdm_dist.models.original_names` knows. Nothing in them is run: they may hold tensors alone."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pavdm_dist.errors import CheckpointError, first_line
from pavdm_dist.io.folders import without_hidden
from pavdm_dist.models.loading import read_index
from pavdm_dist.models.original_names import diffusers_names

# Which of several sets of weights in a file is meant, the first that is there. A critic makes no videos.
SETS = ("generator_ema", "generator", "state_dict", "model", "module")
NOT_SAMPLED = ("critic", "optimizer")
# Of the set that is no variant, in diffusers' words and in transformers'.
_INDEXES = ("diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json")
# What torch raises of a file that is damaged, or none of its own.
_DAMAGED = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError,
)  # fmt: skip


def read_published(file: Path, chosen: str | None = None) -> dict[str, Tensor]:
    """A file's tensors by diffusers' names, on the CPU; of most files nothing is read before it is used.

    Args:
        file: which; or a folder, for the ``.safetensors`` that its index names, or all in it where it has no index.
        chosen: one of several sets of weights in it, as a training program saves them; None takes the first of
            ``SETS``, or the file itself where it holds tensors alone.

    Raises:
        CheckpointError: no such file or set, one that holds more than tensors, or a folder with several sets.
    """
    if not file.exists():
        raise CheckpointError(f"source={file}: no such file")
    if file.is_dir() or file.suffix == ".safetensors":
        if chosen is not None:
            raise CheckpointError(f"weights={chosen}: {file} holds one set of tensors; leave it out")
        tensors: Mapping[str, Any] = _of_folder(file) if file.is_dir() else _safe(file)
    else:
        tensors = _chosen(_unpickled(file), chosen, file)
    strange = next((repr(name) for name in tensors if not isinstance(name, str)), None)
    strange = strange or next((name for name, value in tensors.items() if not isinstance(value, Tensor)), None)
    if strange is not None or not tensors:
        raise CheckpointError(f"{file}: {strange} is no tensor" if strange is not None else f"{file} holds no tensors")
    return {name: tensors[stored] for name, stored in diffusers_names(tensors).items()}


def _of_folder(folder: Path) -> dict[str, Tensor]:
    """What one set of files holds: publishers put a half-precision one, or one of averages, beside it."""
    indexes = without_hidden(folder.glob("*.safetensors.index.json"))
    plain = [index for index in indexes if index.name in _INDEXES]
    indexes = plain if len(plain) == 1 else indexes  # beside that of a variant, such as model.fp16.safetensors
    if len(indexes) > 1:
        raise CheckpointError(f"source={folder}: {indexes[0].name} and {indexes[1].name} are two sets; leave one there")
    if indexes:
        return _indexed(indexes[0])
    tensors, files = dict[str, Tensor](), dict[str, Path]()
    for file in without_hidden(folder.glob("*.safetensors")):
        for name, value in _safe(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"source={folder}: {files[name].name} and {file.name} both hold tensor {name}; name the file that"
                    " is meant"
                )
            tensors[name], files[name] = value, file
    return tensors


def _indexed(index: Path) -> dict[str, Tensor]:
    placed, tensors = read_index(index), dict[str, Tensor]()
    for file in sorted(set(placed.values())):
        if not (index.parent / file).exists():
            raise CheckpointError(f"{index.parent / file} is named by {index.name} but missing")
        tensors |= {name: value for name, value in _safe(index.parent / file).items() if placed.get(name) == file}
    absent = next((name for name in placed if name not in tensors), None)
    if absent is not None:
        raise CheckpointError(f"{index.parent / placed[absent]} lacks tensor {absent}, which the index places there")
    return tensors


def _chosen(content: Any, chosen: str | None, file: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, weights by name are expected")
    sets = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
    if chosen is None and not sets:
        return content
    usable = [name for name in sets if name not in NOT_SAMPLED]
    name = chosen or next((name for name in SETS if name in usable), None)
    if name not in usable:
        what = f"weights={chosen}: " if chosen else ""
        raise CheckpointError(
            f"{what}{file} holds {', '.join(sets) or 'tensors alone'}; name one that samples with weights=NAME"
            if usable
            else f"{what}{file} holds {', '.join(sets) or 'tensors alone'}, no set that samples"
        )
    return content[name]


def _unpickled(file: Path) -> Any:
    try:
        try:
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # a file of torch before 1.6, which cannot be mapped
            return torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise CheckpointError(
            f"{file} is not read: it is damaged, or holds more than tensors, which could run code ({first_line(error)})"
        ) from error


def _safe(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own Rust-side type for a broken header
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
