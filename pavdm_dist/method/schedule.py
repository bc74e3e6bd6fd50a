"""The window plan: pure arithmetic, no tensors (paper section 3.1-3.3).

A chunk walks the same ``T`` levels (:mod:`pavdm_dist.method.levels`) as in ordinary diffusion; only the moments
differ between chunks. :class:`WindowPlan` says which chunks are in flight at every model call ("row"); growing at the
start and draining at the end are the ends of that list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.calls import Call, calls_of
from pavdm_dist.method.legal import check_plan

Start = Literal["noise", "chunk", "clip"]
End = Literal["drain", "cut"]
# How chunks of a window see each other: all of them, each only itself and cleaner ones, or all of them but noisier
# ones as they were a step ago.
Mode = Literal["window", "causal", "displaced"]
# What noisy chunks see of clean ones: these are in the window, or they left keys and values in a pass of their own.
Context = Literal["joint", "cached"]


@dataclass(frozen=True)
class Chunk:
    """One chunk's life.

    Attributes:
        index: 0, 1, 2, ... in time order; negative for given (already clean) input chunks, -1 the latest.
        birth: row of its first update; negative when it enters from a clip at a lower level.
        entry_steps: updates it needs from its entry until it is clean (T when born in the run).
        init: ``noise`` or ``clip`` (a noised real latent).
        role: ``emit`` or ``discard`` (only with ``end="cut"``).
    """

    index: int
    birth: int
    entry_steps: int
    init: Literal["noise", "clip"]
    role: Literal["emit", "discard"]


@dataclass(frozen=True)
class PlanRow:
    """One step of the window: its input is ``context`` (clean, t = 0) followed by ``chunks`` (noisy, cleanest first).

    ``steps_left[i]`` is the number of updates chunk ``chunks[i]`` still needs *before* this call, this one
    included. ``emits`` are the chunks that are clean and leave after the step, those that are to be kept.
    """

    index: int
    context: tuple[int, ...]
    chunks: tuple[int, ...]
    steps_left: tuple[int, ...]
    born: tuple[int, ...]
    emits: tuple[int, ...]

    @property
    def window(self) -> tuple[int, ...]:
        """All chunks the model sees, in time order."""
        return self.context + self.chunks


@dataclass(frozen=True)
class WindowPlan:
    """Which chunks are in flight at which model call (paper Alg. 1, sections 3.2-3.4).

    Attributes:
        num_inference_steps: T, updates from pure noise to clean.
        window_chunks: W, noisy chunks of a full window; divides T.
        latent_chunk_size: c, latent frames per chunk.
        context_chunks: clean chunks kept in front of the window at t = 0 (the paper uses 1). With ``context="cached"``
            the newest ones whose keys and values are kept; a call sees ``context_chunks + 1`` chunks at most, its own
            included, so that fewer noisy chunks read more clean ones.
        start: ``noise`` = from text alone; ``chunk`` = one clean chunk is given; ``clip`` = a real clip fills the
            context and slots 0..W-2, noised to the staircase.
        end: ``drain`` stops births and empties the window; ``cut`` goes on with births to the end and discards
            the chunks that are still noisy.
        num_chunks: K, new chunks to emit; None = endless.
        context: ``joint`` = clean chunks are in the window; ``cached`` = the one that has just become clean has a call
            of its own, whose keys and values later calls read.
        anchor_chunks: so many first chunks stay visible for ever, as if they came right before the others that are
            read; with ``context="cached"``.
        partitions: n, model calls that a row of a full window is cut into, each of W / n chunks of neighbouring levels;
            1 = the whole window is one (:mod:`pavdm_dist.method.calls`).
        lookahead: a call moves half of its chunks, the noisier ones, so that there are twice as many.
        block_chunks: G, neighbouring chunks that are born together, share a level and leave together; divides W. 1 as
            published; W = one block after another, behind the clean context.
    """

    num_inference_steps: int
    window_chunks: int
    latent_chunk_size: int
    context_chunks: int = 1
    start: Start = "noise"
    end: End = "drain"
    num_chunks: int | None = None
    context: Context = "joint"
    anchor_chunks: int = 0
    partitions: int = 1
    lookahead: bool = False
    block_chunks: int = 1

    def __post_init__(self) -> None:
        check_plan(self)

    @property
    def joint_context(self) -> int:
        """Clean chunks whose latents are kept: all of the context, or with a cache the one that has its call next."""
        return self.context_chunks if self.context == "joint" else 1

    @property
    def steps_per_shift(self) -> int:
        """S = T G / W, steps between two moves of the window."""
        return self.num_inference_steps // (self.window_chunks // self.block_chunks)

    @property
    def given_context(self) -> int:
        """Clean chunks the caller must give (their indices are -1, -2, ...)."""
        return {"noise": 0, "chunk": 1, "clip": self.context_chunks}[self.start]

    @property
    def given_clip(self) -> int:
        """Chunks of the caller's clip that enter noised, as chunks 0 .. W-G-1."""
        return self.window_chunks - self.block_chunks if self.start == "clip" else 0

    @property
    def is_partitioned(self) -> bool:
        """Whether a row is several model calls."""
        return self.partitions > 1 or self.lookahead

    @property
    def span(self) -> int:
        """Most chunks that a model call sees."""
        if self.context == "cached":
            return self.context_chunks + 1
        part = self.window_chunks // self.partitions
        return max(part, part // 2 + self.context_chunks) if self.lookahead else part + self.context_chunks

    @property
    def num_rows(self) -> int:
        """Steps of the window: S(W-1+K) from text or one chunk, SK from a clip.

        Raises:
            ConfigError: the plan is endless.
        """
        return self._birth(self._chunks_or_fail() - 1) + self.num_inference_steps

    @property
    def num_calls(self) -> int:
        """Model calls of one guidance branch.

        Raises:
            ConfigError: the plan is endless.
        """
        return self._calls_before(self.num_rows)

    @property
    def first_chunk_after_calls(self) -> int:
        """Model calls of one branch until the first chunk is clean: of T rows from text or one chunk, S from a clip."""
        return self._calls_before(self._birth(0) + self.num_inference_steps)

    @property
    def num_born(self) -> int:
        """Chunks that are ever in flight: K when draining, W-1 more when cut (whole blocks, and W-G more).

        Raises:
            ConfigError: the plan is endless.
        """
        chunks, block = self._chunks_or_fail(), self.block_chunks
        return chunks if self.end == "drain" else -(-chunks // block) * block + self.window_chunks - block

    @property
    def latent_evaluations(self) -> int:
        """Latent frames over all calls of one branch, context included (METHOD of cost: paper App. B)."""
        return sum(self._seen(row, steps) for row, steps in self.shifts(self.num_rows)) * self.latent_chunk_size

    def chunk(self, index: int) -> Chunk:
        """The life of chunk ``index``.

        Raises:
            IndexError: no such chunk is born in this plan.
        """
        if index < 0 or (self.num_chunks is not None and index >= self.num_born):
            raise IndexError(f"chunk {index} is not born in this plan")
        birth = self._birth(index)
        emitted = self.num_chunks is None or index < self.num_chunks
        return Chunk(
            index=index,
            birth=birth,
            entry_steps=self.num_inference_steps + min(birth, 0),
            init="clip" if birth < 0 else "noise",
            role="emit" if emitted else "discard",
        )

    def row(self, n: int) -> PlanRow:
        """Row ``n`` (0-based), computed from ``n`` alone.

        Raises:
            IndexError: ``n`` is outside the plan.
        """
        return _row(self, n)

    def rows(self, start: int = 0) -> Iterator[PlanRow]:
        """Rows from ``start`` to the end, lazily; never ends when ``num_chunks`` is None."""
        n = start
        while self.num_chunks is None or n < self.num_rows:
            yield self.row(n)
            n += 1

    def calls(self, row: PlanRow) -> tuple[Call, ...]:
        """The model calls of a partitioned row, in order of work."""
        slots = tuple((left - 1) // self.steps_per_shift for left in row.steps_left)
        return calls_of(slots, len(row.context), self.window_chunks, self.partitions, self.lookahead)

    def reads(self, row: PlanRow, clean: int | None = None) -> tuple[int, ...]:
        """Chunks of which a call reads what they left, in order of place; none with ``context="joint"``.

        Args:
            row: of the call.
            clean: the clean chunk whose own call it is, which knows of no anchor; None for the noisy chunks.
        """
        if self.context == "joint":
            return ()
        if clean is not None:
            return tuple(range(max(0, clean - self.context_chunks), clean))
        first = row.chunks[0]
        anchors = min(self.anchor_chunks, first)
        recent = min(first - anchors, self.context_chunks + 1 - len(row.chunks) - anchors)
        return (*range(anchors), *range(first - recent, first))

    def kept(self, n: int) -> tuple[int, ...]:
        """Chunks whose keys and values rows from ``n`` on read and none of them makes."""
        if self.context == "joint" or self.is_over(n):
            return ()
        newest = self.row(n).chunks[0] - 1  # which has its call at row n, where a shift begins
        recent = range(max(0, newest - self.context_chunks), newest)
        return tuple(sorted({*range(min(self.anchor_chunks, newest)), *recent}))

    def closes_shift(self, n: int) -> bool:
        """Whether the window moves after row ``n``: its front chunk, if it is old enough, is clean then."""
        return (n + 1) % self.steps_per_shift == 0

    def shifts(self, end: int) -> Iterator[tuple[PlanRow, int]]:
        """First rows of the shifts before row ``end``, one for all in the middle that are alike, and how many rows each
        stands for."""
        step, grown = self.steps_per_shift, self.window_chunks + self.joint_context
        shifts = end // step
        alike = max(1, shifts - grown - self.window_chunks)
        at = 0
        while at < shifts:
            count = alike if at == grown else 1
            yield self.row(at * step), count * step
            at += count

    def is_over(self, n: int) -> bool:
        """Whether row ``n`` is past the last one; never, while the plan is endless."""
        return self.num_chunks is not None and n >= self.num_rows

    def stopped(self, n: int) -> WindowPlan:
        """An endless plan's end, decided before row ``n``: nothing is born behind it, what is in flight ends.

        Rows up to ``n`` stay what they were. With ``end="cut"`` the chunks that are noisy then are discarded as always.
        """
        born = self.row(n).chunks[-1] + 1
        kept = born if self.end == "drain" else max(1, born - self.window_chunks + self.block_chunks)
        return replace(self, num_chunks=kept)

    def _birth(self, index: int) -> int:
        return (index - self.given_clip) // self.block_chunks * self.steps_per_shift

    def _calls_before(self, n: int) -> int:
        if not self.is_partitioned:
            return n
        return sum(len(self.calls(row)) * steps for row, steps in self.shifts(n))

    def _seen(self, row: PlanRow, steps: int) -> int:
        """Chunks that are seen by all calls of so many rows like ``row``, whole shifts."""
        if self.is_partitioned:
            return steps * sum(call.sees.stop - call.sees.start for call in self.calls(row))
        # With a cache a clean chunk has one call in all of a shift.
        alone = steps if self.context == "joint" else steps // self.steps_per_shift
        return steps * len(row.chunks) + alone * len(row.context)

    def _chunks_or_fail(self) -> int:
        if self.num_chunks is None:
            raise ConfigError("num_chunks is not set: an endless plan has no length")
        return self.num_chunks


# All that handles a micro-batch asks for its row, the one before and the one after.
@lru_cache(maxsize=256)
def _row(plan: WindowPlan, n: int) -> PlanRow:
    if n < 0 or (plan.num_chunks is not None and n >= plan.num_rows):
        raise IndexError(f"row {n} is outside the plan")
    block = plan.block_chunks
    newest = n // plan.steps_per_shift * block + plan.given_clip  # the first chunk of the newest block
    first = max(0, newest + block - plan.window_chunks)
    last = newest + block - 1
    if plan.num_chunks is not None:
        last = min(last, plan.num_born - 1)
    chunks = tuple(range(first, last + 1))
    left = tuple(plan._birth(k) + plan.num_inference_steps - n for k in chunks)
    clean = tuple(k for k, steps in zip(chunks, left, strict=True) if steps == 1)
    return PlanRow(
        index=n,
        context=tuple(range(max(first - plan.joint_context, -plan.given_context), first)),
        chunks=chunks,
        steps_left=left,
        born=tuple(range(newest, last + 1)) if n % plan.steps_per_shift == 0 else (),
        emits=clean if plan.num_chunks is None else tuple(k for k in clean if k < plan.num_chunks),
    )
