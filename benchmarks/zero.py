"""Training under DeepSpeed ZeRO beside plain torch and DistributedDataParallel, two processes on one machine.

    python benchmarks/zero.py [--quick] [--json] [--rounds N] [--batch N]

First, at a tiny size, 20 steps of every stage against one process of plain torch: largest difference of a loss, and
the share of the optimizer's bytes that a process holds. Then step times at about 37 million parameters (bucket size
stated): DistributedDataParallel with torch's AdamW, averaged weights and the same loss, beside our trainer at stages
0 to 3, one engine of each kind alive in the same processes, taking turns; ratios are within a round. Last, how long
a step waits for its data at the embedded model's shape, from cached latents of videos made here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, machine_line, parser
from torch.nn.parallel import DistributedDataParallel

from pavdm_dist.digits.settings import VOCABULARY
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.train.batch import Batch, Batches
from pavdm_dist.train.export import Parts
from pavdm_dist.train.loss import velocity_loss
from pavdm_dist.train.model import Text, build
from pavdm_dist.train.ranks import World, free_port, join_world
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config

CHANNELS = 8
PHASES = ("forward", "backward", "optimizer", "average")
STAGES = (0, 1, 2, 3)
BUCKET = 5_000_000  # numbers per message; DistributedDataParallel's usual 25 MB are 6.5 million
TINY = ["model.depth=1", "model.hidden_size=32", "model.num_heads=4", "model.caption_channels=32"]
LARGE = ["model.depth=8", "model.hidden_size=384", "model.num_heads=6", "model.caption_channels=96"]
COMMON = [
    "threads=1", "data.batch_size=2", "data.still_batch_size=2", "optimizer.name=adamw", "optimizer.lr=1e-4",
    "optimizer.warmup_steps=1", f"zero.bucket_elements={BUCKET}", "resume=auto",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
]  # fmt: skip


class RandomBatches:
    """The same few windows of random latents again and again: reading costs nothing."""

    channels = CHANNELS

    def __init__(self, frames: int, size: int, batch: int = 2) -> None:
        self.identity: dict[str, Any] = {}
        self.held_out: Batches | None = None
        generator = torch.Generator().manual_seed(0)
        shape = (batch, CHANNELS, frames, size, size)
        self._pairs = [torch.randn(2, *shape, generator=generator) for _ in range(4)]
        self._levels = torch.linspace(0, 1, frames).expand(batch, -1)

    def batch(self, step: int, rank: int, size: int) -> Batch:
        x, target = self._pairs[step % len(self._pairs)]
        count = x.shape[0]
        text = Text(["a red three drifting up", "a blue seven"] * (count // 2))
        causal = 5 if step % 2 else None
        ids, dropped = [str(number) for number in range(count)], [False] * count
        whole = Batch(x, target, self._levels, text, dropped, 5, causal, FrameInfo(64, 64, 24), ids)
        return whole.part(slice(rank, None, size))

    def close(self) -> None:
        """Nothing is open."""


def configured(folder: str, *settings: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*COMMON, f"run_dir={folder}", *settings])


def trainer_of(stage: int, folder: str, shape: list[str], batches: RandomBatches, world: World) -> Trainer:
    config = configured(folder, f"zero.stage={stage}", *shape)
    return Trainer(config, batches, Parts(Path("unused"), None, FrameInfo(64, 64, 24), (), VOCABULARY), world)


def plain_step(config: TrainConfig, batches: RandomBatches, world: World, parallel: bool) -> Callable[..., float]:
    """One step of plain torch, alone or under DistributedDataParallel: the whole job of the trainer's step."""
    torch.manual_seed(config.seed)
    model: Any = build(config, CHANNELS, VOCABULARY).to(world.device)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    wrapped = DistributedDataParallel(model) if parallel else model
    o = config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, (o.betas[0], o.betas[1]), weight_decay=o.weight_decay)

    def step(number: int, phases: dict[str, float] | None = None) -> float:
        marks = [time.perf_counter()]
        b = batches.batch(number, world.rank, world.size) if parallel else batches.batch(number, 0, 1)
        b = b.to(world.device)
        velocity = wrapped(b.x, b.levels, b.text, b.dropped, b.info, b.chunk_causal)
        loss, *_ = velocity_loss(velocity, b.target, b.levels, b.context)
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        loss.backward()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        marks.append(time.perf_counter())
        decay = min(o.ema_decay, (2 + number) / (11 + number))
        with torch.no_grad():
            for name, value in model.named_parameters():
                average[name].lerp_(value, 1 - decay)
        marks.append(time.perf_counter())
        for phase, first, last in zip(PHASES, marks, marks[1:], strict=False):
            if phases is not None:
                phases[phase] = phases.get(phase, 0.0) + last - first
        return float(world.mean(loss.detach())) if parallel else loss.item()

    return step


def timed(owner: Any, name: str, phase: str, seconds: dict[str, float]) -> None:
    """Adds up what the calls of ``owner.name`` take."""
    plain = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began

    setattr(owner, name, call)


def optimizer_bytes(trainer: Trainer) -> int:
    """Of Adam's two moments, on this process."""
    optimizer = trainer.engine.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    found = [value for state in states for value in state.values() if torch.is_tensor(value) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in found)


def parity(folder: str, world: World) -> dict[int, dict[str, float]]:
    """20 steps of each stage against plain torch, at a tiny size."""
    batches, steps = RandomBatches(10, 4), 20
    plain = plain_step(configured(folder, *TINY), batches, world, parallel=False)
    # The trainer's rate starts with one step of warm-up and then follows the cosine; a flat one is compared here.
    flat = [*TINY, "optimizer.final_ratio=1.0"]
    expected = [plain(number) for number in range(steps)]
    found: dict[int, dict[str, float]] = {}
    full = 0
    for stage in STAGES:
        trainer = trainer_of(stage, f"{folder}/tiny{stage}", flat, batches, world)
        losses = [trainer.train_step()["loss"] for _ in range(steps)]
        full = full or optimizer_bytes(trainer)
        found[stage] = {
            "max_loss_difference": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
            "optimizer_bytes_share": optimizer_bytes(trainer) / full,
        }
        trainer.engine.destroy()
    return found


def _step(trainer: Trainer, number: int) -> dict[str, float]:
    return trainer.train_step()


def throughput(folder: str, world: World, rounds: int, steps: int, batch: int) -> dict[str, Any]:
    """Seconds per step of all kinds, taking turns."""
    batches, large = RandomBatches(10, 16, batch), [*LARGE, f"data.batch_size={batch}"]
    config = configured(folder, *large)
    phases: dict[str, dict[str, float]] = {name: {} for name in ("ddp", *map(str, STAGES))}
    plain = plain_step(config, batches, world, parallel=True)
    kinds: dict[str, Callable[[int], Any]] = {"ddp": lambda number: plain(number, phases["ddp"])}
    for stage in STAGES:
        trainer = trainer_of(stage, f"{folder}/large{stage}", large, batches, world)
        kinds[str(stage)] = partial(_step, trainer)
        calls = ((trainer.engine, "forward"), (trainer.engine, "backward"), (trainer.engine, "step"))
        for phase, (owner, name) in zip(PHASES, (*calls, (trainer.average, "update")), strict=True):
            timed(owner, name, phase, phases[str(stage)])
    numbers = sum(value.numel() for value in build(config, CHANNELS, VOCABULARY).parameters())
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):  # the first one warms up
        for name, step in kinds.items():
            took = []
            if turn == 1:
                phases[name].clear()
            for number in range(steps):
                world.wait()
                began = time.perf_counter()
                step(turn * steps + number)
                world.wait()
                took.append(time.perf_counter() - began)
            if turn:
                seconds[name].append(statistics.median(took))
    return {
        "parameters": numbers,
        "bucket_elements": BUCKET,
        "batch": batch,
        "seconds_per_step": seconds,
        "phases": {
            name: {phase: spent / (rounds * steps) for phase, spent in part.items()} for name, part in phases.items()
        },
    }


def waiting(folder: str, steps: int) -> dict[str, float]:
    """Share of a step that waits for data, at the embedded model's shape, from cached latents; in one process."""
    from pavdm_dist.train.prepared import video_data

    found = {}
    for ahead in (0, 2):
        more = [f"data.folder={folder}/data", "data.batch_size=8", f"data.prefetch={ahead}", "model.depth=4"]
        config = configured(f"{folder}/wait{ahead}", *more, "model.hidden_size=160", "model.num_heads=5")
        batches, parts = video_data(config)
        trainer = Trainer(config, batches, parts)
        waits, began = [], time.perf_counter()
        trainer.train_step()
        for _ in range(steps):
            began = time.perf_counter()
            loading = trainer.train_step()["loading_seconds"]
            waits.append(loading / (time.perf_counter() - began))
        batches.close()
        found[f"waiting_share_{ahead}_ahead"] = statistics.median(waits)
    return found


def make_videos(folder: Path, count: int) -> None:
    """Moving digits as mp4 with captions, prepared as any other videos are."""
    import numpy as np

    from pavdm_dist.data.prepare import PrepareConfig, prepare_command
    from pavdm_dist.digits.world import FPS, render, sample_scene, scene_prompt
    from pavdm_dist.io.encode import export_to_video

    videos = folder / "videos"
    videos.mkdir()
    for number in range(count):
        scene = sample_scene(np.random.default_rng((9, number)))
        export_to_video(render(scene, 0, 157), videos / f"{number}.mp4", FPS)
        (videos / f"{number}.txt").write_text(scene_prompt(scene))
    settings = PrepareConfig([str(videos)], str(folder / "data"), buckets=["64x64x40@24"], scene_cuts=False)
    prepare_command(settings)


def worker(out: str, rounds: int, steps: int, batch: int) -> None:
    torch.set_num_threads(1)
    world = join_world()
    found = {"parity": parity(out, world), "throughput": throughput(out, world, rounds, steps, batch)}
    if world.first:
        Path(out, "found.json").write_text(json.dumps(found))


def two_processes(out: str, rounds: int, steps: int, batch: int) -> dict[str, Any]:
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    command = [sys.executable, __file__, "--worker", out, str(rounds), str(steps), str(batch)]
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(2)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a process failed; its message is above")
    return json.loads(Path(out, "found.json").read_text())


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], *map(int, sys.argv[3:]))
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, help="turns that each kind takes (7; 1 with --quick)")
    options.add_argument("--steps", type=int, help="steps per turn (3; 1 with --quick)")
    options.add_argument("--batch", type=int, help="windows of a step, of both processes (4; 2 with --quick)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    facts = machine()
    with tempfile.TemporaryDirectory() as folder:
        rounds, steps, batch = (1, 1, 2) if args.quick else (7, 3, 4)
        found = two_processes(folder, args.rounds or rounds, args.steps or steps, args.batch or batch)
        make_videos(Path(folder), 4 if args.quick else 16)
        wait = waiting(folder, 4 if args.quick else 20)
    seconds, phases = (found["throughput"].pop(name) for name in ("seconds_per_step", "phases"))
    stages = {}
    for stage in map(str, STAGES):
        ratios = [ddp / own for ddp, own in zip(seconds["ddp"], seconds[stage], strict=True)]
        stages[stage] = {
            **found["parity"][stage],
            "seconds_per_step": statistics.median(seconds[stage]),
            "phases": phases[stage],
            "throughput_vs_ddp": statistics.median(ratios),
            "throughput_vs_ddp_range": [min(ratios), max(ratios)],
        }
    result = {
        "machine": facts,
        "processes": 2,
        **found["throughput"],
        "ddp_seconds_per_step": statistics.median(seconds["ddp"]),
        "ddp_phases": phases["ddp"],
        "zero_stage": stages,
        **wait,
    }
    print(json.dumps(result) if args.json else text(result))


def text(result: dict[str, Any]) -> str:
    lines = [
        machine_line(result["machine"]),
        f"{result['parameters'] / 1e6:.1f} M parameters, buckets of {result['bucket_elements'] / 1e6:g} M numbers, "
        f"{result['batch']} windows a step, DistributedDataParallel {result['ddp_seconds_per_step']:.2f} s per step",
        "stage  largest loss difference  optimizer bytes  s per step  throughput over DDP (range)",
    ]
    for stage, s in result["zero_stage"].items():
        low, high = s["throughput_vs_ddp_range"]
        lines.append(
            f"{stage:>5}  {s['max_loss_difference']:>23.1e}  {s['optimizer_bytes_share']:>15.4f}  "
            f"{s['seconds_per_step']:>10.2f}  {s['throughput_vs_ddp']:.3f} ({low:.3f} to {high:.3f})"
        )
    lines.append("mean seconds of a step: " + ", ".join(PHASES))
    for name, part in [("ddp", result["ddp_phases"]), *((k, s["phases"]) for k, s in result["zero_stage"].items())]:
        lines.append(f"{name:>5}  " + "  ".join(f"{part[phase]:.3f}" for phase in PHASES))
    for ahead in (0, 2):
        lines.append(f"waiting for data, {ahead} batches ahead: {result[f'waiting_share_{ahead}_ahead']:.4f} of a step")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
