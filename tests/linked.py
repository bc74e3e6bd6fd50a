"""Stages over real links, each loop in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pavdm_dist.engine.feed import EpochFeed
from pavdm_dist.engine.gpu_links import HostStagedLink
from pavdm_dist.engine.loop import Links, StageLoop
from pavdm_dist.engine.order import LogEntry, is_active, join_of
from pavdm_dist.engine.spans import RunReport
from pavdm_dist.engine.stage import Stage
from pavdm_dist.engine.transport import Link, LocalLink, PointToPoint, TorchLink
from pavdm_dist.method.stream import Stream

CPU = torch.device("cpu")
WAIT = timedelta(seconds=20)
# A process has one place in torch.distributed's world; here every thread has groups of its own.
BY_HAND = PointToPoint(
    lambda tensor, peer, group: group.send([tensor], peer, 0), lambda tensor, peer, group: group.recv([tensor], peer, 0)
)


def groups(world: int, name: str, store: dist.HashStore, wait: timedelta = WAIT) -> list[Any]:
    """One of gloo, as every rank sees it."""
    made: list[Any] = [None] * world

    def join(rank: int) -> None:
        made[rank] = dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, world, wait)

    in_threads(world, join)
    return made


def in_threads(count: int, call: Callable[[int], None], wait_s: float | None = 60) -> None:
    """``call(rank)`` in a thread for every rank; raises the first error of any."""
    errors = list[BaseException]()

    def run(rank: int) -> None:
        try:
            call(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(wait_s)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), f"not over after {wait_s} s"


def alone() -> Links:
    """Of the only stage."""
    return Links(None, None, LocalLink())


def linked(world: int, kind: Callable[[Any, int], Link], wait: timedelta = WAIT) -> list[Links]:
    """Links of every rank: ``kind`` makes one of a group and the rank at its other end."""
    store = dist.HashStore()
    forward, back = (groups(world, name, store, wait) for name in ("forward", "back"))
    return [
        Links(
            kind(forward[rank], rank - 1) if rank else None,
            kind(forward[rank], rank + 1) if rank < world - 1 else None,
            kind(back[rank], world - 1 if rank == 0 else 0) if rank in (0, world - 1) else None,
        )
        for rank in range(world)
    ]


def staged(device: torch.device, timeout_s: float = 20) -> Callable[[Any, int], Link]:
    """The link of stages that compute on a device and whose messages pass through main memory."""

    def through_host(group: Any, peer: int) -> Link:
        pinned = device.type == "cuda"
        return HostStagedLink(TorchLink(group, peer, CPU, timeout_s=timeout_s, pinned=pinned, calls=BY_HAND), device)

    return through_host


def entries(streams: list[Stream]) -> list[LogEntry]:
    """All of them at once, until the last one ends."""
    joins = [join_of(stream, 0) for stream in streams]
    ends = next(epoch for epoch in range(1000) if not any(is_active(join, epoch) for join in joins))
    return [LogEntry(tuple(joins)), *[LogEntry()] * (ends - 1)]


def sampled(stages: list[Stage], links: list[Links], streams: list[Stream]) -> tuple[list[Any], list[RunReport]]:
    """What the last stage tells, and all reports."""
    told, reports = list[Any](), list[RunReport]()
    log = entries(streams)

    def loop(rank: int) -> None:
        feed = EpochFeed()
        for epoch, entry in enumerate(log):
            feed.seal(epoch, entry)
        feed.stop(len(log))
        tell = told.append if stages[rank].last else lambda event: None
        reports.append(StageLoop(stages[rank], links[rank], feed, 1, tell, trace=True).run())

    for stage in stages:
        for stream in streams:
            stage.prepare(stream)
    in_threads(len(stages), loop)
    return told, reports
