"""Where a video goes on, and what must be as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.window import CleanChunk, WindowSnapshot


@dataclass(frozen=True)
class ResumePoint:
    """Where a video goes on instead of at its beginning: all that is no function of its settings.

    Attributes:
        snapshot: latents in flight, and the next row; past the plan's last one when only decoding is left.
        warm: latents ``[C, n, h, w]`` right before the next chunk, which the decoder is warmed on; None = none.
        undecoded: chunks that are clean already and follow ``warm``, whose frames are still to be made.
        resyncs: of mode displaced, all rows that adaptive re-sync has made exact up to here, for the record.
        prompts: ``(first chunk, prompt)`` of what was changed while the video ran, in the order in which it was.
        left_bytes: of the snapshot's keys and values, those that came since the point before; for :attr:`num_bytes`.
        plan: that was followed; of an endless video that was told to end, the one that ends. None where a file holds
            the point, beside settings that are compared.
        was_stopped: whether it is the latter.
        settings: of the video, by name, that must be equal for it to go on; none where a file holds the point.
    """

    snapshot: WindowSnapshot
    warm: Tensor | None = None
    undecoded: tuple[CleanChunk, ...] = ()
    resyncs: tuple[int, ...] = ()
    prompts: tuple[tuple[int, str], ...] = ()
    left_bytes: int = 0
    plan: WindowPlan | None = None
    was_stopped: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def follow(self, plan: WindowPlan, displaced: Displaced | None = None) -> WindowPlan:
        """The plan that a video goes on with, asked for as ``plan``: an endless one that was told to end still ends.

        Args:
            plan: that is asked for.
            displaced: of mode displaced, which rows are exact, also by how long the video is.

        Raises:
            ConfigError: other rows lead to where this is.
        """
        before, row = self.plan, self.snapshot.row
        if before is None or before == plan:
            return plan
        _check_equal({**vars(before), "num_chunks": None}, {**vars(plan), "num_chunks": None})
        if plan.num_chunks is None and self.was_stopped:
            return before
        now, then = (_behind(one, row, displaced) for one in (plan, before))
        if now is None or now != then:
            length, other = (
                "without an end" if one.num_chunks is None else f"of {one.num_chunks} chunks" for one in (before, plan)
            )
            raise ConfigError(
                f"resume: this is row {row} of a video {length}, where one {other} has other chunks in flight, other"
                " exact rows behind it, or is over; give num_frames as it was, or go on from an earlier chunk"
            )
        return plan

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuses to go on otherwise than the video was begun.

        Raises:
            ConfigError: naming what differs.
        """
        if self.settings:
            _check_equal(self.settings, settings)

    @property
    def num_bytes(self) -> int:
        """What it adds to what earlier points of its video hold, which have the other keys and values in common with
        it; clean latents are those of chunks that were given out."""
        held = [*self.snapshot.latents.values(), *([] if self.warm is None else [self.warm])]
        return self.left_bytes + sum(tensor.nbytes for tensor in held)


def _check_equal(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in now if before[name] != now[name]]
    if changed:
        said = ", ".join(f"{name}={before[name]} (now {now[name]})" for name in changed)
        raise ConfigError(f"resume: the video was begun with {said}; give the same again, or begin anew")


def _behind(plan: WindowPlan, n: int, displaced: Displaced | None) -> tuple[set[int], list[int]] | None:
    """Noisy chunks of row ``n`` that rows before it have moved, and the rows up to it that are exact; None of one past
    the end."""
    if plan.is_over(n):
        return None
    row = plan.row(n)
    exact = [] if displaced is None else [at for at in range(n + 1) if displaced.is_exact(plan, at)]
    return {*row.chunks} - {*row.born}, exact
