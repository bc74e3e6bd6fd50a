"""The wire format: a fixed header and the tensors of one unit, packed into one byte buffer.

Sizes are known to both ends from the plan, so a receive is posted before its message exists. The header is
checked on receipt: gloo accepts a short message in a longer buffer in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pavdm_dist.errors import EngineError

ACTIVATION, LATENTS, WARM_UP = 1, 2, 3
HEADER_FIELDS = 8
HEADER_BYTES = HEADER_FIELDS * 8


class Header(NamedTuple):
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

    @cached_property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes on the wire, header included."""
        return HEADER_BYTES + self.numel * self.dtype.itemsize


def stamps_of(headers: Sequence[Header]) -> Tensor:
    """Headers as they are on the wire, uint8 ``[n, HEADER_BYTES]`` in main memory."""
    numbers = torch.tensor(headers, dtype=torch.int64)
    return numbers.view(torch.uint8).view(len(headers), HEADER_BYTES)


def check_payload(tensors: Sequence[Tensor], layout: Layout) -> None:
    """Refuses tensors that are not what was planned.

    Raises:
        EngineError: naming the first of them.
    """
    for tensor, shape in zip(tensors, layout.shapes, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != layout.dtype:
            raise EngineError(f"message of {tuple(tensor.shape)} {tensor.dtype}, planned {shape} {layout.dtype}")


class Message:
    """A buffer as one message of a layout: its header and its tensors are views into it.

    Views are made once, however often the buffer is filled or received into: they cost more than small messages do.

    Args:
        layout: of the message.
        memory: uint8, at least ``layout.num_bytes`` long; None = new memory of this process.

    Attributes:
        data: all of it, uint8 ``[layout.num_bytes]``.
        header: the header's bytes, uint8 ``[HEADER_BYTES]``.
        tensors: the layout's tensors, back to back behind the header.
    """

    def __init__(self, layout: Layout, memory: Tensor | None = None) -> None:
        if memory is None:
            memory = torch.empty(layout.num_bytes, dtype=torch.uint8)
        self._layout = layout
        self.data = memory[: layout.num_bytes]
        self.header = self.data[:HEADER_BYTES]
        self._numbers = None if memory.is_cuda else self.header.view(torch.int64).numpy()
        payload, offset = self.data[HEADER_BYTES:].view(layout.dtype), 0
        self.tensors = list[Tensor]()
        for shape in layout.shapes:
            numel = math.prod(shape)
            self.tensors.append(payload[offset : offset + numel].view(shape))
            offset += numel

    def fill(self, header: Header, tensors: Sequence[Tensor], stamp: Tensor | None = None) -> None:
        """Copies a header and tensors into it.

        Args:
            header: of the message.
            tensors: as planned.
            stamp: the header as a row of :func:`stamps_of` where the buffer is; None, in main memory, makes it.

        Raises:
            EngineError: tensors that are not what was planned.
        """
        check_payload(tensors, self._layout)
        if stamp is None:
            assert self._numbers is not None, "headers reach a GPU as stamps"
            self._numbers[:] = header
        else:
            self.header.copy_(stamp)
        for place, tensor in zip(self.tensors, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)

    def check(self, expected: Header) -> None:
        """Refuses what was received, in main memory, unless its header is the expected one.

        Raises:
            EngineError: it is another.
        """
        assert self._numbers is not None, "headers are compared where they are"
        found = Header(*self._numbers.tolist())
        if found != expected:
            raise EngineError(f"link out of order: expected {expected}, received {found}")
