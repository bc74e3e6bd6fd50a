"""A stage-time chart (Gantt) as a picture: one lane per stage, one bar per unit."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.storage import atomic_path

WIDTH, LANE, GAP, LEFT, TOP = 1400, 34, 8, 70, 8
GOLDEN = 0.618034  # turns neighbouring numbers into colours far apart
SOFTWARE = "pavdm_dist"  # what a chart says of who drew it


@dataclass(frozen=True)
class Bar:
    """What a stage did from ``start`` to ``end``.

    Attributes:
        stage: lane.
        start, end: in any unit of time.
        colour: number of a colour, the same for what belongs together.
        branch: guidance branch; the second one is drawn paler.
        context: a clean chunk whose keys and values are made; drawn grey.
    """

    stage: int
    start: float
    end: float
    colour: int
    branch: int = 0
    context: bool = False


def draw_chart(path: str, num_stages: int, bars: Sequence[Bar], title: str = "", decoder: bool = False) -> None:
    """Writes a PNG; time runs to the right from the first start to the last end.

    Args:
        path: of the picture.
        num_stages: lanes, also of stages that did nothing.
        bars: in any order.
        title: written under the lanes.
        decoder: one lane more, number ``num_stages``, for a decoder.

    Raises:
        MediaError: it cannot be written.
    """
    from PIL import Image, ImageDraw
    from PIL.PngImagePlugin import PngInfo

    first = min((bar.start for bar in bars), default=0.0)
    span = max((bar.end for bar in bars), default=1.0) - first
    lanes = [f"stage {stage}" for stage in range(num_stages)] + ["decoder"] * decoder
    height = TOP + len(lanes) * (LANE + GAP) + 30
    picture = Image.new("RGB", (LEFT + WIDTH + 10, height), "white")
    pen = ImageDraw.Draw(picture)
    for number, name in enumerate(lanes):
        top = TOP + number * (LANE + GAP)
        pen.text((6, top + LANE // 2 - 5), name, fill="black")
        pen.rectangle((LEFT, top, LEFT + WIDTH, top + LANE), fill=(236, 236, 236))
    for bar in bars:
        top = TOP + bar.stage * (LANE + GAP)
        left, right = (LEFT + WIDTH * (moment - first) / span for moment in (bar.start, bar.end))
        edge = "white" if right - left > 3 else None
        pen.rectangle((left, top, max(right, left + 0.5), top + LANE), fill=_colour(bar), outline=edge)
    pen.text((LEFT, height - 22), f"{title}{'  ' if title else ''}0 to {span:g}", fill="black")
    made_by = PngInfo()
    made_by.add_text("Software", SOFTWARE)
    try:
        with atomic_path(path) as staged:
            picture.save(staged, "PNG", optimize=True, pnginfo=made_by)
    except OSError as error:
        raise MediaError(f"chart={path}: cannot be written ({error.strerror or error})") from error


def check_chart(path: str, field: str) -> None:
    """Refuses a picture that cannot be one, or would replace one of somebody else's.

    Args:
        path: of it.
        field: the setting that names it.

    Raises:
        ConfigError: naming the field.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.endswith(".png"):
        raise ConfigError(f"{field}={path}: must end in .png")
    if not os.path.lexists(path):
        return
    try:
        with Image.open(path) as found:
            ours = found.info.get("Software") == SOFTWARE
    except (Image.DecompressionBombError, UnidentifiedImageError, OSError, ValueError):
        ours = False
    if not ours:
        raise ConfigError(f"{field}={path} exists and is no chart of this program; choose another name")


def _colour(bar: Bar) -> tuple[int, int, int]:
    if bar.context:
        return 120, 120, 120
    red, green, blue = colorsys.hsv_to_rgb(bar.colour * GOLDEN % 1, 0.75 if bar.branch == 0 else 0.4, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)
