"""The wire format: a fixed header and the tensors of one unit, packed into one byte buffer.

Sizes are known to both ends from the plan, so a receive is posted before its message exists. The header is
checked on receipt: gloo accepts a short message in a longer buffer in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from pavdm_dist.errors import EngineError

ACTIVATION, LATENTS, WARM_UP = 1, 2, 3
HEADER_FIELDS = 8
HEADER_BYTES = HEADER_FIELDS * 8


@dataclass(frozen=True)
class Header:
    """What a message is: all fields are int64 on the wire.

    Attributes:
        generation: which gang of actors sent it; a rebuilt gang never accepts an older one's messages.
        kind: ACTIVATION, LATENTS or WARM_UP.
        order: position of the unit in the run's order.
        stream, row, chunk, branch: the unit; ``chunk`` is ``order.WHOLE`` when the unit is a whole window.
        numel: elements of the payload.
    """

    generation: int
    kind: int
    order: int
    stream: int
    row: int
    chunk: int
    branch: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """Shapes and element type of a message's tensors."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire, header included."""
        return HEADER_BYTES + self.numel * self.dtype.itemsize


def stamps_of(headers: Sequence[Header]) -> Tensor:
    """Headers as they are on the wire, uint8 ``[n, HEADER_BYTES]`` in main memory."""
    numbers = torch.tensor([astuple(header) for header in headers], dtype=torch.int64)
    return numbers.view(torch.uint8).view(len(headers), HEADER_BYTES)


def check_payload(tensors: Sequence[Tensor], layout: Layout) -> None:
    """Refuses tensors that are not what was planned.

    Raises:
        EngineError: naming the first of them.
    """
    for tensor, shape in zip(tensors, layout.shapes, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != layout.dtype:
            raise EngineError(f"message of {tuple(tensor.shape)} {tensor.dtype}, planned {shape} {layout.dtype}")


def pack(
    header: Header,
    tensors: Sequence[Tensor],
    layout: Layout,
    buffer: Tensor | None = None,
    stamp: Tensor | None = None,
) -> Tensor:
    """One uint8 buffer: header, then the tensors back to back.

    Args:
        header: of the message.
        tensors: as planned.
        layout: the plan.
        buffer: what is filled, ``layout.num_bytes`` long; None makes one on the tensors' device.
        stamp: the header as a row of :func:`stamps_of` where the buffer is; None makes it.

    Raises:
        EngineError: tensors that are not what was planned.
    """
    check_payload(tensors, layout)
    if buffer is None:
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=tensors[0].device)
    buffer[:HEADER_BYTES] = stamps_of([header])[0] if stamp is None else stamp
    payload = buffer[HEADER_BYTES:].view(layout.dtype)
    offset = 0
    for tensor, shape in zip(tensors, layout.shapes, strict=True):
        payload[offset : offset + tensor.numel()].view(shape).copy_(tensor, non_blocking=True)
        offset += tensor.numel()
    return buffer


def unpack(buffer: Tensor, expected: Header | None, layout: Layout) -> list[Tensor]:
    """The tensors of a received buffer, as views into it.

    Args:
        buffer: what was received.
        expected: its header; None where that is compared elsewhere.
        layout: the plan.

    Raises:
        EngineError: the header is not the expected one.
    """
    found = expected and Header(*buffer[:HEADER_BYTES].view(torch.int64).tolist())
    if found != expected:
        raise EngineError(f"link out of order: expected {expected}, received {found}")
    tensors, offset = [], 0
    payload = buffer[HEADER_BYTES:].view(layout.dtype)
    for shape in layout.shapes:
        tensors.append(payload[offset : offset + math.prod(shape)].view(shape))
        offset += math.prod(shape)
    return tensors
