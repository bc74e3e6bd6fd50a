"""Weights in the Hugging Face layout: ``config.json`` and one safetensors file or a sharded set with an index.

Only the wanted tensors are read, and every one is copied into memory that torch owns: a view into a mapped
file may be misaligned, which changes the last bits of some products.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pavdm_dist.errors import CheckpointError

T = TypeVar("T")

WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def local_folder(folder: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The folder itself, or a hub id's snapshot in the local cache.

    Raises:
        CheckpointError: neither a folder nor something the hub can deliver.
    """
    path = Path(folder)
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
            path = Path(snapshot_download(str(folder), allow_patterns=patterns, **hub))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"model={str(folder)!r} is no folder here and no hub id: {reason}") from error
    path = path / subfolder if subfolder else path
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist in the checkpoint")
    return path


def load_config(folder: str | Path, **hub: Any) -> dict[str, Any]:
    """``config.json`` of a component folder.

    Raises:
        CheckpointError: missing or not JSON.
    """
    path = local_folder(folder, **hub) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a model folder") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it.

    Raises:
        CheckpointError: no weight file, or a shard named by the index is missing.
    """
    for name in WEIGHT_NAMES:
        index = folder / f"{name}.index.json"
        if index.exists():
            try:
                files = {key: folder / file for key, file in json.loads(index.read_text())["weight_map"].items()}
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is not a weight index: {error!r}") from error
            for file in set(files.values()):
                if not file.exists():
                    raise CheckpointError(f"{file} is named by {index.name} but missing")
            return files
        if (folder / name).exists():
            with _open(folder / name) as reader:
                return dict.fromkeys(reader.keys(), folder / name)
    raise CheckpointError(f"{folder} has no weights: expected {' or '.join(WEIGHT_NAMES)} (or their .index.json)")


def read_tensors(folder: Path, want: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The wanted tensors as float32 copies in torch's own memory; only files that hold one are opened."""
    return _read(folder, want, lambda reader, key: reader.get_tensor(key).to(torch.float32, copy=True))


def tensor_shapes(folder: Path, want: Callable[[str], bool] | None = None) -> dict[str, list[int]]:
    """Shapes of the wanted tensors, from the files' headers."""
    return _read(folder, want, lambda reader, key: list(reader.get_slice(key).get_shape()))


def _read(folder: Path, want: Callable[[str], bool] | None, take: Callable[[Any, str], T]) -> dict[str, T]:
    by_file: dict[Path, list[str]] = {}
    for key, file in tensor_files(folder).items():
        if want is None or want(key):
            by_file.setdefault(file, []).append(key)
    found = {}
    for file, keys in by_file.items():
        with _open(file) as reader:
            absent = sorted(set(keys) - set(reader.keys()))
            if absent:
                raise CheckpointError(f"{file} lacks tensor {absent[0]}, which the index places there")
            found.update({key: take(reader, key) for key in keys})
    return found


def load_module(
    module: nn.Module,
    folder: str | Path,
    want: Callable[[str], bool] | None = None,
    optional: Mapping[str, Tensor] | None = None,
    **hub: Any,
) -> None:
    """Fills ``module`` (built on the meta device) with the wanted tensors, float32.

    Args:
        module: what to fill; tensors that are not wanted stay as they are.
        folder: component folder or hub id.
        want: which names; None = all.
        optional: values for names a checkpoint may lack (tables that can be computed).

    Raises:
        CheckpointError: naming the first tensor that is missing, has the wrong size or is unknown.
    """
    path = local_folder(folder, **hub)
    check_module(module, path, want, optional or ())
    tensors = read_tensors(path, want)
    for key, value in (optional or {}).items():
        tensors.setdefault(key, value.clone())
    module.load_state_dict(tensors, strict=False, assign=True)
    module.requires_grad_(False)


def check_module(
    module: nn.Module,
    folder: str | Path,
    want: Callable[[str], bool] | None = None,
    optional: Iterable[str] = (),
    **hub: Any,
) -> None:
    """Compares names and sizes with the files' headers, so that a wrong checkpoint is refused before it is read.

    Raises:
        CheckpointError: naming the first tensor that is missing, has the wrong size or is unknown.
    """
    path = local_folder(folder, **hub)
    found = tensor_shapes(path, want)
    expected = {key: list(value.shape) for key, value in module.state_dict().items() if want is None or want(key)}
    for key, shape in expected.items():
        if key not in found and key not in optional:
            raise CheckpointError(f"{path} lacks tensor {key} of shape {shape}")
        if found.get(key, shape) != shape:
            raise CheckpointError(f"{path}: tensor {key} is {found[key]}, the model needs {shape}")
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise CheckpointError(f"{path}: tensor {unknown[0]} ({len(unknown)} in all) is not part of this model")


def save_module(
    module: nn.Module, folder: str | Path, config: Mapping[str, Any], dtype: torch.dtype | None, shard: str = "5GB"
) -> None:
    """Writes ``config.json`` and one safetensors file, or several of at most ``shard`` with an index."""
    from huggingface_hub import save_torch_state_dict

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # Buffers are tables (rotary angles, the null text): rounding them would move every position.
    converted = {name for name, _ in module.named_parameters()} if dtype else set()
    state = {
        key: value.detach().to("cpu", dtype if key in converted else value.dtype).contiguous()
        for key, value in module.state_dict().items()
    }
    pattern = WEIGHT_NAMES[0].replace(".safetensors", "{suffix}.safetensors")
    save_torch_state_dict(state, path, filename_pattern=pattern, max_shard_size=shard, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except Exception as error:  # safetensors raises its own Rust-side type for a broken header
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
