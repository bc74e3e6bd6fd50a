"""A gang in this process whose events a test looks at, holds back or loses, and streams to take through it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from helpers import reference_chunks, tiny_model, tiny_stream
from torch import Tensor

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Decoded, DecoderLost, Event, Finished, GangLost, Output, Prepared, Shift
from pavdm_dist.engine.local import LocalGang
from pavdm_dist.engine.order import LogEntry
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import VideoError
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.stdit3 import STDiT3

MODES: tuple[Mode, ...] = ("window", "causal", "displaced")
CUTS = {1: [(0, 4)], 2: [(0, 1), (1, 4)], 3: [(0, 2), (2, 3), (3, 4)]}


class MeanCodec:
    """Frames that are the mean of a latent and the three before it: a decoder's memory that shows when it is wrong."""

    spec = CodecSpec(4, 8, 4)

    def receptive_latents(self) -> int:
        return 3

    def decoder(self) -> MeanDecoder:
        return MeanDecoder()


class MeanDecoder:
    def __init__(self) -> None:
        self._past: deque[Tensor] = deque([torch.zeros(())] * 3, maxlen=3)

    def decode(self, latents: Tensor) -> Tensor:
        frames = []
        for latent in latents.unbind(1):
            frames.append(sum(self._past) + latent)
            self._past.append(latent)
        return torch.stack(frames)

    def warm(self, latents: Tensor) -> None:
        self.decode(latents)


@cache
def _model() -> STDiT3:
    """Of all gangs: stages only read it."""
    return tiny_model()


class Watched(LocalGang):
    """A gang that counts its events, and can be told what is to go wrong at which of them.

    Args:
        stages: how many.
        dies_at: the gang is lost instead of telling this event.
        late: polls that frames are held back for.
        refuses: a stream that stages cannot take in.
        breaks: (stream, chunk) that cannot be decoded.
        loses_decoder: the decoder is lost instead of this event, and what was with it too.
        spoils: this event, the end of a shift, tells of values that are not finite.
        spoils_shift: the same, by its number among the ends of shifts.

    Attributes:
        told: how many events there were.
        shifts: which of them were ends of shifts.
        spoiled: the stream whose event was spoilt.
    """

    def __init__(
        self,
        stages: int = 1,
        dies_at: int | None = None,
        late: int = 0,
        refuses: int | None = None,
        breaks: tuple[int, int] | None = None,
        loses_decoder: Sequence[int] = (),
        spoils: int | None = None,
        spoils_shift: int | None = None,
    ) -> None:
        self.parts = [Stage(_model(), blocks) for blocks in CUTS[stages]]
        super().__init__(self.parts, MeanCodec())  # type: ignore[arg-type]
        self.told = 0
        self.sealed: list[LogEntry] = []
        self.prepared: list[int] = []
        self._dies_at, self._late, self._refuses, self._breaks = dies_at, late, refuses, breaks
        self._held: deque[tuple[int, Event]] = deque()
        self._polls = 0
        self._loses_decoder, self._spoils, self._spoils_shift = set(loses_decoder), spoils, spoils_shift
        self.spoiled: int | None = None
        self.shifts: list[int] = []

    def prepare(self, stream: Stream, warm: Tensor | None) -> None:
        super().prepare(stream, warm)
        self.prepared.append(stream.id)
        if stream.id == self._refuses:
            self._events.pop()
            self._events.append(Prepared(stream.id, VideoError("it has no room")))

    def seal(self, epoch: int, entry: LogEntry) -> None:
        super().seal(epoch, entry)
        self.sealed.append(entry)

    def decode(self, stream: int, clean: CleanChunk) -> None:
        super().decode(stream, clean)
        if (stream, clean.index) == self._breaks:
            self._events.pop()
            self._events.append(Decoded(stream, clean.index, None, VideoError(f"chunk {clean.index} is broken")))
        if self._late:
            self._held.append((self._polls + self._late, self._events.pop()))

    def forget(self, stream: int) -> None:
        super().forget(stream)
        self._held = deque(item for item in self._held if item[1].stream != stream)  # type: ignore[union-attr]

    def renew_decoder(self, warm: Mapping[int, Tensor | None]) -> None:
        assert not self._decoders and not self._held
        for stream, latents in warm.items():
            self._decoders[stream] = MeanDecoder()
            if latents is not None:
                self._decoders[stream].warm(latents)

    def poll(self, timeout: float) -> list[Event]:
        self._polls += 1
        if self.told in self._loses_decoder:
            self._loses_decoder.remove(self.told)
            self._decoders.clear()
            self._held.clear()
            self._events = deque(event for event in self._events if not isinstance(event, Decoded))
            return [DecoderLost("the decode actor died")]
        events = []
        while self._held and self._held[0][0] <= self._polls:
            events.append(self._held.popleft()[1])
        events = events or super().poll(timeout)
        if self._dies_at is not None and self._dies_at in range(self.told, self.told + len(events)):
            raise GangLost("stage 0 of 1 died")
        for place, event in enumerate(events):
            if isinstance(event, Shift):
                self.shifts.append(self.told + place)
                if self.told + place == self._spoils or len(self.shifts) - 1 == self._spoils_shift:
                    self.spoiled = event.stream
                    events[place] = replace(event, not_finite=min(event.snapshot.latents, default=0))
        self.told += len(events)
        return events

    @property
    def left_over(self) -> set[int]:
        """Streams of which a stage still holds something."""
        return {
            stream
            for stage in self.parts
            for table in (stage._streams, stage._windows, stage._inputs, stage._velocities, stage._memories)
            for stream in table
        } | {owner for stage in self.parts for owners in stage._texts._users.values() for owner in owners}


def drive(
    driver: Driver, streams: Sequence[Stream], each: Callable[[Output], None] | None = None, steps: int = 10_000
) -> list[Output]:
    """Everything that comes out, with streams submitted as they are wanted."""
    outputs, waiting = list[Output](), iter(streams)
    for _ in range(steps):
        while driver.wants > 0 and (stream := next(waiting, None)) is not None:
            driver.submit(stream)
        if driver.idle:
            return outputs
        for output in driver.step(0.0):
            outputs.append(output)
            if each is not None:
                each(output)
    raise AssertionError("the driver does not come to an end")


def streams_of(mode: Mode, guidance_scale: float = 1.0) -> list[Stream]:
    displaced = Displaced(6, exact_growing=False)
    return [
        tiny_stream(0, 1, guidance_scale, mode, displaced),
        tiny_stream(1, 2, guidance_scale, mode, displaced, start="clip", num_chunks=3),
        tiny_stream(2, 3, guidance_scale, mode, displaced, num_chunks=2),
    ]


@cache
def undisturbed(mode: Mode) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Latents and frames of every stream, from the sampler and one decoder each."""
    found = {}
    for stream in streams_of(mode):
        decoder = MeanDecoder()
        found[stream.id] = [(c.latents, decoder.decode(c.latents)) for c in reference_chunks(tiny_model(), stream)]
    return found


def check_equal(outputs: Sequence[Output], expected: dict[int, list[tuple[Tensor, Tensor]]]) -> None:
    """Every chunk of the expected streams once, in order, bit for bit; nothing of others."""
    finished = [output for output in outputs if isinstance(output, Finished)]
    assert {output.stream for output in finished} <= set(expected)
    for stream, chunks in expected.items():
        mine = [output for output in finished if output.stream == stream]
        assert [output.clean.index for output in mine] == list(range(len(chunks)))
        assert [output.last for output in mine] == [False] * (len(chunks) - 1) + [True]
        for output, (latents, frames) in zip(mine, chunks, strict=True):
            assert torch.equal(output.clean.latents, latents)
            assert output.frames is not None and torch.equal(output.frames, frames)
