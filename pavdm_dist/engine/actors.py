"""Thin Ray actors round plain objects. Ray places, supervises and carries results; tensors of a run go from
stage to stage by torch.distributed and never through Ray.
"""

from __future__ import annotations

import errno
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.cluster.environment import choose_interface, take_on
from pavdm_dist.cluster.metrics import Meters
from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.engine.events import Event, Left, Place
from pavdm_dist.engine.feed import EpochFeed
from pavdm_dist.engine.gpu_links import HostStagedLink, NcclLink
from pavdm_dist.engine.lines import Line, Lines, of_video
from pavdm_dist.engine.loop import Links, StageLoop
from pavdm_dist.engine.order import LogEntry, Unit
from pavdm_dist.engine.rehearsal import Rehearsed, rehearse
from pavdm_dist.engine.spans import RunReport
from pavdm_dist.engine.stage import Stage
from pavdm_dist.engine.transport import Link, LocalLink, TorchLink, warm_up
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.compiling import keep_on_disk
from pavdm_dist.models.devices import DTYPES, check_dtype, choose_device, choose_dtype, device_model
from pavdm_dist.models.kernels import CHOICES
from pavdm_dist.models.source import Source

# Between two looks at how busy a stage is, for who watches the cluster.
MEASURE_S = 10.0
_MEASURED = {
    "pavdm_stage_units": "micro-batches that a stage has run",
    "pavdm_stage_idle_share": "share of the last ten seconds in which a stage computed nothing",
}
# Calls an actor serves at once: its loop, one waiting `take`, and short control calls.
CONCURRENT_CALLS = 4
# The end of a shift and that of its epoch come right after each other; every answer costs the stage's interpreter time.
TOGETHER_S = 0.002


class StageActor:
    """Holds a :class:`Stage` and runs its loop in one long call, whose reference tells the driver it is alive.

    Args:
        source: the backbone, opened here; only this stage's tensors are read.
        blocks: block range.
        device: ``cpu`` or ``cuda``.
        threads: intra-op threads.
        compiled: whether blocks are compiled, as :meth:`rehearse` does.
        dtype: of weights and of what travels between stages, see :func:`~pavdm_dist.models.devices.choose_dtype`.
        environment: of the driver (:func:`~pavdm_dist.cluster.environment.handed_on`).
    """

    def __init__(
        self,
        source: Source | str,
        blocks: tuple[int, int],
        device: str,
        threads: int,
        compiled: bool,
        dtype: str = "auto",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._lines = Lines.of_process()
        take_on(environment or {})
        self._threads = threads
        torch.set_num_threads(threads)
        source = Source.of(source)
        kind = choose_dtype(dtype, choose_device(device), source)
        model = load_backbone(source, blocks, kind, device)
        if compiled:
            keep_on_disk()
            model.compile_repeated_blocks()
        self._stage = Stage(model, blocks, device, kind, graphs=compiled and device == "cuda")
        self._compiled = compiled
        self._feed = EpochFeed()
        self._events: queue.SimpleQueue[Event | Left] = queue.SimpleQueue()
        self._loop: StageLoop | None = None
        self._links = Links(None, None, LocalLink())
        self._generation, self._rank = 0, 0
        self._store: Any = None

    def where(self) -> Place:
        """Node and process of the actor."""
        return _here(self._stage.device)

    def rehearse(self, stream: Stream) -> Rehearsed:
        """Before the links are made: what a run's micro-batches need is loaded, and compiled."""
        torch.set_num_threads(self._threads)
        return rehearse(self._stage, stream, self._compiled)

    def use_kernels(self, chosen: Mapping[str, str]) -> None:
        """Takes over which kernel of attention all stages use for a shape."""
        CHOICES.use(chosen)

    def open_store(self, host: str) -> int:
        """Rank 0: opens the rendezvous store on a free port and returns it. The store lives as long as the actor.

        Args:
            host: address of this node. The store listens there alone, or where the machine does not have it on the
                address that it is translated to.
        """
        from torch.distributed import TCPStore

        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:  # left to itself torch listens on all of the machine's addresses
            listening = socket.create_server((host, 0), family=family)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            # The node's address is translated on its way, to the one that this machine reaches it from.
            listening = socket.create_server((_own_address(host, family), 0), family=family)
        port = listening.getsockname()[1]
        self._store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
        return port

    def connect(
        self, rank: int, world: int, host: str, port: int, generation: int, backend: str, timeout_s: float
    ) -> None:
        """Joins the gang and makes its links; all ranks must call it together."""
        import torch.distributed as dist

        self._generation, self._rank = generation, rank
        if world == 1:
            return
        if backend == "gloo":
            choose_interface(_node())
        timeout = timedelta(seconds=timeout_s)
        store = self._store or dist.TCPStore(host, port, is_master=False, timeout=timeout)
        store = dist.PrefixStore(f"generation{generation}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        # Opposite directions between two ranks must not share a group: without tags their messages could mix.
        forward, feedback = dist.new_group(timeout=timeout), dist.new_group(timeout=timeout)

        device = self._stage.device

        def link(group: Any, peer: int) -> TorchLink:
            if backend == "nccl":
                return NcclLink(group, peer, device, timeout_s=timeout_s)
            # gloo carries what is in host memory only.
            return TorchLink(group, peer, torch.device("cpu"), timeout_s=timeout_s, pinned=device.type == "cuda")

        upstream = link(forward, rank - 1) if rank > 0 else None
        downstream = link(forward, rank + 1) if rank < world - 1 else None
        back = link(feedback, world - 1 if rank == 0 else 0) if rank in (0, world - 1) else None
        if upstream is not None:
            warm_up(upstream, generation, sender=False)
        if downstream is not None:
            warm_up(downstream, generation, sender=True)
        if back is not None:
            warm_up(back, generation, sender=rank != 0)
        links: list[Link | None] = [upstream, downstream, back]
        if backend == "gloo" and device.type == "cuda":
            links = [link and HostStagedLink(link, device) for link in (upstream, downstream, back)]
        self._links = Links(*links)

    def prepare(self, stream: Stream) -> None:
        """Takes a stream in; must be acknowledged by all stages before its join is sealed."""
        with of_video(stream.id):
            self._stage.prepare(stream)

    def seal(self, epoch: int, entry: LogEntry) -> None:
        """Fixes what changes at an epoch."""
        self._feed.seal(epoch, entry)

    def stop(self, epoch: int) -> None:
        """Lets the loop end before ``epoch``."""
        self._feed.stop(epoch)

    def run(self, trace: bool = False) -> RunReport:
        """The stage's loop; returns after :meth:`stop`, raises when a link or the stage fails."""
        torch.set_num_threads(self._threads)  # a property of the calling thread
        self._loop = StageLoop(
            self._stage,
            self._links,
            self._feed,
            self._generation,
            tell=self._events.put if self._stage.last else self._tell_left,
            trace=trace,
        )
        over = threading.Event()
        threading.Thread(target=_measure, args=(self._loop, self._rank, over), name="pavdm-meters", daemon=True).start()
        try:
            return self._loop.run()
        finally:
            over.set()

    def _tell_left(self, event: Event | Left) -> None:
        """Of the other stages nothing else is read."""
        if isinstance(event, Left):
            self._events.put(event)

    def progress(self) -> Unit | None:
        """The unit that was run last."""
        return None if self._loop is None else self._loop.last

    def said(self) -> list[Line]:
        """What was logged here since the last call."""
        return self._lines.take()

    def take(self, wait_s: float = 1.0) -> tuple[list[Event | Left], Unit | None]:
        """Events since the last call, waiting up to ``wait_s`` seconds for the first; and :meth:`progress`."""
        events: list[Event | Left] = []
        try:
            events.append(self._events.get(timeout=wait_s))
            time.sleep(TOGETHER_S)
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events, self.progress()


class DecodeActor:
    """Decodes finished chunks of all streams while the stages go on sampling.

    Calls of the default group run in the order in which they were made; those of the group ``control`` beside them.

    Args:
        source: the codec, or what else makes frames, opened here.
        threads: intra-op threads.
        device: ``cpu`` or ``cuda``.
        dtype: what it computes in.
        environment: of the driver.
        trace: keep when each chunk was decoded.
    """

    def __init__(
        self,
        source: FrameMaker | Source | str,
        threads: int,
        device: str,
        dtype: str = "float32",
        environment: Mapping[str, str] | None = None,
        trace: bool = False,
    ) -> None:
        self._lines = Lines.of_process()
        take_on(environment or {})
        self._threads = threads
        torch.set_num_threads(threads)
        self._device = choose_device(device)
        check_dtype("decoder_dtype", dtype, self._device)
        maker = source if isinstance(source, FrameMaker) else FrameMaker(Source.of(source))
        self._codec = maker.load(self._device, DTYPES[dtype])
        self._decoders: dict[int, Any] = {}
        self._dropped: set[int] = set()
        self._latents = 0
        self._times: list[tuple[int, float, float]] | None = [] if trace else None

    def facts(self) -> tuple[int, int, Place]:
        """Latents that a decoder is warmed on to go on with a stream; frames per latent; where the actor is."""
        return self._codec.receptive_latents(), self._codec.spec.temporal_stride, _here(self._device)

    def open(self, key: int, warm: Tensor | None) -> None:
        """Starts a stream; ``warm`` are latents ``[C, n, h, w]`` that came before its next chunk."""
        torch.set_num_threads(self._threads)  # a property of the calling thread
        if key in self._dropped:
            return
        try:
            with of_video(key):
                self._decoders[key] = decoder = self._codec.decoder()
                for latent in () if warm is None else warm.split(1, dim=1):  # one by one, as in decode
                    if key in self._dropped:
                        return
                    decoder.warm(latent)
                    self._latents += 1
        except Exception as error:  # nobody waits for this call: the first chunk tells it
            self._decoders[key] = error

    def decode(self, key: int, latents: Tensor) -> Any:
        """Latents ``[C, c, h, w]`` of the next chunk -> frames, uint8 numpy ``[t, H, W, 3]``; None if dropped."""
        torch.set_num_threads(self._threads)
        decoder, frames, began = self._decoders.get(key), [], time.time()
        if isinstance(decoder, Exception):
            raise decoder
        for latent in latents.split(1, dim=1):  # one by one, so that it can be seen to work
            if key in self._dropped:
                return None
            assert decoder is not None, "open comes before decode"
            with of_video(key):
                frames.append(decoder.decode(latent).numpy())
            self._latents += 1
        if self._times is not None:
            self._times.append((key, began, time.time()))
        return np.concatenate(frames)

    def close(self, key: int) -> None:
        """Drops a stream's cache, behind all that was asked for it."""
        self._decoders.pop(key, None)
        self._dropped.discard(key)

    def drop(self, key: int) -> None:
        """Control: what waits for a stream is not worth decoding any more; :meth:`close` still follows."""
        self._dropped.add(key)

    def progress(self) -> int:
        """Control: latents decoded so far, of all streams, with those that decoders were warmed on."""
        return self._latents

    def said(self) -> list[Line]:
        """Control: what was logged here since the last call; videos by their keys."""
        return self._lines.take()

    def times(self) -> list[tuple[int, float, float]]:
        """Control: key, begin and end of every chunk, in seconds of the time of day; for a trace alone."""
        return list(self._times or ())


def _measure(loop: StageLoop, rank: int, over: threading.Event) -> None:
    """Tells whoever watches the cluster now and then how busy a stage is, until it is over."""
    meters, units, busy_s, then = Meters(_MEASURED, ("stage",)), 0, 0.0, time.monotonic()
    while not over.wait(MEASURE_S):
        now, stage = time.monotonic(), str(rank)
        meters.add("pavdm_stage_units", loop.units - units, stage=stage)
        meters.set("pavdm_stage_idle_share", max(0.0, 1 - (loop.busy_s - busy_s) / (now - then)), stage=stage)
        units, busy_s, then = loop.units, loop.busy_s, now


def _here(device: torch.device) -> Place:
    log = os.path.realpath("/proc/self/fd/2")
    return Place(_node(), os.getpid(), log, device_model(device))


def _own_address(host: str, family: socket.AddressFamily) -> str:
    """Of this machine, where what goes to ``host`` would leave from; nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.connect((host, 9))
        return str(asking.getsockname()[0])


def _node() -> str:
    """Address of this machine in the cluster."""
    import ray

    return ray.util.get_node_ip_address()
