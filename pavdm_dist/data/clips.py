"""From a video to clips: one look over the whole file, then exact reading of any clip.

A clip starts at a frame of its scene and has the instants ``start + k / fps``. At each of them the frame shown nearest
to it is taken (the earlier one where two are equally near), so a faster source loses frames, a slower one shows
some twice, and a variable frame rate needs no case of its own. The next clip starts behind the last frame taken:
every frame is in one clip at most, and no clip leaves its scene.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from typing import Any, TypeVar

import numpy as np

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.data.buckets import Bucket, order_buckets
from pavdm_dist.data.scenes import CutFinder
from pavdm_dist.errors import MediaError
from pavdm_dist.io.video import average_rate, decoded_frames, open_video, picture, quarter_turns

T = TypeVar("T")

# Seconds before a clip that a reader jumps to, one after the other: in transport streams a jump lands late.
_SEEK_EARLIER = (0, 1, 4)


@dataclass(frozen=True)
class Scan:
    """What one look over a video found.

    Attributes:
        height, width: as shown, in pixels (upright, square pixels).
        times: of every frame, in seconds.
        end: when the last frame stops being shown.
        cuts: frames that begin a new scene, rising, without frame 0.
    """

    height: int
    width: int
    times: list[Fraction]
    end: Fraction
    cuts: list[int]


@dataclass(frozen=True)
class ClipRef:
    """Where a clip is.

    Attributes:
        video: the source's :attr:`~pavdm_dist.data.index.SourceVideo.path`.
        caption: the video's.
        first: number of its first frame in the video, from 0.
        frames: how many frames of the video it reaches over.
        start, end: times of the first and the last of them, seconds.
        scene: the scene it lies in, first frame and the one behind its last.
    """

    video: str
    caption: str
    first: int
    frames: int
    start: Fraction
    end: Fraction
    scene: tuple[int, int]

    @property
    def id(self) -> str:
        """Unique among the clips of a data set."""
        return f"{self.video}#{self.first}"

    def as_json(self) -> dict[str, Any]:
        """For an index; times as exact fractions."""
        fields = {"video": self.video, "caption": self.caption, "first": self.first, "frames": self.frames}
        return {**fields, "start": str(self.start), "end": str(self.end), "scene": list(self.scene)}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> ClipRef:
        """Undoes :meth:`as_json`."""
        times = {name: Fraction(entry[name]) for name in ("start", "end")}
        return cls(**{**entry, **times, "scene": tuple(entry["scene"])})


def scan_video(location: str, scene_cuts: bool) -> Scan:
    """Decodes a whole video once; keeps one time per frame and no pixels.

    Args:
        location: file or address.
        scene_cuts: look for cuts.

    Raises:
        MediaError: missing, not a video, corrupt or truncated.
        ConfigError: the cut detector is not installed.
    """
    finder = CutFinder() if scene_cuts else None
    times: list[Fraction] = []
    with open_video(location) as (container, stream):
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        for time, frame in decoded_frames(location, container, stream):
            if not times:
                height, width = frame.height, round(frame.width * aspect)
                if quarter_turns(frame) % 2:
                    height, width = width, height
            elif time < times[-1]:
                raise MediaError(
                    f"{location}: time runs backwards at frame {len(times)}, from {float(times[-1]):.2f} s to"
                    f" {float(time):.2f} s (joined videos, or B-frames in AVI or WMV): write it anew with ffmpeg"
                )
            times.append(time)
            if finder is not None:
                finder.add(frame)
        # In a variable-rate video the average rate says nothing about its last frame.
        end = times[-1] + (frame.duration * frame.time_base if frame.duration else 1 / average_rate(stream))
    return Scan(height, width, times, end, finder.cuts() if finder is not None else [])


def plan_clips(
    video: str, caption: str, scan: Scan, buckets: Sequence[Bucket], spec: CodecSpec, upscale: bool
) -> tuple[list[tuple[int, ClipRef]], int]:
    """Divides every scene into clips, each as long as its scene still allows.

    Args:
        video, caption: for the clips.
        scan: of the video.
        buckets: shapes that clips may have.
        spec: of the codec.
        upscale: whether buckets larger than the video are allowed.

    Returns:
        (position of the bucket, clip) in order of time, and the number of scenes that gave no clip.
    """
    order = order_buckets(buckets, scan.height, scan.width, upscale, spec)
    clips: list[tuple[int, ClipRef]] = []
    short = 0
    for begin, behind in pairwise([0, *scan.cuts, len(scan.times)]):
        first, before = begin, len(clips)
        scene_end = scan.times[behind] if behind < len(scan.times) else scan.end
        while first < behind:
            left = scene_end - scan.times[first]
            # Half an interval of tolerance: containers round timestamps.
            fit = (i for i in order if (buckets[i].num_frames(spec) - Fraction(1, 2)) / buckets[i].rate <= left)
            chosen = next(fit, None)
            if chosen is None:
                break
            bucket = buckets[chosen]
            frames = ((scan.times[i], i) for i in range(first, behind))
            last = max(at_instants(frames, bucket.rate, bucket.num_frames(spec)))
            start, end = scan.times[first], scan.times[last]
            clips.append((chosen, ClipRef(video, caption, first, last - first + 1, start, end, (begin, behind))))
            first = last + 1
        short += len(clips) == before
    return clips, short


def at_instants(frames: Iterable[tuple[Fraction, T]], rate: Fraction, number: int) -> Iterator[T]:
    """Of ``(time, item)`` the item nearest to each of the instants ``k / rate`` after the first, ``k < number``."""
    later = iter(frames)
    start, item = next(later)
    shown, k = start, 0
    for time, following in later:
        while k < number and k / rate <= (shown + time) / 2 - start:
            yield item
            k += 1
        if k == number:
            return
        shown, item = time, following
    for _ in range(k, number):
        yield item


def read_frames(location: str, clip: ClipRef, bucket: Bucket, num_frames: int) -> np.ndarray:
    """Reads one clip; other frames of the video are decoded from the key frame before it, or some seconds before.

    Args:
        location: the video's file or address.
        clip: of this video.
        bucket: size and rate: the picture is scaled to cover the size and cut to its centre.
        num_frames: pixel frames of the bucket's clips.

    Returns:
        uint8 ``[num_frames, H, W, 3]``, upright.

    Raises:
        MediaError: missing or unreadable, or no longer the video that was scanned.
    """
    for earlier in _SEEK_EARLIER if clip.first else ():
        # No index, no timestamps, or an open group of pictures: the way from the beginning is always right.
        with suppress(MediaError):
            return _read(location, clip, bucket, num_frames, clip.start - earlier)
    return _read(location, clip, bucket, num_frames, None)


def _read(location: str, clip: ClipRef, bucket: Bucket, num_frames: int, seek: Fraction | None) -> np.ndarray:
    import av

    pictures: list[np.ndarray] = []
    with open_video(location) as (container, stream):
        if seek is not None:
            try:
                container.seek(int(seek / stream.time_base), stream=stream, backward=True)
            except av.FFmpegError as error:
                raise MediaError(f"{location}: no way to {float(clip.start):.2f} s") from error
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        size = bucket.height, bucket.width
        decoded = decoded_frames(location, container, stream)
        if seek is not None:
            decoded = _from_key_frame(location, decoded)
        frames = _wanted(location, clip, decoded, seek is not None)
        shown: Any = None
        for frame in at_instants(frames, bucket.rate, num_frames):
            pictures.append(pictures[-1] if frame is shown else picture(frame, size, aspect))
            shown = frame
    return np.stack(pictures)


def _from_key_frame(location: str, frames: Iterator[tuple[Fraction, Any]]) -> Iterator[tuple[Fraction, Any]]:
    """Behind a jump to where pictures are refreshed bit by bit, the first ones are half-built and do not say so."""
    first = next(frames)
    if not first[1].key_frame:
        raise MediaError(f"{location}: no key frame behind the jump")
    yield first
    yield from frames


def _wanted(
    location: str, clip: ClipRef, frames: Iterator[tuple[Fraction, Any]], seek: bool
) -> Iterator[tuple[Fraction, Any]]:
    """The clip's own frames; a check that they begin and end where the scan saw them."""
    ahead: Iterator[tuple[Fraction, Any]]
    if seek:
        # Without timestamps of its own a frame behind a jump cannot be placed.
        ahead = (pair for pair in frames if pair[0] >= clip.start or pair[1].pts is None)
    else:
        ahead = islice(frames, clip.first, None)
    time = None
    for number, (time, frame) in enumerate(islice(ahead, clip.frames)):
        if (number == 0 and time != clip.start) or (seek and frame.pts is None):
            break
        yield time, frame
    else:
        if time == clip.end:
            return
    raise MediaError(f"{location} is not the video that was scanned: frames {clip.first} to {clip.first + clip.frames}")
