"""What the measurements share: the machine's facts, the command line, and one stream of a chosen shape."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import torch

from pavdm_dist.io.metadata import cpu_model
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options that every script has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="smaller shape, fewer repetitions: under a minute")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--threads", type=int, default=1, help="intra-op threads (1)")
    return made


def machine() -> dict[str, Any]:
    """CPU model, cores, load at the time of asking, and torch; every figure is to be read beside them."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_1_min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def machine_line(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def small_config(depth: int, hidden: int, heads: int, text_dim: int, text_tokens: int) -> STDiT3Config:
    """The measured backbone's shape: eight latent channels, no learned variance."""
    return STDiT3Config(
        depth=depth,
        hidden_size=hidden,
        num_heads=heads,
        in_channels=8,
        caption_channels=text_dim,
        model_max_length=text_tokens,
        pred_sigma=False,
    )


def random_model(config: STDiT3Config) -> STDiT3:
    """An untrained model: PyTorch's own initial weights, so that no branch is silent."""
    torch.manual_seed(0)
    return STDiT3(config).eval().requires_grad_(False)


def endless_stream(model: STDiT3, plan: WindowPlan, height: int, width: int, guidance_scale: float = 4.0) -> Stream:
    """One prompt, one null text and random input latents of ``height x width`` for a plan.

    Args:
        model: its config gives channels and the texts' size.
        plan: rows to follow.
        height, width: of the latents.
    """
    generator = torch.Generator().manual_seed(1)
    config = model.config
    prompt, null = torch.randn(2, config.model_max_length, config.caption_channels, generator=generator)
    shape = (config.in_channels, height, width)
    given = {
        index: torch.randn(shape[0], plan.latent_chunk_size, height, width, generator=generator)
        for index in range(-plan.given_context, plan.given_clip)
    }
    return Stream(
        id=0,
        plan=plan,
        schedule=NoiseSchedule(plan.num_inference_steps, 1.7),
        seed=0,
        latent_shape=shape,
        conditioning=Conditioning.build([(0, prompt)], null),
        info=FrameInfo(8 * height, 8 * width, 24),
        guidance_scale=guidance_scale,
        given=given,
    )
