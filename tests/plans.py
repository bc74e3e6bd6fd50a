"""Window plans that several test files share: the paper's worked configurations and a strategy over all legal plans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.window import chunk_noise

# A: one latent per chunk, no clean context. B: the paper's Open-Sora setting. M: the paper's second model.
A = WindowPlan(30, 30, 1, context_chunks=0, start="noise", num_chunks=84)
B = WindowPlan(30, 6, 5, context_chunks=1, start="chunk", num_chunks=84)
M = WindowPlan(50, 10, 5, context_chunks=1, start="chunk", num_chunks=84)


def many(examples: int) -> settings:
    """Hypothesis settings of a test that tries ``examples`` cases, the same ones at every run."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


@st.composite
def legal_plans(draw: st.DrawFn, max_window: int = 8, max_shift: int = 5, max_chunks: int = 12) -> WindowPlan:
    """Any legal plan of a finite length; small numbers, but every start, end and context, and K below W."""
    width = draw(st.integers(1, max_window))
    start = draw(st.sampled_from(["noise", "chunk", "clip"]))
    return WindowPlan(
        num_inference_steps=width * draw(st.integers(1, max_shift)),
        window_chunks=width,
        latent_chunk_size=draw(st.integers(1, 3)),
        context_chunks=draw(st.integers(1 if start == "chunk" else 0, 3)),
        start=start,
        end=draw(st.sampled_from(["drain", "cut"])),
        num_chunks=draw(st.integers(1, max_chunks)),
    )


def simulate(plan: WindowPlan) -> Iterator[PlanRow]:
    """The paper's Algorithm 1 as a queue that is pushed and popped: no formula for any row."""
    assert plan.num_chunks is not None
    queue: list[list[int]] = []  # [chunk, updates left], cleanest first
    to_be_born = plan.num_chunks + (plan.window_chunks - 1 if plan.end == "cut" else 0)
    clean = {"noise": [], "chunk": [-1], "clip": list(range(-plan.context_chunks, 0))}[plan.start]
    shift = plan.num_inference_steps // plan.window_chunks
    if plan.start == "clip":
        queue = [[k, (k + 1) * shift] for k in range(min(plan.window_chunks - 1, to_be_born))]
    next_chunk, emitted, n = len(queue), 0, 0
    while emitted < plan.num_chunks:
        born: tuple[int, ...] = ()
        if n % shift == 0 and next_chunk < to_be_born:
            queue.append([next_chunk, plan.num_inference_steps])
            born, next_chunk = (next_chunk,), next_chunk + 1
        context = clean[max(0, len(clean) - plan.context_chunks) :]
        chunks, left = zip(*queue, strict=True)
        emits: tuple[int, ...] = ()
        for entry in queue:
            entry[1] -= 1
        if queue[0][1] == 0:
            emits = (queue.pop(0)[0],)
            clean += emits
            emitted += 1
        yield PlanRow(n, tuple(context), chunks, left, born, emits)
        n += 1


def endless(plan: WindowPlan) -> WindowPlan:
    return replace(plan, num_chunks=None)


def given_latents(plan: WindowPlan, seed: int = 7, shape: tuple[int, int, int] = (2, 2, 3)) -> dict[int, Tensor]:
    """Clean latents for everything the plan's start asks for; ``shape`` is ``(C, h, w)``."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape[0], plan.latent_chunk_size, *shape[1:])
    return {k: torch.randn(size, generator=generator) for k in range(-plan.given_context, plan.given_clip)}


class CountedNoise:
    """Birth noise by chunk index that remembers the order in which chunks asked for theirs."""

    def __init__(self, plan: WindowPlan, seed: int = 0, shape: tuple[int, int, int] = (2, 2, 3)) -> None:
        self.shape = (shape[0], plan.latent_chunk_size, *shape[1:])
        self.seed = seed
        self.drawn: list[int] = []

    def __call__(self, index: int) -> Tensor:
        self.drawn.append(index)
        return chunk_noise(self.seed, index, self.shape)
