"""A tiny training run: its settings, its cached clips, and processes that train together."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from forked import Program
from safetensors.torch import save_file

from pavdm_dist.digits.batches import INFO, DigitBatches
from pavdm_dist.digits.cache import LatentClips, cache_clips
from pavdm_dist.digits.settings import SHIPPED, VOCABULARY, WORLD_SETTINGS, DigitWorld
from pavdm_dist.train.export import Parts
from pavdm_dist.train.loss import velocity_loss
from pavdm_dist.train.model import build
from pavdm_dist.train.ranks import free_port
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config

TINY = [
    "threads=1", "data.clips=32", "data.num_latents=10", "data.batch_size=2",
    "model.depth=1", "model.hidden_size=16", "model.num_heads=2", "model.caption_channels=16", "model.text_depth=1",
    "objective.num_inference_steps=6", "objective.window_chunks=3", "objective.latent_chunk_size=2",
    "optimizer.total_steps=8", "optimizer.warmup_steps=2", "optimizer.lr=0.01", "log_every_steps=1",
]  # fmt: skip


def start(
    config: TrainConfig,
    clips: LatentClips,
    codec: Path = Path("unused"),
    prompts: tuple[str, ...] = (),
    world: DigitWorld = SHIPPED,
) -> Trainer:
    """A trainer on moving digits."""
    batches = DigitBatches(clips, config.objective, config.data, config.seed, world)
    return Trainer(config, batches, Parts(codec, None, INFO, prompts, VOCABULARY, WORLD_SETTINGS))


def environments(size: int, **more: str) -> list[dict[str, str]]:
    """What torchrun sets for each of ``size`` processes; ``more`` variables."""
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(sys.path),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **more,
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def processes_of(arguments: list[str], size: int = 2, **more: str) -> list[Program]:
    """``size`` processes of a program, set up as torchrun does; ``more`` environment."""
    return [Program(arguments, environment) for environment in environments(size, **more)]


def launch(arguments: list[str], size: int = 2, timeout: float = 200, **more: str) -> list[str]:
    """What the processes printed; all must end well."""
    processes = processes_of(arguments, size, **more)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-3000:] for text in outputs)
    return outputs


def tiny_codec(folder: Path) -> None:
    """An untrained codec of four channels."""
    from pavdm_dist.codecs.wan import WanCodec
    from pavdm_dist.digits.clip_vae import build_vae, public_vae

    torch.manual_seed(0)
    WanCodec(public_vae(build_vae(4, 4, (1, 1, 1)))).save_pretrained(folder)


def prepare_run(folder: Path) -> Path:
    """``folder`` with a codec and cached clips, as a run that starts with training the model finds it."""
    tiny_codec(folder / "vae")
    cache_clips(folder / "vae", folder / "clips", 32, 10, max_seconds=100)
    return folder


def write_clips(folder: Path, clips: int) -> Path:
    """``folder`` with one shard of random latents ``[clips, 4, 10, 4, 4]``; prompts of one and of two digits."""
    folder.mkdir(parents=True, exist_ok=True)
    latents = torch.randn(clips, 4, 10, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    prompts = ["a red three drifting up", "a blue seven bouncing fast, a cyan one bouncing"] * (clips // 2)
    save_file({"latents": latents}, folder / "clips-00000.safetensors", {"prompts": json.dumps(prompts)})
    return folder


def plain_torch(clips: LatentClips, settings: list[str], steps: int) -> dict[str, Any]:
    """The same training without DeepSpeed, sharding, accumulation or our trainer."""
    config = load_config(TrainConfig, None, settings)
    batches = DigitBatches(clips, config.objective, config.data, config.seed)
    torch.manual_seed(config.seed)
    model, o = build(config, batches.channels, VOCABULARY), config.optimizer
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, o.lr, (o.betas[0], o.betas[1]), weight_decay=o.weight_decay)
    average = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    losses, norms = [], []
    for step in range(steps):
        warm = (step + 1) / o.warmup_steps
        done = (step - o.warmup_steps) / (o.total_steps - o.warmup_steps)
        cosine = o.final_ratio + (1 - o.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = o.lr * (warm if step < o.warmup_steps else cosine)
        b = batches.batch(step, 0, 1)
        velocity = model(b.x, b.levels, b.text, b.dropped, b.info, b.chunk_causal)
        loss, *_ = velocity_loss(velocity, b.target, b.levels, b.context)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip)))
        optimizer.step()
        losses.append(loss.item())
        decay = min(o.ema_decay, (2 + step) / (11 + step))
        for name, value in average.items():
            value.lerp_(model.get_parameter(name).detach(), 1 - decay)
    weights = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return {"loss": losses, "grad_norm": norms, "weights": weights, "average": average}
