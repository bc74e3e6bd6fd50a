"""Streams of the few-level staircase that several test files share, and a tiny model for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from wan_models import INFO, WAN, random, tiny_wan

from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream

ROLLING = WindowPlan(5, 5, 3, 6, context="cached", anchor_chunks=1)
LONG = WindowPlan(4, 4, 3, 6, context="cached", anchor_chunks=1)
FORCING = WindowPlan(4, 1, 3, 6, context="cached")
# Two steps a shift, two anchors.
OTHER = WindowPlan(6, 3, 3, 5, context="cached", anchor_chunks=2)
PLANS, NAMES = (ROLLING, LONG, FORCING, OTHER), ("rolling", "long", "forcing", "other")
FEW, FOUR = NoiseSchedule(5, 5.0), NoiseSchedule(4, 5.0)
CUTS = [[(0, 4)], [(0, 1), (1, 4)], [(0, 1), (1, 3), (3, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]]
MODEL = tiny_wan(config=replace(WAN, num_layers=4))


def of(plan: WindowPlan, chunks: int | None) -> WindowPlan:
    return replace(plan, num_chunks=chunks)


def video(plan: WindowPlan, chunks: int | None, number: int = 0, **fields: Any) -> Stream:
    """Of a tiny picture, under two prompts."""
    texts = [random(length, 12, seed=number + length) for length in (3, 5)]
    return Stream(
        number, of(plan, chunks), NoiseSchedule(plan.num_inference_steps, 5.0), 3 + number, (4, 4, 4),
        Conditioning.build([(0, texts[0]), (2, texts[1])], None), INFO, step="renoise", **fields,
    )  # fmt: skip


def latents_of(stream: Stream) -> list[Tensor]:
    return [clean.latents for clean in sample(stream.window(), StreamDenoiser(MODEL, stream))]
