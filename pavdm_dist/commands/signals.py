"""Signals that end a command: what is being written is finished first, what is finished is said."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar, NoReturn

# Ctrl-C, a job that is preempted or cancelled, a terminal that closes.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Signals that follow so soon are one wish: keys that repeat, a launcher that tells every process of a group.
AT_ONCE_S = 2.0


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

    Further ones change nothing: what the first has begun, saving and closing, is done. Entered within another one it is
    that one, from then on. Used in another thread it changes nothing.

    Args:
        of_process: of a whole command, until its process ends. Until it is entered a second time only what comes at
            once after the first signal changes nothing: whoever has waited for a while means it.
    """

    _outer: ClassVar[Signals | None] = None

    def __init__(self, of_process: bool = False) -> None:
        self._of_process, self._heeds_more, self._at = of_process, of_process, 0.0
        self._before: dict[int, Any] = {}
        self._shields = 0
        self._told: int | None = None
        self._stopped = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        if Signals._outer is None:
            Signals._outer = self
            # What was told to be ignored (nohup, a job in the background) still is.
            heard = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        elif Signals._outer is not self:
            Signals._outer._heeds_more = False
        return Signals._outer

    def __exit__(self, *_: object) -> None:
        if Signals._outer is not self:
            return
        Signals._outer = None
        ended = self._of_process and self._stopped
        for number, handler in self._before.items():
            # An interpreter that ends gives handlers back to the system, which would end it in the middle of that.
            signal.signal(number, signal.SIG_IGN if ended else handler)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """What is in here is done whole; a signal that comes meanwhile counts at its end."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if not self._shields and self._told is not None:
            number, self._told = self._told, None
            self._stop(number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._stopped and not (self._heeds_more and time.monotonic() - self._at > AT_ONCE_S):
            return
        if self._shields:
            self._told = self._told or number
        else:
            self._stop(number)

    def _stop(self, number: int) -> NoReturn:
        self._stopped, self._at = True, time.monotonic()
        raise Stopped(number)


def signal_of(interrupt: BaseException) -> int:
    """Number of the signal that an interrupt, or what it was raised from, stands for."""
    found: BaseException | None = interrupt
    while found is not None:
        if isinstance(found, Stopped):
            return found.number
        found = found.__cause__
    return signal.SIGINT
