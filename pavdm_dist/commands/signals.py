"""Signals that end a command: what is being written is finished first, what is finished is said."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C, a job that is preempted or cancelled, a terminal that closes.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ended the command. The exit status is 128 + ``number``, as a shell would say it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, left: str = "") -> None:
        super().__init__(left)
        self.number = number


class Signals:
    """While entered, the first ending signal raises :class:`Stopped` in the main thread, but not within :meth:`shield`.

    Further ones change nothing: what the first has begun, saving and closing, is done.

    Used in another thread it changes nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._shields = 0
        self._told: int | None = None
        self._stopped = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            # What was told to be ignored (nohup, a job in the background) still is.
            heard = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """What is in here is done whole; a signal that comes meanwhile counts at its end."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if not self._shields and self._told is not None:
            number, self._told, self._stopped = self._told, None, True
            raise Stopped(number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._stopped:
            return
        if self._shields:
            self._told = self._told or number
        else:
            self._stopped = True
            raise Stopped(number)
