"""What is asked of a run's videos is for those that are there or still to come, and for no later one of the same id."""

from __future__ import annotations

import pytest
from gangs import Watched, check_equal, streams_of, undisturbed
from helpers import tiny_stream

from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Failed, Finished, Output
from pavdm_dist.engine.runs import Run, Switch
from pavdm_dist.errors import VideoError
from pavdm_dist.method.stream import Stream


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
    assert not held.run._stopping and not held.run._cancelled


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


def test_one_that_is_cancelled_under_way_makes_room_for_the_next_of_its_id() -> None:
    held, stream = Held(), streams_of("window")[0]
    held.build(stream)
    held.outputs(steps=3)
    held.ask("cancel", 0)
    held.ask("cancel", 0)
    held.outputs()
    held.build(stream)
    check_equal(held.outputs(), {0: undisturbed("window")[0]})
