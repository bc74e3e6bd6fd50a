"""What was measured, as a table, plots and one page that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.evaluate.drift import Drift, mean_interval
from pavdm_dist.evaluate.video import Measured
from pavdm_dist.io.reader import open_video

# Seconds whose frames stand side by side, as far as a video has them.
MOMENTS = (1.0, 15.0, 30.0, 45.0, 60.0)
_THUMBNAIL = 128
# Measures of which more is not better, with what is said of them.
ABOUT = {
    "sharpness": "standard deviation of the Laplacian, 0..255",
    "brightness": "mean luma, 0..1",
    "contrast": "standard deviation of luma, 0..1",
    "saturation": "HSV, 0..1",
    "colour_shift": "distance of the mean colour from the first chunk's, 0..1.7",
    "flicker": "VBench's temporal flickering, 1 = no change between frames",
    "frozen": "share of frames that equal the one before",
    "join": "change at the border to the chunk before, over that inside; 1 = no seam",
    "motion": "speed of the fastest twentieth of the pixels, short sides per second",
    "subject_consistency_eff": "VBench's subject consistency, on EfficientNet-Lite0's features",
    "digit": "share of digits that are read as the prompted ones",
    "colour": "share of frames with exactly the prompted colours",
    "count": "share of frames with the prompted number of digits",
    "speed_ratio": "measured over prompted speed",
    "direction": "share of drifting digits that go the prompted way",
    "trajectory_error": "distance of the digits' middles from a straight path over 9 frames, px",
    "law_error": "distance of the digits' middles from a path of the world's law, reflections included, px",
    "bounce": "share of bouncing digits that keep to the law, their speed and a diagonal way",
}


def by_method(videos: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Videos in groups of how they were sampled, in order of appearance."""
    groups: dict[str, list[Measured]] = {}
    for video in videos:
        groups.setdefault(video.method or "unknown", []).append(video)
    return groups


def summary(videos: Sequence[Measured], resamples: int, seed: int) -> list[dict[str, Any]]:
    """A row for every method and measure: means over videos, the slope with an interval, how many videos hold.

    The interval is over videos where there are several, else that of the one video's own slope.
    """
    rows = []
    for method, group in by_method(videos).items():
        for name in dict.fromkeys(name for video in group for name in video.drift):
            found = [video.drift[name] for video in group if name in video.drift]
            rows.append({"method": method, "measure": name, **_summarised(found, resamples, seed)})
    return rows


def whole_rows(videos: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for every method: means of what is measured of a video as a whole."""
    rows = []
    for method, group in by_method(videos).items():
        row: dict[str, Any] = {"method": method, "videos": len(group)}
        for name in dict.fromkeys(name for video in group for name in video.whole):
            values = [value for video in group if (value := video.whole.get(name)) is not None]
            row[name] = statistics.fmean(values) if values else None
        rows.append(row)
    return rows


def _summarised(found: Sequence[Drift], resamples: int, seed: int) -> dict[str, Any]:
    sloping = [drift for drift in found if drift.slope is not None]
    slopes = [drift.slope for drift in sloping if drift.slope is not None]
    low = high = None
    if len(slopes) > 1:
        low, high = mean_interval(slopes, resamples, seed)
    elif sloping:
        low, high = sloping[0].low, sloping[0].high
    held = [drift.holds for drift in found if drift.holds is not None]
    return {
        "videos": len(found),
        "mean": statistics.fmean(drift.mean for drift in found),
        "first": statistics.fmean(drift.first for drift in found),
        "last": statistics.fmean(drift.last for drift in found),
        "between_ends": statistics.fmean(drift.between_ends for drift in found),
        "minimum": min(drift.minimum for drift in found),
        "slope": statistics.fmean(slopes) if slopes else None,
        "low": low,
        "high": high,
        "hold": f"{sum(held)} of {len(held)}" if held else None,
    }


def plots(videos: Sequence[Measured]) -> dict[str, bytes]:
    """A PNG for every measure: its mean over a method's videos by time, with the middle 80 % as a band.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("output=: plots need matplotlib: pip install 'pavdm-dist[metrics]'") from None
    drawn = {}
    for name in dict.fromkeys(name for video in videos for name in video.drift):
        figure = Figure(figsize=(7, 2.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for method, group in by_method(videos).items():
            times, rows = _curves([video for video in group if name in video.chunks], name)
            known = ~np.isnan(rows).all(0)
            times, rows = times[known], rows[:, known]
            if not len(times):
                continue
            (line,) = axes.plot(times, np.nanmean(rows, 0), label=f"{method} ({len(rows)})")
            if len(rows) > 1:
                low, high = np.nanquantile(rows, [0.1, 0.9], axis=0)
                axes.fill_between(times, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set_xlabel("seconds")
        axes.set_title(f"{name}: {ABOUT.get(name, '')}", fontsize=8, loc="left")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": "pavdm_dist"})
        drawn[name] = file.getvalue()
    return drawn


def _curves(videos: Sequence[Measured], name: str) -> tuple[Any, Any]:
    """Times, and a row of values for every video at them: its own between its first and last chunk, else NaN.

    The times are those of the video with the most chunks; others may have chunks of other lengths.
    """
    times = np.array(max((video.times for video in videos), key=len, default=[]))
    rows = np.full((len(videos), len(times)), np.nan)
    for row, video in zip(rows, videos, strict=True):
        pairs = zip(video.times, video.chunks[name], strict=True)
        known = [(time, value) for time, value in pairs if value is not None]
        if known:
            at, found = np.array(known).T
            row[:] = np.interp(times, at, found, left=np.nan, right=np.nan)
    return times, rows


def moments(path: str) -> list[tuple[float, bytes]]:
    """Frames at ``MOMENTS`` as PNG files, of the last frame where one is a little early.

    Raises:
        MediaError: it is no video any more.
    """
    from PIL import Image

    found: list[tuple[float, bytes]] = []
    with open_video(path) as reader:
        wanted = list(MOMENTS)
        half = float(1 / reader.rate) * 1.5
        last: tuple[float, Any] | None = None
        frames = ((float(time), frame) for time, frame in reader.frames())
        for time, frame in frames:
            last = (time, frame)
            if wanted and time >= wanted[0]:
                found.append((wanted.pop(0), _png(Image, reader.picture(frame, None))))
        if wanted and last is not None and last[0] >= wanted[0] - half:
            found.append((wanted[0], _png(Image, reader.picture(last[1], None))))
    return found


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
) -> str:
    """One HTML page with tables, plots and frames inside."""
    parts = [f"<h1>{len(videos)} videos</h1>", "<h2>As a whole</h2>", _table(whole_rows(videos))]
    parts += ["<h2>Over time</h2>", f"<p>{_LEGEND}</p>", _table(rows)]
    parts += [f'<img alt="{html.escape(name)} over time" src="{_data(png)}">' for name, png in drawn.items()]
    parts.append(f"<h2>At {', '.join(f'{moment:g}' for moment in MOMENTS)} seconds</h2>")
    for video in videos:
        try:
            frames = moments(video.video)
        except MediaError as error:
            frames, failed = [], [*failed, {"video": video.video, "error": str(error)}]
        pictures = "".join(f'<img alt="at {time:g} s" title="{time:g} s" src="{_data(png)}">' for time, png in frames)
        said = html.escape(" · ".join(filter(None, (video.video, video.method, video.prompt))))
        parts.append(f"<figure><figcaption>{said}</figcaption>{pictures}</figure>")
    if failed:
        parts += ["<h2>Not measured</h2>", _table(failed)]
    return _PAGE.format(body="\n".join(parts))


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
    " change per minute, with its 95 % interval (low, high) over videos, or of a single video over its chunks; hold:"
    " videos whose own interval holds zero. Consistency is read beside motion: a picture that stands still has the most"
    " of it."
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pavdm eval</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
img {{ max-width: 100%; }} figure {{ margin: 1rem 0; }} figure img {{ margin-right: 4px; image-rendering: pixelated; }}
</style></head><body>
{body}
</body></html>
"""
