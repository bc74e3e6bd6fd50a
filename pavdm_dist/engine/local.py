"""The stages of a pipeline in one process, without Ray: the reference for the distributed engine's order, and a gang
whose every step a test can see.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from pavdm_dist.codecs.base import FrameDecoder
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Decoded, EpochDone, Event, Failed, Finished, Prepared
from pavdm_dist.engine.feed import EpochFeed
from pavdm_dist.engine.loop import events_of
from pavdm_dist.engine.order import LogEntry, Unit
from pavdm_dist.engine.stage import RowDone, Stage
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.base import Activation


class LocalGang:
    """The same :class:`Stage` objects in the same order as the actors, one unit after another (a driver's ``Gang``).

    Args:
        stages: in pipeline order; their ranges must cover the model.
        codec: makes frames; None leaves latents.
    """

    def __init__(self, stages: Sequence[Stage], codec: FrameDecoder | None = None) -> None:
        self._stages, self._codec = list(stages), codec
        self.decodes = codec is not None
        self.keep = 0 if codec is None else codec.receptive_latents()
        self.frames_per_latent = 1 if codec is None else codec.spec.temporal_stride
        self._feed, self._work = EpochFeed(), self._run()
        self._events: deque[Event] = deque()
        self._decoders: dict[int, Any] = {}

    def prepare(self, stream: Stream, warm: Tensor | None) -> None:
        for stage in self._stages if not stream.is_sampled else ():
            stage.prepare(stream)
        if self._codec is not None:
            self._decoders[stream.id] = self._codec.decoder()
            if warm is not None:
                self._decoders[stream.id].warm(warm)
        self._events.append(Prepared(stream.id))

    def seal(self, epoch: int, entry: LogEntry) -> None:
        self._feed.seal(epoch, entry)

    def renew_decoder(self, warm: Mapping[int, Tensor | None]) -> None:
        raise NotImplementedError("a codec in this process is not lost without the process")

    def decode(self, stream: int, clean: CleanChunk) -> None:
        self._events.append(Decoded(stream, clean.index, self._decoders[stream].decode(clean.latents)))

    def forget(self, stream: int) -> None:
        self._decoders.pop(stream, None)
        self._events = deque(e for e in self._events if not (isinstance(e, Decoded) and e.stream == stream))

    def poll(self, timeout: float) -> list[Event]:
        """Runs units until something has happened, or nothing is sealed any more; never waits."""
        while not self._events and next(self._work):
            pass
        return [self._events.popleft()] if self._events else []

    def _run(self) -> Iterator[bool]:
        """Unit by unit; yields whether there was something to do."""
        while True:
            epoch = self._feed.next(block=False)
            if epoch is None:
                yield False
                continue
            for stage in self._stages:
                for stream in epoch.entry.leaves:
                    stage.leave(stream)
                for stream, plan in epoch.entry.stops.items():
                    stage.stop(stream, plan)
                for stream, changes in epoch.entry.prompts.items():
                    for new in changes:
                        stage.change(stream, new)
                stage.begin(epoch.units)
            for unit in epoch.units:
                self._run_unit(unit)
                yield True
            self._events.append(EpochDone(epoch.number))
            yield True

    def _run_unit(self, unit: Unit) -> None:
        activation: Activation | None = None
        left: dict[str, Tensor] = {}
        for stage in self._stages:
            result = stage.run(unit, activation)
            if (taken := stage.newly_left(unit)) is not None:
                left |= taken()
            activation = result if isinstance(result, Activation) else None
        if not isinstance(result, RowDone):
            return
        if result.latents is not None:
            self._stages[0].feed(unit.stream, unit.row + 1, unit.chunk, result.latents)
        self._events.extend(events_of(unit, result, left))


class LocalEngine:
    """Samples with :class:`LocalGang`; what the engine on Ray must equal bit for bit.

    Args:
        stages: in pipeline order; their ranges must cover the model.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages

    def run(self, streams: Iterable[Stream], streams_in_flight: int = 1) -> Iterator[tuple[int, CleanChunk]]:
        """Samples all streams, at most ``streams_in_flight`` at a time; yields ``(stream id, clean chunk)``."""
        driver, waiting = Driver(LocalGang(self._stages), streams_in_flight), iter(streams)
        while True:
            while driver.wants > 0 and (stream := next(waiting, None)) is not None:
                driver.submit(stream)
            if driver.idle:
                return
            for output in driver.step(0.0):
                if isinstance(output, Failed):
                    raise output.error
                if isinstance(output, Finished):
                    yield output.stream, output.clean
