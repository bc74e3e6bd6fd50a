"""Thin Ray actors round plain objects. Ray places, supervises and carries results; tensors of a run go from
stage to stage by torch.distributed and never through Ray.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.engine.loop import EpochFeed, Links, RunReport, StageRunner
from pavdm_dist.engine.order import Join, Unit
from pavdm_dist.engine.stage import RowDone, Stage
from pavdm_dist.engine.transport import HostStagedLink, Link, LocalLink, TorchLink, warm_up
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.devices import DTYPES, check_dtype, choose_device, choose_dtype, device_model
from pavdm_dist.models.source import Source

# Calls an actor serves at once: its loop, one waiting `take`, and short control calls.
CONCURRENT_CALLS = 4


class StageActor:
    """Holds a :class:`Stage` and runs its loop in one long call, whose reference tells the driver it is alive.

    Args:
        source: the backbone, opened here; only this stage's tensors are read.
        blocks: block range.
        device: ``cpu`` or ``cuda``.
        threads: intra-op threads.
        compiled: whether blocks are compiled.
        dtype: of weights and of what travels between stages, see :func:`~pavdm_dist.models.devices.choose_dtype`.
    """

    def __init__(
        self,
        source: Source | str,
        blocks: tuple[int, int],
        device: str,
        threads: int,
        compiled: bool,
        dtype: str = "auto",
    ) -> None:
        self._threads = threads
        torch.set_num_threads(threads)
        source = Source.of(source)
        kind = choose_dtype(dtype, choose_device(device), source)
        model = load_backbone(source, blocks, kind, device)
        if compiled:
            model.compile_repeated_blocks()
        self._stage = Stage(model, blocks, device, kind)
        self._feed = EpochFeed()
        self._events: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self._links = Links(None, None, LocalLink())
        self._generation = 0
        self._store: Any = None

    def where(self) -> dict[str, Any]:
        """Node address, process and device, for placement checks, error messages and the sidecar."""
        import ray

        device = device_model(self._stage.device)
        return {"node": ray.util.get_node_ip_address(), "pid": os.getpid(), "device": device}

    def open_store(self, host: str) -> int:
        """Rank 0: opens the rendezvous store on a free port and returns it. The store lives as long as the actor."""
        from torch.distributed import TCPStore

        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return self._store.port

    def connect(
        self, rank: int, world: int, host: str, port: int, generation: int, backend: str, timeout_s: float
    ) -> None:
        """Joins the gang and makes its links; all ranks must call it together."""
        import torch.distributed as dist

        self._generation = generation
        if world == 1:
            return
        timeout = timedelta(seconds=timeout_s)
        store = self._store or dist.TCPStore(host, port, is_master=False, timeout=timeout)
        store = dist.PrefixStore(f"generation{generation}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        # Opposite directions between two ranks must not share a group: without tags their messages could mix.
        forward, feedback = dist.new_group(timeout=timeout), dist.new_group(timeout=timeout)

        # gloo carries what is in host memory only.
        device = torch.device("cpu") if backend == "gloo" else self._stage.device

        def link(group: Any, peer: int) -> TorchLink:
            return TorchLink(group, peer, device, timeout_s=timeout_s)

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
        if device != self._stage.device:
            links = [link and HostStagedLink(link, self._stage.device) for link in (upstream, downstream, back)]
        self._links = Links(*links)

    def prepare(self, stream: Stream) -> None:
        """Takes a stream in; must be acknowledged by all stages before its join is sealed."""
        self._stage.prepare(stream)

    def seal(self, epoch: int, joins: Sequence[Join], exact: Mapping[int, frozenset[int]] | None = None) -> None:
        """Fixes an epoch's log entries."""
        self._feed.seal(epoch, joins, exact)

    def stop(self, epoch: int) -> None:
        """Lets the loop end before ``epoch``."""
        self._feed.stop(epoch)

    def run(self, trace: bool = False) -> RunReport:
        """The stage's loop; returns after :meth:`stop`, raises when a link or the stage fails."""
        torch.set_num_threads(self._threads)  # a property of the calling thread
        runner = StageRunner(
            self._stage,
            self._links,
            self._feed,
            self._generation,
            emit=self._emit,
            epoch_done=lambda epoch: self._events.put(("epoch", epoch)),
            trace=trace,
        )
        return runner.run()

    def take(self, wait_s: float = 1.0) -> list[tuple]:
        """Last stage: events since the last call, waiting up to ``wait_s`` seconds for the first.

        ``("epoch", e)``, ``("change", stream, row, change)`` or ``("chunk", stream, index, latents, snapshot)``.
        """
        events: list[tuple] = []
        try:
            events.append(self._events.get(timeout=wait_s))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def _emit(self, unit: Unit, done: RowDone) -> None:
        if done.change is not None:
            self._events.put(("change", unit.stream, unit.row, done.change))
        if done.clean is not None:
            self._events.put(("chunk", unit.stream, done.clean.index, done.clean.latents.cpu(), done.snapshot))


class DecodeActor:
    """Decodes finished chunks of all streams while the stages go on sampling.

    Args:
        source: the codec, opened here.
        threads: intra-op threads.
        device: ``cpu`` or ``cuda``.
        dtype: what it computes in.
    """

    def __init__(self, source: Source | str, threads: int, device: str, dtype: str = "float32") -> None:
        from pavdm_dist.codecs.wan import WanCodec

        torch.set_num_threads(threads)
        chosen = choose_device(device)
        check_dtype("decoder_dtype", dtype, chosen)
        self._codec = WanCodec.from_pretrained(source, chosen, DTYPES[dtype])
        self._decoders: dict[int, Any] = {}

    def open(self, stream: int, warm: Tensor | None) -> None:
        """Starts a stream; ``warm`` are latents ``[C, n, h, w]`` that came before its first chunk."""
        self._decoders[stream] = self._codec.decoder()
        if warm is not None:
            self._decoders[stream].warm(warm)

    def decode(self, stream: int, latents: Tensor) -> Any:
        """Latents ``[C, c, h, w]`` of the stream's next chunk -> frames, uint8 numpy ``[t, H, W, 3]``."""
        return self._decoders[stream].decode(latents).numpy()

    def close(self, stream: int) -> None:
        """Drops a stream's cache."""
        self._decoders.pop(stream, None)
