"""Which blocks go to which stage: contiguous ranges with the slowest stage as fast as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise

from pavdm_dist.errors import ConfigError
from pavdm_dist.models.base import Costs


def partition(costs: Costs, num_stages: int, layers_per_stage: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Block ranges ``(first, last)`` of the stages, with the smallest possible slowest stage.

    Args:
        costs: of a micro-batch.
        num_stages: P, at most the number of blocks.
        layers_per_stage: blocks per stage, chosen by the user; overrides the balance.

    Raises:
        ConfigError: more stages than blocks, or ``layers_per_stage`` does not add up.
    """
    count = len(costs.blocks)
    if not 1 <= num_stages <= count:
        raise ConfigError(f"num_stages={num_stages}: the model has {count} blocks, use 1 to {count} stages")
    if layers_per_stage is not None:
        sizes = list(layers_per_stage)
        if len(sizes) != num_stages or sum(sizes) != count or min(sizes) < 1:
            raise ConfigError(
                f"layers_per_stage={sizes}: needs num_stages={num_stages} positive numbers that add up to {count}"
            )
        return list(pairwise([0, *accumulate(sizes)]))

    @cache
    def best(first: int, stages: int) -> tuple[float, float, tuple[int, ...]]:
        """(slowest stage, sum of squares, ends) for blocks ``first ..`` on ``stages`` stages.

        Where one stage cannot be helped, the squares keep the others even.
        """
        if stages == 1:
            cost = costs.stage(first, count)
            return cost, cost**2, (count,)
        options = []
        for last in range(first + 1, count - stages + 2):
            cost = costs.stage(first, last)
            slowest, squares, ends = best(last, stages - 1)
            options.append((max(cost, slowest), cost**2 + squares, (last, *ends)))
        return min(options)

    return list(pairwise([0, *best(0, num_stages)[2]]))


def with_codec(costs: Costs, codec: float) -> Costs:
    """The same costs with a decoder on the last stage's device."""
    return replace(costs, head=costs.head + codec)
