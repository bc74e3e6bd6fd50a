"""What was measured, group by group, as rows of tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pavdm_dist.evaluate.drift import mean_interval
from pavdm_dist.evaluate.measured import Measured

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
    "dino_subject_consistency": "VBench's subject consistency, on the named DINO",
    "clip_background_consistency": "VBench's background consistency, on the named CLIP",
    "clip_aesthetic_quality": "VBench's aesthetic quality, on the named CLIP and head",
    "digit": "share of digits that are read as the prompted ones",
    "colour": "share of frames with exactly the prompted colours",
    "count": "share of frames with the prompted number of digits",
    "speed_ratio": "measured over prompted speed",
    "direction": "share of drifting digits that go the prompted way",
    "trajectory_error": "distance from a straight path over 9 frames, px",
    "law_error": "distance from the nearest path of the world's law, reflections included, px",
    "bounce": "share of bouncing digits that keep to the law, their speed and a diagonal way",
    "followed": "share of digits that are seen long enough for law_error and bounce",
}


def by_group(videos: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Videos by what they are compared as, in order of appearance."""
    groups: dict[str, list[Measured]] = {}
    for video in videos:
        groups.setdefault(video.group, []).append(video)
    return groups


def prompt_of(video: Measured) -> str:
    """What takes of one prompt are told by; a video whose prompt is not known is a prompt of its own."""
    return video.prompt or video.video


def over_prompts(videos: Sequence[Measured], values: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Numbers that are independent of each other: takes of one prompt resemble each other, and count as their mean.

    Takes of a single prompt stay as they are: what is said of them is said of that prompt.

    Args:
        videos: of one group.
        values: one or more numbers of each video.
    """
    takes: dict[str, list[tuple[float, ...]]] = {}
    for video, value in zip(videos, values, strict=True):
        takes.setdefault(prompt_of(video), []).append(value)
    if len(takes) == 1:
        return list(values)
    return [tuple(map(statistics.fmean, zip(*own, strict=True))) for own in takes.values()]


def summary(videos: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for every group and measure: means over videos, the slope with an interval, how many videos hold.

    The slope is the mean over prompts, and its interval is over them (None without SciPy); of one prompt over its
    videos; of one video that of its own slope. ``prompts`` says how many there are.
    """
    rows = []
    for group, own in by_group(videos).items():
        for name in dict.fromkeys(name for video in own for name in video.drift):
            found = _summarised([video for video in own if name in video.drift], name)
            rows.append({"group": group, "measure": name, **found})
    return rows


def whole_rows(videos: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for every group: means of what is measured of a video as a whole, and of its cost."""
    rows = []
    for group, own in by_group(videos).items():
        row: dict[str, Any] = {"group": group, "videos": len(own)}
        for name in dict.fromkeys(name for video in own for name in video.whole):
            values = [value for video in own if (value := video.whole.get(name)) is not None]
            row[name] = statistics.fmean(values) if values else None
        rows.append(row)
    return rows


def _summarised(videos: Sequence[Measured], name: str) -> dict[str, Any]:
    found = [video.drift[name] for video in videos]
    sloping = [video for video in videos if video.drift[name].slope is not None]
    slopes = over_prompts(sloping, [(slope,) for drift in found if (slope := drift.slope) is not None])
    low = high = None
    if len(slopes) > 1:
        low, high = mean_interval([slope for (slope,) in slopes])
    elif sloping:
        low, high = sloping[0].drift[name].low, sloping[0].drift[name].high
    held = [drift.holds for drift in found if drift.holds is not None]
    return {
        "videos": len(found),
        "prompts": len(set(map(prompt_of, videos))),
        "mean": statistics.fmean(drift.mean for drift in found),
        "first": statistics.fmean(drift.first for drift in found),
        "last": statistics.fmean(drift.last for drift in found),
        "between_ends": statistics.fmean(drift.between_ends for drift in found),
        "minimum": min(drift.minimum for drift in found),
        "slope": statistics.fmean(slope for (slope,) in slopes) if slopes else None,
        "low": low,
        "high": high,
        "hold": f"{sum(held)} of {len(held)}" if held else None,
    }
