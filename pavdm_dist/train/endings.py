"""Signals that end a training run, told to the processes that train by the one that started them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Ctrl-C, a job that is preempted or cancelled, a terminal that closes.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Interrupts that follow so soon are one wish: keys that repeat.
AT_ONCE_S = 2.0


@contextmanager
def heard(tell: Callable[[int], None]) -> Iterator[list[signal.Signals]]:
    """Hands signals on while the block runs; what was told to be ignored (``nohup``) still is.

    Handlers are the main thread's: in another one nothing is heard.

    Args:
        tell: takes the number of the first signal, and of an interrupt of one who has waited; in the main thread, at
            any place of the block.

    Yields:
        All signals that came.
    """
    told: list[signal.Signals] = []
    at = -AT_ONCE_S

    def hear(number: int, _: object) -> None:
        nonlocal at
        # Once it is stopping only one who interrupts it anew, after having waited, changes anything.
        heeded = not told or (number == signal.SIGINT and time.monotonic() - at > AT_ONCE_S)
        told.append(signal.Signals(number))
        if heeded:
            at = time.monotonic()
            tell(number)

    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {number: signal.signal(number, hear) for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
