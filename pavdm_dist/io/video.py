"""Reading clips: any format PyAV knows, at a wanted rate and size, in memory that only the result takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.encode import as_rate, export_to_video
from pavdm_dist.io.storage import exists, is_remote, open_read

__all__ = [
    "ClipInfo",
    "average_rate",
    "decoded_frames",
    "export_to_video",
    "open_video",
    "picture",
    "probe",
    "quarter_turns",
    "read_clip",
]

# FFmpeg plays any text file as an animated terminal.
_NOT_VIDEO = ("tty",)


@dataclass(frozen=True)
class ClipInfo:
    """What a file says about its video.

    Attributes:
        height, width: as shown, after rotation.
        fps: average rate.
        num_frames: None when the container does not tell.
        seconds: None when the container does not tell.
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
    with open_video(path) as (container, stream):
        _, first = next(decoded_frames(path, container, stream))
        height, width = first.height, first.width
        if quarter_turns(first) % 2:
            height, width = width, height
        seconds = container.duration / 1_000_000 if container.duration else None
        return ClipInfo(height, width, float(average_rate(stream)), stream.frames or None, seconds)


def read_clip(
    path: str | Path,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    keep: Literal["first", "last"] = "first",
    temporal_stride: int = 1,
) -> np.ndarray:
    """Reads a clip.

    Args:
        path: the file, local or remote.
        num_frames: frames to return; None = all.
        height, width: size to return, both or none: the picture is scaled to cover it and cut to its centre.
        fps: rate to return: for each of its instants the frame shown nearest to it is taken. None = as in the file.
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
    pictures: deque[np.ndarray] = deque(maxlen=num_frames)
    with open_video(path) as (container, stream):
        frames = decoded_frames(path, container, stream)
        rate = None if fps is None else as_rate(fps)
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        for frame in _resample(frames, rate, 1 / average_rate(stream)):
            pictures.append(picture(frame, size, aspect))
            if keep == "first" and len(pictures) == num_frames:
                break
    found = len(pictures)
    legal = found - (found - 1) % temporal_stride
    if num_frames is not None and found < num_frames:
        at = "" if fps is None else f" at {fps:g} fps"
        raise MediaError(
            f"{path} has {found} frames{at}, {num_frames} are needed; nearest legal number for this clip: {legal}"
        )
    start = found - (num_frames or legal) if keep == "last" else 0
    return np.stack(list(pictures)[start : start + (num_frames or legal)])


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first real video stream.

    Raises:
        MediaError: missing, not a video, or audio only.
    """
    import av

    try:
        if not exists(path) or (not is_remote(path) and not Path(path).is_file()):
            raise MediaError(f"{path}: no such file")
        with open_read(path) as file:
            try:
                container: Any = av.open(file, metadata_errors="replace")
            except (av.FFmpegError, OSError) as error:
                raise MediaError(f"{path} is not a video, or it is truncated: {error.strerror}") from error
            with container:
                yield container, _video_stream(path, container)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error}") from error


def _video_stream(path: str | Path, container: Any) -> Any:
    from av.stream import Disposition

    if container.format.name in _NOT_VIDEO:
        raise MediaError(f"{path} is not a video")
    # The cover of a music file is a video stream with one picture.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if streams:
        return streams[0]
    kinds = sorted({str(stream.type) for stream in container.streams})
    raise MediaError(f"{path} has no video, only {' and '.join(kinds) or 'no stream at all'}")


def decoded_frames(path: str | Path, container: Any, stream: Any) -> Iterator[tuple[Fraction, Any]]:
    """(time in seconds, decoded frame) in showing order; at the end a check that nothing is missing.

    Raises:
        MediaError: corrupt, truncated, or without a frame.
    """
    import av

    count = 0
    step = 1 / average_rate(stream)
    first = end = Fraction(0)
    try:
        for packet in container.demux(stream):
            damaged = packet.is_corrupt
            for frame in () if damaged else packet.decode():
                time = end if frame.pts is None else frame.pts * frame.time_base
                first = first if count else time
                if frame.is_corrupt:
                    damaged = True
                    break
                yield time, frame
                count += 1
                end = time + step
            if damaged:
                raise MediaError(f"{path} is corrupt or truncated after frame {count} ({float(end - first):.2f} s)")
    except av.FFmpegError as error:
        where = f"after frame {count} ({float(end - first):.2f} s)"
        raise MediaError(f"{path} is corrupt or truncated {where}: {error.strerror}") from error
    if not count:
        raise MediaError(f"{path} has a video stream without frames")
    # Containers without an index (Matroska) just end early; a packet of sound at the break ends others without a word.
    # Some durations count from 0 and some from the first frame. Sound may last a little longer than the pictures.
    declared = Fraction(container.duration or 0, 1_000_000)
    tolerance = Fraction(1, 2) if len(container.streams) == 1 else Fraction(1) + declared / 10
    if stream.frames:  # the pictures' own duration is known; frames may be left out by an edit list
        declared, tolerance = Fraction(stream.duration or 0) * stream.time_base, max(Fraction(1, 2), 2 * step)
    if declared:
        found = max(end - first, end)
        if declared - found > tolerance:
            raise MediaError(
                f"{path} is truncated: {float(declared):.2f} s are announced, "
                f"{float(found):.2f} s ({count} frames) are there"
            )


def _resample(frames: Iterator[tuple[Fraction, Any]], rate: Fraction | None, step: Fraction) -> Iterator[Any]:
    """Frames nearest to the instants k / rate after the first; the earlier one where two are equally near."""
    if rate is None:
        yield from (frame for _, frame in frames)
        return
    start, frame = next(frames)
    shown = start
    k = 0
    for time, later in frames:
        while k / rate <= (shown + time) / 2 - start:
            yield frame
            k += 1
        shown, frame = time, later
    # Half an interval of tolerance: containers round timestamps.
    while k == 0 or (k + Fraction(1, 2)) / rate <= shown + step - start:
        yield frame
        k += 1


def picture(frame: Any, size: tuple[int, int] | None, aspect: Fraction) -> np.ndarray:
    """Upright RGB ``[H, W, 3]`` of ``size``; ``aspect``: width over height of a stored pixel."""
    turns = quarter_turns(frame)
    if size is None:
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    height, width = size if turns % 2 == 0 else size[::-1]
    shown_width = frame.width * aspect
    scale = max(Fraction(height, frame.height), width / shown_width)
    scaled_height, scaled_width = max(height, round(frame.height * scale)), max(width, round(shown_width * scale))
    scaled = frame.reformat(width=scaled_width, height=scaled_height, format="rgb24", interpolation="BICUBIC")
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    cut = scaled.to_ndarray()[top : top + height, left : left + width]
    return np.ascontiguousarray(np.rot90(cut, turns))


def quarter_turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, that set a frame upright (phones store pictures lying)."""
    return round(frame.rotation / 90) % 4


def average_rate(stream: Any) -> Fraction:
    """Frames per second as the container tells, 25 where it does not."""
    return Fraction(stream.average_rate or stream.guessed_rate or 25)
