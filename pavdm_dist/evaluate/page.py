"""One HTML page of what was measured, which needs nothing but itself: tables, plots, and frames side by side."""

from __future__ import annotations

import base64
import html
import io
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from pavdm_dist.errors import MediaError
from pavdm_dist.evaluate.measured import Measured
from pavdm_dist.evaluate.report import by_group, prompt_of, whole_rows
from pavdm_dist.io.reader import open_video

logger = logging.getLogger(__name__)

# Seconds whose frames stand side by side, as far as a video has them.
MOMENTS = (1.0, 15.0, 30.0, 45.0, 60.0)
_THUMBNAIL = 128


def moments(path: str) -> list[tuple[float, bytes]]:
    """What is on the screen at ``MOMENTS``, as PNG files: at each the last frame that is not later.

    The last frame stays as long as the file says, and is taken where it ends half a frame early.

    Raises:
        MediaError: it is no video any more.
    """
    from PIL import Image

    found: list[tuple[float, bytes]] = []
    with open_video(path) as reader:
        wanted = deque(MOMENTS)

        def take(frame: Any, until: Fraction) -> None:
            """Adds a frame at all wanted moments for which it is on the screen."""
            png: bytes | None = None
            while wanted and wanted[0] < until:
                png = png or _png(Image, reader.picture(frame, None))
                found.append((wanted.popleft(), png))

        began, at, last = Fraction(0), Fraction(0), None
        # Fractions: a frame at the very moment is the one on the screen.
        for time, frame in reader.frames():
            if last is None:
                began = time
            else:
                take(last, time - began)
            at, last = time - began, frame
            if not wanted:
                break
        if last is not None:
            shown = reader.shown_for(last)
            take(last, at + shown + min(shown, 1 / reader.rate) / 2)
    return found


def pictures_of(path: str) -> tuple[list[tuple[float, bytes]], str | None]:
    """As :func:`moments`; of a video that cannot be shown none, and why: it costs no other's pictures."""
    try:
        return moments(path), None
    except MediaError as error:
        logger.warning("not shown: %s", error)
        return [], str(error)
    except Exception as error:  # of a decoder
        logger.exception("not shown: %s", path)
        return [], f"{path}: {type(error).__name__}: {error}"


def _png(image: Any, picture: Any) -> bytes:
    small = image.fromarray(picture)
    side = max(small.size)
    small = small.resize([max(1, round(length * _THUMBNAIL / side)) for length in small.size])
    file = io.BytesIO()
    small.save(file, "png")
    return file.getvalue()


def page(
    videos: Sequence[Measured],
    failed: Sequence[Mapping[str, str]],
    rows: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, bytes],
    shown: int,
) -> str:
    """One HTML page with tables, plots and frames inside.

    Args:
        videos: that were measured.
        failed: ``video`` and ``error`` of those that were not.
        rows: of :func:`~pavdm_dist.evaluate.report.summary`.
        drawn: plots, by name.
        shown: prompts whose frames are shown.
    """
    parts = [f"<h1>{len(videos)} videos</h1>", "<h2>As a whole</h2>", _table(whole_rows(videos))]
    parts.append("<h2>Over time</h2>")
    curves = "".join(f'<img alt="{html.escape(name)}" src="{_data(png)}">' for name, png in drawn.items())
    parts.append(f"<div class=plots>{curves}</div>")
    parts.append(f"<h2>At {', '.join(f'{moment:g}' for moment in MOMENTS)} seconds</h2>")
    takes = side_by_side(videos)
    names = dict.fromkeys(row["measure"] for row in rows)
    measures = {name: place for place, name in enumerate(names)}
    unseen: list[Mapping[str, str]] = []
    for title, own in list(takes.items())[:shown]:
        lines = []
        for video in own:
            frames, error = pictures_of(video.video)
            if error is not None:
                unseen.append({"video": video.video, "error": error})
            pictures = "".join(f"<td>{_picture(time, png)}</td>" for time, png in frames)
            name = f'<th title="{html.escape(video.video)}">{html.escape(video.group)}</th>'
            lines.append(f"<tr>{name}{pictures}</tr>")
        body = "".join(lines)
        parts.append(f"<figure><figcaption>{html.escape(title)}</figcaption><table>{body}</table></figure>")
    if len(takes) > shown:
        parts.append(f"<p>{len(takes) - shown} more are measured and not shown.</p>")
    # A measure's groups under each other, as they are compared.
    parts += [
        "<h2>In numbers</h2>",
        f"<p>{_LEGEND}</p>",
        _table(sorted(rows, key=lambda row: measures[row["measure"]])),
    ]
    if unseen:
        parts += ["<h2>Measured, and not shown</h2>", _table(unseen)]
    if failed:
        parts += ["<h2>Not measured</h2>", _table(failed)]
    return _PAGE.format(body="\n".join(parts))


def side_by_side(videos: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Videos whose frames belong under each other: take n of a prompt in every group; of unknown prompts each alone."""
    takes: dict[str, list[Measured]] = {}
    for own in by_group(videos).values():
        seen: dict[str, int] = {}
        for video in own:
            prompt = prompt_of(video)
            seen[prompt] = seen.get(prompt, 0) + 1
            title = prompt if seen[prompt] == 1 else f"{prompt} ({seen[prompt]})"
            takes.setdefault(title, []).append(video)
    return takes


def _picture(time: float, png: bytes) -> str:
    return f'<img alt="at {time:g} s" title="{time:g} s" src="{_data(png)}">'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(row.get(name))}</td>' for name in names)}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


_LEGEND = (
    "first, last: mean of the first and last 15 % of the chunks; between_ends: their distance in each video; slope:"
    " change per minute, with its 95 % interval (low, high) over prompts, of whose videos the mean counts, or over the"
    " videos of a single prompt, or of a single video over its chunks; hold:"
    " videos whose own interval holds zero. Consistency is read beside motion: a picture that stands still has the most"
    " of it. calls_per_s, latents_per_s, seconds_per_s: what a second of video cost, in micro-batches, in latent frames"
    " that they held (guidance and context included), and on the clock of the machine it was made on."
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pavdm eval</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
.plots {{ display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
img {{ max-width: 100%; }} figure {{ margin: 1rem 0; overflow-x: auto; }}
figure img {{ image-rendering: pixelated; display: block; }}
figure td, figure th {{ padding: 2px; border: 0; }} figcaption {{ font-weight: 600; }}
</style></head><body>
{body}
</body></html>
"""
