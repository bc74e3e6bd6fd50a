"""Tasks in this process, in several, or on a Ray cluster; results come back as they are ready."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import wait as wait_for_end
from typing import Any

from pavdm_dist.cluster.starting import importing_alike
from pavdm_dist.errors import ConfigError, EngineError, first_line

# Tasks under way per worker: one that runs and one that waits, so that none is idle.
_AHEAD = 2
# Tasks of a cluster that were told to leave have so long for it, before their neighbour's death is looked into.
_LEAVING_S = 60.0

Function = Callable[..., int]
Task = tuple[Any, ...]  # the arguments of one call
Run = Callable[[Function, Iterable[Task]], Iterator[int]]


@contextmanager
def workers(processes: int, ray_address: str | None, cpus: int, gpu: bool) -> Iterator[Run]:
    """A function that calls ``function(*task)`` for every task and yields the results as they are ready.

    ``function`` must be importable by name. What it raises ends the run, and so does an interrupt; tasks that were not
    begun are dropped, those under way are ended where they are: a task may take hours.

    Args:
        processes: how many tasks at a time; 1 = in this process, one after the other.
        ray_address: cluster to use instead; it decides how many run at a time.
        cpus, gpu: what a task takes of the cluster.

    Raises:
        WorkerDied: a worker died, and what the others were doing is lost; the function can be called again.
        EngineError: the cluster cannot be reached.
    """
    if ray_address is not None:
        with _ray(ray_address, cpus, gpu) as run:
            yield run
    elif processes == 1:
        yield lambda function, tasks: (function(*task) for task in tasks)
    else:
        pool = _Pool(processes)
        try:
            yield pool.run
        except BaseException:
            pool.end_tasks()
            raise
        finally:
            pool.close()


class WorkerDied(EngineError):
    """A worker was ended by what it was doing, or from outside."""


class _Pool:
    """Processes for tasks; new ones where a death has ended all."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        # spawn: forking a process that holds threads (torch, FFmpeg) can lock up.
        self._context = multiprocessing.get_context("spawn")
        self._started: Any = None
        self._over: Any = None

    def run(self, function: Function, tasks: Iterable[Task]) -> Iterator[int]:
        if self._pool is None:
            with importing_alike():  # the process that keeps its semaphores
                self._started, self._over = self._context.SimpleQueue(), self._context.Value("b", 0)
                given = (self._context.Value("i", 0), self._started, self._over)
                self._pool = ProcessPoolExecutor(self._processes, self._context, _begin, given)
        waiting, most = iter(tasks), _AHEAD * self._processes
        pending: set[Future[int]] = set()
        try:
            while True:
                with importing_alike():  # each new task may start a process
                    pending |= {
                        self._pool.submit(_called, function, *task) for task in islice(waiting, most - len(pending))
                    }
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            self.close()
            raise WorkerDied("a worker process died, perhaps for lack of memory; run again to go on") from error

    def end_tasks(self) -> None:
        """Ends what is under way; :meth:`close` waits for that."""
        if self._pool is None:
            return
        # In this order: a process tells its number before it asks whether it may begin.
        self._over.value = 1
        while not self._started.empty():
            with suppress(ProcessLookupError):
                os.kill(self._started.get(), signal.SIGTERM)  # it leaves its task as for any error

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)


_number = 0


def worker_number() -> int:
    """Which of the processes this one is, from 0; 0 too in a process of its own and under Ray, which gives devices."""
    return _number


_is_busy = False
_is_over: Any = None


def _called(function: Function, *task: Any) -> int:
    global _is_busy
    _is_busy = True
    try:
        if _is_over.value:
            raise InterruptedError("the run is over")
        return function(*task)
    finally:
        _is_busy = False


def _begin(counter: Any, started: Any, over: Any) -> None:
    """Sets a worker process up."""
    global _number, _is_over
    _is_over = over
    with counter.get_lock():
        _number, counter.value = counter.value, counter.value + 1
    signal.signal(signal.SIGTERM, _end)
    started.put(os.getpid())
    follow_parent()


def _end(*_: object) -> None:
    """Leaves the task under way; one that waits for a task goes when its pool is closed."""
    if _is_busy:
        raise KeyboardInterrupt


def follow_parent() -> None:
    """Ends this worker with its parent, even a killed one; an interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait_for_end([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _ray(address: str, cpus: int, gpu: bool) -> Iterator[Run]:
    import ray

    from pavdm_dist.cluster.environment import handed_on
    from pavdm_dist.cluster.joining import connect
    from pavdm_dist.cluster.room import may_grow

    membership = connect(address)
    pending: list[Any] = []

    def run(function: Function, tasks: Iterable[Task]) -> Iterator[int]:
        call, told = ray.remote(num_cpus=cpus, num_gpus=int(gpu))(_told), handed_on()
        waiting = iter(tasks)
        while True:
            # Asked each time: a cluster may grow.
            found = ray.cluster_resources()
            at_once = _AHEAD * max(1, int(found.get("GPU", 1) if gpu else found.get("CPU", 1) // cpus))
            # References in a list reach the task as they are: what they stand for is read once the environment is set.
            some = islice(waiting, max(0, at_once - len(pending)))
            pending.extend(call.remote(told, [ray.put((function, task))]) for task in some)
            if not pending:
                return
            done, pending[:] = ray.wait(pending)
            try:
                yield from ray.get(done)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                ended = list(pending)
                for reference in ended:
                    ray.cancel(reference)
                pending.clear()
                if ended:  # what they are in the middle of is not what ended their neighbour
                    ray.wait(ended, num_returns=len(ended), timeout=_LEAVING_S)
                reason = first_line(error)
                raise WorkerDied(f"ray_address={address!r}: {reason}; run again to go on") from error

    try:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = any(node.get("CPU", 0) >= cpus and (not gpu or node.get("GPU", 0) >= 1) for node in resources)
        if not room and not may_grow():
            most = int(max((node.get("CPU", 0) for node in resources), default=0))
            wanted = f"threads={cpus}" + (" with device=cuda" if gpu else "")
            raise ConfigError(f"{wanted}: no node of ray_address={address!r} has that; the largest has {most} CPUs")
        yield run
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise EngineError(f"ray_address={address!r}: {first_line(error)}; run again to go on") from error
    finally:
        for reference in pending:
            ray.cancel(reference)
        membership.leave()


def _told(told: dict[str, str], work: list[Any]) -> int:
    """A task on some node, whose imports must find the driver's environment."""
    import ray

    from pavdm_dist.cluster.environment import take_on

    take_on(told)
    function, task = ray.get(work[0])
    return function(*task)
