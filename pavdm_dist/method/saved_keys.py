"""Keys and values that clean chunks left, as resume points hold them: tensors by guidance branch, chunk and block."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.models.clean_memory import CleanMemory
from pavdm_dist.models.kv_cache import Memory


def newly_left(memories: Sequence[Memory | None]) -> dict[str, Tensor]:
    """As :func:`left_tensors`, in main memory."""
    return {name: part.cpu() for name, part in left_tensors(memories).items()}


def left_tensors(memories: Sequence[Memory | None]) -> dict[str, Tensor]:
    """What clean chunks left since the last call, ``[1, heads, tokens, head_dim]`` each, where it is."""
    return {
        f"{branch}.{chunk}.{block}.{kind}": part
        for branch, memory in enumerate(memories)
        if isinstance(memory, CleanMemory)
        for (chunk, block), pair in memory.take_new().items()
        for kind, part in zip("kv", pair, strict=True)
    }


def of_chunks(saved: Mapping[str, Tensor], chunks: Collection[int]) -> dict[str, Tensor]:
    """What is saved of these chunks."""
    return {name: tensor for name, tensor in saved.items() if _chunk(name) in chunks}


def chunks_in(saved: Mapping[str, Tensor]) -> frozenset[int]:
    """The chunks of which something is saved."""
    return frozenset(map(_chunk, saved))


def put_back(
    memories: Sequence[Memory | None],
    saved: Mapping[str, Tensor],
    chunks: Sequence[int],
    blocks: Sequence[int],
    device: torch.device | str,
) -> None:
    """Lets a stream's memories hold what ``chunks`` left in ``blocks``, those that mix frames.

    Raises:
        ConfigError: not all of it is saved.
    """
    for branch, memory in enumerate(memories):
        if not isinstance(memory, CleanMemory):
            continue
        for chunk in chunks:
            for block in blocks:
                names = [f"{branch}.{chunk}.{block}.{kind}" for kind in "kv"]
                if not all(name in saved for name in names):
                    raise ConfigError(
                        f"the video cannot go on from its latents alone: keys and values that chunk {chunk} left with"
                        f" context=cached are not saved for block {block}, nor are clean latents to make them again;"
                        " begin it anew"
                    )
                key, value = (saved[name].to(device) for name in names)
                memory.hold(chunk, block, (key, value))


def _chunk(name: str) -> int:
    return int(name.split(".")[1])
