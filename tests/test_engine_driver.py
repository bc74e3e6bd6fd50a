"""The driver without Ray: whatever happens to a gang, a stream or a consumer, at any moment of a recorded run."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import reference_chunks, tiny_model, tiny_stream
from torch import Tensor

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.engine.driver import SEALED_AHEAD, Driver
from pavdm_dist.engine.events import Decoded, DecoderLost, Event, Failed, Finished, GangLost, Grown, Output, Prepared
from pavdm_dist.engine.local import LocalGang
from pavdm_dist.engine.order import LogEntry
from pavdm_dist.engine.stage import Stage
from pavdm_dist.engine.watchdog import Patience, Watchdog
from pavdm_dist.errors import ConfigError, VideoError
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.method.window import CleanChunk

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


class Watched(LocalGang):
    """A gang that counts its events, and can be told what is to go wrong at which of them.

    Args:
        stages: how many.
        dies_at: the gang is lost instead of telling this event.
        late: polls that frames are held back for.
        refuses: a stream that stages cannot take in.
        breaks: (stream, chunk) that cannot be decoded.
        loses_decoder: the decoder is lost instead of this event, and what was with it too.
    """

    def __init__(
        self,
        stages: int = 1,
        dies_at: int | None = None,
        late: int = 0,
        refuses: int | None = None,
        breaks: tuple[int, int] | None = None,
        loses_decoder: Sequence[int] = (),
    ) -> None:
        self.parts = [Stage(tiny_model(), blocks) for blocks in CUTS[stages]]
        super().__init__(self.parts, MeanCodec())  # type: ignore[arg-type]
        self.told = 0
        self.sealed: list[LogEntry] = []
        self.prepared: list[int] = []
        self._dies_at, self._late, self._refuses, self._breaks = dies_at, late, refuses, breaks
        self._held: deque[tuple[int, Event]] = deque()
        self._polls = 0
        self._loses_decoder = set(loses_decoder)

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
        }


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


def events_in(mode: Mode) -> int:
    gang = Watched()
    drive(Driver(gang, 2), streams_of(mode))
    return gang.told


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_everything_comes_out_once_however_late_frames_are(mode: Mode, late: int) -> None:
    gang = Watched(2, late=late)
    outputs = drive(Driver(gang, 2), streams_of(mode))
    check_equal(outputs, undisturbed(mode))
    assert not gang.left_over and not gang._decoders
    assert not any(isinstance(output, Failed) for output in outputs)


@pytest.mark.parametrize("mode", MODES)
def test_a_gang_that_dies_at_any_event_costs_nothing(mode: Mode) -> None:
    for moment in range(events_in(mode)):
        driver, outputs = Driver(Watched(1, dies_at=moment, late=moment % 3), 2), list[Output]()
        with pytest.raises(GangLost):
            drive(driver, streams_of(mode), outputs.append)
        submitted = driver.streams | {output.stream for output in outputs}
        driver.adopt(Watched(1 + moment % 3))
        rest = drive(driver, [stream for stream in streams_of(mode) if stream.id not in submitted])
        check_equal([*outputs, *rest], undisturbed(mode))


def test_where_a_stream_is_can_be_asked_at_any_moment() -> None:
    (stream, *_), gang = streams_of("window"), Watched(1, late=2)
    driver = Driver(gang, 1)
    driver.submit(stream)
    seen = [driver.at_work(stream.id)]
    while not driver.idle:
        driver.step(0)
        seen.append(driver.at_work(stream.id))
    found = [one for one in seen if one is not None]
    assert found[0].awaited == "chunk 0: the video waits for a place" and found[0].row == 0
    rows = [one.row for one in found]
    assert rows == sorted(rows) and rows[-1] > 0 and any(one.decoding for one in found)
    assert seen[-1] is None and driver.at_work(99) is None, "it is over"


def test_a_decoder_that_is_lost_at_any_event_costs_nothing() -> None:
    for moment in range(events_in("window")):
        gang = Watched(1, late=moment % 4, loses_decoder=[moment, moment + 2])
        check_equal(drive(Driver(gang, 2), streams_of("window")), undisturbed("window"))
        assert not gang.left_over and not gang._decoders
    with pytest.raises(GangLost, match=r"the decode actor died \(2 times in a row\)"):
        drive(Driver(Watched(1, late=3, loses_decoder=[9, 10]), 2, max_restarts=1), streams_of("window"))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_goes_on_from_every_point_it_gave_out(mode: Mode) -> None:
    (stream, *_), expected = streams_of(mode), undisturbed(mode)[0]
    outputs = drive(Driver(Watched(), 1), [stream])
    points = [(o.resume, o.clean.index + 1 if isinstance(o, Finished) else 0) for o in outputs]  # type: ignore[union-attr]
    found = [(point, done) for point, done in points if point is not None]
    assert len(found) == (6 if mode != "displaced" else 2), "every shift, and of mode displaced those before exact rows"
    for point, done in found:
        rest = drive(Driver(Watched(2), 1), [replace(stream, resume=point)])
        finished = [output for output in rest if isinstance(output, Finished)]
        assert [output.clean.index for output in finished] == list(range(done, 4))
        for output in finished:
            latents, frames = expected[output.clean.index]
            assert torch.equal(output.clean.latents, latents) and torch.equal(output.frames, frames)
        # With a chunk whose frames were lost: it comes again, then what follows.
        if done:
            past = torch.cat([latents for latents, _ in expected[: done - 1]], 1) if done > 1 else None
            again = CleanChunk(done - 1, expected[done - 1][0])
            lost = replace(point, warm=past, undecoded=(again,))
            rest = drive(Driver(Watched(), 1), [replace(stream, resume=lost)])
            frames = [output.frames for output in rest if isinstance(output, Finished)]
            assert len(frames) == 5 - done and torch.equal(frames[0], expected[done - 1][1])
            again_points = [output.resume for output in rest if isinstance(output, Finished)]
            assert again_points[0] is not None and again_points[0].snapshot.row == point.snapshot.row


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_leaves_at_any_event_is_gone_and_its_id_free(mode: Mode) -> None:
    first, *others = streams_of(mode)
    again = replace(first, seed=9)
    expected = {stream.id: undisturbed(mode)[stream.id] for stream in others}
    for moment in range(1, events_in(mode), 2):
        gang = Watched(1 + moment % 3, late=moment % 2)
        driver, outputs = Driver(gang, 2), list[Output]()
        waiting, cancelled = deque([first, *others]), False
        while not (driver.idle and cancelled):
            while driver.wants > 0 and waiting:
                driver.submit(waiting.popleft())
            if gang.told >= moment and not cancelled:
                driver.cancel(first.id)
                waiting.append(again)  # under the same id
                outputs, cancelled = [output for output in outputs if output.stream != first.id], True
            outputs += driver.step(0.0)
        mine = [output.clean for output in outputs if isinstance(output, Finished) and output.stream == first.id]
        for clean, reference in zip(mine, _chunks_of_seed_9(mode), strict=True):
            assert torch.equal(clean.latents, reference.latents)
        check_equal([output for output in outputs if output.stream != first.id], expected)
        assert not gang.left_over and not gang._decoders


@cache
def _chunks_of_seed_9(mode: Mode) -> list[CleanChunk]:
    return reference_chunks(tiny_model(), replace(streams_of(mode)[0], seed=9))


@pytest.mark.parametrize("fault", ["refused", "not finite", "not decoded"])
def test_a_stream_that_fails_ends_alone(fault: str) -> None:
    streams = streams_of("window", guidance_scale=3.0)
    expected = {}
    for stream in streams[1:]:
        decoder = MeanDecoder()
        chunks = reference_chunks(tiny_model(), stream)
        expected[stream.id] = [(clean.latents, decoder.decode(clean.latents)) for clean in chunks]
    gang = Watched(2, refuses=0 if fault == "refused" else None, breaks=(0, 1) if fault == "not decoded" else None)
    if fault == "not finite":
        texts = streams[0].conditioning
        broken = Conditioning.build(
            [(0, next(iter(texts.texts.values())) * float("inf"))], texts.texts[texts.null or ""]
        )
        streams[0] = replace(streams[0], conditioning=broken)
    outputs = drive(Driver(gang, 2), streams)
    failed = [output for output in outputs if isinstance(output, Failed)]
    assert [output.stream for output in failed] == [0]
    words = {
        "refused": "no room",
        "not finite": "chunk 0 holds values that are not finite after step 1",
        "not decoded": "1",
    }
    assert words[fault] in str(failed[0].error)
    chunks = [output.clean.index for output in outputs if isinstance(output, Finished) and output.stream == 0]
    assert chunks == ([0] if fault == "not decoded" else [])
    check_equal([output for output in outputs if output.stream != 0], expected)
    assert not gang.left_over and not gang._decoders


def test_a_consumer_that_takes_nothing_stops_the_work_and_one_that_takes_starts_it_again() -> None:
    stream = tiny_stream(0, guidance_scale=1.0, num_chunks=12)
    chunk_bytes = 3 * 2 * 4 * 32 * 48
    driver = Driver(gang := Watched(), 1, backlog_bytes=3 * chunk_bytes)
    driver.submit(stream)
    outputs: list[Output] = []
    for _ in range(200):  # nothing is taken: every finished chunk is held
        held = sum(isinstance(output, Finished) for output in outputs) * chunk_bytes
        outputs += driver.step(0.0, held)
    stalled = sum(isinstance(output, Finished) for output in outputs)
    assert 3 <= stalled <= 3 + 2 * (SEALED_AHEAD + 1), "what had been handed out, and no more"
    sealed = len(gang.sealed)
    assert not driver.step(0.0, stalled * chunk_bytes) and len(gang.sealed) == sealed
    rest = drive(driver, [])
    assert sum(isinstance(output, Finished) for output in rest) == 12 - stalled


def test_less_room_than_a_chunk_still_goes_on() -> None:
    outputs = drive(Driver(Watched(), 1, backlog_bytes=1), streams_of("window")[:1])
    check_equal(outputs, {0: undisturbed("window")[0]})


def test_a_late_decoder_delays_no_admission() -> None:
    gang = Watched(late=10_000)
    driver = Driver(gang, 1)
    for stream in streams_of("window"):
        driver.submit(stream)
    for _ in range(100):
        driver.step(0.0)
    assert gang.prepared == [0, 1, 2], "the last stream is taken in although no frame of the first has come"


@pytest.mark.parametrize("end", ["drain", "cut"])
@pytest.mark.parametrize("mode", MODES)
def test_an_endless_stream_ends_when_it_is_told_to(mode: Mode, end: str) -> None:
    for moment in range(0, 9, 2):
        endless = replace(streams_of(mode)[0], plan=replace(streams_of(mode)[0].plan, num_chunks=None, end=end))
        gang = Watched(1 + moment % 3)
        driver, finished = Driver(gang, 2), list[Finished]()
        driver.submit(endless)
        driver.submit(replace(streams_of(mode)[1], id=7))
        while not driver.idle:
            finished += [o for o in driver.step(0.0) if isinstance(o, Finished) and o.stream == 0]
            if gang.told == moment or len(finished) == moment:
                driver.stop(0)
                driver.stop(7)  # has its end already
        assert [output.clean.index for output in finished] == list(range(len(finished)))
        assert [output.last for output in finished] == [False] * (len(finished) - 1) + [True]
        whole = replace(endless, plan=replace(endless.plan, num_chunks=len(finished)))
        for output, reference in zip(finished, reference_chunks(tiny_model(), whole), strict=True):
            assert torch.equal(output.clean.latents, reference.latents)
        assert not gang.left_over


def test_grown_shifts_come_before_the_first_chunk() -> None:
    outputs = drive(Driver(Watched(), 1), streams_of("window")[:1])
    kinds = [type(output) for output in outputs]
    assert kinds == [Grown, Grown, Finished, Finished, Finished, Finished]
    rows = [output.resume.snapshot.row for output in outputs]  # type: ignore[union-attr]
    assert rows == [2, 4, 6, 8, 10, 12]
    assert all(
        not tensor.is_cuda
        for output in outputs
        for tensor in output.resume.snapshot.latents.values()  # type: ignore[union-attr]
    )


def test_what_cannot_be_decided_in_time_is_refused_before_it_is_taken_in() -> None:
    adaptive = Displaced(None, exact_growing=False, adaptive=0.2)
    stream = tiny_stream(mode="displaced", displaced=adaptive, num_inference_steps=3)
    driver = Driver(gang := Watched(), 1)
    with pytest.raises(ConfigError, match=r"adaptive=0.2: needs at least 2 steps per shift"):
        driver.submit(stream)
    driver.submit(streams_of("window")[1])
    with pytest.raises(ValueError, match="stream 1 is here already"):
        driver.submit(streams_of("window")[1])
    assert not gang.prepared


class Ticking:
    """Seconds that pass by one at every step of a driver."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Withholding(Watched):
    """A gang that is well but gives no frames of stream 0 any more, from chunk 1 on; or does not take it in."""

    def __init__(self, what: str) -> None:
        super().__init__(2)
        self._what = what

    def poll(self, timeout: float) -> list[Event]:
        def withheld(event: Event) -> bool:
            if self._what == "frames":
                return isinstance(event, Decoded) and event.stream == 0 and event.chunk > 0
            return self._what == "place" and isinstance(event, Prepared) and event.stream == 0

        return [event for event in super().poll(timeout) if not withheld(event)]


def watched_driver(gang: Watched, clock: Ticking, places: int = 2, **options: int) -> Driver:
    return Driver(gang, places, watchdog=Watchdog(Patience(10, 20, 500), clock), **options)


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("frames", "chunk 1 is with the decoder, and 2 behind it"),
        ("place", "chunk 0: the stages are taking the video in"),
    ],
)
def test_a_stream_that_gives_nothing_is_reported_and_then_ended_by_name(
    what: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock, gang = Ticking(), Withholding(what)
    driver, outputs, ended = watched_driver(gang, clock), list[Output](), 0.0
    for stream in streams_of("window"):
        driver.submit(stream)
    while not driver.idle and clock.now < 5000:
        clock.now += 1
        outputs += driver.step(0.0)
        if not ended and any(isinstance(output, Failed) for output in outputs):
            ended = clock.now
            if what == "place":  # what the stages were taking in, they have taken in
                gang._what = "nothing"
                gang._events.append(Prepared(0))
    (failed,) = (output for output in outputs if isinstance(output, Failed))
    assert driver.idle and failed.stream == 0 and 500 <= ended < 600
    assert re.fullmatch(rf"nothing has come for 501 s.*; {where} \(stall_limit_s\)", str(failed.error))
    reported = [record.message for record in caplog.records if "video 0" in record.message]
    assert len(reported) == (1 if what == "frames" else 0), "before its first shift nobody knows what is usual"
    if reported:
        assert re.match(r"video 0: nothing has come for \d+ s, usually [\d.]+ s a chunk; chunk 1 is with", reported[0])
    rest = {stream: chunks for stream, chunks in undisturbed("window").items() if stream != 0}
    check_equal([output for output in outputs if output.stream != 0], rest)
    assert not gang.left_over and not gang._decoders
    assert "video 1" not in caplog.text and "video 2" not in caplog.text


def test_who_waits_for_others_is_not_late(caplog: pytest.LogCaptureFixture) -> None:
    """For a consumer, for a turn at the decoder, for a place, or for another gang."""
    clock = Ticking()
    driver = watched_driver(Watched(), clock, backlog_bytes=1000)
    driver.submit(streams_of("window")[0])
    outputs: list[Output] = []
    while not any(isinstance(output, Finished) for output in outputs):
        clock.now += 1
        outputs += driver.step(0.0)
    for _ in range(50):  # the consumer takes nothing
        clock.now += 100
        outputs += driver.step(0.0, 1000)
    clock.now += 400
    driver.adopt(Watched(2))
    clock.now += 400
    while not driver.idle:
        outputs += driver.step(0.0)
    check_equal(outputs, {0: undisturbed("window")[0]})

    watchdog = Watchdog(Patience(10, 20, 500), clock)
    for stream in (0, 1):
        watchdog.starts(stream)
        clock.now += 1
        watchdog.shifted(stream)
    for stream in [0] * 20 + [1]:
        watchdog.handed(stream)
    for _ in range(20):
        clock.now += 15
        assert not watchdog.late([0, 1])
        watchdog.gave(0)
    clock.now += 15
    assert not watchdog.late([1]), "300 s passed before it was its turn"
    clock.now += 15
    assert [late.seconds for late in watchdog.late([1])] == [30.0]
    for _ in range(20):
        clock.now += 50
        assert not [late for late in watchdog.late([0], held_up=True) if late.stream == 0], "others fill the backlog"
    assert not caplog.records


def test_a_driver_that_stood_still_blames_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Ctrl-Z and fg, a debugger, a machine that sleeps."""
    clock = Ticking()
    driver = watched_driver(Watched(), clock)
    driver.submit(streams_of("window")[0])
    outputs: list[Output] = []
    while not driver.idle:
        clock.now += 4000 if len(outputs) == 2 else 1
        outputs += driver.step(0.0)
    check_equal(outputs, {0: undisturbed("window")[0]})
    assert not caplog.records
