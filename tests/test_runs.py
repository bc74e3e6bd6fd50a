"""What is asked of a run's videos is for those that are there or still to come, and for no later one of the same id."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from gangs import MeanCodec, Watched, check_equal, streams_of, undisturbed
from helpers import tiny_model, tiny_stream

from pavdm_dist.engine.asked import Asked
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Failed, Finished, Output
from pavdm_dist.engine.inline import InlineEngine
from pavdm_dist.engine.runs import Run, Switch
from pavdm_dist.errors import ConfigError, VideoError
from pavdm_dist.method.stream import NewPrompt, Stream
from pavdm_dist.request import running
from pavdm_dist.request.running import Running


class Held:
    """A run with its driver, step by step in this thread; a stream is built when it is given."""

    def __init__(self) -> None:
        self.driver = Driver(Watched(1), 1)
        self.run = Run(iter(()), 1, Switch())

    def build(self, *streams: Stream | Failed) -> None:
        """Takes them from the source, as the run's own thread does."""
        self.run._source = iter(streams)
        with self.run._switch:
            self.run._wanted = 10
        self.run.feed()

    def outputs(self, steps: int | None = None) -> list[Output]:
        """What comes out until all is over, or in so many steps."""
        run, found = self.run, list[Output]()
        while steps is None or steps > 0:
            with run._switch:
                run.hand_over(self.driver)
            if self.driver.idle:
                break
            given = self.driver.step(0.0)
            with run._switch:
                run.take(given, self.driver.streams)
            steps = None if steps is None else steps - 1
        with run._switch:
            while run.outputs:
                found.append(run.outputs.popleft())
        return found

    def ask(self, what: str, stream: int) -> None:
        """As the engine does: of the run and of the driver."""
        with self.run._switch:
            getattr(self.run, what)(stream)
        getattr(self.driver, what)(stream)


@pytest.mark.parametrize("what", ["cancel", "stop"])
def test_what_comes_too_late_is_not_for_the_next_of_that_id(what: str) -> None:
    held, stream = Held(), streams_of("window")[0]
    for _ in range(2):  # every later one, too
        held.build(stream)
        check_equal(held.outputs(), {0: undisturbed("window")[0]})
        held.ask(what, 0)
    endless = tiny_stream(0, 1, 1.0, num_chunks=None)
    held.build(endless)
    assert len([o for o in held.outputs(steps=400) if isinstance(o, Finished)]) > 4, "it goes on"
    held.ask("stop", 0)
    assert [o.last for o in held.outputs() if isinstance(o, Finished)][-1]
    assert held.run._asked.is_empty


def test_what_is_asked_of_one_still_to_come_is_for_it_alone() -> None:
    held, (first, second, *_) = Held(), streams_of("window")
    held.ask("cancel", 0)
    held.ask("cancel", 1)
    held.build(first)
    assert not held.outputs(), "it was dropped as it came"
    held.build(Failed(1, VideoError("no clip")))
    assert [type(output) for output in held.outputs()] == [Failed], "this one, for good"
    held.build(first, second)
    check_equal(held.outputs(), {number: undisturbed("window")[number] for number in (0, 1)})


def test_what_is_asked_is_held_for_those_to_come_and_no_longer() -> None:
    asked, new = Asked(), NewPrompt(3, "new", torch.zeros(1, 4))
    for _ in range(2):
        asked.stop(0)
        asked.cancel(1)
        asked.set_prompt(0, new)
        assert asked.is_stopping(0) and asked.is_cancelled(1) and not asked.is_cancelled(0)
        assert asked.take_prompts(0) == [new] and asked.take_prompts(0) == []
        for stream in (0, 1):
            asked.ends(stream)
        asked.stop(0)
        asked.cancel(1)
        asked.set_prompt(0, new)
        assert asked.is_empty, "too late"
        for stream in (0, 1):
            asked.comes(stream)


def test_one_that_is_cancelled_under_way_makes_room_for_the_next_of_its_id() -> None:
    held, stream = Held(), streams_of("window")[0]
    held.build(stream)
    held.outputs(steps=3)
    held.ask("cancel", 0)
    held.ask("cancel", 0)
    held.outputs()
    held.build(stream)
    check_equal(held.outputs(), {0: undisturbed("window")[0]})


# --- in this process ---------------------------------------------------------------------------------------------


def inline() -> InlineEngine:
    return InlineEngine(tiny_model(), MeanCodec())  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["cancel", "stop", "set_prompt"])
def test_in_this_process_what_comes_too_late_is_for_no_later_run(what: str) -> None:
    engine, stream = inline(), streams_of("window")[0]
    asked = (NewPrompt(0, "new", 2 * next(iter(stream.conditioning.texts.values()))),) if what == "set_prompt" else ()
    for _ in range(2):
        check_equal(list(engine.run([stream])), {0: undisturbed("window")[0]})
        getattr(engine, what)(0, *asked)
    endless = engine.run([tiny_stream(0, 1, 1.0, num_chunks=None)])
    found = [next(endless) for _ in range(12)]
    for output, (latents, frames) in zip(found, undisturbed("window")[0][:2], strict=False):
        assert torch.equal(output.clean.latents, latents) and torch.equal(output.frames, frames)
    engine.stop(0)
    assert list(endless)[-1].last


def test_in_this_process_the_second_of_an_id_is_not_asked_for_the_first() -> None:
    engine, stream = inline(), streams_of("window")[0]

    def twice() -> Iterator[Stream]:
        yield stream
        engine.cancel(0)
        engine.stop(0)
        yield stream

    found = list(engine.run(twice()))
    half = len(found) // 2
    for outputs in (found[:half], found[half:]):
        check_equal(outputs, {0: undisturbed("window")[0]})


def test_in_this_process_a_later_run_ends_an_earlier_one_and_is_not_touched_by_its_end() -> None:
    engine, endless = inline(), tiny_stream(0, 1, 1.0, num_chunks=None)
    threads = torch.get_num_threads()
    first, second, third = (engine.run([endless]) for _ in range(3))
    next(first)
    next(second)
    engine.stop(0)
    first.close()  # or the garbage collector
    rest = list(islice(second, 20))
    assert rest[-1].last and len(rest) <= 4 and torch.get_num_threads() == threads
    next(third)
    check_equal(list(engine.run([streams_of("window")[0]])), {0: undisturbed("window")[0]})
    with pytest.raises(ConfigError, match="ended by a later one"):
        next(third)
    assert engine.at_work(0) is None


def test_a_prompt_may_come_while_its_video_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    run, told = Running(None, None), list[int]()  # type: ignore[arg-type]
    request = types.SimpleNamespace(params=None, resume=None)
    plan = types.SimpleNamespace(num_chunks=None)

    def asks(*_: object) -> None:
        run.set_prompt(0, 0, "a blue seven")
        told.append(0)

    monkeypatch.setattr(running, "encoded", lambda *_: None)
    monkeypatch.setattr(running, "plan_of", lambda *_: plan)
    monkeypatch.setattr(running, "frames_left", asks)
    assert run._begins(0, request, None) and told  # type: ignore[arg-type]
    (new,) = run._asked.take_prompts(0)
    assert new.prompt == "a blue seven"


def test_a_run_is_ended_by_a_thread_that_holds_the_engines_lock() -> None:
    """A finaliser runs anywhere; whoever asks something holds the run's lock and waits for the engine's."""
    run = Running(None, None)  # type: ignore[arg-type]
    with run._lock:
        ending = threading.Thread(target=run.end, daemon=True)
        ending.start()
        ending.join(10)
        assert not ending.is_alive() and run.is_over
