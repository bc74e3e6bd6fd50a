"""From a video to clips: one look over the whole file, then exact reading of any clip.

A clip starts at a frame of its scene and has the instants ``start + k / fps``. At each of them the frame shown nearest
to it is taken (the earlier one where two are equally near), so a faster source loses frames, a slower one shows
some twice, and a variable frame rate needs no case of its own. The next clip starts behind the last frame taken:
every frame is in one clip at most, and no clip leaves its scene or reaches over a gap in the timestamps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from typing import Any

import numpy as np

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.data.buckets import Bucket, order_buckets
from pavdm_dist.data.cuts import CutFinder
from pavdm_dist.errors import MediaError
from pavdm_dist.io.picture import remarks
from pavdm_dist.io.reader import VideoReader, open_video
from pavdm_dist.io.shots import SEEK_EARLIER, last_shown_for, longest_wait, shown_at

_SMALL = (32, 32)


@dataclass(frozen=True)
class Scan:
    """What one look over a video found.

    Attributes:
        sizes: ``(first, height, width)``: from this frame on, pictures are shown so large, in pixels (upright, square
            pixels); rising, the first one is of frame 0. What a call or a stream recorded may change in the middle.
        times: of every frame, in seconds.
        end: when the last frame stops being shown.
        cuts: frames that begin a new scene, rising, without frame 0; those that begin a new size are among them.
        remarks: see :func:`~pavdm_dist.io.picture.remarks`; of the first frame.
        fault: what is wrong behind the last frame; None = nothing.
    """

    sizes: list[tuple[int, int, int]]
    times: list[Fraction]
    end: Fraction
    cuts: list[int]
    remarks: tuple[str, ...] = ()
    fault: str | None = None

    def size(self, frame: int) -> tuple[int, int]:
        """Height and width of a frame as shown."""
        return self.sizes[bisect_right(self.sizes, frame, key=lambda size: size[0]) - 1][1:]

    def shots(self, rate: Fraction) -> tuple[list[int], list[Fraction]]:
        """The frames behind the last one of each shot of a clip at ``rate``, rising, and when these last frames end.

        A shot ends with its scene, and where a frame is shown for longer than a clip can show it.
        """
        wait, cuts = longest_wait(rate), {*self.cuts, len(self.times)}
        behind, ends = list[int](), list[Fraction]()
        first = 0
        for number, (time, following) in enumerate(pairwise([*self.times, self.end]), 1):
            if number in cuts or following - time > wait:
                before = time - self.times[number - 2] if number - first > 1 else None
                behind.append(number)
                ends.append(time + last_shown_for(following - time, before, rate))
                first = number
        return behind, ends


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


def scan_video(location: str, scene_cuts: bool, cut: bool = False) -> Scan:
    """Decodes a whole video once; keeps one time per frame and no pixels.

    Args:
        location: file or address.
        scene_cuts: look for cuts.
        cut: of a corrupt or truncated video, take what lies before the fault.

    Raises:
        MediaError: missing, not a video, or, without ``cut``, corrupt or truncated.
        ConfigError: the cut detector is not installed.
    """
    finder = CutFinder() if scene_cuts else None
    times: list[Fraction] = []
    sizes: list[tuple[int, int, int]] = []
    fault = None
    with open_video(location) as reader:
        try:
            for time, frame in reader.frames():
                if not times:
                    # Colours that cannot be read are found here, not in the middle of a shard.
                    reader.picture(frame, _SMALL)
                    said = remarks(frame)
                shown = reader.shown_size(frame)
                if not sizes or shown != sizes[-1][1:]:
                    sizes.append((len(times), *shown))
                times.append(time)
                end = time + reader.shown_for(frame)
                if finder is not None:
                    finder.add(frame)
        except MediaError as error:
            if not (cut and times):
                raise
            fault = str(error)
    cuts = {*(finder.cuts() if finder is not None else ()), *(first for first, _, _ in sizes[1:])}
    return Scan(sizes, times, end, sorted(cuts), said, fault)


def plan_clips(
    video: str, caption: str, scan: Scan, buckets: Sequence[Bucket], spec: CodecSpec, upscale: bool
) -> tuple[list[tuple[int, ClipRef]], int]:
    """Divides every scene into clips, each as long as its scene and the next gap still allow.

    Args:
        video, caption: for the clips.
        scan: of the video.
        buckets: shapes that clips may have.
        spec: of the codec.
        upscale: whether buckets larger than a scene are allowed.

    Returns:
        (position of the bucket, clip) in order of time, and the number of scenes that gave no clip.
    """
    orders = {(h, w): order_buckets(buckets, h, w, upscale, spec) for _, h, w in scan.sizes}
    shots = {rate: scan.shots(rate) for rate in {buckets[i].rate for order in orders.values() for i in order}}
    clips: list[tuple[int, ClipRef]] = []
    short = 0
    for begin, behind in pairwise([0, *scan.cuts, len(scan.times)]):
        order = orders[scan.size(begin)]
        first, before = begin, len(clips)
        while first < behind:
            for chosen in order:
                bucket, frames = buckets[chosen], buckets[chosen].num_frames(spec)
                number = bisect_right(shots[bucket.rate][0], first)
                shot_behind, shot_end = shots[bucket.rate][0][number], shots[bucket.rate][1][number]
                # Half an interval of tolerance: containers round timestamps.
                if (frames - Fraction(1, 2)) / bucket.rate <= shot_end - scan.times[first]:
                    break
            else:
                ends = (shots[buckets[i].rate][0] for i in order)
                first = min((behinds[bisect_right(behinds, first)] for behinds in ends), default=behind)
                continue
            start = scan.times[first]
            ahead = ((scan.times[i], i) for i in range(first, shot_behind))
            last = max(shown_at(ahead, _instants(start, bucket.rate, frames)))
            reference = ClipRef(video, caption, first, last - first + 1, start, scan.times[last], (begin, behind))
            clips.append((chosen, reference))
            first = last + 1
        short += len(clips) == before
    return clips, short


def _instants(start: Fraction, rate: Fraction, number: int) -> Iterator[Fraction]:
    return (start + k / rate for k in range(number))


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
    for earlier in (0, *SEEK_EARLIER) if clip.first else ():
        # No index, no timestamps, or an open group of pictures: the way from the beginning is always right.
        with suppress(MediaError):
            return _read(location, clip, bucket, num_frames, clip.start - earlier)
    return _read(location, clip, bucket, num_frames, None)


def _read(location: str, clip: ClipRef, bucket: Bucket, num_frames: int, seek: Fraction | None) -> np.ndarray:
    pictures: list[np.ndarray] = []
    with open_video(location) as reader:
        size = bucket.height, bucket.width
        shown: Any = None
        frames = _wanted(reader, clip, seek)
        for frame in shown_at(frames, _instants(clip.start, bucket.rate, num_frames)):
            pictures.append(pictures[-1] if frame is shown else reader.picture(frame, size))
            shown = frame
    return np.stack(pictures)


def _wanted(reader: VideoReader, clip: ClipRef, seek: Fraction | None) -> Iterator[tuple[Fraction, Any]]:
    """The clip's own frames; a check that they begin and end where the scan saw them."""
    frames = reader.frames(seek)
    ahead = islice(frames, clip.first, None) if seek is None else (pair for pair in frames if pair[0] >= clip.start)
    time = None
    for number, (time, frame) in enumerate(islice(ahead, clip.frames)):
        if number == 0 and time != clip.start:
            break
        yield time, frame
    else:
        if time == clip.end:
            return
    raise MediaError(
        f"{reader.path} is not the video that was scanned: frames {clip.first} to {clip.first + clip.frames}"
    )
