"""Notices a video that gives nothing any more while the gang is well.

Deaths and silences of actors are the gang's to notice, each with its own limit, and they are every video's. What is
left is one video whose chunk does not come although units and latents are being finished: it is reported after so many
times its own usual time, and ended by name after a limit, so that the others go on and the command comes to an end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

# Chunks that a video's usual time is taken from.
REMEMBERED = 33


@dataclass(frozen=True)
class Patience:
    """When a video that gives no chunk is reported, and when it is ended.

    Attributes:
        factor: it is reported after so many times the median of its own earlier chunks,
        floor_s: but not before so many seconds.
        limit_s: it is ended after so many seconds, never before it would be reported.
    """

    factor: float = 10.0
    floor_s: float = 60.0
    limit_s: float = 3600.0


class Pauses:
    """Tells whoever asks again and again that it stood still itself: a stopped process, a debugger. What was silent
    meanwhile is not to blame.

    Args:
        limit_s: of the silence that is watched for; a quarter of it without a question is a pause,
        floor_s: but nothing shorter than this: that much may pass between two questions.
        clock: seconds, monotonic (tests give their own).
    """

    def __init__(self, limit_s: float, floor_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._shortest, self._clock = max(limit_s / 4, floor_s), clock
        self._asked = clock()

    def stood_still(self) -> bool:
        """Whether there was a pause between the last call and this one."""
        before, self._asked = self._asked, self._clock()
        return self._asked - before > self._shortest


@dataclass
class _Pace:
    since: float
    chunk_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    reported: bool = False
    together: int = 1

    @property
    def usual_s(self) -> float | None:
        """From one block of chunks to the next, whose first one is waited for and the others are not."""
        times = list(self.chunk_seconds)
        size = min(self.together, len(times))
        return median(sum(times[i : i + size]) for i in range(len(times) - size + 1)) if times else None


@dataclass(frozen=True)
class Late:
    """A video that is late: since when, what ``together`` chunks usually take (None: it has given nothing so far),
    whether it is over.

    One that is not ``over`` is told once per chunk.
    """

    stream: int
    seconds: float
    usual_s: float | None
    over: bool
    together: int = 1

    @property
    def usually(self) -> str:
        """What it usually takes, in words to be added to a sentence."""
        if self.usual_s is None:
            return ""
        return f", usually {self.usual_s:.1f} s {'a chunk' if self.together == 1 else f'for {self.together} chunks'}"


class Watchdog:
    """Measures videos that should be giving chunks.

    Args:
        patience: with them.
        clock: seconds, monotonic (tests give their own).
    """

    def __init__(self, patience: Patience, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience, self._clock = patience, clock
        self._paces: dict[int, _Pace] = {}
        self._decoding: deque[int] = deque()
        self._pauses = Pauses(patience.limit_s, clock=clock)

    def starts(self, stream: int, together: int = 1) -> None:
        """A video is taken in, for the first time or by another gang; so many of its chunks become clean together."""
        self._paces.setdefault(stream, _Pace(0.0, together=together)).since = self._clock()

    def handed(self, stream: int) -> None:
        """A chunk of a video was handed to the decoder, which takes all of them in this order."""
        self._decoding.append(stream)

    def gave(self, stream: int) -> None:
        """A video gave a chunk."""
        if stream in self._decoding:
            self._decoding.remove(stream)  # its oldest
        self.shifted(stream)

    def shifted(self, stream: int) -> None:
        """A shift of a video ended that gives no chunk, which costs about as much: its window grows, or a gang repeats
        what another had done."""
        now = self._clock()
        pace = self._paces.setdefault(stream, _Pace(now))
        pace.chunk_seconds.append(now - pace.since)
        pace.since, pace.reported = now, False

    def excuse(self) -> None:
        """Time up to now is nobody's: whoever consumes takes nothing."""
        now = self._clock()
        for pace in self._paces.values():
            pace.since = now

    def anew(self) -> None:
        """What computes was lost; another goes on, and nothing is with a decoder any more."""
        self._decoding.clear()
        self.excuse()

    def forget(self, stream: int) -> None:
        """A video is over."""
        self._paces.pop(stream, None)
        self._decoding = deque(other for other in self._decoding if other != stream)

    def late(self, streams: Iterable[int], held_up: bool = False) -> list[Late]:
        """Videos that have become late, or are over, the longest silent first; to be asked every few seconds.

        Args:
            streams: those that are awaited.
            held_up: the stages get no work, because too much waits for the decoder or the consumer.
        """
        now, found = self._clock(), list[Late]()
        if self._pauses.stood_still():
            self.excuse()
        for stream in streams:
            pace = self._paces.setdefault(stream, _Pace(now))
            is_decoded = bool(self._decoding) and self._decoding[0] == stream
            if (held_up or stream in self._decoding) and not is_decoded:
                pace.since = now  # its turn has not come
            seconds = now - pace.since
            usual = pace.usual_s
            allowed = max(self._patience.floor_s, self._patience.factor * (usual or 0.0))
            over = seconds > max(allowed, self._patience.limit_s)
            # Before the first shift nobody knows what is usual; there is the limit alone.
            if over or (usual is not None and seconds > allowed and not pace.reported):
                pace.reported = True
                found.append(Late(stream, seconds, usual, over, pace.together))
        return sorted(found, key=lambda late: -late.seconds)
