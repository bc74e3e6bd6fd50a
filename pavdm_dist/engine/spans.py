"""What a stage, or a decoder, did and when."""

from __future__ import annotations

from dataclasses import dataclass, field

from pavdm_dist.engine.order import Unit


@dataclass(frozen=True)
class Span:
    """One traced unit: compute from ``start`` to ``end``, after waiting for its input since ``ready``.

    Times are seconds of the machine's monotonic clock, comparable between processes of one machine; of a GPU they say
    when it computed, not when it was told to.
    """

    unit: Unit
    ready: float
    start: float
    end: float


@dataclass(frozen=True)
class DecodeSpan:
    """A chunk that was decoded beside the stages, in seconds of the time of day."""

    stream: int
    chunk: int
    start: float
    end: float


@dataclass
class RunReport:
    """What a stage did: units, bytes handed to links, and the trace when it was asked for.

    ``clock`` added to a span's times makes them seconds of the time of day, comparable between machines.
    """

    clock: float
    units: int = 0
    bytes_forward: int = 0
    bytes_feedback: int = 0
    trace: list[Span] = field(default_factory=list)
