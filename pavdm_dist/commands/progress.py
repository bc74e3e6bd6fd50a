"""What a person sees while a command runs: log lines and progress.

The library logs to ``pavdm_dist.*`` and leaves the root logger alone; only the command line calls
:func:`setup_logging`.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import ClassVar, Protocol, TextIO

from tqdm import tqdm

from pavdm_dist.redaction import hide_secrets

logger = logging.getLogger(__name__)


def setup_logging(verbose: bool = False, file: TextIO | None = None) -> None:
    """Send this package's log records to ``file`` (default stderr), without the root logger and without secrets.

    Calling it again replaces the earlier set-up. Tracebacks of faults lose secrets, too, in whatever thread they are;
    hooks that are not Python's own are left alone.
    """
    package = logging.getLogger("pavdm_dist")
    handler = logging.StreamHandler(file)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    package.handlers = [handler]
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
    package.propagate = False
    sys.excepthook = _excepthook
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _thread_excepthook
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisablehook


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(hide_secrets("".join(traceback.format_exception(kind, error, trace))))


def _thread_excepthook(fault: threading.ExceptHookArgs) -> None:
    if fault.exc_type is SystemExit or fault.exc_value is None or sys.stderr is None:  # as Python's own
        return
    name = "an unknown thread" if fault.thread is None else f"thread {fault.thread.name}"
    sys.stderr.write(hide_secrets(f"Exception in {name}:\n"))
    _excepthook(fault.exc_type, fault.exc_value, fault.exc_traceback)


def _unraisablehook(fault: sys.UnraisableHookArgs) -> None:
    if fault.exc_value is None or sys.stderr is None:
        return
    sys.stderr.write(hide_secrets(f"{fault.err_msg or 'Exception ignored in'}: {fault.object!r}\n"))
    _excepthook(fault.exc_type, fault.exc_value, fault.exc_traceback)


class Progress(Protocol):
    """What is told while videos are made; made with the arguments of :class:`ChunkProgress`."""

    def found(self, frames: int) -> None:
        """See :meth:`ChunkProgress.found`."""

    def chunk(self, stream: int, index: int, frames: int) -> None:
        """See :meth:`ChunkProgress.chunk`."""

    def close(self) -> None:
        """No more is told."""


class ChunkProgress:
    """Progress of one or several videos, told chunk by chunk.

    On a terminal one bar with frames, seconds of video per minute and time left; elsewhere one log line a chunk.

    Args:
        total_frames: new frames of *one* video.
        fps: frames per second of the output, to count seconds of video.
        num_videos: videos this bar covers.
        file: where the bar goes; default stderr.
        clock: seconds, monotonic (tests give their own).
    """

    # Whether a terminal gets a bar.
    draws: ClassVar[bool] = True

    def __init__(
        self,
        total_frames: int,
        fps: float,
        num_videos: int = 1,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # None where standard error was closed when the program was started.
        self._file: TextIO | None = sys.stderr if file is None else file
        self._total = total_frames * num_videos
        self._fps = fps
        self._several = num_videos > 1
        self._clock = clock
        self._start = clock()
        self._found = self._made = 0
        self._bar: tqdm | None = None
        if self.draws and self._file is not None and self._file.isatty():
            layout = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} frames{postfix} [{elapsed}]"
            # A pseudo-terminal may have no rows; tqdm would then draw nothing.
            self._bar = tqdm(total=self._total, file=self._file, bar_format=layout, nrows=20)
            self._bar.set_postfix_str("first chunk on its way")

    def found(self, frames: int) -> None:
        """So many frames, of all videos together, were there already: they count as done, and not for the pace."""
        if frames != self._found:
            self._found = frames
            self._draw()

    def chunk(self, stream: int, index: int, frames: int) -> None:
        """Chunk ``index`` of video ``stream`` (both 0-based) has been decoded into ``frames`` frames."""
        self._made += frames
        rate = self.seconds_per_minute
        left = self._eta()
        pace = f"{rate:.1f} s of video/min, {left} left"
        if self._bar is not None:
            self._draw(pace)
            return
        video = f"video {stream} " if self._several else ""
        logger.info("%schunk %d: %d/%d frames, %s", video, index, self._done, self._total, pace)

    @property
    def _done(self) -> int:
        # The last chunk of a video may be trimmed by the caller or not; the bar never exceeds its total.
        return min(self._found + self._made, self._total)

    def _draw(self, pace: str | None = None) -> None:
        """The bar as things are, where there is one."""
        if self._bar is None:
            return
        try:
            if pace is not None:
                self._bar.set_postfix_str(pace, refresh=False)
            self._bar.n = self._done
            self._bar.refresh()
        except OSError:  # its terminal is closed; the videos go on
            self._bar.disable, self._bar = True, None

    @property
    def seconds_per_minute(self) -> float:
        """Seconds of video rendered per minute so far, all videos together; of new frames alone."""
        elapsed = self._clock() - self._start
        return self._made / self._fps * 60 / elapsed if elapsed > 0 else 0.0

    def close(self) -> None:
        """Leave the bar as it is and give the line back; harmless when called twice."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

    def _eta(self) -> str:
        if not self._made:
            return "?"
        left = (self._clock() - self._start) / self._made * (self._total - self._done)
        hours, rest = divmod(round(left), 3600)
        minutes, seconds = divmod(rest, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _FarmProgress(ChunkProgress):
    """Log lines, and behind each a line for the program of a render farm, which reads standard error as well."""

    draws = False
    line: ClassVar[str]

    def chunk(self, stream: int, index: int, frames: int) -> None:
        super().chunk(stream, index, frames)
        self._draw()

    def _draw(self, pace: str | None = None) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # nobody listens any more; the videos go on
            self._file.write(self.line.format(percent=100 * self._done / max(1, self._total)) + "\n")
            self._file.flush()


class OpenJDProgress(_FarmProgress):
    """``openjd_progress: 42.0``: Open Job Description, so AWS Deadline Cloud."""

    line = "openjd_progress: {percent:.1f}"


class DeadlineProgress(_FarmProgress):
    """``Progress: 42%``: Thinkbox Deadline's plugin of command lines, and others that look for a percentage."""

    line = "Progress: {percent:.0f}%"


# By the setting ``progress``.
PROGRESS: dict[str, type[ChunkProgress]] = {
    "auto": ChunkProgress,
    "openjd": OpenJDProgress,
    "deadline": DeadlineProgress,
}
