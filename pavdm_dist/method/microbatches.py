"""How a stream's rows are cut into micro-batches: pure arithmetic, shared by sampler, stages, order and simulator."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.calls import named
from pavdm_dist.method.schedule import Mode, PlanRow, WindowPlan

# The "chunk" of a micro-batch that is a whole window: of all its noisy chunks, where context is cached.
WHOLE = -(2**31)
# Steps per shift from which adaptive re-sync can be decided before the rows it concerns are handed out, which the
# distributed engine does in groups.
LEAST_ADAPTIVE_STEPS = 2


@dataclass(frozen=True)
class Displaced:
    """When mode displaced is exact, and how it treats the clean context.

    A displaced row runs chunk by chunk; each reads fresh keys and values of cleaner chunks and those that noisier ones
    left at the row before. An exact row is one whole window, as in mode window, and renews all that was left. A
    stream's first row is always exact.

    Attributes:
        resync_every_steps: rows whose index it divides are exact; 1 = all, None = none. A run can be restored where a
            shift begins with an exact row, so a multiple of the steps per shift gives most such places.
        exact_steps: so many rows at the start of the video are exact.
        exact_growing: rows are exact while the window grows.
        exact_draining: rows are exact while it drains: after the last chunk was born, without a full window.
        adaptive: a shift in which keys of the last block that mixes frames change by more than this from row to row
            (relative L2, over all chunks) makes the first row of the next shift but one exact; None = never.
        context_refresh: the clean chunk's keys and values, which in a bidirectional model depend on its noisy
            neighbours, are made anew once per ``shift`` or at every ``step``.
    """

    resync_every_steps: int | None = 25
    exact_steps: int = 0
    exact_growing: bool = True
    exact_draining: bool = False
    adaptive: float | None = None
    context_refresh: Literal["shift", "step"] = "shift"

    def __post_init__(self) -> None:
        if self.resync_every_steps is not None and self.resync_every_steps < 1:
            raise ConfigError(
                f"displaced.resync_every_steps={self.resync_every_steps}: 1 (every step) or more, or null for never"
            )
        if self.exact_steps < 0:
            raise ConfigError(f"displaced.exact_steps={self.exact_steps}: 0 or more")
        if self.adaptive is not None and not self.adaptive > 0:
            raise ConfigError(f"displaced.adaptive={self.adaptive}: must be above 0, or null for never")
        if self.context_refresh not in ("shift", "step"):
            raise ConfigError(f"displaced.context_refresh={self.context_refresh}: must be shift or step")

    def is_exact(self, plan: WindowPlan, n: int, first_row: int = 0) -> bool:
        """Whether row ``n`` of a stream that starts at ``first_row`` is one whole window."""
        if n == first_row or n < self.exact_steps:
            return True
        if self.resync_every_steps is not None and n % self.resync_every_steps == 0:
            return True
        chunks = plan.row(n).chunks
        partial = len(chunks) < plan.window_chunks
        growing = plan.num_chunks is None or chunks[-1] + 1 < plan.num_born
        return partial and (self.exact_growing if growing else self.exact_draining)


def check_displaced(mode: Mode, displaced: Displaced) -> None:
    """Refuses settings of mode displaced that another mode would not read.

    Raises:
        ConfigError: naming the first of them.
    """
    for setting in fields(Displaced) if mode != "displaced" else ():
        value = getattr(displaced, setting.name)
        if value != getattr(Displaced(), setting.name):
            raise ConfigError(f"displaced.{setting.name}={value}: mode={mode} does not read it; set mode=displaced")


def check_chunks_per_unit(mode: Mode, plan: WindowPlan, chunks_per_unit: int) -> None:
    """Refuses a size of micro-batches that the mode or the plan does not read, or no window fills.

    Raises:
        ConfigError: naming it and what is legal.
    """
    if plan.is_partitioned and chunks_per_unit != 1:
        raise ConfigError(
            f"chunks_per_unit={chunks_per_unit}: {named(plan.partitions, plan.lookahead)} says already which chunks a"
            " micro-batch holds; use chunks_per_unit=1"
        )
    if plan.block_chunks > 1 and chunks_per_unit != 1:
        raise ConfigError(
            f"chunks_per_unit={chunks_per_unit}: blocks of {plan.block_chunks} chunks, which see each other, are one"
            " micro-batch with the rest of the window; use chunks_per_unit=1"
        )
    if mode == "window" and chunks_per_unit != 1:
        raise ConfigError(
            f"chunks_per_unit={chunks_per_unit}: in mode=window a micro-batch is the whole window; use"
            " chunks_per_unit=1, or mode=causal or displaced"
        )
    if not 1 <= chunks_per_unit <= plan.window_chunks:
        legal = "1" if plan.window_chunks == 1 else f"1 to {plan.window_chunks}"
        raise ConfigError(
            f"chunks_per_unit={chunks_per_unit}: a window has window_chunks={plan.window_chunks} noisy chunks; use"
            f" {legal}"
        )


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of every row of one stream, without guidance branches.

    Attributes:
        plan: the rows.
        mode: how chunks see each other.
        first_row: where the stream starts.
        displaced: of mode displaced.
        exact_rows: rows that adaptive re-sync has made exact so far.
        chunks_per_unit: neighbouring noisy chunks that are one micro-batch, where that is no whole window; the noisiest
            one holds what is left, and a clean chunk has one of its own.
    """

    plan: WindowPlan
    mode: Mode
    first_row: int = 0
    displaced: Displaced = field(default_factory=Displaced)
    exact_rows: frozenset[int] = frozenset()
    chunks_per_unit: int = 1

    def __post_init__(self) -> None:
        plan = self.plan
        if plan.is_partitioned and self.mode != "window":
            raise ConfigError(
                f"mode={self.mode}: {named(plan.partitions, plan.lookahead)} cuts rows of mode=window into calls; use"
                " mode=window, or partitions=1 and lookahead=false"
            )
        if plan.block_chunks > 1 and self.mode != "window":
            raise ConfigError(
                f"mode={self.mode}: blocks of {plan.block_chunks} chunks at one level see each other; use mode=window"
            )

    def parts(self, n: int) -> tuple[tuple[int, bool], ...]:
        """Row ``n`` as ``(name, is clean context)`` in order of work: ``WHOLE`` alone, or cleanest first.

        A micro-batch that is no whole window goes by the first chunk that it moves, or by its clean one. The calls of a
        partitioned row come noisiest first.

        Where context is cached the newest clean chunk comes before ``WHOLE``, once, in the first row of a shift.

        In mode causal a clean chunk comes once, in the first row that has it as context. In mode displaced too, unless
        it is refreshed at every step or that row is exact.
        """
        if self.plan.context == "cached":
            opens = n % self.plan.steps_per_shift == 0
            return (*((k, True) for k in self.plan.row(n).context if opens), (WHOLE, False))
        if self.plan.is_partitioned:
            row = self.plan.row(n)
            return tuple((row.window[call.sees.stop - call.moves], False) for call in self.plan.calls(row))
        if self.mode == "window" or (self.mode == "displaced" and self._is_exact(n)):
            return ((WHOLE, False),)
        now = self.plan.row(n)
        known: tuple[int, ...] = ()
        if n > self.first_row and not (self.mode == "displaced" and self.displaced.context_refresh == "step"):
            known = self.plan.row(n - 1).context
        clean = tuple((k, True) for k in now.context if k not in known)
        return clean + tuple((k, False) for k in now.chunks[:: self.chunks_per_unit])

    def sent(self, n: int) -> tuple[int, ...]:
        """Micro-batches of row ``n`` whose latents the last stage sends back to the first, for row ``n + 1``."""
        if self.plan.is_over(n + 1):
            return ()
        return tuple(self._carried(n))

    def fed(self, n: int) -> tuple[tuple[int, ...], ...]:
        """For each micro-batch of row ``n``, those of the row before whose latents must be back before it can begin.

        Latents come back in the order of the work that gave them, so what came for others is taken with them.
        """
        row, coming = self.plan.row(n), [(k, frozenset(chunks)) for k, chunks in self._carried(n - 1).items()]
        waited, taken = [], 0
        for chunk, _ in self.parts(n):
            held = self.held(row, chunk)
            needed = [i for i in range(taken, len(coming)) if not coming[i][1].isdisjoint(held)]
            first, taken = taken, max(needed, default=taken - 1) + 1
            waited.append(tuple(k for k, _ in coming[first:taken]))
        return tuple(waited)

    def slots(self, row: PlanRow, chunk: int) -> slice:
        """Places in a row's window of the chunks that a micro-batch holds, see :meth:`parts` for its name.

        The last of them are those that it moves (:meth:`moved`); at the others it only looks.
        """
        if chunk == WHOLE:
            return slice(0 if self.plan.context == "joint" else len(row.context), len(row.window))
        first = row.window.index(chunk)
        if self.plan.is_partitioned:
            return next(call.sees for call in self.plan.calls(row) if call.sees.stop - call.moves == first)
        size = 1 if chunk in row.context else self.chunks_per_unit
        return slice(first, min(first + size, len(row.window)))

    def held(self, row: PlanRow, chunk: int) -> tuple[int, ...]:
        """The chunks of a micro-batch."""
        return row.window[self.slots(row, chunk)]

    def moved(self, row: PlanRow, chunk: int) -> tuple[int, ...]:
        """The noisy chunks that take a step by a micro-batch, the last ones that it holds; none by a clean chunk's."""
        if chunk == WHOLE:
            return row.chunks
        if chunk in row.context:
            return ()
        return row.window[row.window.index(chunk) : self.slots(row, chunk).stop]

    def returned(self, row: PlanRow, chunk: int) -> tuple[int, ...]:
        """Chunks whose latents the last stage sends to the first behind a micro-batch, for the row after ``row``."""
        return self._returned(row, self.plan.row(row.index + 1), chunk)

    def ends_row(self, row: PlanRow, chunk: int) -> bool:
        """Whether a micro-batch is the row's last one."""
        return chunk == WHOLE or row.chunks[0 if self.plan.is_partitioned else -1] in self.moved(row, chunk)

    def may_end(self, n: int) -> bool:
        """Whether an endless stream can be told before row ``n`` to end and leave earlier rows what they were.

        In mode displaced rows of a growing window may be exact where those of a draining one are not. Once nothing more
        is born, the rest of the newest chunk's first shift is of a draining one, unless the window is full.
        """
        full = len(self.plan.row(n).chunks) == self.plan.window_chunks
        return self.mode != "displaced" or full or n % self.plan.steps_per_shift == 0

    @property
    def adaptive(self) -> bool:
        """Whether rows become exact while the stream runs."""
        return self.mode == "displaced" and self.displaced.adaptive is not None

    def reported(self, n: int, change: float) -> MicroBatches:
        """After row ``n`` closed a shift in which keys changed by ``change``: with what follows from it."""
        row = n + 1 + self.plan.steps_per_shift
        if not self.adaptive or change <= (self.displaced.adaptive or 0.0) or self.plan.is_over(row):
            return self
        return replace(self, exact_rows=self.exact_rows | {row})

    def decided_by(self, n: int) -> int | None:
        """The row whose report says whether row ``n`` is exact; None where nothing is left to say."""
        row = n - 1 - self.plan.steps_per_shift
        if not self.adaptive or n % self.plan.steps_per_shift or row < self.first_row:
            return None
        return row

    def durable(self, n: int, saved: Collection[int] = ()) -> bool:
        """Whether a run that is restored before row ``n`` goes on bit for bit, from the latents alone.

        In mode displaced only where row ``n`` reads nothing that earlier ones left. Where context is cached, only where
        what is read of it from there on is ``saved``, by chunk.
        """
        if not set(self.plan.kept(n)) <= set(saved):
            return False
        return self.mode != "displaced" or self.plan.is_over(n) or self._is_exact(n)

    def exact_from(self, n: int) -> frozenset[int]:
        """Rows from ``n`` on that adaptive re-sync has made exact so far."""
        return frozenset(row for row in self.exact_rows if row >= n)

    def _carried(self, n: int) -> dict[int, tuple[int, ...]]:
        """By micro-batch of row ``n`` that is followed by another row, the chunks that come back for it; in order."""
        row, after = self.plan.row(n), self.plan.row(n + 1)
        carried = {k: self._returned(row, after, k) for k, is_context in self.parts(n) if not is_context}
        return {k: chunks for k, chunks in carried.items() if chunks}

    def _returned(self, row: PlanRow, after: PlanRow, chunk: int) -> tuple[int, ...]:
        return after.window if chunk == WHOLE else tuple(k for k in self.moved(row, chunk) if k in after.window)

    def _is_exact(self, n: int) -> bool:
        return n in self.exact_rows or self.displaced.is_exact(self.plan, n, self.first_row)


def check_adaptive(batches: MicroBatches) -> None:
    """Refuses adaptive re-sync where a row would be handed out before it is known whether it is exact.

    Raises:
        ConfigError: too few steps per shift.
    """
    plan, least = batches.plan, LEAST_ADAPTIVE_STEPS
    if batches.adaptive and plan.steps_per_shift < least:
        raise ConfigError(
            f"displaced.adaptive={batches.displaced.adaptive}: needs at least {least} steps per shift, and"
            f" num_inference_steps={plan.num_inference_steps} over window_chunks={plan.window_chunks} are"
            f" {plan.steps_per_shift}; use num_inference_steps={least * plan.window_chunks} or more, or adaptive=null"
        )
