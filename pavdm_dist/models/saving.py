"""Writes weights in the Hugging Face layout, as :mod:`pavdm_dist.models.loading` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.models.loading import WEIGHT_NAMES, Choose


def save_module(
    module: nn.Module,
    folder: str | Path,
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
    shard: str = "5GB",
    keeps_float32: Choose = lambda name: False,
) -> None:
    """Writes ``config.json`` and one safetensors file, or several of at most ``shard`` with an index; ``dtype``
    converts parameters on the way, but those of the names that ``keeps_float32`` says."""
    # Buffers are tables (rotary angles, the null text): rounding them would move every position.
    converted = {name for name, _ in module.named_parameters() if not keeps_float32(name)} if dtype else set()
    state = {
        key: value.detach().to("cpu", dtype if key in converted else value.dtype).contiguous()
        for key, value in module.state_dict().items()
    }
    save_tensors(state, folder, config, shard)


def save_tensors(
    state: Mapping[str, Tensor], folder: str | Path, config: Mapping[str, Any], shard: str = "5GB"
) -> None:
    """As :func:`save_module`, of tensors by name, as they are; two in the same memory are written as two."""
    from huggingface_hub import save_torch_state_dict

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    pattern = WEIGHT_NAMES[0].replace(".safetensors", "{suffix}.safetensors")
    save_torch_state_dict(
        _apart(state), path, filename_pattern=pattern, max_shard_size=shard, metadata={"format": "pt"}
    )
    (path / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """No two in the same memory: of those the hub's library would write one alone."""
    found, taken = dict[str, Tensor](), set[int]()
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return found
