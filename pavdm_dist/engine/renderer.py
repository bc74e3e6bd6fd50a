"""The driver of one renderer: brings a gang of actors up, admits streams, collects chunks, ends cleanly.

The driver is not in the data path. It seals epochs of the order ahead of the stages and reads finished chunks
from the last stage; between those two it only watches that every actor's loop is still running.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.engine.loop import RunReport
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.order import Join, is_active, join_of, undecided
from pavdm_dist.engine.placement import connect, place
from pavdm_dist.errors import ConfigError, EngineError, PAVDMError
from pavdm_dist.method.microbatches import MicroBatches
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk, WindowSnapshot
from pavdm_dist.models.source import Source

logger = logging.getLogger(__name__)

# Epochs sealed beyond the last finished one. Two keep the stages from ever waiting for the driver.
SEALED_AHEAD = 2
# How long other stages' reports are awaited after the first failure, so that the cause is named, not its echo.
BLAME_WAIT_S = 2.0

# Chunks that may wait for the decoder before no more work is admitted: memory stays constant when decoding is
# the slower part, and the stages themselves never wait.
DECODE_BACKLOG = 8

OnSnapshot = Callable[[int, WindowSnapshot], None]


@dataclass(frozen=True)
class Finished:
    """A clean chunk of a stream; ``frames`` is uint8 ``[t, H, W, 3]``, None in an engine without a decoder."""

    stream: int
    clean: CleanChunk
    frames: Tensor | None


class RayEngine:
    """P stage actors (and a decode actor) on a Ray cluster; use as a context manager.

    Args:
        source: the backbone, which every node opens for itself.
        blocks: block range of each stage (:func:`~pavdm_dist.planning.partition.partition`).
        options: resources and limits.
        codec: of the decode actor; None makes none.

    Attributes:
        devices: models of what the stages compute on.

    Raises:
        EngineError: no cluster, not enough resources, or an actor did not come up.
    """

    def __init__(
        self,
        source: Source | str,
        blocks: Sequence[tuple[int, int]],
        options: EngineOptions,
        codec: Source | str | None = None,
    ) -> None:
        self._options, self._blocks = options, list(blocks)
        self._actors: list[Any] = []
        self.devices: list[str] = []
        self._loops: list[Any] = []
        self._group: Any = None
        self._taking: Any = None
        self.decoder: Any = None
        self._epoch = 0
        self._exhausted = False
        self._last_chunk: dict[int, int] = {}
        # How streams' rows are cut so far, and of adaptive ones the last row whose report is there.
        self._batches: dict[int, MicroBatches] = {}
        self._reported: dict[int, int] = {}
        self._owns_ray = connect(options)
        try:
            self._group = place(options)
            self._start(source, codec)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, streams: Iterable[Stream], streams_in_flight: int = 1, on_snapshot: OnSnapshot | None = None
    ) -> Iterator[Finished]:
        """Samples (and decodes) all streams; yields each stream's chunks in order.

        Args:
            streams: taken one by one as places become free.
            streams_in_flight: videos in the pipeline at a time.
            on_snapshot: called with (stream id, snapshot) at every shift from which a run can go on bit for bit: in
                mode displaced, those that begin with an exact row.

        Raises:
            EngineError: an actor died or a link timed out; the gang is torn down.
            ConfigError: ``streams_in_flight`` below 1.
        """
        import ray

        if streams_in_flight < 1:
            raise ConfigError(f"streams={streams_in_flight}: at least 1")

        waiting, active, undecided_epoch = iter(streams), list[Join](), False
        decoding: deque[tuple[int, CleanChunk, Any]] = deque()
        self._exhausted, done = False, self._epoch - 1
        # A waiting `take` outlives a run: its events belong to whoever reads next.
        self._taking = self._taking or self._actors[-1].take.remote()
        try:
            while True:
                while len(decoding) < DECODE_BACKLOG and self._epoch <= done + SEALED_AHEAD:
                    active = [join for join in active if is_active(join, self._epoch)]
                    undecided_epoch = undecided(active, self._epoch, self._reported)
                    if undecided_epoch:
                        break
                    active += self._admit(waiting, streams_in_flight - len(active))
                    if not active:
                        break
                    self._seal(active)
                if self._exhausted and not undecided_epoch and done == self._epoch - 1 and not decoding:
                    return
                watched = [self._taking, *self._loops, *(ref for _, _, ref in list(decoding)[:1])]
                ready, _ = ray.wait(watched, timeout=1.0)
                if any(loop in ready for loop in self._loops):
                    self._blame()
                if self._taking in ready:
                    events, self._taking = ray.get(self._taking), self._actors[-1].take.remote()
                    for kind, *event in events:
                        if kind == "epoch":
                            done = event[0]
                            continue
                        if kind == "change":
                            self._report(*event)
                            continue
                        stream_id, index, latents, snapshot = event
                        batches = self._batches[stream_id]
                        if on_snapshot is not None and batches.durable(snapshot.row):
                            on_snapshot(stream_id, replace(snapshot, exact_rows=batches.exact_from(snapshot.row)))
                        clean = CleanChunk(index, latents)
                        if self.decoder is None:
                            yield Finished(stream_id, clean, None)
                        else:
                            decoding.append((stream_id, clean, self.decoder.decode.remote(stream_id, latents)))
                            if self._last_chunk.get(stream_id) == index:
                                del self._last_chunk[stream_id]
                                self.decoder.close.remote(stream_id)  # behind the decode: calls run in order
                elif decoding and decoding[0][2] in ready:
                    stream_id, clean, ref = decoding.popleft()
                    # The store's array is read-only; consumers may not expect that.
                    yield Finished(stream_id, clean, torch.from_numpy(ray.get(ref).copy()))
        except ray.exceptions.RayActorError as error:
            self._blame(error)

    def _admit(self, waiting: Iterator[Stream], places: int) -> list[Join]:
        """Prepares up to ``places`` streams on every actor; they join at the epoch that is sealed next."""
        joins: list[Join] = []
        while not self._exhausted and len(joins) < places:
            stream = next(waiting, None)
            if stream is None:
                self._exhausted = True
                break
            join = join_of(stream, self._epoch)
            calls = [actor.prepare.remote(stream) for actor in self._actors]
            if self.decoder is not None:
                calls.append(self.decoder.open.remote(stream.id, stream.warm))
                assert stream.plan.num_chunks is not None
                self._last_chunk[stream.id] = stream.plan.num_chunks - 1
            self._call(calls)
            joins.append(join)
            self._reported.pop(stream.id, None)  # an earlier run's stream may have had this number
            self._batches[stream.id] = stream.batches
        return joins

    def _report(self, stream: int, row: int, change: float) -> None:
        """A shift of an adaptive stream is over: what follows from it enters the log with the next epoch."""
        self._batches[stream] = self._batches[stream].reported(row, change)
        self._reported[stream] = row

    def exact_rows(self, stream: int) -> tuple[int, ...]:
        """Rows that adaptive re-sync has made exact so far."""
        return tuple(sorted(self._batches[stream].exact_rows)) if stream in self._batches else ()

    def _seal(self, active: list[Join]) -> None:
        joins = [join for join in active if join.epoch == self._epoch]
        # The row before this epoch's first one says which latents are on their way back.
        exact = {
            join.stream: self._batches[join.stream].exact_from(join.row_at(self._epoch) - 1)
            for join in active
            if self._batches[join.stream].adaptive
        }
        for actor in self._actors:
            actor.seal.remote(self._epoch, joins, exact)
        self._epoch += 1

    def finish(self) -> list[RunReport]:
        """Lets the loops end after the last sealed epoch and returns every stage's report, in stage order."""
        for actor in self._actors:
            actor.stop.remote(self._epoch)
        return self._call(self._loops)

    def close(self) -> None:
        """Ends all actors and gives the resources back; safe to call twice."""
        import ray

        if not ray.is_initialized():
            return
        for actor in (*self._actors, self.decoder):
            if actor is not None:
                ray.kill(actor)
        self._actors, self._loops, self.decoder = [], [], None
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)
            self._group = None
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def _start(self, source: Source | str, codec: Source | str | None) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from pavdm_dist.engine.actors import CONCURRENT_CALLS, DecodeActor, StageActor

        options, world = self._options, len(self._blocks)

        def actor(cls: type, bundle: int, cpus: float, gpus: float, calls: int) -> Any:
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
            return ray.remote(cls).options(
                num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=calls, scheduling_strategy=strategy
            )

        stage = [
            actor(StageActor, i, options.cpus_per_stage, options.stage_gpus(i), CONCURRENT_CALLS) for i in range(world)
        ]
        for make, blocks in zip(stage, self._blocks, strict=True):
            settings = (options.device, options.threads_per_stage, options.compile, options.dtype)
            self._actors.append(make.remote(source, blocks, *settings))
        if codec is not None:
            make = actor(DecodeActor, options.decoder_bundle, options.cpus_per_decoder, options.decoder_gpus, 1)
            self.decoder = make.remote(codec, options.decoder_threads, options.decoder_device, options.decoder_dtype)
        places = self._call([a.where.remote() for a in self._actors])
        self._places = [f"node {place['node']}, pid {place['pid']}" for place in places]
        self.devices = sorted({place["device"] for place in places})
        host = places[0]["node"]
        port = self._call([self._actors[0].open_store.remote(host)])[0] if world > 1 else 0
        self._call(
            [
                a.connect.remote(rank, world, host, port, 1, options.transport, options.link_timeout_s)
                for rank, a in enumerate(self._actors)
            ]
        )
        if self.decoder is not None:
            self._call([self.decoder.__ray_ready__.remote()])  # a broken codec is said before anything is sampled
        self._loops = [a.run.remote(options.trace) for a in self._actors]
        logger.info("renderer up: %d stage(s), blocks %s", world, self._blocks)

    def _call(self, refs: list[Any]) -> list[Any]:
        """Results of control calls; an actor's failure becomes an :class:`EngineError`."""
        import ray

        try:
            return ray.get(refs)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, PAVDMError):
                raise cause from error
            logger.error("a stage failed:\n%s", error)
            raise EngineError(f"a stage failed: {_last_line(error)}") from error
        except ray.exceptions.RayActorError as error:
            if self._loops:
                self._blame(error)
            raise EngineError(f"an actor did not come up: {_last_line(error)}") from error

    def _blame(self, seen: BaseException | None = None) -> None:
        """Raises for the stage that failed first: a dead actor before a stage whose neighbour died."""
        import ray

        ended, _ = ray.wait(self._loops, num_returns=len(self._loops), timeout=BLAME_WAIT_S)
        died: list[tuple[str, str, BaseException | None]] = []
        failed: list[tuple[str, str, BaseException | None]] = []
        for rank, loop in enumerate(self._loops):
            if loop not in ended:
                continue
            name = f"stage {rank} of {len(self._loops)} ({self._places[rank]})"
            try:
                ray.get(loop)
                failed.append((name, "its loop ended early", None))
            except ray.exceptions.RayActorError as error:
                died.append((name, _last_line(error), error))
            except ray.exceptions.RayTaskError as error:
                logger.error("%s failed:\n%s", name, error)
                echo = isinstance(error.cause, EngineError)
                failed.insert(len(failed) if echo else 0, (name, _last_line(error), error))
        self.close()
        what = "died" if died else "failed"
        for name, reason, cause in (*died, *failed):
            raise EngineError(f"{name} {what}: {reason}") from cause
        reason = "its log has the reason" if seen is None else _last_line(seen)
        raise EngineError(f"the decode actor died although all stages are running: {reason}") from seen


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^pavdm_dist\.errors\.\w+: ", "", lines[-1]) if lines else type(error).__name__
