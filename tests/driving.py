"""A stream through the driver and stages in this process, with something done at its chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import tiny_model

from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Finished, Grown
from pavdm_dist.engine.local import LocalGang
from pavdm_dist.engine.stage import Stage
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk

CUTS = ([(0, 4)], [(0, 1), (1, 3), (3, 4)])


def local_gang(blocks: list[tuple[int, int]]) -> LocalGang:
    return LocalGang([Stage(tiny_model(), cut) for cut in blocks])


def driven(
    stream: Stream, blocks: list[tuple[int, int]], at: Callable[[Driver, Finished], None] | None = None
) -> list[Finished]:
    """All that stages give of a stream; ``at`` is called with every chunk."""
    driver, found = Driver(local_gang(blocks)), list[Finished]()
    driver.submit(stream)
    while not driver.idle:
        for output in driver.step(0.0):
            assert isinstance(output, Finished | Grown)
            if isinstance(output, Finished):
                found.append(output)
                if at is not None:
                    at(driver, output)
    return found


def equal(one: list[Finished], other: list[CleanChunk]) -> bool:
    """Whether latents are the same bits."""
    return len(one) == len(other) and all(
        torch.equal(a.clean.latents, b.latents) for a, b in zip(one, other, strict=True)
    )
