"""Which window plans there can be, and what is said of others: the field, its value, the nearest legal ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.calls import check_partitions, named

if TYPE_CHECKING:
    from pavdm_dist.method.schedule import WindowPlan


def check_plan(plan: WindowPlan) -> None:
    """Refuses a plan that cannot be.

    Raises:
        ConfigError: naming the first of what is wrong.
    """
    steps, width, block = plan.num_inference_steps, plan.window_chunks, plan.block_chunks
    for name in ("num_inference_steps", "window_chunks", "latent_chunk_size"):
        check_whole(name, getattr(plan, name))
    if block < 1 or width % block:
        raise ConfigError(f"block_chunks={block}: must divide window_chunks={width}")
    blocks = width // block
    if steps % blocks:
        legal = [block * near for near in _nearest_divisors(steps, blocks)]
        multiples = sorted({max(steps // blocks, 1) * blocks, (steps // blocks + 1) * blocks})
        raise ConfigError(
            f"window_chunks={width} does not divide num_inference_steps={steps}: use window_chunks "
            f"{_join(legal)}, or num_inference_steps {_join(multiples)}"
        )
    if plan.context_chunks < 0:
        raise ConfigError(f"context_chunks={plan.context_chunks}: 0 or more")
    if plan.start not in ("noise", "chunk", "clip"):
        raise ConfigError(f"start={plan.start!r}: must be noise, chunk or clip")
    if plan.end not in ("drain", "cut"):
        raise ConfigError(f"end={plan.end!r}: must be drain or cut")
    if plan.start == "chunk" and plan.context_chunks == 0:
        raise ConfigError("start=chunk needs context_chunks of at least 1: the given chunk is the context")
    if plan.num_chunks is not None and plan.num_chunks < 1:
        raise ConfigError(f"num_chunks={plan.num_chunks}: at least 1 is needed")
    check_partitions(width, plan.partitions, plan.lookahead)
    if block > 1 and plan.is_partitioned:
        raise ConfigError(
            f"{named(plan.partitions, plan.lookahead)}: chunks of a block have one level, there is nothing to part; use"
            " partitions=1, lookahead=false"
        )
    _check_context(plan)


def _check_context(plan: WindowPlan) -> None:
    if plan.context not in ("joint", "cached"):
        raise ConfigError(f"context={plan.context!r}: must be joint or cached")
    if plan.anchor_chunks < 0:
        raise ConfigError(f"anchor_chunks={plan.anchor_chunks}: 0 or more")
    if plan.context == "joint":
        if plan.anchor_chunks:
            raise ConfigError(f"anchor_chunks={plan.anchor_chunks}: context=joint keeps none; set context=cached")
        return
    if plan.is_partitioned:
        raise ConfigError(
            f"{named(plan.partitions, plan.lookahead)}: with context=cached a row is one call; use partitions=1,"
            " lookahead=false"
        )
    if plan.block_chunks > 1:
        raise ConfigError(
            f"context=cached: blocks of {plan.block_chunks} chunks read clean ones in the window; set context=joint"
        )
    if plan.start != "noise":
        raise ConfigError(f"context=cached: start={plan.start} gives chunks that left no keys; set start=noise")
    least = max(1, plan.window_chunks - 1 + plan.anchor_chunks)
    if plan.context_chunks < least:
        raise ConfigError(
            f"context_chunks={plan.context_chunks}: with context=cached a call sees context_chunks + 1 chunks,"
            f" window_chunks={plan.window_chunks} and anchor_chunks={plan.anchor_chunks} among them; use {least} or"
            " more"
        )


def check_whole(name: str, value: object) -> None:
    """Refuses what is no whole number above 0.

    Raises:
        ConfigError: naming it.
    """
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name}={value}: at least 1 is needed, and a whole number")


def _nearest_divisors(number: int, near: int) -> list[int]:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < near][-1:]
    return below + [d for d in divisors if d > near][:1]


def _join(values: list[int]) -> str:
    return " or ".join(str(v) for v in values)
