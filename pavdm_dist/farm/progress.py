"""What a person, or another farm's scheduler, sees while shots are rendered."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

from pavdm_dist.commands.progress import DeadlineProgress, OpenJDProgress

logger = logging.getLogger(__name__)

# Between two lines where there is no terminal.
TELL_S = 10.0


class FarmProgress:
    """A bar on a terminal, else a log line every ten seconds in which something came; and the lines that other farms'
    schedulers read.

    Args:
        fps: frames per second of the shots, to count seconds of video.
        openjd: where ``openjd_progress`` and ``openjd_status`` lines go; None = nowhere.
        deadline: where ``Progress: 42%`` lines go; None = nowhere.
        file: where the bar goes; None = standard error.
        clock: seconds, monotonic (tests give their own).

    Attributes:
        total: new frames of all shots of the manifest.
        before: of these, those that were complete at the start.
    """

    def __init__(
        self,
        fps: float,
        openjd: TextIO | None = None,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        deadline: TextIO | None = None,
    ) -> None:
        # None where standard error was closed when the program was started.
        stream: TextIO | None = sys.stderr if file is None else file
        self.total = self.before = 0
        self._fps, self._openjd, self._deadline, self._clock = fps, openjd, deadline, clock
        self._start = self._told = clock()
        self._said = (0, "")
        self._percent = -1.0
        self._bar: tqdm | None = None
        if stream is not None and stream.isatty():
            layout = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} frames{postfix} [{elapsed}]"
            self._bar = tqdm(total=1, file=stream, bar_format=layout, nrows=20)

    def show(self, frames: int, reached: int, status: str) -> None:
        """Says how far it is.

        Args:
            frames: written by this farm so far, from which its speed follows; those that were lost and made again
                count once more.
            reached: of the shots that were not complete at the start, frames behind which nothing is left to do.
            status: how many shots are where.
        """
        done, elapsed = min(self.before + reached, self.total), self._clock() - self._start
        rate = frames / self._fps * 60 / elapsed if elapsed > 0 else 0.0
        left = (self.total - done) * elapsed / frames if frames else None
        text = f"{status}, {rate:.1f} s of video/min, {_clock_text(left)} left"
        if self._bar is not None:
            try:
                self._bar.total, self._bar.n = max(self.total, 1), done
                self._bar.set_postfix_str(text, refresh=True)
            except OSError:  # its terminal is closed; the shots go on
                self._bar.disable, self._bar = True, None
        elif self._clock() - self._told >= TELL_S and (done, status) != self._said:
            self._told, self._said = self._clock(), (done, status)
            logger.info("%d/%d frames, %s", done, self.total, text)
        percent = round(100 * done / self.total, 1) if self.total else 0.0
        if percent == self._percent:
            return
        self._percent = percent
        with suppress(OSError):  # nobody listens any more; the shots go on
            if self._openjd is not None:
                line = OpenJDProgress.line.format(percent=percent)
                print(f"{line}\nopenjd_status: {text}", file=self._openjd, flush=True)
            if self._deadline is not None:
                print(DeadlineProgress.line.format(percent=percent), file=self._deadline, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is and gives the line back."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()


def _clock_text(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
