"""Runs trainers one after another in this process of a group, and keeps what they computed.

``python zero_program.py OUT CLIPS CASES`` with CASES = JSON of ``{name: {"settings": [...], "steps": n, ...}}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from training import start

from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config


def optimizer_bytes(trainer: Trainer) -> int:
    """Of Adam's two moments, on this process."""
    optimizer = trainer.engine.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    found = [value for state in states for value in state.values() if torch.is_tensor(value) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in found)


def shard_numbers(trainer: Trainer) -> int:
    """Numbers of all parameters that this process holds between steps."""
    return sum(getattr(value, "ds_tensor", value).numel() for value in trainer.engine.module.parameters())


def die(where: str) -> None:
    """This process is killed in the middle of the next step, or of writing its first file."""
    if where == "in a step":
        os.kill(os.getpid(), signal.SIGKILL)

    def torn(value: object, file: str, **_: object) -> None:
        Path(file).write_bytes(b"PK\x03\x04 torn")
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = torn


def run_case(case: dict[str, Any], clips: LatentClips) -> dict[str, Any]:
    trainer = start(load_config(TrainConfig, None, case["settings"]), clips)
    first = trainer.step
    metrics = [trainer.train_step() for _ in range(case["steps"])]
    if case.get("save", False):
        trainer.save()
    if torch.distributed.get_rank() == 1 and "die" in case:
        die(case["die"])
    if case.get("die") == "in a save":
        trainer.train_step()
        trainer.save()
    elif case.get("die") == "in a step":
        trainer.train_step()
    found = {
        "first_step": first,
        "loss": [line["loss"] for line in metrics],
        "grad_norm": [line["grad_norm"] for line in metrics],
        "optimizer_bytes": optimizer_bytes(trainer),
        "shard_numbers": shard_numbers(trainer),
        "tables": {name: value.clone() for name, value in trainer.engine.module.named_buffers()},
        "average_numbers": sum(part.numel() for _, part in trainer.average.parts.values()),
        "weights": trainer.whole_weights(averaged=False),
        "average": trainer.whole_weights(averaged=True),
    }
    trainer.engine.destroy()
    return found


def main(out: str, clips: str, cases: str) -> None:
    cached = LatentClips(clips)
    found = {name: run_case(case, cached) for name, case in json.loads(cases).items()}
    torch.save(found, Path(out) / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
