"""The engine that a process holds: a gang, the thread that drives it, and what waits for whoever consumes.

The driver's thread runs however slow its consumer is: an encoder, an upload or a callback that sleeps does not stop
the stages until ``EngineOptions.backlog_bytes`` of frames wait.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from pavdm_dist.cluster.joining import connect
from pavdm_dist.cluster.metrics import Meters
from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import AtWork, Failed, Finished, GangLost, Grown, Output
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.order import Unit
from pavdm_dist.engine.ray_gang import RayGang
from pavdm_dist.engine.restart import Restarts, rebuilt
from pavdm_dist.engine.runs import Run, Switch
from pavdm_dist.engine.spans import DecodeSpan, RunReport
from pavdm_dist.engine.watchdog import Patience, Watchdog
from pavdm_dist.errors import ConfigError, EngineError, PAVDMError, ResourcesError
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.stream import NewPrompt, Stream
from pavdm_dist.models.source import Source

logger = logging.getLogger(__name__)

# Seconds the driver waits for events before it looks whether something else is to be done.
POLL_S, EAGER_POLL_S = 1.0, 0.1
# Between two questions to the stages, what they did last.
LOOK_S = 0.5
_MEASURED = {"pavdm_engine_recoveries": "gangs that took the place of lost ones"}


class RayEngine:
    """P stage actors (and a decode actor) on a Ray cluster; use as a context manager.

    One thread drives them; :meth:`run` is called from any other, one run at a time.

    Args:
        source: the backbone, which every node opens for itself.
        blocks: block range of each stage (:func:`~pavdm_dist.planning.partition.partition`).
        options: resources and limits.
        codec: of the decode actor; None makes none.
        recut: block ranges for another number of stages, where a restart has room for fewer; None always restarts
            with as many.
        rehearsal: of :class:`RayGang`; streams of other sizes take longer at first.

    Attributes:
        blocks, options: as asked for; after a restart with fewer stages the gang's may differ.
        generation: of the present gang, from 1.
        devices: models of what the stages compute on.
        rehearsal: as given.
        relative_error, kernels: of the gang, see :class:`RayGang`.

    Raises:
        EngineError: no cluster, not enough resources, or an actor did not come up.
    """

    def __init__(
        self,
        source: Source | str,
        blocks: Sequence[tuple[int, int]],
        options: EngineOptions,
        codec: FrameMaker | Source | str | None = None,
        recut: Callable[[int], list[tuple[int, int]]] | None = None,
        rehearsal: Stream | None = None,
    ) -> None:
        self.blocks, self.options, self._recut = list(blocks), options, recut
        self.rehearsal, self.kernels = rehearsal, dict[str, str]()
        self._membership = connect(options.ray_address)

        def gang(stages: int, generation: int, patience_s: float) -> RayGang:
            cut = self.blocks if stages == len(self.blocks) or recut is None else recut(stages)
            chosen = replace(options, num_stages=len(cut), placement_timeout_s=patience_s)
            made = RayGang(
                source, cut, chosen, codec, generation, lambda: self._switch.closing, rehearsal, self.kernels
            )
            self.kernels = made.kernels
            return made

        # Guards all of the below but the driver and its gang, which are the thread's alone.
        self._switch = Switch()
        self._make, self.generation = gang, 1
        try:
            self._gang = gang(len(self.blocks), 1, options.placement_timeout_s)
        except BaseException as error:
            others = self._membership.others
            self._membership.leave()
            if isinstance(error, ResourcesError) and others:
                raise ResourcesError(
                    f"{error}; {others} other pipeline(s) of this process have stages: close them"
                ) from error
            raise
        self.devices = self._gang.devices
        self._restarts = Restarts(options)
        self._meters = Meters(_MEASURED)
        watchdog = Watchdog(Patience(options.stall_factor, options.stall_floor_s, options.stall_limit_s))
        self._driver = Driver(self._gang, 1, options.backlog_bytes, options.max_restarts, watchdog)
        self._run: Run | None = None
        # What stages were seen to have done, for who watches.
        self._looking, self._looked, self._seen = threading.Lock(), -math.inf, tuple[Unit | None, ...]()
        self._asked: deque[Callable[[], None]] = deque()
        self._thread = threading.Thread(
            target=self._drive, name=f"pavdm-driver of {threading.current_thread().name}", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        streams: Iterable[Stream | Failed],
        streams_in_flight: int = 1,
        on_grown: Callable[[int, ResumePoint], None] | None = None,
        on_failed: Callable[[int, PAVDMError], None] | None = None,
    ) -> Iterator[Finished]:
        """Samples (and decodes) all streams; yields each stream's chunks in order.

        Abandoning the iterator (``close()``, or a new run) takes its streams out of the pipeline.

        Args:
            streams: taken one by one, one ahead of free places, in a thread of their own, so that building one holds
                nothing up. A ``Failed`` stands for one that could not be built.
            streams_in_flight: videos in the pipeline at a time.
            on_grown: called with (stream id, resume point) for shifts that finish no chunk, while a window grows.
            on_failed: called with (stream id, error) for a stream that ends early, while others go on; without it the
                error is raised and ends the run.

        Raises:
            EngineError: an actor died or is silent; the gang is torn down.
            ConfigError: ``streams_in_flight`` below 1.
        """
        if streams_in_flight < 1:
            raise ConfigError(f"streams={streams_in_flight}: at least 1")
        run = Run(iter(streams), streams_in_flight, self._switch)
        self._begin(run)
        try:
            while (output := run.next()) is not None:
                if isinstance(output, Finished):
                    yield output
                elif isinstance(output, Grown):
                    if on_grown is not None:
                        on_grown(output.stream, output.resume)
                elif on_failed is None:
                    raise output.error
                else:
                    on_failed(output.stream, output.error)
        finally:
            self._end(run)

    @property
    def is_over(self) -> bool:
        """Whether it was closed, or has ended by a fault: nothing can be run on it any more."""
        return self._switch.over

    @property
    def decoded(self) -> list[DecodeSpan]:
        """Of :meth:`finish`: when chunks were decoded, where a trace is kept."""
        return self._gang.decoded

    @property
    def relative_error(self) -> float | None:
        return self._gang.relative_error

    def at_work(self, stream: int) -> AtWork | None:
        """Where a stream of the running :meth:`run` is, and what each stage did last; None of one that is not here.

        From any thread. Stages are asked at most twice a second, however many watch.
        """
        found = self._driver.at_work(stream)
        if found is None:
            return None
        with self._looking:
            if time.monotonic() - self._looked > LOOK_S and not self.is_over:
                try:
                    self._seen = self._gang.progress()
                except Exception as error:  # the gang may be ending in this moment: nothing depends on what is shown
                    logger.debug("stages cannot be asked: %s", error)
                    self._seen = ()
                self._looked = time.monotonic()
            return replace(found, stages=self._seen)

    def stop(self, stream: int) -> None:
        """Lets an endless stream end: what is in flight is finished, then its last chunk comes."""
        with self._switch:
            self._asked.append(partial(self._driver.stop, stream))
            if self._run is not None:
                self._run.stop(stream)
            self._switch.notify_all()

    def set_prompt(self, stream: int, new: NewPrompt) -> None:
        """Another prompt for a stream of the running :meth:`run`, in force at the next chunk that is born."""
        with self._switch:
            self._asked.append(partial(self._driver.set_prompt, stream, new))
            if self._run is not None:
                self._run.set_prompt(stream, new)
            self._switch.notify_all()

    def cancel(self, stream: int) -> None:
        """Ends a stream of the running :meth:`run` where it is; nothing more of it comes out. Others go on."""
        with self._switch:
            self._asked.append(partial(self._driver.cancel, stream))
            if self._run is not None:
                self._run.cancel(stream)
            self._switch.notify_all()

    def finish(self) -> list[RunReport]:
        """Ends the stages after what they were given, and returns every stage's report, in stage order."""
        done: list[list[RunReport] | BaseException] = []

        def finish() -> None:  # only the thread may
            reports: list[RunReport] | BaseException
            try:
                reports = self._gang.finish()
            except BaseException as error:
                reports = error
            with self._switch:
                done.append(reports)
                self._switch.closing = True  # at once, so that its ended stages are not taken for a loss
                self._switch.notify_all()

        with self._switch:
            self._asked.append(finish)
            self._switch.notify_all()
            self._switch.wait_for(lambda: done or self._switch.over)
        if not done:
            raise self._switch.end()
        if isinstance(done[0], BaseException):
            raise done[0]
        self.close()
        return done[0]

    def close(self) -> None:
        """Ends all actors and gives the resources back; safe to call twice."""
        with self._switch:
            self._switch.closing = True
            self._switch.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._gang.close()
        self._membership.leave()

    # --- the consumer's side -------------------------------------------------------------------------------

    def _begin(self, run: Run) -> None:
        with self._switch:
            if self._run is not None:
                self._run.over = True
                self._asked.append(partial(self._abandon, self._run))
            self._run = run
            self._switch.notify_all()
        threading.Thread(
            target=run.feed, name=f"pavdm-streams of {threading.current_thread().name}", daemon=True
        ).start()

    def _end(self, run: Run) -> None:
        with self._switch:
            run.over = True
            if self._run is run:
                self._run = None
                self._asked.append(partial(self._abandon, run))
            self._switch.notify_all()

    # --- the thread's side ---------------------------------------------------------------------------------

    def _drive(self) -> None:
        try:
            while self._prepare_step():
                run = self._run
                held = 0 if run is None else run.held_bytes
                # Whoever waits for a free place, or for room, must not wait for the pipeline's next event.
                eager = held > 0 or (run is not None and not run.exhausted)
                try:
                    self._give(self._driver.step(EAGER_POLL_S if eager else POLL_S, held))
                except GangLost as loss:
                    self._recover(loss)
        except BaseException as error:
            if isinstance(error, OSError):  # as Ray says it, wherever it finds out
                gone = "the connection to Ray's process on this machine, which any restart would need, is lost"
                error = EngineError(f"{gone}: {error.strerror or error}")
            with self._switch:
                self._switch.error = error
                self._switch.notify_all()
            self._gang.close()

    def _recover(self, loss: GangLost) -> None:
        """Another gang, on what there is; every video goes on from its last shift.

        Raises:
            EngineError: this loss was one too many, or nothing can take the gang's place.
        """
        lost_at = time.monotonic()
        while True:
            delay = self._restarts.delay(loss)
            self._gang.close()
            with self._switch:
                if self._switch.wait_for(lambda: self._switch.closing, delay):
                    return
            self.generation += 1
            try:
                most, wait = len(self.blocks), self.options.node_wait_s
                stages = range(1 if self._recut else most, most + 1)
                self._gang = rebuilt(self._make, stages, self.generation, wait, lambda: self._switch.closing)
                self._driver.adopt(self._gang)
                break
            except GangLost as again:
                loss = again
        self._meters.add("pavdm_engine_recoveries")
        logger.warning("generation %d is up %.1f s after the loss", self.generation, time.monotonic() - lost_at)

    def _prepare_step(self) -> bool:
        """Does what others asked for; waits while there is nothing to do; False at the end."""
        while True:
            with self._switch:
                asked, self._asked = list(self._asked), deque()
            for what in asked:  # may take a while: not under the lock
                what()
            with self._switch:
                if self._switch.closing:
                    return False
                if self._asked:
                    continue
                if self._run is not None:
                    self._run.hand_over(self._driver)
                if not self._driver.idle:
                    return True
                self._switch.wait()

    def _give(self, outputs: Sequence[Output]) -> None:
        with self._switch:
            if self._run is None:
                return
            self._run.take(outputs, self._driver.streams)
            if any(not isinstance(output, Failed) for output in outputs):
                self._restarts.went_on()

    def _abandon(self, run: Run) -> None:
        """Takes what is left of a run out of the pipeline."""
        for stream in run.open:
            self._driver.cancel(stream)
        with self._switch:
            run.clear()
