"""The engine behind a pipeline: made when a call needs it, kept for the next one, and ended with its owner."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.engine.events import Failed, Finished
from pavdm_dist.engine.inline import InlineEngine
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import EngineError, PAVDMError, TraceError
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.source import Source

if TYPE_CHECKING:
    from pavdm_dist.engine.ray_engine import RayEngine

E = TypeVar("E", "RayEngine", InlineEngine)
OnFailed = Callable[[int, PAVDMError], None]
OnGrown = Callable[[int, ResumePoint], None]
# For so many stages as the options say: the blocks of each.
Cut = Callable[[EngineOptions], list[tuple[int, int]]]


class Engines:
    """At most one engine at a time, with the weights that it has loaded.

    Attributes:
        current: that one; None = none is up.
    """

    def __init__(self) -> None:
        self.current: RayEngine | InlineEngine | None = None

    def inline(self, make: Callable[[], InlineEngine]) -> InlineEngine:
        """The engine of this process, which ``make`` loads unless it is up."""
        if isinstance(self.current, InlineEngine):
            return self.current
        return self._hold(make())

    def on_stages(
        self, source: Source, options: EngineOptions, frames: FrameMaker, cut: Cut, rehearsed: Stream | None
    ) -> RayEngine:
        """The engine of an earlier call where it is cut alike; else a new one.

        Args:
            source: the backbone's folder.
            options: of the engine.
            frames: what makes frames of latents.
            cut: says which blocks a stage gets; asked again, for fewer stages, where some are lost for good.
            rehearsed: what stages run before they are linked; None = nothing.

        Raises:
            PAVDMError: as :class:`~pavdm_dist.engine.ray_engine.RayEngine`.
        """
        from pavdm_dist.engine.ray_engine import RayEngine

        blocks, current = cut(options), self.current
        alike = isinstance(current, RayEngine) and current.blocks == blocks and _alike(current.rehearsal, rehearsed)
        if isinstance(current, RayEngine) and alike and not current.is_over:
            return current
        self.close()

        def recut(num_stages: int) -> list[tuple[int, int]]:
            return cut(replace(options, num_stages=num_stages, layers_per_stage=None))

        return self._hold(RayEngine(source, blocks, options, frames, recut, rehearsed))

    def run(
        self,
        engine: RayEngine,
        streams: Iterator[Stream | Failed],
        in_flight: int,
        on_grown: OnGrown | None,
        on_failed: OnFailed | None,
    ) -> Iterator[Finished]:
        """What an engine of stages makes of streams; afterwards its trace is written, where one is wanted.

        Raises:
            EngineError: the engine as a whole has ended.
            TraceError: everything was given out, and only its trace cannot be kept.
        """
        try:
            yield from engine.run(streams, in_flight, on_grown, on_failed)
        except EngineError:  # the actors are gone
            self.close()
            raise
        if engine.options.trace_file is not None:
            self._keep_trace(engine, engine.options.trace_file)

    def _keep_trace(self, engine: RayEngine, path: str) -> None:
        """Ends an engine that has nothing left to do, and writes what it has told."""
        from pavdm_dist.engine.trace import write_trace

        try:
            reports = engine.finish()
        except Exception as error:  # whatever becomes of the stages now: nothing is missing but this
            raise TraceError(
                f"trace={path}: the stages do not tell what they did ({error}); the videos are not touched by that"
            ) from error
        finally:
            self.close()
        write_trace(path, reports, engine.decoded)

    def close(self) -> None:
        """Ends the engine and gives its resources back. Safe to call twice."""
        engine, self.current = self.current, None
        if engine is not None:
            self._finalizer.detach()
            engine.close()

    def _hold(self, engine: E) -> E:
        self.current = engine
        # Whoever forgets close(): the actors go with this object, or with the process.
        self._finalizer = weakref.finalize(self, engine.close)
        return engine


def _alike(one: Stream | None, other: Stream | None) -> bool:
    """Whether two rehearsals meet the same sizes."""
    if one is None or other is None:
        return one is other
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("plan", "latent_shape", "info", "mode", "displaced", "chunks_per_unit")
    )
