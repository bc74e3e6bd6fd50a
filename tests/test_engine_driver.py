"""The driver without Ray: whatever happens to a gang, a stream or a consumer, at any moment of a recorded run."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from gangs import MODES, MeanDecoder, Watched, check_equal, drive, streams_of, undisturbed
from helpers import reference_chunks, tiny_model, tiny_stream

from pavdm_dist.engine.driver import SEALED_AHEAD, Driver
from pavdm_dist.engine.events import Failed, Finished, GangLost, Grown, Output
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Conditioning, NewPrompt
from pavdm_dist.method.window import CleanChunk


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


# Of every mode: odd events, and with -m slow even ones, too.
HALVES = [1, pytest.param(0, marks=pytest.mark.slow)]


@pytest.mark.parametrize("first", HALVES)
@pytest.mark.parametrize("mode", MODES)
def test_a_gang_that_dies_at_any_event_costs_nothing(mode: Mode, first: int) -> None:
    for moment in range(first, events_in(mode), 2):
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
    assert rows == sorted(rows) and rows[-1] > 0
    # Who has the next chunk is said once, with those that are behind it.
    decoding = [one for one in found if one.decoding]
    assert decoding and {len(one.decoding) for one in decoding} >= {1, 2}
    for one in decoding:
        behind = f", and {len(one.decoding) - 1} behind it" if len(one.decoding) > 1 else ""
        assert one.awaited == f"chunk {one.decoding[0]} is with the decoder{behind}"
    assert any(re.fullmatch(r"chunk \d is with the stages", one.awaited) for one in found)
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


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_leaves_at_any_event_is_gone_and_its_id_free(mode: Mode, half: int) -> None:
    first, *others = streams_of(mode)
    again = replace(first, seed=9)
    expected = {stream.id: undisturbed(mode)[stream.id] for stream in others}
    for moment in range(1 + half, events_in(mode), 2):
        gang = Watched(1 + moment % 3, late=moment // 2 % 2)
        driver, outputs = Driver(gang, 2), list[Output]()
        waiting, cancelled = deque([first, *others]), False
        while not (driver.idle and cancelled and not waiting):
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


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_whose_values_fail_at_any_shift_ends_alone_and_its_id_is_free(mode: Mode) -> None:
    failed, whole = set(), Watched(2, late=1)
    drive(Driver(whole, 2), streams_of(mode))
    for moment in whole.shifts:
        gang = Watched(2, late=1, spoils=moment)
        driver = Driver(gang, 2)
        outputs = drive(driver, streams_of(mode))
        lost = [output for output in outputs if isinstance(output, Failed)]
        assert [output.stream for output in lost] == [gang.spoiled]
        rest = {number: chunks for number, chunks in undisturbed(mode).items() if number != gang.spoiled}
        check_equal([output for output in outputs if output.stream != gang.spoiled], rest)
        assert not gang.left_over and not gang._decoders
        assert gang.spoiled is not None
        failed.add(gang.spoiled)
        again = drive(driver, [stream for stream in streams_of(mode) if stream.id == gang.spoiled])
        check_equal(again, {gang.spoiled: undisturbed(mode)[gang.spoiled]})
    assert failed == {0, 1, 2}


@pytest.mark.parametrize("loses", [None, "decoder", "gang"])
def test_frames_of_what_was_sound_are_given_however_late_they_are(loses: str | None) -> None:
    """As one process gives them: what is clean before values fail does not hang on how fast the decoder is, nor on what
    is lost while it decodes."""
    stream, decoder = tiny_stream(0, 1, 1.0, num_chunks=6), MeanDecoder()
    sound = [(clean.latents, decoder.decode(clean.latents)) for clean in reference_chunks(tiny_model(), stream)]
    drive(Driver(whole := Watched(), 1), [stream])
    for number, late in product(range(2, len(whole.shifts)), (0, 30)):
        gang, given, is_lost = Watched(1, late=late, spoils_shift=number), list[Finished](), False
        driver = Driver(gang, 1)
        driver.submit(stream)
        outputs = list[Output]()
        while not driver.idle:
            outputs += driver.step(0.0)
            if gang.spoiled == 0 and driver.streams and loses and not is_lost:
                is_lost = True
                if loses == "decoder":
                    gang._loses_decoder.add(gang.told)
                else:  # it goes on from the last sound shift, and fails at the same one
                    driver.adopt(gang := Watched(2, late=late, spoils_shift=0))
        given = [output for output in outputs if isinstance(output, Finished)]
        failed = [output for output in outputs if isinstance(output, Failed)]
        assert len(failed) == 1 and failed[0] is outputs[-1] and "not finite" in str(failed[0].error)
        assert [output.clean.index for output in given] == list(range(number - 2)), "two shifts give nothing yet"
        for output, (latents, frames) in zip(given, sound, strict=False):
            assert torch.equal(output.clean.latents, latents) and torch.equal(output.frames, frames)
        assert is_lost == bool(loses and late and given) and not gang.left_over and not gang._decoders


@pytest.mark.parametrize("late", [0, 3])
def test_a_stream_that_is_refused_or_not_decoded_at_any_chunk_ends_alone(late: int) -> None:
    expected = undisturbed("window")
    faults = [(stream, None) for stream in expected] + [(s, c) for s in expected for c in range(len(expected[s]))]
    for stream, chunk in faults:
        breaks = None if chunk is None else (stream, chunk)
        gang = Watched(2, late=late, refuses=stream if chunk is None else None, breaks=breaks)
        outputs = drive(Driver(gang, 2), streams_of("window"))
        assert [output.stream for output in outputs if isinstance(output, Failed)] == [stream]
        given = [output.clean.index for output in outputs if isinstance(output, Finished) and output.stream == stream]
        assert given == list(range(chunk or 0)), "what came before the fault"
        others = {number: chunks for number, chunks in expected.items() if number != stream}
        check_equal([output for output in outputs if output.stream != stream], others)
        assert not gang.left_over and not gang._decoders


@pytest.mark.parametrize("mode", MODES)
def test_a_consumer_that_stops_at_any_event_loses_nothing_and_holds_the_work(mode: Mode) -> None:
    chunk_bytes = max(3 * frames.nbytes for chunks in undisturbed(mode).values() for _, frames in chunks)
    for moment in range(0, events_in(mode), 3):
        gang = Watched(1 + moment % 2, late=moment % 4)
        driver, waiting = Driver(gang, 2, backlog_bytes=chunk_bytes), deque(streams_of(mode))
        taken, held, asleep = list[Output](), list[Output](), 40
        while not (driver.idle and not waiting):
            while driver.wants > 0 and waiting:
                driver.submit(waiting.popleft())
            if gang.told >= moment and asleep:
                asleep -= 1
            elif held:
                taken, held = taken + held, []
            finished = sum(isinstance(output, Finished) for output in held)
            assert finished <= 1 + 2 * (SEALED_AHEAD + 1), "what had been handed out, and no more"
            held += driver.step(0.0, finished * chunk_bytes)
        check_equal([*taken, *held], undisturbed(mode))
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


@pytest.mark.parametrize("steps", [15, 21])  # no multiple of a shift is one of an epoch
@pytest.mark.parametrize("exact", [Displaced(), Displaced(exact_growing=False, exact_draining=True)])
def test_an_endless_stream_whose_end_would_change_earlier_rows_ends_a_little_later(
    exact: Displaced, steps: int
) -> None:
    """Rows that are exact while the window grows and not while it drains, or the other way round."""
    stream = tiny_stream(mode="displaced", displaced=exact, num_inference_steps=steps, guidance_scale=1.0)
    stream, lengths = replace(stream, plan=replace(stream.plan, num_chunks=None)), set[int]()
    for moment in range(6):
        gang = Watched(2)
        driver, finished = Driver(gang, 1), list[Finished]()
        driver.submit(stream)
        for _ in range(10_000):
            if driver.idle:
                break
            finished += [output for output in driver.step(0.0) if isinstance(output, Finished)]
            if gang.told >= moment:
                driver.stop(0)
        lengths.add(len(finished))
        whole = replace(stream, plan=replace(stream.plan, num_chunks=len(finished)))
        for output, reference in zip(finished, reference_chunks(tiny_model(), whole), strict=True):
            assert torch.equal(output.clean.latents, reference.latents)
        assert not gang.left_over
    assert min(lengths) < 4, "some were told while the window grew"


def test_texts_that_no_chunk_follows_any_more_are_forgotten() -> None:
    """An endless video whose prompt is changed for every chunk, and twice for some."""
    stream = tiny_stream(guidance_scale=3.0)
    stream = replace(stream, plan=replace(stream.plan, num_chunks=None))
    gang, held = Watched(2), list[tuple[int, ...]]()
    driver, finished = Driver(gang, 1), list[Finished]()
    driver.submit(stream)
    generator = torch.Generator().manual_seed(0)
    while len(finished) < 30:
        for output in driver.step(0.0):
            if not isinstance(output, Finished):
                continue
            finished.append(output)
            for word in ("a", "b"):
                text = torch.randn(
                    3, stream.conditioning.texts[stream.conditioning.prompts[0][1]].shape[1], generator=generator
                )
                driver.set_prompt(0, NewPrompt(output.clean.index + 5, word, text))
            flight = driver._flights[0]
            held.append(
                (
                    len(flight.stream.conditioning.texts),
                    len(flight.told),
                    *(len(stage._streams[0].conditioning.texts) for stage in gang.parts),
                    *(len(stage._texts._raw) for stage in gang.parts),
                )
            )
    assert max(max(counts) for counts in held) <= 14, held[-1]
    point = finished[20].resume
    assert point is not None and len(point.prompts) > 20, "the record has them all"
    driver.stop(0)
    drive(driver, [])
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
