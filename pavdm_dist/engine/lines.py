"""What the processes of a gang log: kept there until the driver asks, and told in its log with the stage and the video.

Ray carries what its processes print, without saying whose it is, and only to who asked for it: a farm's log could not
say which shot a line is of.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

# Lines that a process keeps between two questions, the newest ones; and seconds between these.
KEPT, ASK_S = 200, 5.0
# How long the last lines of a gang that ends are waited for.
ANSWER_S = 0.5
# Number of videos that are over, which no video has.
OVER = -1

_VIDEO: ContextVar[int | None] = ContextVar("pavdm_video", default=None)
_PACKAGE = "pavdm_dist"


@dataclass(frozen=True)
class Line:
    """What was logged: level and logger as ``logging`` has them; ``video`` is the number it is of, None of none."""

    level: int
    logger: str
    text: str
    video: int | None


@contextmanager
def of_video(number: int) -> Iterator[None]:
    """What this thread logs in the block is of a video."""
    token = _VIDEO.set(number)
    try:
        yield
    finally:
        _VIDEO.reset(token)


class Lines(logging.Handler):
    """Keeps what is logged, from ``INFO`` on, until it is taken."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._kept: deque[Line] = deque(maxlen=KEPT)

    @classmethod
    def of_process(cls) -> Lines:
        """Those of this package from now on. Warnings are printed, too, as Python prints those that nobody handles:
        Ray keeps them in a file of the process, whose end is shown when it is lost."""
        package, lines, printed = logging.getLogger(_PACKAGE), cls(), logging.StreamHandler()
        printed.setLevel(logging.WARNING)
        package.addHandler(lines)
        package.addHandler(printed)
        package.setLevel(logging.INFO)
        return lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.exc_info:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            self._kept.append(Line(record.levelno, record.name, text, _VIDEO.get()))
        except Exception:  # whoever logs has other things to do
            self.handleError(record)

    def take(self) -> list[Line]:
        """All since the last call, oldest first. From any thread."""
        found = list[Line]()
        while self._kept:
            found.append(self._kept.popleft())
        return found


@dataclass(frozen=True)
class Speaker:
    """An actor of a gang.

    Attributes:
        name, stage: for people, and for logs.
        ask: a reference to its lines.
        video: the number of the video that it calls so, as far as that is known.
    """

    name: str
    stage: int | str
    ask: Callable[[], Any]
    video: Callable[[int], int | None] = lambda number: number


class Listener:
    """Asks actors now and then what they logged; of one that does not answer nothing is told, others' lines are."""

    def __init__(self) -> None:
        self._asked: list[tuple[Speaker, Any]] = []
        self._next = 0.0

    def listen(self, speakers: Callable[[], Iterable[Speaker]]) -> None:
        """To be called again and again; never waits."""
        if self._asked:
            self._hear(0.0)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + ASK_S
            silent = {speaker.stage for speaker, _ in self._asked}
            self._asked += [(speaker, speaker.ask()) for speaker in speakers() if speaker.stage not in silent]

    def finish(self, speakers: Iterable[Speaker]) -> None:
        """What was logged last; waits a moment."""
        self._asked += [(speaker, speaker.ask()) for speaker in speakers]
        self._hear(ANSWER_S)
        self._asked.clear()

    def _hear(self, timeout: float) -> None:
        import ray

        refs = [ref for _, ref in self._asked]
        ready = set(ray.wait(refs, num_returns=len(refs), timeout=timeout)[0]) if refs else set()
        heard, self._asked = self._asked, [(speaker, ref) for speaker, ref in self._asked if ref not in ready]
        for speaker, ref in heard:
            if ref not in ready:
                continue
            try:
                tell(ray.get(ref), speaker)
            except ray.exceptions.RayError:  # it is dead, which those who wait for it will hear
                continue


def tell(lines: Iterable[Line], speaker: Speaker) -> None:
    """Logs lines of an actor here, with whose they are."""
    for line in lines:
        video = line.video
        if video is not None and (video := speaker.video(video)) is None:
            video = OVER  # a line of no video would be taken for one of all
        logger = logging.getLogger(line.logger)
        logger.log(line.level, "%s: %s", speaker.name, line.text, extra={"stage": speaker.stage, "video": video})
