"""Weights in the Hugging Face layout: one safetensors file or a sharded set with an index.

Only the wanted tensors are read, and every one is copied into memory that torch owns: a view into a mapped
file may be misaligned, which changes the last bits of some products.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pavdm_dist.errors import CheckpointError
from pavdm_dist.models.lora import Changes, changes_of
from pavdm_dist.models.original_names import diffusers_names
from pavdm_dist.models.source import Source
from pavdm_dist.values.fields import made, read_object

WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
# Element types by their name in a file's header.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Place = str | Path | Source
Choose = Callable[[str], bool]


@dataclass(frozen=True)
class Stored:
    """What a file's header says of a tensor: its shape and the name of its element type (``F32``, ``BF16``, ...)."""

    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: the name of its file, and its own name in there."""

    file: str
    name: str


def tensor_files(source: Place) -> dict[str, str]:
    """Tensor name (:func:`~pavdm_dist.models.original_names.diffusers_names`) -> the file of ``source`` that holds it.

    Raises:
        CheckpointError: no weight file, or a shard named by the index is missing.
    """
    return {key: place.file for key, place in _places(Source.of(source)).items()}


def _places(source: Source) -> dict[str, _Place]:
    """As :func:`tensor_files`, with the name a tensor has in its file."""
    files = _stored_files(source)
    return {key: _Place(files[stored], stored) for key, stored in diffusers_names(files).items()}


def _stored_files(source: Source) -> dict[str, str]:
    """A tensor's name in its file -> the file."""
    name, is_index = _weights(source)
    if name is None:
        if source.offline:
            raise CheckpointError(f"{source}: a file of weights is {source.offline}")
        names = " or ".join(WEIGHT_NAMES)
        raise CheckpointError(f"{source} has no weights: expected {names} (or their .index.json)")
    if not is_index:
        return dict.fromkeys(_header(source, name), name)
    index = source.file(name)
    files = read_index(index)
    for file in set(files.values()) if source.is_folder else ():
        if source.find(file) is None:
            raise CheckpointError(f"{source}/{file} is named by {index.name} but missing")
    return files


def read_index(index: Path) -> dict[str, str]:
    """A tensor's name in its file -> the name of the file, which lies beside the index.

    Raises:
        CheckpointError: no index, or one that names other places.
    """
    values = read_object(index, CheckpointError)
    files = made(_Index, values, index, ignore_unknown=True, error=CheckpointError).weight_map
    for key, file in files.items():
        if file in ("", "..") or Path(file).name != file:
            raise CheckpointError(f"{index}: {key} is placed in {file!r}, which is no name of a file beside it")
    return files


def weight_files(source: Place) -> set[str]:
    """Names of the files that hold the weights, and of the index of several.

    Raises:
        CheckpointError: as :func:`tensor_files`.
    """
    source = Source.of(source)
    name, is_index = _weights(source)
    return {*tensor_files(source).values(), *([name] if is_index and name is not None else [])}


def has_weights(source: Place) -> bool:
    """Whether there are weights, or a shape only."""
    return _weights(Source.of(source))[0] is not None


def stored_tensors(source: Place, want: Choose | None = None) -> dict[str, Stored]:
    """What the files' headers say of the wanted tensors; of files on the hub nothing else is read."""
    source, found = Source.of(source), dict[str, Stored]()
    for file, keys in _by_file(source, want).items():
        header = _header(source, file)
        _check_index(source, file, keys, header)
        found.update({key: header[stored] for key, stored in keys.items()})
    return found


def stored_dtype(source: Place) -> torch.dtype:
    """The type that most of the numbers in the files have: bfloat16, float16, or else (and where there are no files)
    float32."""
    sizes = Counter[str]()
    for tensor in stored_tensors(source).values() if has_weights(source) else ():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return _DTYPES.get(max(sizes, key=lambda name: sizes[name], default=""), torch.float32)


def read_tensors(
    source: Place,
    want: Choose | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keeps_float32: Choose | None = None,
    changes: Iterable[Changes] = (),
) -> dict[str, Tensor]:
    """The wanted tensors as copies in torch's own memory; only files that hold one are opened, or fetched.

    Args:
        source: a component.
        want: which names; None = all.
        dtype: what they are converted to, one by one.
        device: where they are put; nothing else of a file passes through main memory.
        keeps_float32: names that are float32 whatever ``dtype`` is.
        changes: what is added to them before they are converted.
    """
    source, device, found = Source.of(source), _exact(device), dict[str, Tensor]()
    for file, keys in _by_file(source, want).items():
        with _open(source.file(file), str(device)) as reader:
            _check_index(source, file, keys, reader.keys())
            for key, stored in keys.items():
                kind = torch.float32 if keeps_float32 is not None and keeps_float32(key) else dtype
                tensor = reader.get_tensor(stored)
                for change in changes:
                    tensor = change.added(key, tensor)
                found[key] = tensor.to(kind, copy=device.type == "cpu")
    return found


def read_tensor(source: Place, name: str) -> Tensor:
    """One tensor, float32, on the CPU; on the hub its bytes alone are fetched.

    Raises:
        CheckpointError: there is none of that name.
    """
    source = Source.of(source)
    place = _places(source).get(name)
    if place is None:
        raise CheckpointError(f"{source} lacks tensor {name}")
    file = place.file
    if source.cached(file) is not None:
        return read_tensors(source, lambda key: key == name)[name]
    info = source.header(file)[place.name]
    if info.dtype not in _DTYPES:
        raise CheckpointError(f"{source}: tensor {name} is {info.dtype}, it must be one of {', '.join(_DTYPES)}")
    # Behind the header, whose length is the file's first number.
    first = 8 + int.from_bytes(source.read(file, 0, 8), "little") + info.data_offsets[0]
    data = bytearray(source.read(file, first, info.data_offsets[1] - info.data_offsets[0]))
    return torch.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(info.shape).to(torch.float32, copy=True)


def load_module(
    module: nn.Module,
    source: Place,
    want: Choose | None = None,
    optional: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keeps_float32: Choose | None = None,
) -> None:
    """Fills ``module`` (built on the meta device) with the wanted tensors.

    Args:
        module: what to fill; tensors that are not wanted stay as they are.
        source: component, see :func:`read_tensors` for this and what is not said here.
        want: which names; None = all.
        optional: values for names a checkpoint may lack (tables that can be computed).
        dtype, device, keeps_float32: what they become.

    Raises:
        CheckpointError: naming the first tensor that is missing, has the wrong size or is unknown.
    """
    source, state = Source.of(source), module.state_dict()
    check_tensors(state, source, want, optional or ())
    tensors = read_tensors(source, want, dtype, device, keeps_float32, changes_of(source, state))
    for key, value in (optional or {}).items():
        tensors.setdefault(key, value.to(device, copy=True))
    module.load_state_dict(tensors, strict=False, assign=True)
    module.requires_grad_(False)


def check_tensors(
    expected: Mapping[str, Tensor], source: Place, want: Choose | None = None, optional: Iterable[str] = ()
) -> None:
    """Compares names, sizes and types with the files' headers, so that a wrong checkpoint is refused before it is read.

    Raises:
        CheckpointError: naming the first tensor that is missing, has the wrong size or type, or is unknown.
    """
    source = Source.of(source)
    wanted = {key: value for key, value in expected.items() if want is None or want(key)}
    check_stored(wanted, stored_tensors(source, want), source, optional)


def check_stored(
    expected: Mapping[str, Tensor], stored: Mapping[str, Stored], where: object, optional: Iterable[str] = ()
) -> None:
    """As :func:`check_tensors`, for what files at ``where`` are known to hold."""
    for key, value in expected.items():
        shape, found = list(value.shape), stored.get(key)
        if found is None and key not in optional:
            raise CheckpointError(f"{where} lacks tensor {key} of shape {shape}")
        if found is not None and found.shape != shape:
            raise CheckpointError(f"{where}: tensor {key} is {found.shape}, the model needs {shape}")
        if found is not None and found.dtype not in _DTYPES:
            raise CheckpointError(f"{where}: tensor {key} is {found.dtype}, it must be one of {', '.join(_DTYPES)}")
    unknown = sorted(set(stored) - set(expected))
    if unknown:
        raise CheckpointError(f"{where}: tensor {unknown[0]} ({len(unknown)} in all) is not part of this model")


def as_stored(tensor: Tensor) -> Stored:
    """What a file's header would say of a tensor."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return Stored(list(tensor.shape), names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")))


def convert(module: nn.Module, dtype: torch.dtype, device: torch.device | str, keeps_float32: Choose) -> None:
    """Another type and device for a module that is loaded, or was made, in float32."""
    state = module.state_dict()
    moved = {key: value.to(device, torch.float32 if keeps_float32(key) else dtype) for key, value in state.items()}
    module.load_state_dict(moved, assign=True)
    module.requires_grad_(False)


def _weights(source: Source) -> tuple[str | None, bool]:
    """Name of the weight file, or of the index of several, if any; whether it is an index."""
    for name in WEIGHT_NAMES:
        for candidate, is_index in ((f"{name}.index.json", True), (name, False)):
            # On the hub an index is fetched here, it is small; a weight file is only looked for.
            if (source.find(candidate) is not None) if is_index else source.has(candidate):
                return candidate, is_index
    return None, False


def _by_file(source: Source, want: Choose | None) -> dict[str, dict[str, str]]:
    """The wanted tensors of each file, with their names in there."""
    by_file: dict[str, dict[str, str]] = {}
    for key, place in _places(source).items():
        if want is None or want(key):
            by_file.setdefault(place.file, {})[key] = place.name
    return by_file


def _check_index(source: Source, file: str, keys: Mapping[str, str], stored: Iterable[str]) -> None:
    absent = sorted(set(keys.values()) - set(stored))
    if absent:
        raise CheckpointError(f"{source}/{file} lacks tensor {absent[0]}, which the index places there")


def _header(source: Source, file: str) -> dict[str, Stored]:
    path = source.cached(file)
    if path is None:
        return {key: Stored(list(info.shape), info.dtype) for key, info in source.header(file).items()}
    with _open(path, "cpu") as reader:
        parts = {key: reader.get_slice(key) for key in reader.keys()}  # noqa: SIM118
        return {key: Stored(list(part.get_shape()), part.get_dtype()) for key, part in parts.items()}


def _exact(device: torch.device | str) -> torch.device:
    """With its number: files are opened for one GPU, not for the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _open(file: Path, device: str) -> Any:
    try:
        return safe_open(file, framework="pt", device=device)
    except Exception as error:  # safetensors raises its own Rust-side type for a broken header
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
