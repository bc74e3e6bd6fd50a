"""When frames are shown: which of them at the instants of another rate, and where a film stands still.

A frame is shown until the next one, but not for ever: a camera that was paused, a recorder that lost its signal and
an editor's hole leave gaps in the timestamps. What is before one and what is behind it are two shots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pavdm_dist.errors import MediaError
from pavdm_dist.io.picture import remarks
from pavdm_dist.io.reader import VideoReader, open_video

T = TypeVar("T")

# Seconds before a place that a reader jumps to, one after the other: in transport streams a jump lands at the key frame
# behind, and encoders put ten seconds and more between two.
SEEK_EARLIER = (1, 4, 16, 64)


def longest_wait(rate: Fraction) -> Fraction:
    """Seconds that a frame may be shown when ``rate`` frames per second are wanted; what lasts longer is a gap."""
    return max(Fraction(1), 2 / rate)


def last_shown_for(own: Fraction, before: Fraction | None, rate: Fraction) -> Fraction:
    """Seconds that a shot's last frame is shown.

    Args:
        own: as it says itself, 0 = nothing.
        before: how long the frame before it was shown; None = there is none.
        rate: frames per second that are wanted.
    """
    wait = longest_wait(rate)
    return next((found for found in (own, before) if found is not None and 0 < found <= wait), 1 / rate)


def shown_at(frames: Iterable[tuple[Fraction, T]], instants: Iterable[Fraction]) -> Iterator[T]:
    """For every instant the item shown nearest to it, the earlier one where two are equally near.

    Args:
        frames: ``(time, item)``, times rising; read as far as is needed. The last one is shown for ever.
        instants: rising.
    """
    later = iter(frames)
    shown, item = next(later)
    following = next(later, None)
    for instant in instants:
        while following is not None and instant > (shown + following[0]) / 2:
            (shown, item), following = following, next(later, None)
        yield item


@dataclass(frozen=True)
class LastShot:
    """What lies behind the last gap of a film, as far as it was looked at.

    Attributes:
        start: time of its first frame, seconds.
        end: when its last frame stops being shown.
        gap: how long the film stands still before it; None = it does not, or nobody looked that far.
        height, width: as shown.
        remarks: see :func:`~pavdm_dist.io.picture.remarks`.
    """

    start: Fraction
    end: Fraction
    gap: Fraction | None
    height: int
    width: int
    remarks: tuple[str, ...]

    def num_frames(self, rate: Fraction) -> int:
        """Frames at ``rate``, half an interval of tolerance: containers round timestamps."""
        return max(1, int((self.end - self.start) * rate + Fraction(1, 2)))


def last_shot(path: str | Path, rate: Fraction, num_frames: int | None = None) -> LastShot:
    """Looks where a film's last shot begins and ends.

    Args:
        path: the file, local or remote.
        rate: frames per second that are wanted of it.
        num_frames: as many at the end are enough: what lies before is not read where the file can be jumped into.
            None = all, so that a fault anywhere is found.

    Raises:
        MediaError: missing, not a video, or corrupt or truncated where it was read.
    """
    if num_frames is not None:
        seconds = num_frames / rate
        with open_video(path) as reader:
            end = reader.announced_end
        for earlier in SEEK_EARLIER:
            for _ in range(2):  # the file's word for its end, then the end that was found
                if end is None or (place := end - seconds - earlier) <= 0:
                    break
                try:
                    shot = _look(path, rate, place)
                except MediaError:  # a place further before may do; the way from the beginning says what is wrong
                    break
                if shot.gap is not None or shot.end - shot.start >= seconds:
                    return shot
                if end - shot.end <= earlier:  # the word was good enough, and the jump landed late
                    break
                end = shot.end
    return _look(path, rate, None)


def last_pictures(
    path: str | Path, shot: LastShot, rate: Fraction, count: int, size: tuple[int, int] | None
) -> Iterator[np.ndarray]:
    """The last pictures of a film, one after the other; from its last shot.

    Args:
        path: the file, local or remote.
        shot: of :func:`last_shot`.
        rate: frames per second.
        count: at most the shot's ``num_frames(rate)``.
        size: height and width; None = as stored.

    Yields:
        Upright uint8 ``[H, W, 3]``, those shown at ``shot.end - count / rate``, ..., ``shot.end - 1 / rate``.

    Raises:
        MediaError: corrupt.
    """
    with _standing_at(path, max(shot.end - count / rate, shot.start)) as (reader, frames):
        taken: Any = None
        for frame in shown_at(frames, (shot.end - k / rate for k in range(count, 0, -1))):
            if frame is not taken:
                found, taken = reader.picture(frame, size), frame
            yield found


def _look(path: str | Path, rate: Fraction, place: Fraction | None) -> LastShot:
    wait = longest_wait(rate)
    start, shown, gap, before = Fraction(0), None, None, None
    with open_video(path) as reader:
        for time, frame in reader.frames(place):
            if shown is None or time - shown > wait:
                start, gap, before = time, None if shown is None else time - shown, None
            else:
                before = time - shown
            shown, last = time, frame
        end = time + last_shown_for(reader.shown_for(last), before, rate)
        return LastShot(start, end, gap, *reader.shown_size(last), remarks(last))


@contextmanager
def _standing_at(path: str | Path, place: Fraction) -> Iterator[tuple[VideoReader, Iterator[tuple[Fraction, Any]]]]:
    """A reader, and its frames from the one on that is shown at a time."""
    for earlier in (*SEEK_EARLIER, None):
        if earlier is not None and place - earlier <= 0:
            continue
        with open_video(path) as reader:
            frames = reader.frames(None if earlier is None else place - earlier)
            try:
                head = _skip_to(frames, place)
            except MediaError:  # no index, no timestamps, or an open group of pictures: a place further before may do
                if earlier is None:
                    raise
                continue
            if earlier is None or head[0][0] <= place:
                yield reader, chain(head, frames)
                return


def _skip_to(frames: Iterator[tuple[Fraction, T]], place: Fraction) -> list[tuple[Fraction, T]]:
    """The frame shown at a time, and the next one if there is one."""
    shown = next(frames)
    for following in frames:
        if following[0] > place:
            return [shown, following]
        shown = following
    return [shown]
