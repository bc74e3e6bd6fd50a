"""When a stage did what: by the machine's clock, or by a GPU's, which is behind the thread that hands it work."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks that become seconds of the machine's monotonic clock, once the device has passed them.

    Args:
        device: what computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._zero, self._began = device, None, 0.0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._zero, self._began = self.mark(), time.monotonic()

    def mark(self) -> Any:
        """The present point of the device's work."""
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, mark: Any) -> float:
        """When that point was reached; waits for it."""
        if self._zero is None:
            return mark
        mark.synchronize()
        return self._began + self._zero.elapsed_time(mark) / 1000

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another; waits for both."""
        if self._zero is None:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000
