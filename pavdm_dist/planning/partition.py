"""Which blocks go to which stage: contiguous ranges with the slowest stage as fast as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

from pavdm_dist.errors import ConfigError
from pavdm_dist.models.base import BackboneSpec, Grid


@dataclass(frozen=True)
class Costs:
    """Cost of one micro-batch, in any one unit (FLOP or seconds).

    ``codec`` is what decoding adds per micro-batch to the last stage when the decoder shares its device.
    """

    blocks: tuple[float, ...]
    embed: float = 0.0
    head: float = 0.0
    codec: float = 0.0

    def stage(self, first: int, last: int) -> float:
        """Cost of the stage that runs blocks ``first .. last - 1``."""
        cost = sum(self.blocks[first:last])
        cost += self.embed if first == 0 else 0.0
        return cost + (self.head + self.codec if last == len(self.blocks) else 0.0)


def estimate_costs(spec: BackboneSpec, grid: Grid, text_len: int) -> Costs:
    """FLOP of every STDiT half-block, embed and head for one window; two per multiply-add."""
    dim, frames, patches = spec.hidden_size, grid.frames, grid.tokens_per_frame
    tokens = frames * patches
    dense = tokens * dim * dim * (8 + 4 + 16)  # self-attention, cross-attention (q, out), MLP of ratio 4
    cross = 4 * tokens * text_len * dim
    spatial, temporal = (dense + cross + 4 * tokens * span * dim for span in (patches, frames))
    patch_values = spec.latent_channels * spec.patch[1] * spec.patch[2]
    embed = 2 * tokens * patch_values * dim + 2 * frames * dim * (256 + 7 * dim)
    head = 2 * tokens * dim * 2 * patch_values
    return Costs(tuple(temporal if i % 2 else spatial for i in range(spec.num_blocks)), embed, head)


def partition(costs: Costs, num_stages: int, layers_per_stage: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Block ranges ``(first, last)`` of the stages, with the smallest possible slowest stage.

    Args:
        costs: per block, embed, head (and codec where it shares the last stage's device).
        num_stages: P, at most the number of blocks.
        layers_per_stage: blocks per stage, chosen by the user; overrides the balance.

    Raises:
        ConfigError: more stages than blocks, or ``layers_per_stage`` does not add up.
    """
    count = len(costs.blocks)
    if not 1 <= num_stages <= count:
        raise ConfigError(f"num_stages={num_stages}: the model has {count} half-blocks, use 1 to {count} stages")
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
    return replace(costs, codec=codec)
