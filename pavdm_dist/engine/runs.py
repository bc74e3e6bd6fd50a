"""One call of :meth:`RayEngine.run`, seen from both sides: what is to come, what is under way, what waits.

Streams are taken from their source in a thread of its own, and outputs are taken by whoever consumes, so that neither a
source that thinks nor a consumer that sleeps holds the engine's thread up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from pavdm_dist.engine.asked import Asked, ended_by_a_later_run
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Failed, Output
from pavdm_dist.errors import EngineError, PAVDMError
from pavdm_dist.method.stream import NewPrompt, Stream


class Switch(threading.Condition):
    """Guards what an engine's threads share, and wakes who waits for a change.

    Attributes:
        closing: the engine is being closed.
        error: what ended it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closing = False
        self.error: BaseException | None = None

    @property
    def over(self) -> bool:
        return self.error is not None or self.closing

    def end(self) -> BaseException:
        """What an engine that is over is to raise."""
        return self.error or EngineError("the engine is closed")


class Run:
    """Streams of one run; all but :meth:`next` and :meth:`feed` is called with ``switch`` held.

    Args:
        source: where streams come from.
        places: videos in flight.
        switch: of the engine.

    Attributes:
        places: see above.
        open: ids of the driver's streams that are not over.
        outputs: what waits for the consumer, oldest first.
        held_bytes: of them.
        exhausted: the source has ended.
        over: nobody consumes it any more.
    """

    def __init__(self, source: Iterator[Stream | Failed], places: int, switch: Switch) -> None:
        self._source, self.places, self._switch = source, places, switch
        self.open: set[int] = set()
        self.outputs: deque[Output] = deque()
        self.held_bytes = 0
        self.exhausted, self.over = False, False
        self._error: BaseException | None = None  # what the source raised
        self._wanted = 0  # streams that the driver would take now
        self._built: deque[Stream] = deque()  # taken from the source, not yet the driver's
        self._asked = Asked()  # of streams that the driver has not got yet

    def next(self) -> Output | None:
        """The oldest output, waited for; None when nothing follows.

        Raises:
            ConfigError: another run has taken this one's place.
            BaseException: what the source raised, or what ended the engine.
        """
        switch = self._switch
        with switch:
            while True:
                if self.over:
                    raise ended_by_a_later_run()
                if self.outputs:
                    output = self.outputs.popleft()
                    self.held_bytes -= output.num_bytes
                    switch.notify_all()
                    return output
                if self._error is not None:
                    raise self._error
                if switch.over:
                    raise switch.end()
                if self.exhausted and not self.open and not self._built:
                    return None
                switch.wait()

    def feed(self) -> None:
        """Takes streams from the source as they are wanted, until either ends."""
        switch = self._switch
        try:
            while True:
                with switch:
                    switch.wait_for(lambda: self._wanted > len(self._built) or self.over or switch.over)
                    if self.over or switch.over:
                        return
                stream = next(self._source, None)
                with switch:
                    if stream is None:
                        self.exhausted = True
                    elif isinstance(stream, Failed):
                        self.outputs.append(stream)
                        self._asked.ends(stream.stream)
                    else:
                        self._built.append(stream)
                        self._asked.comes(stream.id)
                    switch.notify_all()
                    if stream is None:
                        return
        except BaseException as error:  # whatever the source raises belongs to whoever consumes
            with switch:
                self._error = error
                switch.notify_all()

    def hand_over(self, driver: Driver) -> None:
        """Gives the driver what was built, and says how many more it would take."""
        driver.places = self.places
        while self._built:
            stream = self._built.popleft()
            self._switch.notify_all()
            if self._asked.is_cancelled(stream.id):
                self._asked.ends(stream.id)
                continue
            try:
                driver.submit(stream)
                self.open.add(stream.id)
            except PAVDMError as error:
                self.outputs.append(Failed(stream.id, error))
            except ValueError as error:  # two of one id
                self._error = error
            if self._asked.is_stopping(stream.id):
                driver.stop(stream.id)
            for new in self._asked.take_prompts(stream.id):
                driver.set_prompt(stream.id, new)
            if stream.id not in self.open:
                self._asked.ends(stream.id)
        if (wanted := driver.wants) != self._wanted:
            self._wanted = wanted
            self._switch.notify_all()

    def take(self, outputs: Sequence[Output], streams: set[int]) -> None:
        """Keeps what the driver gave for the consumer.

        Args:
            outputs: oldest first; those of a run that was abandoned are dropped.
            streams: ids that the driver still has.
        """
        for output in outputs:
            if output.stream not in self.open:
                continue
            self.outputs.append(output)
            self.held_bytes += output.num_bytes
        still = self.open & streams
        for stream in self.open - still:
            self._asked.ends(stream)
        if outputs or still != self.open:
            self.open = still
            self._switch.notify_all()

    def stop(self, stream: int) -> None:
        """Notes that a stream that is still on its way is to end."""
        if stream not in self.open:
            self._asked.stop(stream)

    def set_prompt(self, stream: int, new: NewPrompt) -> None:
        """Notes a prompt of a stream that is still on its way."""
        if stream not in self.open:
            self._asked.set_prompt(stream, new)

    def cancel(self, stream: int) -> None:
        """Drops a stream, and what of it waits; one that is still on its way as soon as it comes."""
        if stream in self.open:
            self.open.remove(stream)
            self._asked.ends(stream)
        else:
            self._asked.cancel(stream)
        self.outputs = deque(output for output in self.outputs if output.stream != stream)
        self.held_bytes = sum(output.num_bytes for output in self.outputs)

    def clear(self) -> None:
        """Drops all that waits."""
        self._built.clear()
        self.outputs.clear()
