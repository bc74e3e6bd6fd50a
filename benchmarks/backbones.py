"""SkyReels-V2 by diffusers' own long-video sampler and by this package, with the same random weights: CPU time.

    python benchmarks/backbones.py [--quick] [--json] [--rounds N]

257 frames (65 latents of 16 x 16), 30 steps, chunks of 5 latents, no guidance, latents only, float32. In every round
each variant makes the whole video in turn; ratios are taken within a round. Diffusers' pipeline imports transformers.

``async`` is diffusers' with ``ar_step=5`` and chunk-causal attention, windows of 97 frames that overlap by 17, ``sync``
with all latents of a window at one level; ``window`` and ``causal`` are this package's modes with 5 chunks and a clean
one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, machine_line, parser
from torch import Tensor

from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.skyreels_v2 import SkyReelsV2, SkyReelsV2Config

FRAMES, LATENTS, CHUNK, STEPS = 257, 65, 5, 30
CELLS = 16
PLAN = WindowPlan(STEPS, 5, CHUNK, context_chunks=1, num_chunks=LATENTS // CHUNK)
VARIANTS = ("async", "sync", "window", "causal")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, help="rounds to take medians over (3; 1 with --quick)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    heads, layers = (4, 2) if arguments.quick else (8, 6)
    config = SkyReelsV2Config(
        num_attention_heads=heads, attention_head_dim=24, ffn_dim=140 * heads, num_layers=layers, text_dim=64,
        text_len=32, inject_sample_info=True,
    )  # fmt: skip
    report = measure(config, arguments.rounds or (1 if arguments.quick else 3))
    print(json.dumps(report) if arguments.json else table(report))


def measure(config: SkyReelsV2Config, rounds: int) -> dict[str, Any]:
    """Makes the video with every variant ``rounds`` times."""
    torch.manual_seed(0)
    model = SkyReelsV2(config).eval().requires_grad_(False)
    text = torch.randn(1, config.text_len, config.text_dim)
    runs: dict[str, Callable[[], tuple[int, int, Tensor]]] = {
        "async": lambda: by_diffusers(model, text, ar_step=5, causal_block_size=CHUNK),
        "sync": lambda: by_diffusers(model, text, ar_step=0, causal_block_size=1),
        "window": lambda: by_package(model, text[0], "window"),
        "causal": lambda: by_package(model, text[0], "causal"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, tuple[int, int]] = {}
    for turn in range(rounds):
        for name in VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]:
            before = time.process_time()
            *counted, latents = runs[name]()
            seconds[name].append(time.process_time() - before)
            calls[name] = counted[0], counted[1]
            assert latents.shape[-3] == LATENTS and latents.isfinite().all()
    return {
        "machine": machine(),
        "shape": {"width": config.width, "layers": config.num_layers, "cells": CELLS, "frames": FRAMES},
        "rounds": rounds,
        "calls": {name: count for name, (count, _) in calls.items()},
        "latent_evaluations": {name: count for name, (_, count) in calls.items()},
        "cpu_seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "frames_per_cpu_second": {name: round(FRAMES / statistics.median(times), 2) for name, times in seconds.items()},
        "speed_over_async": {
            name: round(statistics.median(a / b for a, b in zip(seconds["async"], times, strict=True)), 3)
            for name, times in seconds.items()
        },
    }


def by_package(model: SkyReelsV2, text: Tensor, mode: Mode) -> tuple[int, int, Tensor]:
    """Model calls, latents in them, and the video's latents ``[C, N, h, w]``."""
    stream = Stream(
        id=0, plan=PLAN, schedule=NoiseSchedule(STEPS, 8.0), seed=0,
        latent_shape=(model.config.in_channels, CELLS, CELLS), conditioning=Conditioning.build([(0, text)], None),
        info=FrameInfo(8 * CELLS, 8 * CELLS, 24), guidance_scale=1.0, given={}, mode=mode,
    )  # fmt: skip
    seen: list[int] = []
    embed = model.embed

    def counting(x: Tensor, levels: Tensor, info: FrameInfo) -> Any:
        seen.append(x.shape[2])
        return embed(x, levels, info)

    model.embed = counting  # type: ignore[method-assign]
    try:
        chunks = [clean.latents for clean in sample(stream.window(), StreamDenoiser(model, stream), 1.0)]
    finally:
        del model.embed
    return len(seen), sum(seen), torch.cat(chunks, dim=-3)


def by_diffusers(model: SkyReelsV2, text: Tensor, **settings: int) -> tuple[int, int, Tensor]:
    """As :func:`by_package`, by diffusers' pipeline around diffusers' own transformer with these weights."""
    from diffusers import AutoencoderKLWan, SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler

    peer, seen = model.of_diffusers().eval().requires_grad_(False), list[int]()
    peer.load_state_dict(model.state_dict(), assign=True)
    forward = peer.forward

    def counting(**inputs: Any) -> Any:
        seen.append(inputs["hidden_states"].shape[2])
        return forward(**inputs)

    peer.forward = counting
    vae = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    pipeline = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, transformer=peer, vae=vae,
        scheduler=UniPCMultistepScheduler(flow_shift=8, use_flow_sigmas=True, prediction_type="flow_prediction"),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        prompt=None, prompt_embeds=text, guidance_scale=1.0, height=8 * CELLS, width=8 * CELLS, num_frames=FRAMES,
        base_num_frames=97, overlap_history=17, addnoise_condition=20, num_inference_steps=STEPS, output_type="latent",
        generator=torch.Generator().manual_seed(0), **settings,
    )  # fmt: skip
    return len(seen), sum(seen), found.frames[0]


def table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), f"{report['shape']}, {report['rounds']} round(s)"]
    columns = ("calls", "latent_evaluations", "cpu_seconds", "frames_per_cpu_second", "speed_over_async")
    lines.append("".join(f"{name:>24}" for name in ("", *columns)))
    for variant in VARIANTS:
        lines.append(f"{variant:>24}" + "".join(f"{report[column][variant]:>24}" for column in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
