"""Videos that give nothing although their gang is well: reported, then ended by name, and never for what others do."""

from __future__ import annotations

import re

import pytest
from gangs import Watched, check_equal, streams_of, undisturbed

from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Decoded, Event, Failed, Finished, Output, Prepared
from pavdm_dist.engine.watchdog import Patience, Watchdog


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
    said = rf"nothing has come for 501 s.*; {where}, row \d+ comes next \(stall_limit_s\)"
    assert re.fullmatch(said, str(failed.error))
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
