"""Plots of what was measured: curves over time with bands, one for every group, and quality over cost."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from pavdm_dist.errors import ConfigError
from pavdm_dist.evaluate.measured import Measured
from pavdm_dist.evaluate.report import ABOUT, by_group

# More curves than this are told apart by their dashes, too.
_COLOURS = 10
_MARKERS = "os^vD<>pP*X"
# What quality is read from, the first that was measured, and its cost.
_QUALITY = ("digit", "dino_subject_consistency", "subject_consistency_eff", "sharpness")
COST = "latents_per_s"


def plots(videos: Sequence[Measured]) -> dict[str, bytes]:
    """A PNG for every measure, and ``quality_over_cost`` where the cost of several groups is known.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(name for video in videos for name in video.drift))
    drawn = {name: overview(videos, [name], columns=1) for name in names}
    quality = next((name for name in _QUALITY if name in names), None)
    points = [] if quality is None else _points(videos, quality)
    if quality is not None and len(points) > 1:
        drawn["quality_over_cost"] = _quality_over_cost(points, quality)
    return drawn


def overview(videos: Sequence[Measured], names: Sequence[str], columns: int = 2) -> bytes:
    """A PNG of measures over time: of every group the mean over its videos, with the middle 80 % as a band.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    rows = -(-len(names) // columns)
    figure = _figure(7.0 if columns == 1 else 6.0 * columns, 2.8 * rows)
    handles: dict[str, Any] = {}
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        for number, (group, own) in enumerate(by_group(videos).items()):
            times, curves = _curves([video for video in own if name in video.chunks], name)
            known = ~np.isnan(curves).all(0)
            times, curves = times[known], curves[:, known]
            if not len(times):
                continue
            style = {"color": f"C{number % _COLOURS}", "linestyle": "-" if number < _COLOURS else "--"}
            (line,) = axes.plot(
                times, np.nanmean(curves, 0), label=_plain(f"{group} ({len(curves)})"), linewidth=1.3, **style
            )
            handles.setdefault(group, line)
            if len(curves) > 1:
                low, high = np.nanquantile(curves, [0.1, 0.9], axis=0)
                axes.fill_between(times, low, high, alpha=0.12, color=style["color"], linewidth=0)
        axes.set_xlabel("seconds", fontsize=8)
        axes.set_title(f"{name}: {ABOUT.get(name, '')}", fontsize=8, loc="left")
        axes.grid(alpha=0.3)
    figure.legend(handles=list(handles.values()), loc="outside right upper", fontsize=8)
    return _png(figure)


def _points(videos: Sequence[Measured], quality: str) -> list[tuple[str, float, float]]:
    """Of every group whose cost is known: its name, the cost, and the mean quality."""
    found = []
    for group, own in by_group(videos).items():
        cost = [value for video in own if (value := video.whole.get(COST)) is not None]
        reached = [video.drift[quality].mean for video in own if quality in video.drift]
        if cost and reached:
            found.append((group, statistics.fmean(cost), statistics.fmean(reached)))
    return found


def _quality_over_cost(points: Sequence[tuple[str, float, float]], quality: str) -> bytes:
    figure = _figure(7.0, 2.8)
    axes = figure.add_subplot()
    for number, (group, cost, reached) in enumerate(points):
        # Hollow and of many shapes: groups of equal cost and quality lie on each other.
        style = {"color": f"C{number % _COLOURS}", "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot(cost, reached, linestyle="", fillstyle="none", markersize=9, label=_plain(group), **style)
    axes.set_xlabel("latent evaluations per second of video, guidance and context included", fontsize=8)
    axes.set_title(f"{quality}: {ABOUT.get(quality, '')}", fontsize=8, loc="left")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return _png(figure)


def check_matplotlib() -> None:
    """Raises:
    ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("output=: plots need matplotlib: pip install 'pavdm-dist[metrics]'") from None


def _figure(width: float, height: float) -> Any:
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    """As matplotlib shows it letter by letter: between two dollars would be a formula, what is no letter ends it."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": "pavdm_dist"})
    return file.getvalue()


def _curves(videos: Sequence[Measured], name: str) -> tuple[Any, Any]:
    """Times, and a row of values for every video at them: its own between its first and last chunk, else NaN.

    The times are those of the video that lasts longest; others may have chunks of other lengths.
    """
    times = np.array(max((video.times for video in videos), key=lambda own: own[-1], default=[]))
    rows = np.full((len(videos), len(times)), np.nan)
    for row, video in zip(rows, videos, strict=True):
        pairs = zip(video.times, video.chunks[name], strict=True)
        known = [(time, value) for time, value in pairs if value is not None]
        if known:
            at, found = np.array(known).T
            row[:] = np.interp(times, at, found, left=np.nan, right=np.nan)
    return times, rows
