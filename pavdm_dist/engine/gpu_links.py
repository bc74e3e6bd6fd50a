"""Links between stages on GPUs: over NCCL, or over another link whose buffers are in main memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.engine.messages import Header, Layout, Message, stamps_of
from pavdm_dist.engine.transport import OUTSTANDING, Link, PointToPoint, TorchLink
from pavdm_dist.models.devices import to_device


class NcclLink(TorchLink):
    """A link over a group of NCCL: sends and receives are work of the device, for which no thread waits.

    A message that never comes lets the device stand still; the group's own timeout ends the process then, and the
    driver notices by the units that are not finished. Headers are compared on the device, and the result is read once
    an epoch (:meth:`verdict`).
    """

    posts_late = True

    def __init__(
        self,
        group: Any,
        peer: int,
        device: torch.device,
        outstanding: int = OUTSTANDING,
        timeout_s: float = 300,
        calls: PointToPoint | None = None,
    ) -> None:
        super().__init__(group, peer, device, outstanding, timeout_s, calls=calls)
        self._stamps: dict[Header, Tensor] = {}
        self._differ: Tensor | None = None

    def announce(self, headers: Sequence[Header]) -> None:
        """Puts their headers on the device in one copy."""
        if headers:
            rows = to_device(stamps_of(headers), self._device).unbind(0)
            self._stamps.update(zip(headers, rows, strict=True))

    def verdict(self) -> Tensor | None:
        """How many bytes of headers differed since the last call."""
        differ, self._differ = self._differ, None
        return differ

    def _fill(self, message: Message, header: Header, tensors: Sequence[Tensor]) -> None:
        message.fill(header, tensors, self._stamp(header))

    def _check(self, message: Message, expected: Header) -> None:
        differ = (message.header != self._stamp(expected)).sum()
        self._differ = differ if self._differ is None else self._differ + differ

    def _stamp(self, header: Header) -> Tensor:
        known = self._stamps.pop(header, None)
        return to_device(stamps_of([header])[0], self._device) if known is None else known

    def _until_done(self, work: Any) -> None:
        work.wait()  # with a timeout this thread would look once a millisecond; so the device waits


class HostStagedLink:
    """A link between stages on GPUs whose messages pass through host memory: for gloo, which carries nothing else.

    Args:
        link: with buffers in host memory.
        device: where what is received goes.
    """

    posts_late = False

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link, self._device = link, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def bytes_sent(self) -> int:
        return self._link.bytes_sent

    def announce(self, headers: Sequence[Header]) -> None:
        """As of the link."""
        self._link.announce(headers)

    def post(self, layout: Layout) -> None:
        """As of the link."""
        self._link.post(layout)

    def receive(self, expected: Header, layout: Layout) -> list[Tensor]:
        """The oldest posted message, on the device; waits for the copy alone, not for what is computed there."""
        found = self._link.receive(expected, layout)
        if self._stream is None:
            return [tensor.to(self._device) for tensor in found]
        with torch.cuda.stream(self._stream):
            moved = [tensor.to(self._device, non_blocking=True) for tensor in found]
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._stream)
        for tensor in moved:
            tensor.record_stream(here)
        self._stream.synchronize()  # the host's buffer is used again
        return moved

    def verdict(self) -> Tensor | None:
        """As of the link."""
        return self._link.verdict()

    def send(self, header: Header, tensors: Sequence[Tensor], layout: Layout) -> None:
        """As of the link, which waits for the device to have computed them."""
        self._link.send(header, tensors, layout)

    def close(self) -> None:
        """As of the link."""
        self._link.close()
