"""The part of `gpu.py` that trains: seconds of a step on windows of random latents, memory, share of the peak."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import kernels_of
from torch import Tensor

from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3Config
from pavdm_dist.values.merging import load_config


def training(
    config: STDiT3Config,
    cells: tuple[int, int],
    steps: int,
    peak: float,
    compiled: bool,
    recompute: str,
    windows: int,
) -> dict[str, Any]:
    """Seconds of a step on windows of random latents, and of its phases, where each is waited for; kernels' time."""
    from pavdm_dist.train.batch import Batch, Batches
    from pavdm_dist.train.export import Parts
    from pavdm_dist.train.model import Text
    from pavdm_dist.train.ranks import join_world
    from pavdm_dist.train.train_settings import TrainConfig
    from pavdm_dist.train.trainer import Trainer

    frames, info = 30, FrameInfo(8 * cells[0], 8 * cells[1], 24)
    x, target = torch.randn(2, windows, config.in_channels, frames, *cells, generator=torch.Generator().manual_seed(0))
    words = torch.randn(windows, config.model_max_length, config.caption_channels)
    names = ["random"] * windows
    given = Text(names, words, torch.ones(windows, config.model_max_length, dtype=torch.bool))

    class Random:
        channels = config.in_channels

        def __init__(self) -> None:
            self.identity: dict[str, Any] = {}
            self.held_out: Batches | None = None

        def batch(self, step: int, rank: int, size: int) -> Batch:
            return Batch(x, target, levels(), given, [False] * windows, 5, None, info, names)

        def close(self) -> None:
            """Nothing is open."""

    def levels() -> Tensor:
        return torch.linspace(0, 1, frames).expand(windows, -1)

    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run_dir={folder}", "data.folder=random", f"data.batch_size={windows}", "threads=1",
            "optimizer.name=adamw",
            f"model.depth={config.depth}", f"model.hidden_size={config.hidden_size}",
            f"model.num_heads={config.num_heads}", f"model.caption_channels={config.caption_channels}",
            f"model.model_max_length={config.model_max_length}", "zero.stage=1", "zero.precision=bfloat16",
            f"zero.recompute={recompute}", f"compile={compiled}",
        ]  # fmt: skip
        world = join_world()
        parts = Parts(Path("unused"), None, info, ())
        trainer = Trainer(load_config(TrainConfig, None, settings), Random(), parts, world)
        took = []
        for _ in range(steps + 2):
            _settle(world.device)
            began = time.perf_counter()
            trainer.train_step(trainer.load())  # as a run does: nothing waits for the device
            _settle(world.device)
            took.append(time.perf_counter() - began)
        phases = _phases(trainer, max(1, steps // 2))
        cuda = world.device.type == "cuda"
        kernels = kernels_of(lambda: trainer.train_step(trainer.load()), lambda: 1) if cuda else {}
        model = trainer.engine.module.transformer
        costs = model.costs(model.grid(frames, *cells), model.spec.text_len)
    seconds = statistics.median(took[2:])
    flop = 3 * windows * costs.stage(0, len(costs.blocks))
    memory = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else None
    return {
        "seconds_per_step": seconds,
        "pflop": flop / 1e15,
        "share_of_peak": flop / seconds / (peak * 1e12),
        "peak_memory_gib": memory,
        "phases": phases,
        **kernels,
    }


def _phases(trainer: Any, steps: int) -> dict[str, float]:
    """Median seconds of a step's parts."""
    device, took = trainer.world.device, defaultdict[str, list[float]](list)
    owners = {"forward": trainer.engine, "backward": trainer.engine, "step": trainer.engine, "update": trainer.average}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            _settle(device)
            began = time.perf_counter()
            found = call(*given)
            _settle(device)
            took[name].append(time.perf_counter() - began)
            return found

        return run

    for name, owner in owners.items():
        setattr(owner, name, timed(name, getattr(owner, name)))
    for _ in range(steps):
        trainer.train_step(trainer.load())
    for name, owner in owners.items():
        delattr(owner, name)  # the method of its class again
    return {name: statistics.median(times) for name, times in took.items()}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
