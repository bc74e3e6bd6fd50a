"""Which chunks a model call sees where a row is several calls: partitions and lookahead of FIFO-Diffusion.

A model that never met different levels in one window is asked for chunks of neighbouring levels alone (FIFO-Diffusion,
arXiv 2405.11473, sections 4.2 and 4.3). There a queue of n f latents at as many levels loses one latent a step; here
the queue is the window of W chunks, f is W / n of them, and S = T / W steps lie between two shifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pavdm_dist.errors import ConfigError


@dataclass(frozen=True)
class Call:
    """One model call of a row.

    Attributes:
        sees: places in the row's window of the chunks that it is given.
        moves: so many of them, the last ones, take the step; those before are looked at, as they were before the row.
    """

    sees: slice
    moves: int


def named(partitions: int, lookahead: bool) -> str:
    """The setting that makes several calls of a row, for a message."""
    return "lookahead=true" if lookahead else f"partitions={partitions}"


def check_partitions(window_chunks: int, partitions: int, lookahead: bool) -> None:
    """Refuses partitions that are no equal parts of a window.

    Raises:
        ConfigError: naming the nearest legal values.
    """
    if type(partitions) is not int or partitions < 1:
        raise ConfigError(f"partitions={partitions}: at least 1 is needed, and a whole number")
    if type(lookahead) is not bool:
        raise ConfigError(f"lookahead={lookahead!r}: must be true or false")
    legal = [n for n in range(1, window_chunks + 1) if window_chunks % n == 0]
    if lookahead:
        legal = [n for n in legal if window_chunks // n % 2 == 0]
        if not legal:
            near = [even for even in (window_chunks - 1, window_chunks + 1) if even]
            raise ConfigError(
                f"lookahead=true: a call denoises half of its chunks, and window_chunks={window_chunks} has no halves;"
                f" use window_chunks {' or '.join(map(str, near))}"
            )
    if partitions in legal:
        return
    below, above = [n for n in legal if n < partitions][-1:], [n for n in legal if n > partitions][:1]
    why = "into parts of an even number of chunks (lookahead=true)" if lookahead else "into equal parts"
    raise ConfigError(
        f"partitions={partitions} does not cut window_chunks={window_chunks} {why}: use partitions"
        f" {' or '.join(map(str, below + above))}"
    )


@lru_cache(maxsize=4096)  # rows of a video are alike but for the number of their chunks
def calls_of(
    slots: tuple[int, ...], context: int, window_chunks: int, partitions: int, lookahead: bool
) -> tuple[Call, ...]:
    """A row's calls in order of work, the noisiest chunks first: what a call looks at has not moved yet.

    A partition is W / n neighbouring slots of the full window, whichever of them are taken: growing and draining
    windows have fewer calls, and no call ever sees a wider range of levels. With lookahead a call moves half a
    partition and looks at the half before. The cleanest chunks' call is given the clean ones, too.

    Args:
        slots: of the noisy chunks, rising by one: 0 is the one that becomes clean next, W - 1 the newborn one.
        context: clean chunks in front of them.
        window_chunks: W.
        partitions: n.
        lookahead: see above.
    """
    size = window_chunks // partitions // (2 if lookahead else 1)
    starts = [place for place, slot in enumerate(slots) if place == 0 or slot % size == 0]
    ends = [*starts[1:], len(slots)]
    calls = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        seen_from = start if number else -context
        if number and lookahead:
            seen_from = starts[number - 1]
        calls.append(Call(slice(context + seen_from, context + end), end - start))
    return tuple(reversed(calls))
