"""What leaves a device for main memory without anybody waiting for it, and who is told once it is there."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Copies:
    """Tensors on their way to main memory.

    Args:
        hosts: where they go.
        done: a GPU's event behind the copies; None where they are there already.
    """

    def __init__(self, hosts: Sequence[Tensor], done: Any = None) -> None:
        self._hosts, self._done = list(hosts), done

    def take(self) -> list[Tensor]:
        """Waits for them; what is given is ordinary memory, so that the pinned kind is free for the next."""
        if self._done is not None:
            self._done.synchronize()
            self._hosts, self._done = [host.clone() for host in self._hosts], None
        return self._hosts


class Readback:
    """Copies tensors of a device beside what it computes: on a stream of its own, into pinned memory, which torch keeps
    and uses again.

    Args:
        device: the tensors', whose values must not be changed in place later.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensors: Sequence[Tensor]) -> Copies:
        """Begins behind what the device was given so far."""
        if self._stream is None:
            return Copies([tensor.to("cpu", copy=True) for tensor in tensors])
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        hosts = []
        with torch.cuda.stream(self._stream):
            for tensor in tensors:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                hosts.append(host.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._stream)
        return Copies(hosts, _event(self._stream))


class Teller:
    """Tells what has happened when the device has come that far, in order.

    The thread that hands out work is ahead of a GPU; a thread of this object's waits for it. On a CPU, where work is
    done when it has been handed out, everything is told at once.

    Args:
        device: what computes.
        failed: called in that thread with what it raised, after which nothing more is told.
    """

    def __init__(self, device: torch.device, failed: Callable[[BaseException], None]) -> None:
        self._device, self._failed = device, failed
        self._thread: threading.Thread | None = None
        self._waiting: queue.SimpleQueue[tuple[Any, Callable[[], None]] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        if device.type == "cuda":
            self._thread = threading.Thread(target=self._tell, name="pavdm-teller", daemon=True)
            self._thread.start()

    def then(self, tell: Callable[[], None]) -> None:
        """Calls ``tell`` once all is done that the device has been given so far; raises what an earlier one raised."""
        if self._error is not None:
            raise self._error
        if self._thread is None:
            tell()
            return
        self._waiting.put((_event(torch.cuda.current_stream(self._device)), tell))

    def close(self) -> None:
        """Waits until everything is told; raises what was raised meanwhile."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _tell(self) -> None:
        while (entry := self._waiting.get()) is not None:
            event, tell = entry
            try:
                event.synchronize()
                tell()
            except BaseException as error:  # the loop's thread raises it
                self._error = error
                self._failed(error)
                return


def _event(stream: Any) -> Any:
    """Behind what a GPU's stream was given so far; whoever waits for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
