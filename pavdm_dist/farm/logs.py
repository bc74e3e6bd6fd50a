"""What is logged of shots: the last lines of each, and everything as JSON lines with the shot, renderer and stage."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TextIO

from pavdm_dist.commands.terminal import printable
from pavdm_dist.redaction import hide_secrets

logger = logging.getLogger(__name__)

# Lines that a failure record keeps; shots whose lines are kept at a time.
TAIL, _SHOTS = 50, 4096
_SHOT: ContextVar[str | None] = ContextVar("pavdm_shot", default=None)


@contextmanager
def of_shot(id: str) -> Iterator[None]:
    """What this thread logs in the block is of a shot, whoever logs it there."""
    before = _SHOT.get()
    _SHOT.set(id)
    try:
        yield
    finally:  # not by a token: a generator may be ended elsewhere than it was begun
        _SHOT.set(before)


class ShotLog(logging.Handler):
    """Keeps the last lines of every shot that is under way, and writes all as JSON where there is a file.

    A record is of the shot that its ``shot`` attribute names, or that a renderer calls by the number of ``video``, or
    that the thread is busy with (:func:`of_shot`); of those of a renderer's threads that name none, all shots in that
    renderer's hands get a copy: a lost stage concerns each. Whoever logs never hears of an error here: shots are worth
    more than what is said of them.

    Args:
        file: for JSON lines, closed with this; None keeps the tails only. It is given up when it cannot be written, as
            on a full disk.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        super().__init__(logging.INFO)
        self._file = file
        self._tails: dict[str, deque[str]] = {}
        self._of: dict[str, set[str]] = {}
        self._numbers: dict[tuple[str, int], str] = {}  # by renderer and number there, the shots that are begun

    def begun(self, renderer: str, shot: str) -> None:
        """A shot is in a renderer's hands from now on."""
        with self._held:
            self._tails.setdefault(shot, deque(maxlen=TAIL))
            self._of.setdefault(renderer, set()).add(shot)
            while len(self._tails) > _SHOTS:
                self._tails.pop(next(iter(self._tails)))

    def numbered(self, renderer: str, video: int, shot: str) -> None:
        """What is under way calls it so, as long as the renderer has it."""
        with self._held:
            self._numbers[renderer, video] = shot

    def ended(self, renderer: str, shot: str) -> None:
        """It is not any more; its lines stay until it is :meth:`forgotten <forget>`."""
        with self._held:
            for key in [key for key, one in self._numbers.items() if key[0] == renderer and one == shot]:
                del self._numbers[key]
            shots = self._of.get(renderer, set())
            shots.discard(shot)
            if not shots:  # renderers come and go, too
                self._of.pop(renderer, None)

    def tail(self, shot: str) -> tuple[str, ...]:
        """Its last lines, oldest first."""
        with self._held:
            return tuple(self._tails.get(shot, ()))

    def forget(self, shot: str) -> None:
        with self._held:
            self._tails.pop(shot, None)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._emit(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what was left to write may find no room
                file.close()
        super().close()

    def _emit(self, record: logging.LogRecord) -> None:
        renderer = _renderer(record)
        shot, video = getattr(record, "shot", None), getattr(record, "video", None)
        if shot is None:
            shot = _SHOT.get() if video is None else self._numbers.get((renderer, video))
        text = printable(hide_secrets(record.getMessage()))  # or no file could hold the record of its failure
        line = f"{_time(record)} {record.levelname} {text}"
        shots = {shot} if shot is not None else self._of.get(renderer, ()) if video is None else ()
        for id in tuple(shots):
            if (tail := self._tails.get(id)) is not None:
                tail.append(line)
        file = self._file
        if file is None:
            return
        try:
            file.write(json.dumps(_facts(record, renderer, shot, text), ensure_ascii=False) + "\n")
            file.flush()
        except OSError as error:
            self._file = None
            logger.warning("the log beside the shots cannot be written, and ends here: %s", error)
            with suppress(OSError):
                file.close()

    @property
    def _held(self) -> threading.RLock:
        """The lock that :meth:`emit` is called with, too."""
        assert self.lock is not None
        return self.lock


def _facts(record: logging.LogRecord, renderer: str, shot: str | None, text: str) -> dict[str, object]:
    facts = {
        "time": round(record.created, 3),
        "level": record.levelname,
        "message": text,
        "logger": record.name,
        "renderer": renderer or None,
        "shot": shot,
        "stage": getattr(record, "stage", None),
        "error": hide_secrets(logging.Formatter().formatException(record.exc_info)) if record.exc_info else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _renderer(record: logging.LogRecord) -> str:
    """The engine's threads are named after the thread that made them."""
    name = getattr(record, "renderer", None) or (record.threadName or "").rpartition(" of ")[2]
    return str(name) if str(name).startswith("renderer-") else ""


def _time(record: logging.LogRecord) -> str:
    return logging.Formatter(datefmt="%H:%M:%S").formatTime(record, "%H:%M:%S")
