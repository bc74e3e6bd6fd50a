"""The moving average of the weights, sharded as ZeRO shards the float32 masters.

Each process averages the part of every parameter whose master it holds, so the average costs no communication and
1/N of its memory, and equals that of one process: averaging is element by element. Files name parameters and places
in them, so that any number of processes can read what any other wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pavdm_dist.errors import CheckpointError
from pavdm_dist.train.ranks import World
from pavdm_dist.train.zero import is_sharded, local_part, readable, stays, whole_shape

FILE = "average-{rank:05d}-of-{size:05d}.safetensors"


class Average:
    """Exponential moving average of a module's trained parameters, float32.

    Args:
        module: whose parameters are followed.
        decay: weight of the past; smaller in the first steps.
        device: where it is kept; None = where the masters are.
    """

    def __init__(self, module: nn.Module, decay: float, device: torch.device | None = None) -> None:
        self.decay, self.steps = decay, 0
        self.parts: dict[str, tuple[int, Tensor]] = {}
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
        for name, parameter in _trained(module):
            start, part = local_part(parameter)
            self.parts[name] = (start, part.detach().float().clone().to(device or part.device))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the parameters after one optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        mine, masters = self._pairs or self._paired(module)
        now = [part.to(own.device, torch.float32) for own, part in zip(mine, masters, strict=True)]
        # All at once: one by one they are hundreds of kernels, each over few numbers.
        torch._foreach_lerp_(mine, now, 1 - decay)

    def _paired(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The averaged parts and views of the masters; looked up once where these stay in place, which takes a host as
        long as a GPU takes to average them."""
        trained = list(_trained(module))
        pairs = [self.parts[name][1] for name, _ in trained], [local_part(parameter)[1] for _, parameter in trained]
        if all(stays(parameter) for _, parameter in trained):
            self._pairs = pairs
        return pairs

    def save(self, folder: Path, rank: int, size: int) -> None:
        """Writes this process' parts."""
        starts = {name: start for name, (start, _) in self.parts.items()}
        tensors = {name: part.cpu() for name, (_, part) in self.parts.items()}
        meta = {"starts": json.dumps(starts), "steps": str(self.steps)}
        save_file(tensors, folder / FILE.format(rank=rank, size=size), metadata=meta)

    def restore(self, folder: Path) -> None:
        """Reads this process' parts from whatever files there are.

        Raises:
            CheckpointError: some part is in none of them.
        """
        missing = {name: part.numel() for name, (_, part) in self.parts.items()}
        for file in sorted(folder.glob("average-*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                meta = reader.metadata()
                self.steps = int(meta["steps"])
                for name, theirs in json.loads(meta["starts"]).items():
                    missing[name] -= self._take(name, theirs, reader.get_slice(name))
            if not any(count > 0 for count in missing.values()):
                return
        lost = next((name for name, count in missing.items() if count > 0), None)
        if lost is not None:
            raise CheckpointError(f"{folder} lacks a part of the averaged {lost}")

    def _take(self, name: str, theirs: int, stored: Any) -> int:
        start, part = self.parts[name]
        first, last = max(start, theirs), min(start + part.numel(), theirs + stored.get_shape()[0])
        if first >= last:
            return 0
        part[first - start : last - start] = stored[first - theirs : last - theirs]
        return last - first


def whole_tensors(
    module: nn.Module, world: World, average: Average | None = None, keep: bool = True, frozen: bool = True
) -> dict[str, Tensor]:
    """A state dict of whole tensors in main memory: averaged or current float32 parameters, and the buffers.

    Every process must call it.

    Args:
        module: the trained module.
        world: all processes.
        average: None = the current weights.
        keep: False on processes that only take part; they get an empty dict.
        frozen: whether parameters that are not trained are among them.
    """
    found = {name: value.detach().cpu().clone() for name, value in module.named_buffers()}
    for name, value in module.named_parameters() if frozen else ():
        if not value.requires_grad:
            with readable([value]):
                if keep:
                    found[name] = value.detach().cpu().clone()
    for name, parameter in _trained(module):
        start, part = local_part(parameter) if average is None else average.parts[name]
        shape = whole_shape(parameter)
        if not is_sharded(parameter):
            whole = part.float()
        else:
            whole = torch.zeros(shape.numel(), device=world.device)
            whole[start : start + part.numel()] = part
            torch.distributed.all_reduce(whole)  # the others hold zeros there: exact
        if keep:
            found[name] = whole.cpu().clone().view(shape)
    return found if keep else {}


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
