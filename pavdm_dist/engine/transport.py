"""Links between neighbouring stages: torch.distributed point to point, or a queue inside one process.

A link is one direction between two stages. Messages arrive in the order in which they were sent, so nothing
is matched by tag (NCCL has none). Two rules keep a ring of stages free of deadlock: a sender holds at most
``outstanding`` buffers and never waits for anything else, and stage 0 posts the receive of the latents that
come back *before* it sends the unit they come back from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from pavdm_dist.engine.messages import HEADER_BYTES, WARM_UP, Header, Layout, pack, unpack
from pavdm_dist.errors import EngineError

# Sends to one neighbour that may be under way before the sender waits.
OUTSTANDING = 4


class Link(Protocol):
    """One direction between two stages; each end calls only its own half."""

    @property
    def bytes_sent(self) -> int:
        """Sender: bytes handed over so far, headers included."""

    def post(self, layout: Layout) -> None:
        """Receiver: get ready for the next message."""

    def receive(self, expected: Header, layout: Layout) -> list[Tensor]:
        """Receiver: the oldest posted message; waits for it."""

    def send(self, header: Header, tensors: Sequence[Tensor], layout: Layout) -> None:
        """Sender: hands the message over without waiting for the receiver."""

    def close(self) -> None:
        """Sender: waits until everything sent has left."""


class LocalLink:
    """A link inside one process (one stage, whose feedback is a message to itself)."""

    def __init__(self) -> None:
        self.bytes_sent = 0
        self._messages: deque[Tensor] = deque()

    def post(self, layout: Layout) -> None:
        """Nothing to prepare."""

    def receive(self, expected: Header, layout: Layout) -> list[Tensor]:
        """The oldest message."""
        return unpack(self._messages.popleft(), expected, layout)

    def send(self, header: Header, tensors: Sequence[Tensor], layout: Layout) -> None:
        """Queues a copy."""
        self._messages.append(pack(header, tensors, layout))
        self.bytes_sent += layout.num_bytes

    def close(self) -> None:
        """Nothing is in flight."""


class TorchLink:
    """A link over a torch.distributed process group (gloo on CPUs, NCCL on GPUs).

    Args:
        group: a group of its own for this direction of traffic.
        peer: global rank of the other end.
        device: where buffers live.
        outstanding: buffers in flight at most, 2 or more.
        timeout_s: longest wait for one message, in seconds.
    """

    def __init__(
        self, group: Any, peer: int, device: torch.device, outstanding: int = OUTSTANDING, timeout_s: float = 300
    ) -> None:
        self.bytes_sent = 0
        self._group, self._peer, self._device = group, peer, device
        self._outstanding, self._timeout = outstanding, timedelta(seconds=timeout_s)
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._posted: deque[tuple[Any, Tensor]] = deque()

    def post(self, layout: Layout) -> None:
        """Posts a receive of exactly the planned size."""
        import torch.distributed as dist

        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self._device)
        work = self._begun(lambda: dist.irecv(buffer, self._peer, group=self._group))
        self._posted.append((work, buffer))

    def receive(self, expected: Header, layout: Layout) -> list[Tensor]:
        """Waits for the oldest posted receive.

        Raises:
            EngineError: the peer died, nothing came within the timeout, or the wrong message came.
        """
        work, buffer = self._posted.popleft()
        self._wait(work, f"rank {self._peer} sent nothing for unit {expected.order}")
        return unpack(buffer, expected, layout)

    def send(self, header: Header, tensors: Sequence[Tensor], layout: Layout) -> None:
        """Starts a send; waits only when ``outstanding`` earlier ones have not left."""
        import torch.distributed as dist

        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        if len(self._sent) >= self._outstanding:
            self._wait(self._sent.popleft()[0], f"rank {self._peer} did not take unit {header.order}")
        buffer = pack(header, tensors, layout)
        work = self._begun(lambda: dist.isend(buffer, self._peer, group=self._group))
        self._sent.append((work, buffer))
        self.bytes_sent += layout.num_bytes

    def close(self) -> None:
        """Waits for all sends."""
        while self._sent:
            self._wait(self._sent.popleft()[0], f"rank {self._peer} did not take the last messages")

    def _begun(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # a connection that is closed already
            raise EngineError(f"rank {self._peer} is gone: {str(error).splitlines()[0]}") from error

    def _wait(self, work: Any, what: str) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:  # torch.distributed has no finer type for a closed or silent peer
            raise EngineError(f"{what}: {str(error).splitlines()[0]}") from error


class HostStagedLink:
    """A link between stages on GPUs whose messages pass through host memory: for gloo, which carries nothing else.

    Args:
        link: with buffers in host memory.
        device: where what is received goes.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link, self._device = link, device

    @property
    def bytes_sent(self) -> int:
        return self._link.bytes_sent

    def post(self, layout: Layout) -> None:
        """As of the link."""
        self._link.post(layout)

    def receive(self, expected: Header, layout: Layout) -> list[Tensor]:
        """The oldest posted message, on the device."""
        return [tensor.to(self._device) for tensor in self._link.receive(expected, layout)]

    def send(self, header: Header, tensors: Sequence[Tensor], layout: Layout) -> None:
        """As of the link; waits for the device to have computed them."""
        self._link.send(header, [tensor.cpu() for tensor in tensors], layout)

    def close(self) -> None:
        """As of the link."""
        self._link.close()


def warm_up(link: TorchLink, generation: int, sender: bool) -> None:
    """First message over a link, in an order fixed by the caller: connections are made before the run starts."""
    layout = Layout(((1,),), torch.float32)
    header = Header(generation, WARM_UP, -1, -1, -1, -1, -1, 1)
    if sender:
        link.send(header, [torch.zeros(1, device=link._device)], layout)
        link.close()
        link.bytes_sent -= HEADER_BYTES + 4
    else:
        link.post(layout)
        link.receive(header, layout)
