"""From decoded frames to upright RGB pictures: everything that a file says about how they look is applied here."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from pavdm_dist.errors import MediaError
from pavdm_dist.io import colour

# FFmpeg's numbers of matrices.
_RESERVED, _UNSPECIFIED = 3, 2
# What is left of a turn that is a whole number of quarters, as a share.
_TILT = 0.1


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways in which a stored picture may lie: first its axes change places, then its sides.

    Attributes:
        transposed: rows are columns.
        upside_down, mirrored: top and bottom, left and right change places.
    """

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False

    def applied(self, picture: np.ndarray) -> np.ndarray:
        """The upright picture ``[H, W, 3]`` of a stored one."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        if self.upside_down:
            picture = picture[::-1]
        return np.ascontiguousarray(picture[:, ::-1] if self.mirrored else picture)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The upright size of a stored one, and the other way round."""
        return (width, height) if self.transposed else (height, width)


def orientation(frame: Any) -> Orientation:
    """How a decoded frame lies, by the whole of its display matrix.

    Raises:
        MediaError: it is turned by something else than quarters, or skewed.
    """
    data, seen = _display_matrix(frame)
    if not seen:
        return _TURNS[round(frame.rotation / 90) % 4]
    if data is None:
        return Orientation()
    # A point (x, y), y downwards, is shown at (a x + c y, b x + d y).
    a, b, _, c, d, *_ = (int(number) for number in np.frombuffer(bytes(data), np.int32))
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if not straight and not crossed:
        return Orientation()  # no matrix at all
    transposed = crossed > straight
    rest = max(abs(a), abs(d)) if transposed else max(abs(b), abs(c))
    if rest > _TILT * max(straight, crossed):
        raise MediaError(f"its pictures are turned by {frame.rotation} degrees; quarter turns and mirrors are read")
    return Orientation(transposed, (b if transposed else d) < 0, (c if transposed else a) < 0)


def _display_matrix(frame: Any) -> tuple[Any, bool]:
    """A frame's display matrix, None = it has none; and whether one could be seen.

    Side data of a kind that PyAV does not know hides all others. Then only the turn is told, which leaves out mirrors.
    """
    from av.sidedata.sidedata import Type

    try:
        return frame.side_data.get(Type.DISPLAYMATRIX), True
    except ValueError:
        return None, False


# By quarter turns, counter-clockwise.
_TURNS = (
    Orientation(),
    Orientation(transposed=True, upside_down=True),
    Orientation(upside_down=True, mirrored=True),
    Orientation(transposed=True, mirrored=True),
)


def shown_size(frame: Any, aspect: Fraction) -> tuple[int, int]:
    """Height and width of a frame as it is shown, in square pixels; ``aspect``: width over height of a stored one."""
    return orientation(frame).size(frame.height, round(frame.width * aspect))


def kept_share(shown: tuple[int, int], size: tuple[int, int]) -> Fraction:
    """Share of a picture, 0..1, that is left where it is scaled to cover ``size`` and cut to its centre."""
    ratio = Fraction(shown[0] * size[1], shown[1] * size[0])
    return min(ratio, 1 / ratio)


def picture(frame: Any, size: tuple[int, int] | None, aspect: Fraction, reformatter: Any) -> np.ndarray:
    """A decoded frame as people see it.

    Args:
        frame: of PyAV.
        size: height and width: it is scaled to cover them and cut to its centre; None = as stored.
        aspect: width over height of a stored pixel.
        reformatter: PyAV's, to be kept for all frames of a film.

    Returns:
        Upright uint8 RGB ``[H, W, 3]`` in BT.709; what is brighter than white is rolled off, what is transparent is
        shown on black.

    Raises:
        MediaError: colours or a layout that cannot be converted.
    """
    lies = orientation(frame)
    if size is None:
        return lies.applied(_rgb(frame, reformatter))
    height, width = lies.size(*size)
    shown_width = frame.width * aspect
    scale = max(Fraction(height, frame.height), width / shown_width)
    scaled_height, scaled_width = max(height, round(frame.height * scale)), max(width, round(shown_width * scale))
    scaled = _rgb(frame, reformatter, scaled_height, scaled_width)
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return lies.applied(scaled[top : top + height, left : left + width])


def known_matrix(frame: Any) -> Any:
    """A decoded frame, which nothing converts where its matrix is the reserved one: some writers of VP9 mean that they
    do not know."""
    if frame.colorspace == _RESERVED:
        frame.colorspace = _UNSPECIFIED
    return frame


def remarks(frame: Any) -> tuple[str, ...]:
    """What a frame says of its pictures that a user should know of, since they are not taken as they are."""
    found = {
        "hdr": frame.color_trc in (colour.PQ, colour.HLG),
        "transparent": _has_alpha(frame) and frame.reformat(format="rgba").to_ndarray()[..., 3].min() < 255,
        "interlaced": frame.interlaced_frame,
        "perhaps mirrored": not _display_matrix(frame)[1],
    }
    return tuple(name for name, holds in found.items() if holds)


def _has_alpha(frame: Any) -> bool:
    # Four components are colours and alpha, two are grey and alpha; a palette's alpha is seen when it is looked up.
    return len(frame.format.components) in (2, 4) or frame.format.has_palette


def _rgb(frame: Any, reformatter: Any, height: int | None = None, width: int | None = None) -> np.ndarray:
    """uint8 ``[height, width, 3]``; None = as stored."""
    import av

    transfer, primaries, alpha = frame.color_trc, frame.color_primaries, _has_alpha(frame)
    unknown = colour.UNKNOWN_CURVES.get(transfer) or colour.UNKNOWN_PRIMARIES.get(primaries)
    if unknown:
        raise MediaError(f"its colours are {unknown}: convert it to BT.709 first")
    other = colour.needs_conversion(transfer, primaries)
    layout = ("rgba64le" if alpha else "rgb48le") if other else ("rgba" if alpha else "rgb24")
    scaled: dict[str, Any] = {"interpolation": "BICUBIC", "height": height, "width": width} if height else {}
    try:
        pixels = reformatter.reformat(known_matrix(frame), format=layout, **scaled).to_ndarray()
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(
            f"its colours cannot be read: pixels {frame.format.name}, matrix {frame.colorspace}, range"
            f" {frame.color_range}: {error}"
        ) from error
    shown = colour.converted(pixels[..., :3], transfer, primaries) if other else pixels[..., :3]
    if not alpha:
        return shown
    # The numbers of both layouts: opaque is all bits set.
    opaque = pixels[..., 3:].astype(np.float32) / np.iinfo(pixels.dtype).max
    return np.round(shown * opaque).astype(np.uint8)
