"""The stages of a pipeline in one process, without Ray: the reference for the distributed engine's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pavdm_dist.engine.order import Join, Unit, epochs, join_of
from pavdm_dist.engine.stage import RowDone, Stage
from pavdm_dist.method.microbatches import MicroBatches
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.base import Activation


class LocalEngine:
    """Runs the same :class:`Stage` objects in the same order as the actors, one unit after another.

    Args:
        stages: in pipeline order; their ranges must cover the model.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)

    def run(self, streams: Iterable[Stream], streams_in_flight: int = 1) -> Iterator[tuple[int, CleanChunk]]:
        """Samples all streams, at most ``streams_in_flight`` at a time; yields ``(stream id, clean chunk)``."""
        waiting = iter(streams)
        batches, exact = dict[int, MicroBatches](), dict[int, frozenset[int]]()

        def enter(epoch: int) -> Join | None:
            stream = next(waiting, None)
            if stream is None:
                return None
            join = join_of(stream, epoch)
            for stage in self._stages:
                stage.prepare(stream)
            batches[stream.id] = stream.batches
            exact.pop(stream.id, None)
            return join

        for units in epochs(enter, streams_in_flight, exact):
            for unit in units:
                done = self._run_unit(unit)
                if done is not None and done.change is not None:
                    batches[unit.stream] = batches[unit.stream].reported(unit.row, done.change)
                    exact[unit.stream] = batches[unit.stream].exact_rows
                if done is not None and done.clean is not None:
                    yield unit.stream, done.clean

    def _run_unit(self, unit: Unit) -> RowDone | None:
        activation: Activation | None = None
        for stage in self._stages:
            result = stage.run(unit, activation)
            activation = result if isinstance(result, Activation) else None
        if not isinstance(result, RowDone):
            return None
        if result.latents is not None:
            self._stages[0].feed(unit.stream, unit.row + 1, unit.chunk, result.latents)
        return result
