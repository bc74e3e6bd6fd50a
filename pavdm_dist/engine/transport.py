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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pavdm_dist.engine.messages import HEADER_BYTES, WARM_UP, Header, Layout, Message, check_payload
from pavdm_dist.errors import EngineError, first_line

# Sends to one neighbour that may be under way before the sender waits.
OUTSTANDING = 4
# Layouts of messages that a buffer keeps views for: more than a window has sizes while it grows and drains.
LAYOUTS = 64


class Link(Protocol):
    """One direction between two stages; each end calls only its own half.

    Attributes:
        posts_late: a receive is work for the device, which spins until its message is there. It is posted when all that
            the message depends on has been handed to the device; the unit before it, above all.
    """

    posts_late: bool

    @property
    def bytes_sent(self) -> int:
        """Sender: bytes handed over so far, headers included."""

    def announce(self, headers: Sequence[Header]) -> None:
        """Either end: these messages come next, with others between them that are announced later."""

    def post(self, layout: Layout) -> None:
        """Receiver: get ready for the next message."""

    def receive(self, expected: Header, layout: Layout) -> list[Tensor]:
        """Receiver: the oldest posted message; it holds until the next one is received."""

    def verdict(self) -> Tensor | None:
        """Receiver: whether a message since the last call had another header than expected, where that was not looked
        at when it came; a number on the device, 0 for none."""

    def send(self, header: Header, tensors: Sequence[Tensor], layout: Layout) -> None:
        """Sender: hands the message over without waiting for the receiver."""

    def close(self) -> None:
        """Sender: waits until everything sent has left."""


class LocalLink:
    """A link inside one process (one stage, whose feedback is a message to itself)."""

    posts_late = False

    def __init__(self) -> None:
        self.bytes_sent = 0
        self._messages: deque[tuple[Header, list[Tensor]]] = deque()

    def announce(self, headers: Sequence[Header]) -> None:
        """Nothing to prepare."""

    def post(self, layout: Layout) -> None:
        """Nothing to prepare."""

    def receive(self, expected: Header, layout: Layout) -> list[Tensor]:
        """The oldest message."""
        found, tensors = self._messages.popleft()
        if found != expected:
            raise EngineError(f"link out of order: expected {expected}, received {found}")
        return tensors

    def verdict(self) -> None:
        """Headers are looked at when messages come."""

    def send(self, header: Header, tensors: Sequence[Tensor], layout: Layout) -> None:
        """Queues a copy."""
        check_payload(tensors, layout)
        self._messages.append((header, [tensor.clone() for tensor in tensors]))
        self.bytes_sent += layout.num_bytes

    def close(self) -> None:
        """Nothing is in flight."""


class Buffer:
    """Memory for one message at a time, of any layout.

    Args:
        memory: uint8.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._messages = memory, dict[Layout, Message]()

    @property
    def num_bytes(self) -> int:
        """How long a message may be."""
        return self._memory.numel()

    def message(self, layout: Layout) -> Message:
        """It as a message of a layout, which must not be longer."""
        known = self._messages.get(layout)
        if known is None:
            if len(self._messages) == LAYOUTS:
                self._messages.clear()
            known = self._messages[layout] = Message(layout, self._memory)
        return known


class Buffers:
    """Message buffers that are used again; the largest in use sets what is held.

    Args:
        device: where they live.
        pinned: in main memory that GPUs copy from and to by themselves.
        most: free ones that are kept.
    """

    def __init__(self, device: torch.device, pinned: bool, most: int) -> None:
        self._device, self._pinned, self._most = device, pinned, most
        self._free: list[Buffer] = []

    def take(self, num_bytes: int) -> Buffer:
        """One of at least so many bytes."""
        fitting = [place for place, buffer in enumerate(self._free) if buffer.num_bytes >= num_bytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda place: self._free[place].num_bytes))
        return Buffer(torch.empty(num_bytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned))

    def give(self, buffer: Buffer) -> None:
        """It is free again; beyond the number that is kept the smallest one goes."""
        self._free.append(buffer)
        if len(self._free) > self._most:
            self._free.pop(min(range(len(self._free)), key=lambda place: self._free[place].num_bytes))


class PointToPoint(NamedTuple):
    """What begins a message and gives its handle: called as torch.distributed's functions of these names are.

    A process has one rank in torch.distributed's world. Where both ends of a link are threads of one process, over
    groups that are in no such world, a link is given calls that take these.
    """

    isend: Callable[..., Any]
    irecv: Callable[..., Any]


class TorchLink:
    """A link over a torch.distributed process group of gloo, which carries what is in main memory.

    Args:
        group: a group of its own for this direction of traffic.
        peer: global rank of the other end.
        device: where buffers live.
        outstanding: buffers in flight at most, 2 or more.
        timeout_s: longest wait for one message, in seconds.
        pinned: buffers are in pinned memory, because stages compute on GPUs.
        calls: what begins messages; None = torch.distributed's own.
    """

    posts_late = False

    def __init__(
        self,
        group: Any,
        peer: int,
        device: torch.device,
        outstanding: int = OUTSTANDING,
        timeout_s: float = 300,
        pinned: bool = False,
        calls: PointToPoint | None = None,
    ) -> None:
        if calls is None:
            import torch.distributed as dist

            calls = PointToPoint(dist.isend, dist.irecv)
        self.bytes_sent = 0
        self._calls = calls
        self._group, self._peer, self._device = group, peer, device
        self._outstanding, self._timeout = outstanding, timedelta(seconds=timeout_s)
        self._sent: deque[tuple[Any, Buffer]] = deque()
        self._posted: deque[tuple[Any, Buffer]] = deque()
        self._buffers = Buffers(device, pinned, outstanding + 2)
        self._read: Buffer | None = None

    def announce(self, headers: Sequence[Header]) -> None:
        """Headers are made and looked at in main memory, message by message."""

    def post(self, layout: Layout) -> None:
        """Posts a receive of exactly the planned size."""
        buffer = self._buffers.take(layout.num_bytes)
        work = self._begun(self._calls.irecv, buffer.message(layout))
        self._posted.append((work, buffer))

    def receive(self, expected: Header, layout: Layout) -> list[Tensor]:
        """Waits for the oldest posted receive.

        Raises:
            EngineError: the peer died, nothing came within the timeout, or the wrong message came.
        """
        work, buffer = self._posted.popleft()
        self._wait(work, f"rank {self._peer} sent nothing for unit {expected.order}")
        if self._read is not None:
            self._buffers.give(self._read)
        self._read = buffer
        message = buffer.message(layout)
        self._check(message, expected)
        return message.tensors

    def verdict(self) -> Tensor | None:
        """Headers are looked at when messages come."""
        return None

    def send(self, header: Header, tensors: Sequence[Tensor], layout: Layout) -> None:
        """Starts a send; waits only when ``outstanding`` earlier ones have not left."""
        while self._sent and self._sent[0][0].is_completed():
            self._buffers.give(self._sent.popleft()[1])
        if len(self._sent) >= self._outstanding:
            work, buffer = self._sent.popleft()
            self._wait(work, f"rank {self._peer} did not take unit {header.order}")
            self._buffers.give(buffer)
        buffer = self._buffers.take(layout.num_bytes)
        message = buffer.message(layout)
        self._fill(message, header, tensors)
        work = self._begun(self._calls.isend, message)
        self._sent.append((work, buffer))
        self.bytes_sent += layout.num_bytes

    def close(self) -> None:
        """Waits for all sends."""
        while self._sent:
            self._wait(self._sent.popleft()[0], f"rank {self._peer} did not take the last messages")

    def _fill(self, message: Message, header: Header, tensors: Sequence[Tensor]) -> None:
        message.fill(header, tensors)
        if tensors[0].is_cuda:  # gloo reads at once
            torch.cuda.current_stream(tensors[0].device).record_event().synchronize()

    def _check(self, message: Message, expected: Header) -> None:
        message.check(expected)

    def _begun(self, call: Callable[..., Any], message: Message) -> Any:
        try:
            return call(message.data, self._peer, group=self._group)
        except RuntimeError as error:  # a connection that is closed already
            raise EngineError(f"rank {self._peer} is gone: {first_line(error)}") from error

    def _wait(self, work: Any, what: str) -> None:
        try:
            self._until_done(work)
        except RuntimeError as error:  # torch.distributed has no finer type for a closed or silent peer
            raise EngineError(f"{what}: {first_line(error)}") from error

    def _until_done(self, work: Any) -> None:
        work.wait(self._timeout)


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
    if (differ := link.verdict()) is not None and int(differ):  # read here, so that the device has done it
        raise EngineError(f"link out of order: rank {link._peer} sent something else than a first message")
