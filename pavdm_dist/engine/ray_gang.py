"""One generation of actors on a Ray cluster: brought up together, watched, and lost together.

Knows streams only as far as it hands them on; what becomes of them is the driver's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from pavdm_dist.cluster.room import is_gone
from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.engine.blame import control_results, frozen, lost, video_error
from pavdm_dist.engine.cast import Cast
from pavdm_dist.engine.events import EpochDone, Event, Left, Prepared, Shift
from pavdm_dist.engine.lines import Listener
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.order import LogEntry, Unit
from pavdm_dist.engine.spans import DecodeSpan, RunReport
from pavdm_dist.engine.watchdog import Pauses
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.source import Source

# How long stages may take to say what they did last.
ANSWER_S = 0.5
# Beyond the links' own timeout: a stage that waits for a frozen one should say so first.
FREEZE_MARGIN_S = 3.0


class RayGang:
    """P stage actors and a decode actor (a driver's ``Gang``).

    Args:
        source: the backbone, which every node opens for itself.
        blocks: block range of each stage (:func:`~pavdm_dist.planning.partition.partition`).
        options: resources and limits.
        codec: of the decode actor; None makes none.
        generation: stamped on every message; higher than that of any gang before.
        given_up: asked while actors come up; true ends that.
        stream: what stages rehearse before they are linked (:mod:`pavdm_dist.engine.rehearsal`); None = nothing.
        kernels: that an earlier gang of the run chose, so that bits stay what they were.

    Attributes:
        relative_error: of compiled blocks against plain ones, as the rehearsal found it; None where none are compiled.
        kernels: of attention, by shape, as all stages use them.
        decoded: when chunks were decoded, once a traced gang has finished; by the last decoder, where one was lost.

    Raises:
        EngineError: not enough resources, or an actor did not come up within ``start_timeout_s``.
    """

    def __init__(
        self,
        source: Source | str,
        blocks: Sequence[tuple[int, int]],
        options: EngineOptions,
        codec: FrameMaker | Source | str | None = None,
        generation: int = 1,
        given_up: Callable[[], bool] = lambda: False,
        stream: Stream | None = None,
        kernels: Mapping[str, str] | None = None,
    ) -> None:
        self.decoded: list[DecodeSpan] = []
        self._options = options
        self._cast = Cast(source, blocks, options, codec)
        self._preparing: dict[int, tuple[list[Any], float]] = {}
        self._taken_in = set[Any]()  # of these, what need not be waited for any more: a wait would end at once
        self._events: deque[Event] = deque()
        # What the last stage told; of streams with cached context other stages' parts, asked for once there is one.
        self._told: deque[Event] = deque()
        self._taking_left: dict[int, Any] = {}
        self._left: dict[tuple[int, int], list[Left]] = {}
        self._sealed, self._done, self._moved = -1, -1, time.monotonic()
        self._last: Unit | None = None
        self._pauses = Pauses(options.link_timeout_s, FREEZE_MARGIN_S)
        self._lines = Listener()
        try:
            self._cast.bring_up(generation, given_up, stream, kernels or {})
            self._taking = self._cast.stages[-1].take.remote()
        except BaseException:
            self.close()
            raise

    @property
    def devices(self) -> list[str]:
        """Models of what the stages compute on."""
        return sorted({place.device for place in self._cast.places})

    @property
    def relative_error(self) -> float | None:
        return self._cast.relative_error

    @property
    def kernels(self) -> dict[str, str]:
        return self._cast.kernels

    @property
    def keep(self) -> int:
        return self._cast.keep

    @property
    def frames_per_latent(self) -> int:
        return self._cast.frames_per_latent

    @property
    def decodes(self) -> bool:
        return self._cast.decoding is not None

    def prepare(self, stream: Stream, warm: Tensor | None) -> None:
        import ray

        if self._cast.decoding is not None:
            self._cast.decoding.open(stream.id, warm)
        if stream.is_sampled:
            self._events.append(Prepared(stream.id))
            return
        if stream.plan.context == "cached" and not self._taking_left:
            self._taking_left = {rank: stage.take.remote() for rank, stage in enumerate(self._cast.stages[:-1])}
        try:
            shared = ray.put(stream)
        except ray.exceptions.RayError as error:
            raise lost(self._cast.loops, self._cast.places, error) from error
        self._preparing[stream.id] = [stage.prepare.remote(shared) for stage in self._cast.stages], time.monotonic()

    def seal(self, epoch: int, entry: LogEntry) -> None:
        if self._done == self._sealed:
            self._moved = time.monotonic()  # nothing was to be done so far
        self._sealed = epoch
        for stage in self._cast.stages:
            stage.seal.remote(epoch, entry)

    def renew_decoder(self, warm: Mapping[int, Tensor | None]) -> None:
        import ray
        from ray.util.placement_group import placement_group_table

        assert self._cast.decoding is not None and self._cast.placement is not None
        try:
            table = placement_group_table(self._cast.placement.group)
            node = table["bundles_to_node_id"].get(self._cast.placement.decoder, "")
            gone = table["state"] != "CREATED" or is_gone(node, self._options.ray_address)
        except ray.exceptions.RayError as error:
            raise lost(self._cast.loops, self._cast.places, error) from error
        if gone:  # where Ray counts it still, another actor would wait there for as long as one may take to come up
            cause = "its node was removed"
            raise self._cast.decoding.gone(cause)
        decoding = self._cast.renew_decoder()
        for stream, latents in warm.items():
            decoding.open(stream, latents)

    def decode(self, stream: int, clean: CleanChunk) -> None:
        assert self._cast.decoding is not None
        self._cast.decoding.decode(stream, clean)

    def forget(self, stream: int) -> None:
        if self._cast.decoding is not None:
            self._cast.decoding.forget(stream)

    def poll(self, timeout: float) -> list[Event]:
        import ray

        if not self._events:
            try:
                self._collect(timeout)
            except ray.exceptions.RayError as error:
                raise lost(self._cast.loops, self._cast.places, error) from error
        events = list(self._events)
        self._events.clear()
        return events

    def progress(self) -> tuple[Unit | None, ...]:
        """The unit that each stage has finished last; None of one that did not answer at once. Any thread may ask."""
        import ray

        asked = [stage.progress.remote() for stage in list(self._cast.stages)]
        answered = set(ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)[0]) if asked else set()

        def told(ref: Any) -> Unit | None:
            if ref not in answered:
                return None
            try:
                return ray.get(ref)
            except ray.exceptions.RayError:  # it is dead, which those who wait for it will hear
                return None

        return tuple(map(told, asked))

    def finish(self) -> list[RunReport]:
        """Lets the loops end after the last sealed epoch and returns every stage's report, in stage order."""
        for stage in self._cast.stages:
            stage.stop.remote(self._sealed + 1)
        reports = control_results(self._cast.loops, self._options.link_timeout_s, self._cast.actors, "end")
        self.decoded = [] if self._cast.decoding is None or not self._options.trace else self._cast.decoding.spans()
        return reports

    def close(self) -> None:
        """Ends all actors and gives the resources back; safe to call twice."""
        import ray

        if not ray.is_initialized():
            return
        # Where the cluster itself is gone nothing can be given back, and nothing needs to be.
        try:
            with suppress(ray.exceptions.RayError, OSError):
                self._lines.finish(self._cast.speakers())
        finally:  # also where whoever waits there is told to stop
            self._cast.disband()

    def _collect(self, timeout: float) -> None:
        """Waits for the first of: the last stage's events, a stage's having taken a stream in, frames, a loop's end."""
        import ray

        prepares = [ref for refs, _ in self._preparing.values() for ref in refs if ref not in self._taken_in]
        watched = [self._taking, *self._taking_left.values(), *self._cast.loops, *prepares]
        watched += self._cast.decoding.awaited if self._cast.decoding else []
        ray.wait(watched, timeout=timeout)
        ready, _ = ray.wait(watched, num_returns=len(watched), timeout=0)
        if self._pauses.stood_still():
            self._excuse()
        if any(loop in ready for loop in self._cast.loops):
            raise lost(self._cast.loops, self._cast.places)
        self._taken_in |= {ref for ref in prepares if ref in ready}
        for stream, (refs, _) in list(self._preparing.items()):
            if self._taken_in.issuperset(refs):
                del self._preparing[stream]
                self._taken_in.difference_update(refs)
                self._events.append(self._prepared(stream, refs))
        if self._taking in ready:
            events, last = ray.get(self._taking)
            self._taking = self._cast.stages[-1].take.remote()
            self._done = max([self._done, *(event.epoch for event in events if isinstance(event, EpochDone))])
            if last != self._last:
                self._last, self._moved = last, time.monotonic()
            self._told.extend(events)
        for rank, taking in list(self._taking_left.items()):
            if taking in ready:
                for event in ray.get(taking)[0]:
                    self._left.setdefault((event.stream, event.row), []).append(event)
                self._taking_left[rank] = self._cast.stages[rank].take.remote()
        self._complete()
        if self._cast.decoding is not None:
            self._events.extend(self._cast.decoding.collect())
        self._lines.listen(self._cast.speakers)
        self._check_silence()

    def _complete(self) -> None:
        """Passes on what the last stage told, in its order, once other stages' parts of it are there."""
        others = len(self._cast.stages) - 1
        while self._told:
            event = self._told[0]
            if isinstance(event, Shift) and event.snapshot.left and others:
                key = event.stream, event.snapshot.row - 1
                if len(self._left.get(key, ())) < others:
                    return
                event = event.with_left(self._left.pop(key))
            self._told.popleft()
            self._events.append(event)

    def _prepared(self, stream: int, refs: list[Any]) -> Prepared:
        import ray

        for rank, ref in enumerate(refs):
            try:
                ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                return Prepared(stream, video_error(error, "a stage could not take the video in", stream, rank))
        return Prepared(stream)

    def _excuse(self) -> None:
        """Silence up to now is nobody's: this process stood still."""
        self._moved = now = time.monotonic()
        self._preparing = {stream: (refs, now) for stream, (refs, _) in self._preparing.items()}
        if self._cast.decoding is not None:
            self._cast.decoding.excuse()

    def _check_silence(self) -> None:
        """Notices what neither an ended loop nor a link's timeout tells: stages that stand still."""
        limit, now = self._options.link_timeout_s, time.monotonic()
        waiting = {"no unit was finished": self._moved} if self._done < self._sealed else {}
        if self._preparing:
            waiting["a stage did not take a video in"] = min(since for _, since in self._preparing.values())
        for what, since in waiting.items():
            if now - since > limit + FREEZE_MARGIN_S:
                raise frozen(self._cast.stages, self._cast.places, f"{what} for {now - since:.0f} s", limit)
