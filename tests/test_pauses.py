"""A driver that stood still itself (Ctrl-Z and fg, a debugger) takes nobody's silence meanwhile for a freeze."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from threaded import Threads, futures_for_references

from pavdm_dist.engine import blame, decoding, ray_gang
from pavdm_dist.engine.blame import control_results, stage_actors
from pavdm_dist.engine.cast import Cast
from pavdm_dist.engine.decoding import Decoding
from pavdm_dist.engine.events import DecoderLost, GangLost, Place
from pavdm_dist.engine.lines import Listener
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.ray_gang import RayGang
from pavdm_dist.engine.watchdog import Pauses
from pavdm_dist.method.window import CleanChunk

LIMIT_S = 10.0


class Time:
    """A clock in the place of the module ``time``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (blame, decoding, ray_gang):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


def gang_of(time: Time, decoder: Decoding | None = None) -> RayGang:
    """One stage that has been up and has said nothing since, with a unit outstanding."""
    gang = RayGang.__new__(RayGang)
    gang._options = EngineOptions(1, link_timeout_s=LIMIT_S)
    stage = Threads(SimpleNamespace(where=lambda: None, said=list))
    gang._cast = Cast("", [(0, 1)], gang._options, None)
    gang._cast.stages, gang._cast.places, gang._cast.decoding = [stage], [Place("10.0.0.1", 11)], decoder
    gang._cast.loops, gang._taking, gang._taking_left, gang._lines = [Future[Any]()], Future[Any](), {}, Listener()
    gang._events, gang._told, gang._left, gang._preparing = deque(), deque(), {}, {}
    gang._taken_in = set()
    gang._sealed, gang._done, gang._moved, gang._last = 0, -1, time.now, None
    gang._pauses = Pauses(LIMIT_S, ray_gang.FREEZE_MARGIN_S, lambda: time.now)
    return gang


def until_lost(gang: RayGang, time: Time) -> float:
    """Seconds until silence is a loss, asked every two."""
    began = time.now
    while time.now < began + 100:
        time.now += 2
        try:
            for event in gang.poll(0.0):
                assert isinstance(event, DecoderLost)
                return time.now - began
        except GangLost:
            return time.now - began
    raise AssertionError("nothing is noticed any more")


@pytest.mark.parametrize("owed", ["a unit", "taking in"])
def test_stages_are_not_blamed(owed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    futures_for_references(monkeypatch)
    time = Time(monkeypatch)
    gang = gang_of(time)
    if owed == "taking in":
        gang._done, gang._preparing = 0, {3: ([Future[Any]()], time.now)}
    time.now += 2
    assert gang.poll(0.0) == []
    time.now += 400  # it stood still
    assert gang.poll(0.0) == []
    assert until_lost(gang, time) == 14, "a silence that goes on is noticed as ever"


def test_the_decoder_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    futures_for_references(monkeypatch)
    time, frames = Time(monkeypatch), Future[Any]()
    facts = {"facts": lambda: (0, 4, None), "progress": lambda: 0, "open": lambda *_: None, "said": list}
    actor = Threads(SimpleNamespace(**facts))
    decoder = Decoding(actor, LIMIT_S, 60)
    decoder.facts.result(5)
    decoder.open(0, None)
    monkeypatch.setattr(Threads, "decode", SimpleNamespace(remote=lambda *_: frames), raising=False)
    gang = gang_of(time, decoder)
    gang._done = 0  # stages owe nothing
    gang.decode(0, CleanChunk(0, None))  # type: ignore[arg-type]
    assert gang.poll(0.0) == []
    time.now += 400
    assert gang.poll(0.0) == []
    assert until_lost(gang, time) == 12


def test_actors_that_come_up_have_their_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers at the first look after the pause has come up; so has one at the second."""
    futures_for_references(monkeypatch)
    time, ref, looks = Time(monkeypatch), Future[Any](), 0
    monkeypatch.setattr(blame, "Pauses", lambda limit, floor: Pauses(limit, floor, lambda: time.now))

    def given_up() -> bool:
        nonlocal looks
        looks += 1
        time.now += 400 if looks == 1 else 1
        if looks == 3:
            ref.set_result("up")
        return False

    monkeypatch.setattr(blame, "LOOK_S", 0.001)
    assert control_results([ref], 60, stage_actors(1), "come up", given_up) == ["up"]

    def ticks() -> bool:
        time.now += 1
        return False

    began = time.now
    with pytest.raises(GangLost, match="stage 0 of 1 did not come up within 60 s"):
        control_results([Future[Any]()], 60, stage_actors(1), "come up", ticks)
    assert time.now == began + 60
