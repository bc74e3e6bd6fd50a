"""Reading clips: any format PyAV knows, at a wanted rate and size, in memory that only the result takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.encode import export_to_video
from pavdm_dist.io.reader import VideoReader, open_video
from pavdm_dist.io.shots import last_pictures, last_shot, last_shown_for, longest_wait
from pavdm_dist.values.rates import as_rate

__all__ = ["ClipInfo", "export_to_video", "probe", "read_clip"]


@dataclass(frozen=True)
class ClipInfo:
    """What a file says about its video.

    Attributes:
        height, width: as shown, upright, in square pixels.
        fps: average rate.
        num_frames: None when the container does not tell.
        seconds: of the pictures where the container tells, else of its longest stream; None when it tells neither.
    """

    height: int
    width: int
    fps: float
    num_frames: int | None
    seconds: float | None


def probe(path: str | Path) -> ClipInfo:
    """Reads the header and the first frame.

    Raises:
        MediaError: missing, not a video, audio only, or without a readable frame.
    """
    with open_video(path) as reader:
        _, first = next(reader.frames())
        seconds = None if reader.seconds is None else float(reader.seconds)
        return ClipInfo(*reader.shown_size(first), float(reader.rate), reader.num_frames, seconds)


def read_clip(
    path: str | Path,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | str | None = None,
    keep: Literal["first", "last"] = "first",
    temporal_stride: int = 1,
) -> np.ndarray:
    """Reads a clip.

    A film that stands still for more than a second (or two frames at a rate below one) is not one shot: of its first
    or its last one the clip is taken. With ``keep="last"``, ``fps`` and ``num_frames`` what lies before is not read.

    Args:
        path: the file, local or remote.
        num_frames: frames to return; None = all.
        height, width: size to return, both or none: the picture is scaled to cover it and cut to its centre.
        fps: rate to return, a number or a name such as ``30000/1001`` or ``ntsc``: for each of its instants the frame
            shown nearest to it is taken; they are counted from the end that is kept. None = as in the file.
        keep: which end of the clip is wanted.
        temporal_stride: what the codec needs: without ``num_frames`` the number is cut to a multiple of this
            plus one.

    Returns:
        uint8 ``[t, H, W, 3]``, upright.

    Raises:
        MediaError: missing, not a video, audio only, corrupt, truncated, or too short.
        ConfigError: contradictory arguments.
    """
    if (height is None) != (width is None):
        raise ConfigError(f"height={height} and width={width}: give both or none")
    if num_frames is not None and num_frames < 1:
        raise ConfigError(f"num_frames={num_frames}: must be at least 1")
    size = None if height is None or width is None else (height, width)
    rate = None if fps is None else as_rate(fps)
    if keep == "first":
        pictures, gap = _first_pictures(path, rate, num_frames, size)
    elif rate is None:
        pictures, gap = _last_as_stored(path, num_frames, size)
    else:
        shot = last_shot(path, rate, num_frames)
        found, gap = shot.num_frames(rate), shot.gap
        pictures = list(last_pictures(path, shot, rate, min(found, num_frames or found), size))
    found = len(pictures)
    legal = found - (found - 1) % temporal_stride
    if num_frames is not None and found < num_frames:
        at = "" if rate is None else f" at {float(rate):g} fps"
        side = "before" if keep == "first" else "behind"
        where = "" if gap is None else f" {side} a gap of {float(gap):.2f} s in its timestamps"
        raise MediaError(
            f"{path} has {found} frames{at}{where}, {num_frames} are needed; nearest legal number for this clip:"
            f" {legal}"
        )
    if len({shown.shape for shown in pictures}) > 1:
        raise MediaError(f"{path}: the size of its pictures changes on the way; give height and width")
    start = found - (num_frames or legal) if keep == "last" else 0
    return np.stack(pictures[start : start + (num_frames or legal)])


def _first_pictures(
    path: str | Path, rate: Fraction | None, most: int | None, size: tuple[int, int] | None
) -> tuple[list[np.ndarray], Fraction | None]:
    """Pictures up to the film's first gap, and how long that is; None where it was not reached."""
    gaps: list[Fraction] = []
    pictures: list[np.ndarray] = []
    with open_video(path) as reader:
        taken: Any = None
        for frame in islice(_first_shot(reader, rate, gaps), most):
            pictures.append(pictures[-1] if frame is taken else reader.picture(frame, size))
            taken = frame
    return pictures, next(iter(gaps), None)


def _first_shot(reader: VideoReader, rate: Fraction | None, gaps: list[Fraction]) -> Iterator[Any]:
    """Frames nearest to the instants k / rate after the first; the earlier one where two are equally near."""
    frames = reader.frames()
    shown, frame = next(frames)
    start, before, k = shown, None, 0
    for time, later in frames:
        if time - shown > longest_wait(rate or reader.rate):
            gaps.append(time - shown)
            break
        if rate is None:
            yield frame
        while rate is not None and k / rate <= (shown + time) / 2 - start:
            yield frame
            k += 1
        before, shown, frame = time - shown, time, later
    if rate is None:
        yield frame
        return
    end = shown + last_shown_for(reader.shown_for(frame), before, rate)
    # Half an interval of tolerance: containers round timestamps.
    while k == 0 or (k + Fraction(1, 2)) / rate <= end - start:
        yield frame
        k += 1


def _last_as_stored(
    path: str | Path, most: int | None, size: tuple[int, int] | None
) -> tuple[list[np.ndarray], Fraction | None]:
    """Pictures behind the film's last gap at its own rate, and how long that is; None where there is none."""
    pictures: deque[np.ndarray] = deque(maxlen=most)
    gap = shown = None
    with open_video(path) as reader:
        for time, frame in reader.frames():
            if shown is not None and time - shown > longest_wait(reader.rate):
                gap = time - shown
                pictures.clear()
            shown = time
            pictures.append(reader.picture(frame, size))
    return list(pictures), gap
