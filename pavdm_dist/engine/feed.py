"""Sealed epochs on their way to a stage's loop."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from pavdm_dist.engine.order import Join, LogEntry, Unit, epoch_units


@dataclass(frozen=True)
class Epoch:
    """A sealed epoch: what changes at its beginning, and its units in order."""

    number: int
    entry: LogEntry
    units: Sequence[Unit]


class EpochFeed:
    """Sealed epochs, handed from the control thread to the stage's loop in order.

    An epoch that is not sealed is never started: its log entry might still change.
    """

    def __init__(self) -> None:
        self._sealed: dict[int, LogEntry] = {}
        self._log: list[Join] = []
        self._stop_at: int | None = None
        self._broken: BaseException | None = None
        self._changed = threading.Condition()
        self._epoch = 0
        self._order = 0

    def seal(self, epoch: int, entry: LogEntry) -> None:
        """Fixes what changes at ``epoch``; epochs may be sealed in any order of arrival."""
        with self._changed:
            self._sealed[epoch] = entry
            self._changed.notify_all()

    def stop(self, epoch: int) -> None:
        """No epoch from ``epoch`` on will be sealed: the loop ends there."""
        with self._changed:
            self._stop_at = epoch
            self._changed.notify_all()

    def break_off(self, error: BaseException) -> None:
        """What was handed out has failed: whoever asks for more gets the error."""
        with self._changed:
            self._broken = error
            self._changed.notify_all()

    def next(self, block: bool) -> Epoch | None:
        """The next epoch; None at the stop, or (without ``block``) when it is not sealed yet."""
        with self._changed:
            while self._broken is None and self._epoch not in self._sealed:
                if not block or self._stop_at == self._epoch:
                    return None
                self._changed.wait()
            if self._broken is not None:
                raise self._broken
            number, entry = self._epoch, self._sealed.pop(self._epoch)
            self._log = entry.applied(self._log, number)
            units = epoch_units(self._log, number, self._order)
            self._epoch += 1
            self._order += len(units)
            return Epoch(number, entry, units)
