"""The processes that train together."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.train.zero import join_group


@dataclass(frozen=True)
class World:
    """The processes as ``torchrun``, DeepSpeed's launcher or Ray Train started them; one without any of these.

    Attributes:
        rank, size: this process and how many there are.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def agree(self, value: int) -> int:
        """The first process' ``value``, on every process: what the clock decides must be decided once."""
        if self.size == 1:
            return value
        told = torch.tensor(value, device=self.device)
        torch.distributed.broadcast(told, 0)
        return int(told)

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


def launched_size() -> int:
    """How many processes a launcher says it started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_world(timeout_seconds: float = 1800.0) -> World:
    """Starts ``torch.distributed`` through DeepSpeed, or takes over the group that is there.

    Args:
        timeout_seconds: of a collective; a process that is gone ends the others after this long.

    Raises:
        ConfigError: a launcher set some of its variables and not all.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if launched_size() > 1:
        for name in (*alone, "MASTER_PORT"):
            if name not in os.environ:
                raise ConfigError(f"{name} is not set although WORLD_SIZE={launched_size()}: launch with torchrun")
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    cuda = torch.cuda.is_available()
    if cuda:  # before any collective, which would take the first device in every process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if join_group(timeout_seconds, "cuda" if cuda else "cpu") and not cuda:
        # Gloo's threads may still hold tensors of Python's. If the interpreter ends under them the process aborts
        # although all went well (pytorch/pytorch#179291).
        atexit.register(_leave_world)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def _leave_world() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
