"""STDiT3-XL/2 at 240x424 on one GPU, random weights, bfloat16, one process, without Ray: sampling and training.

    python benchmarks/gpu.py [--quick] [--json] [--part sampling|training] [--compile] [--latents N] [--recompute R]
        [--batch N] [--peak-tflops X]

Sampling: window of 35 latents (W = 6, c = 5, one clean chunk), guidance 7, T = 30, in modes window and causal by the
engine that runs stages in one process; seconds for 425 latents (60 s of video at 24 frames per second with the 1.2
codec's stride), and FLOP of all units over time and the device's matrix peak. Training: one window of 30 latents (119
frames), loss, backward pass with recomputed blocks, AdamW and averaged weights under ZeRO stage 1; seconds per step,
peak memory, and three forward passes' FLOP over time and peak (the recomputing is not counted). --quick is a tiny model
on whatever device is there, to see that everything runs.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, machine_line, parser
from torch import Tensor

from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.stage import Stage
from pavdm_dist.merging import load_config
from pavdm_dist.method.schedule import Mode, NoiseSchedule, WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.loading import convert
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config

XL = STDiT3Config(pred_sigma=False)
TINY = STDiT3Config(depth=2, hidden_size=64, num_heads=4, caption_channels=32, model_max_length=8, pred_sigma=False)
GUIDANCE, CHUNK = 7.0, 5
MODES: tuple[Mode, ...] = ("window", "causal")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--part", choices=("sampling", "training"), help="only this one")
    options.add_argument("--latents", type=int, help="of the video (425; 15 with --quick)")
    options.add_argument("--compile", action="store_true", help="run compiled blocks")
    options.add_argument("--steps", type=int, help="training steps that are timed (5; 2 with --quick)")
    options.add_argument("--recompute", default="every:1", help="training: zero.recompute (none, every:N, budget:GiB)")
    options.add_argument("--batch", type=int, default=1, help="training: windows a step")
    options.add_argument("--peak-tflops", type=float, default=989.0, help="of dense bfloat16 products (H100 SXM: 989)")
    args = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.quick:
        raise SystemExit("benchmarks/gpu.py: there is no GPU here; --quick runs a tiny model on the CPU")
    torch.set_num_threads(args.threads)
    config, cells = (TINY, (4, 6)) if args.quick else (XL, (30, 53))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report: dict[str, Any] = {"machine": {**machine(), "device": name}, "peak_tflops": args.peak_tflops}
    if args.part != "training":
        latents = args.latents or (15 if args.quick else 425)
        report["sampling"] = {
            mode: sampling(config, cells, latents, mode, device, args.peak_tflops, args.compile) for mode in MODES
        }  # fmt: skip
    if args.part != "sampling":
        steps = args.steps or (2 if args.quick else 5)
        report["training"] = training(config, cells, steps, args.peak_tflops, args.compile, args.recompute, args.batch)
    print(json.dumps(report) if args.json else text(report))


def sampling(
    config: STDiT3Config,
    cells: tuple[int, int],
    latents: int,
    mode: Mode,
    device: torch.device,
    peak: float,
    compiled: bool,
) -> dict[str, float]:
    """Seconds of a whole video, behind a short one that warms up."""
    torch.manual_seed(0)
    with torch.device(device):
        model = STDiT3(config).eval()
    convert(model, torch.bfloat16, device, model.keeps_float32)
    if compiled:
        model.compile_repeated_blocks()
    engine = LocalEngine([Stage(model, (0, model.spec.num_blocks), device, torch.bfloat16)])
    seconds = []
    # Seven chunks: until the window is full and has its clean chunk.
    for number, chunks in enumerate((min(7, latents // CHUNK), latents // CHUNK)):
        stream = _stream(model, cells, chunks, mode, number)
        _settle(device)
        began = time.perf_counter()
        for _ in engine.run([stream]):
            pass
        _settle(device)
        seconds.append(time.perf_counter() - began)
    flop = 0.0
    for row in stream.plan.rows():
        for chunk, _ in stream.batches.parts(row.index):
            frames = CHUNK * (1 if chunk in row.window else len(row.window))
            costs = model.costs(model.grid(frames, *cells), model.spec.text_len)
            flop += stream.branches * costs.stage(0, len(costs.blocks))
    return {"seconds": seconds[1], "pflop": flop / 1e15, "share_of_peak": flop / seconds[1] / (peak * 1e12)}


def _stream(model: STDiT3, cells: tuple[int, int], chunks: int, mode: Mode, number: int) -> Stream:
    generator = torch.Generator().manual_seed(1)
    prompt, null = (torch.randn(model.spec.text_len, model.spec.text_dim, generator=generator) for _ in range(2))
    return Stream(
        id=number, plan=WindowPlan(30, 6, CHUNK, 1, num_chunks=chunks), schedule=NoiseSchedule(30), seed=0,
        latent_shape=(model.spec.latent_channels, *cells), conditioning=Conditioning.build([(0, prompt)], null),
        info=FrameInfo(8 * cells[0], 8 * cells[1], 24), guidance_scale=GUIDANCE, mode=mode,
    )  # fmt: skip


def training(
    config: STDiT3Config,
    cells: tuple[int, int],
    steps: int,
    peak: float,
    compiled: bool,
    recompute: str,
    windows: int,
) -> dict[str, float | None]:
    """Seconds of a step on windows of random latents."""
    from pavdm_dist.train.batches import Batch
    from pavdm_dist.train.export import Parts
    from pavdm_dist.train.model import Text
    from pavdm_dist.train.processes import join_world
    from pavdm_dist.train.settings import TrainConfig
    from pavdm_dist.train.trainer import Trainer

    frames, info = 30, FrameInfo(8 * cells[0], 8 * cells[1], 24)
    x, target = torch.randn(2, windows, config.in_channels, frames, *cells, generator=torch.Generator().manual_seed(0))
    words = torch.randn(windows, config.model_max_length, config.caption_channels)
    names = ["random"] * windows
    given = Text(names, words, torch.ones(windows, config.model_max_length, dtype=torch.bool))

    class Random:
        channels = config.in_channels
        held_out = None

        def __init__(self) -> None:
            self.identity: dict[str, Any] = {}

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
    }


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def text(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"])]
    for name, row in [*report.get("sampling", {}).items(), ("training", report.get("training", {}))]:
        shown = (f"{key} {value:.4g}" for key, value in row.items() if value is not None)
        lines.append(f"{name:9} " + "  ".join(shown))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
