"""The processes that train together."""

from __future__ import annotations

import atexit
import datetime
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError, EngineError, PAVDMError
from pavdm_dist.io.storage import disk_errors
from pavdm_dist.train.zero import join_group

T = TypeVar("T")

# What tells that several processes were started as one job, by something that sets none of a launcher's variables.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_TORCHRUN = "launch with torchrun, one per machine (cluster/slurm/train.sbatch does it under Slurm)"


@dataclass(frozen=True)
class World:
    """The processes as ``torchrun``, DeepSpeed's launcher or Ray Train started them; one without any of these.

    Attributes:
        rank, size: this process and how many there are.
        device: where this process computes.
        hosts: the processes' group for what devices need not know; None = the group of all.
    """

    rank: int
    size: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hosts: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def told(self, *wishes: bool) -> list[bool]:
        """Which of some wishes any process has, on every process; no device is waited for."""
        if self.size == 1:
            return list(wishes)
        counts = torch.tensor([float(wish) for wish in wishes])
        torch.distributed.all_reduce(counts, group=self.hosts)
        return [count > 0 for count in counts.tolist()]

    def begin_mean(self, values: Tensor) -> Callable[[], Tensor]:
        """As :meth:`mean`, without waiting; what is given back does, and gives the values in main memory."""
        work = torch.distributed.all_reduce(values, async_op=True) if self.size > 1 else None
        if self.device.type == "cpu":

            def waited() -> Tensor:
                if work is not None:
                    work.wait()
                return values / self.size

            return waited
        if work is not None:
            work.wait()  # of the device's stream, not of this process
        copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copied.copy_(values / self.size, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def arrived() -> Tensor:
            done.synchronize()
            return copied

        return arrived

    def mean(self, values: Tensor) -> Tensor:
        """The processes' mean of ``values``, on every process."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values / self.size

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()

    def gather(self, value: object) -> list[object]:
        """Every process' ``value`` by rank, on every process."""
        found: list[object] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def faults(self, mine: str | None) -> list[str]:
        """What any process has to say against going on, each once, on every process; empty where nothing."""
        return list(dict.fromkeys(str(text) for text in self.gather(mine) if text))

    def of_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives the first process, on every process; the others wait for it.

        Raises:
            PAVDMError, OSError, RuntimeError: it failed; on the first process.
            EngineError: as much, on the others, whose lost connections would bury the first one's words.
        """
        if self.size == 1:
            return make()
        found: T | None = None
        fault: PAVDMError | OSError | RuntimeError | None = None
        if self.first:
            try:
                with disk_errors():
                    found = make()
            except (PAVDMError, OSError, RuntimeError) as error:  # the last is torch's of a disk that is full
                fault = error
        if faults := self.faults(None if fault is None else str(fault) or type(fault).__name__):
            raise fault or EngineError(faults[0])
        return cast(T, self.gather(found)[0])


def launched_size() -> int:
    """How many processes a launcher says it started; 1 without one.

    Raises:
        ConfigError: its variable holds no such number.
    """
    return _number("WORLD_SIZE", 1) or 1


def check_alone() -> None:
    """Refuses to train in this process alone, or to start others from it, where it is one of several of a kind.

    Raises:
        ConfigError: several processes were started without a launcher.
    """
    for name in _TASKS if _number("WORLD_SIZE", 1) is None else ():
        tasks = _number(name, 1)
        if tasks is not None and tasks > 1:
            raise ConfigError(
                f"{name}={tasks}, but WORLD_SIZE is not set: every one of these processes would train by itself;"
                f" {_TORCHRUN}"
            )


def join_world(timeout_seconds: float = 1800.0) -> World:
    """Starts ``torch.distributed`` through DeepSpeed, or takes over the group that is there.

    Args:
        timeout_seconds: of a collective; a process that is gone ends the others after this long.

    Raises:
        ConfigError: a launcher set some of its variables and not all, one of them holds what it cannot, or more
            processes were started on this machine than it has GPUs.
        EngineError: the processes could not be connected.
    """
    size, local = launched_size(), _number("LOCAL_RANK", 0) or 0
    if size > 1:
        _check_launcher(size)
    else:  # whatever else is set is of some other job
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ["LOCAL_RANK"] = str(local)
    cuda = torch.cuda.is_available()
    if cuda:  # before any collective, which would take the first device in every process
        count = torch.cuda.device_count()
        # Other launchers may show every process a device of its own, which all call the first.
        if local >= count and "TORCHELASTIC_RUN_ID" in os.environ:
            raise ConfigError(
                f"LOCAL_RANK={local}: there are {count} GPUs on {platform.node()}, which NCCL lets no two processes"
                f" share; start at most {count} there (launch.processes, or torchrun's --nproc-per-node)"
            )
        torch.cuda.set_device(local % count)
    if join_group(timeout_seconds, "cuda" if cuda else "cpu") and not cuda:
        # Gloo's threads may still hold tensors of Python's. If the interpreter ends under them the process aborts
        # although all went well (pytorch/pytorch#179291).
        atexit.register(_leave_world)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    hosts = None
    if cuda and size > 1:
        limit = datetime.timedelta(seconds=timeout_seconds)
        hosts = torch.distributed.new_group(backend="gloo", timeout=limit)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, hosts)


def several_tasks() -> str:
    """What to say where several processes of one job may have been started without a launcher; else empty."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    return f"; SLURM_NTASKS={tasks}: to train in several processes, {_TORCHRUN}" if tasks not in ("", "1") else ""


def _number(name: str, least: int) -> int | None:
    """A variable of a launcher's; None where it is not set, or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise ConfigError(
            f"{name}={text}: must be a whole number, {least} or more, as a launcher sets it; unset it, or {_TORCHRUN}"
        )
    return int(text)


def _check_launcher(size: int) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"{name} is not set although WORLD_SIZE={size}: {_TORCHRUN}")
    rank, port, address = _number("RANK", 0), _number("MASTER_PORT", 1), os.environ["MASTER_ADDR"]
    if rank is None or rank >= size:
        raise ConfigError(f"RANK={rank}: must be 0 to {size - 1} with WORLD_SIZE={size}; {_TORCHRUN}")
    if port is None or port > 65535:
        raise ConfigError(f"MASTER_PORT={port}: must be 1 to 65535")
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={address}: {platform.node()} knows no such machine ({error.strerror})"
        ) from error


def _leave_world() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
