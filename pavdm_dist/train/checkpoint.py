"""Checkpoints of a training run that cannot tear, and the export of its averaged weights.

DeepSpeed names a checkpoint ``latest`` before it is complete; here a checkpoint appears under its name in one
rename after everything is written, and only then does ``latest`` point to it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.errors import CheckpointError, ConfigError

LATEST = "latest"
IDENTITY = "identity.json"
KEEP = 2


class Average:
    """Exponential moving average of a module's parameters, float32.

    Args:
        module: whose parameters are followed.
        decay: weight of the past; smaller in the first steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {name: parameter.detach().float().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the parameters after one optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in module.named_parameters():
            self.values[name].lerp_(parameter.detach().float(), 1 - decay)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"steps": self.steps, "values": self.values}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.steps = state["steps"]
        for name, value in state["values"].items():
            self.values[name].copy_(value)


def save(engine: Any, root: str | Path, step: int, identity: Mapping[str, Any], client_state: dict[str, Any]) -> None:
    """Writes checkpoint ``step`` under a temporary name, publishes it, and drops all but the last two.

    Args:
        engine: the DeepSpeed engine.
        root: folder of checkpoints.
        step: number of optimizer steps done.
        identity: settings (parts of names and values) that :func:`load` insists on.
        client_state: what :func:`load` returns.
    """
    folder = Path(root)
    tag, partial = f"step{step:07d}", f"step{step:07d}.partial"
    if (folder / tag).exists():  # nothing happened since
        return
    engine.save_checkpoint(str(folder), tag=partial, client_state=client_state, save_latest=False)
    if torch.distributed.get_rank() == 0:
        _publish(folder, tag, partial, identity)
    torch.distributed.barrier()


def _publish(folder: Path, tag: str, partial: str, identity: Mapping[str, Any]) -> None:
    (folder / partial / IDENTITY).write_text(json.dumps(identity))
    os.replace(folder / partial, folder / tag)
    pointer = folder / f"{LATEST}.partial"
    with open(pointer, "w") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointer, folder / LATEST)
    kept = sorted(path for path in folder.glob("step*") if path.suffix != ".partial")
    for old in [*kept[:-KEEP], *folder.glob("*.partial")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def load(engine: Any, root: str | Path, identity: Mapping[str, Any], resume: str) -> dict[str, Any] | None:
    """Goes on from the newest checkpoint.

    Args:
        engine: the DeepSpeed engine to fill.
        root: folder of checkpoints.
        identity: settings that must equal the checkpoint's.
        resume: ``auto`` starts afresh where there is none, ``must`` refuses to, ``never`` refuses to go on.

    Returns:
        The client state, or None for a fresh start.

    Raises:
        ConfigError: nothing to resume, or something that must not be; another world, model or objective.
        CheckpointError: the newest checkpoint cannot be read.
    """
    pointer = Path(root) / LATEST
    if not pointer.exists():
        if resume == "must":
            raise ConfigError(f"resume=must: {root} holds no checkpoint; resume=auto starts afresh")
        return None
    if resume == "never":
        raise ConfigError(f"resume=never: {root} holds a checkpoint; choose another run_dir or resume=auto")
    tag = pointer.read_text().strip()
    try:
        theirs = json.loads((Path(root) / tag / IDENTITY).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{root}/{tag} is incomplete: {error}") from error
    for part, values in json.loads(json.dumps(identity)).items():
        for name, value in values.items():
            found = theirs.get(part, {}).get(name)
            if found != value:
                raise ConfigError(f"{root} was trained with {part}.{name}={found}, this run has {value}")
    path, state = engine.load_checkpoint(str(root), tag=tag)
    if path is None:
        raise CheckpointError(f"{root}/{tag} could not be loaded")
    return state


def averaged(module: nn.Module, average: Average) -> dict[str, Tensor]:
    """State dict of ``module`` with averaged parameters and its own buffers."""
    return {**module.state_dict(), **average.values}
