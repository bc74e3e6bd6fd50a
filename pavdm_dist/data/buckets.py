"""Buckets: the sizes and lengths that clips are brought to, so that batches can be stacked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.picture import kept_share
from pavdm_dist.values.rates import as_rate, rate_text

_FORM = re.compile(r"(\d+)x(\d+)x(\d+)(?:@([\w./:-]+))?")
# Buckets that keep nearly as much of the picture as the best one compete by length; the others are not considered.
_ASPECT_SHARE = 0.9


@dataclass(frozen=True)
class Bucket:
    """One shape of clips.

    Attributes:
        height, width: pixels.
        num_latents: length of a clip in latent frames.
        fps: frames per second of a clip.
    """

    height: int
    width: int
    num_latents: int
    fps: float

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_latents}@{rate_text(self.fps)}"

    @classmethod
    def parse(cls, text: str, fps: float | None = None) -> Bucket:
        """Reads ``HEIGHTxWIDTHxLATENTS@FPS``; ``fps``: when the text names none.

        Raises:
            ConfigError: another form, no rate, or one that :func:`~pavdm_dist.values.rates.as_rate` does not know.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or (match[4] is None and fps is None):
            raise ConfigError(f"bucket {text!r}: write HEIGHTxWIDTHxLATENTS@FPS, such as 240x424x35@24")
        try:
            rate = float(match[4] or fps or 0)
        except ValueError:  # a fraction or a name
            try:
                rate = float(as_rate(match[4] or str(fps)))
            except ConfigError as error:
                raise ConfigError(f"bucket {text!r}: {error}") from error
        return cls(int(match[1]), int(match[2]), int(match[3]), rate)

    def check(self, spec: CodecSpec) -> None:
        """Refuses a shape that the codec cannot encode.

        Raises:
            ConfigError: a size it cannot divide, a length of 0, or an impossible rate.
        """
        try:
            spec.latent_size(self.height, self.width)
            as_rate(self.fps)
        except ConfigError as error:
            raise ConfigError(f"bucket {self}: {error}") from error
        if self.num_latents < 1:
            raise ConfigError(
                f"bucket {self}: must have at least 1 latent; nearest legal: {replace(self, num_latents=1)}"
            )

    def same(self, other: Bucket) -> bool:
        """Whether both are one shape, however their rates are written."""
        return replace(self, fps=0) == replace(other, fps=0) and self.rate == other.rate

    @property
    def rate(self) -> Fraction:
        """``fps`` as the exact fraction that clips are cut with; see :func:`~pavdm_dist.values.rates.as_rate`."""
        return as_rate(self.fps)

    def num_frames(self, spec: CodecSpec) -> int:
        """Pixel frames of a clip."""
        return spec.frames_in_chunk(self.num_latents, first=True)

    def seconds(self, spec: CodecSpec) -> Fraction:
        """Length of a clip."""
        return self.num_frames(spec) / self.rate

    def kept(self, height: int, width: int) -> Fraction:
        """Share of a picture of this size that the centre crop keeps, 0..1."""
        return kept_share((height, width), (self.height, self.width))


def parse_buckets(texts: Sequence[str], fps: float, spec: CodecSpec) -> list[Bucket]:
    """Reads ``HEIGHTxWIDTHxLATENTS@FPS``, such as ``240x424x35@24``.

    Args:
        texts: one per bucket.
        fps: rate of the buckets that name none.
        spec: of the codec that encodes the clips.

    Raises:
        ConfigError: another form, a size that the codec cannot divide, a length of 0, or a bucket given twice.
    """
    buckets: list[Bucket] = []
    for text in texts:
        bucket = Bucket.parse(text, fps)
        bucket.check(spec)
        if any(bucket.same(other) for other in buckets):
            raise ConfigError(f"bucket {bucket} is given twice")
        buckets.append(bucket)
    if not buckets:
        raise ConfigError("buckets=[]: at least one, such as 240x424x35@24")
    return buckets


def order_buckets(buckets: Sequence[Bucket], height: int, width: int, upscale: bool, spec: CodecSpec) -> list[int]:
    """Buckets for a video of this size, the one to try first in front.

    Only buckets that lose about as little of the picture as the best one are taken; of these the longest is
    first, then the largest.

    Args:
        buckets: to choose from.
        height, width: of the video as shown, in pixels.
        upscale: whether buckets larger than the video are allowed.
        spec: of the codec.

    Returns:
        Positions in ``buckets``; empty when the video is smaller than all of them.
    """
    fit = [i for i, b in enumerate(buckets) if upscale or (b.height <= height and b.width <= width)]
    best = max((buckets[i].kept(height, width) for i in fit), default=Fraction(0))
    close = [i for i in fit if buckets[i].kept(height, width) >= _ASPECT_SHARE * best]

    def rank(i: int) -> tuple[Fraction, int, Fraction, int]:
        bucket = buckets[i]
        return (-bucket.seconds(spec), -bucket.height * bucket.width, -bucket.kept(height, width), i)

    return sorted(close, key=rank)


def smallest(buckets: Sequence[Bucket]) -> Bucket:
    """The bucket with the smallest picture, for messages."""
    return min(buckets, key=lambda bucket: math.hypot(bucket.height, bucket.width))
