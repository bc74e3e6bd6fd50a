"""What ``drift.py`` says of its videos, compared group by group on the same prompts and seeds."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from drift_videos import Job, cost_path
from PIL import Image, ImageDraw

from pavdm_dist.digits.prompts import parse_prompt
from pavdm_dist.evaluate.command import write_report
from pavdm_dist.evaluate.drift import mean_interval, ratio_interval
from pavdm_dist.evaluate.features import frechet_distance
from pavdm_dist.evaluate.measured import Measured
from pavdm_dist.evaluate.page import MOMENTS, page, pictures_of, side_by_side
from pavdm_dist.evaluate.plots import overview, plots
from pavdm_dist.evaluate.report import by_group, over_prompts, prompt_of, summary, whole_rows
from pavdm_dist.io.storage import atomic_write

# Seconds at either end that are compared.
END = 10.0
# What the figure shows, and what the paired comparison is about.
_CURVES = ("digit", "colour", "law_error", "trajectory_error", "sharpness", "saturation", "motion", "join")
_COMPARED = ("digit", "colour", "trajectory_error", "law_error", "bounce", "sharpness", "saturation", "motion", "join")
_ZOOM, _LINE, _NAME = 2, 14, 120


def result_of(videos: Sequence[Measured], jobs: Sequence[Job]) -> dict[str, Any]:
    """Everything in numbers.

    Returns:
        ``groups`` (a row each, for the table), ``ends`` (first and last seconds), ``paired`` (against pavdm on the same
        prompts and seeds), ``digits`` (identity by how many were asked), ``summary`` and ``whole`` as ``pavdm eval``
        has them.
    """
    rows = summary(videos)
    ends = [row for group, own in by_group(videos).items() for row in _ends(group, own)]
    named = {job.path: job for job in jobs}
    return {
        "groups": [_group_row(group, own, videos, rows, ends) for group, own in by_group(videos).items()],
        "ends": ends,
        "paired": _paired(videos, named),
        "digits": _by_digits(videos),
        "summary": rows,
        "whole": whole_rows(videos),
    }


def mean_of(video: Measured, name: str, wanted: Callable[[float], bool] = lambda _: True) -> float | None:
    """Mean of a measure over chunks that begin at wanted seconds, each by its frames; None where there are none."""
    rows = zip(video.times, video.lengths, video.chunks.get(name, ()), strict=False)
    known = [(value, length) for time, length, value in rows if value is not None and wanted(time)]
    return statistics.fmean(*zip(*known, strict=True)) if known else None


def _ends(group: str, videos: Sequence[Measured]) -> list[dict[str, Any]]:
    """First and last ten seconds, and the first one against what follows, of chunks that begin there.

    The ends are means over prompts, and so is the 95 % interval of their ratio.
    """
    rows = []
    for name in dict.fromkeys(name for video in videos for name in video.chunks):
        whole, pairs = [], []
        for video in videos:
            end = video.seconds - END
            first = mean_of(video, name, lambda time: time < END)
            last = mean_of(video, name, lambda time, end=end: time >= end)  # type: ignore[misc]
            if first is not None and last is not None and video.seconds >= 2 * END:
                whole.append(video)
                pairs.append((first, last))
        begin = _mean([mean_of(video, name, lambda time: time < 1) for video in videos])
        later = _mean([mean_of(video, name, lambda time: time >= 1) for video in videos])
        row: dict[str, Any] = {"group": group, "measure": name, "first_second": begin, "later": later}
        if pairs:
            own = over_prompts(whole, pairs)
            ratio, low, high = ratio_interval([(first, last) for first, last in own])
            first, last = np.mean(own, axis=0)
            row |= {"videos": len(pairs), "prompts": _prompts(whole)}
            row |= {"first_10s": float(first), "last_10s": float(last), "ratio": ratio, "low": low, "high": high}
        rows.append(row)
    return rows


def _paired(videos: Sequence[Measured], named: Mapping[str, Job]) -> list[dict[str, Any]]:
    """Every group minus pavdm on the same prompts and seeds: the mean over prompts, with its 95 % interval."""
    takes: dict[str, dict[tuple[int, int], Measured]] = {}
    for video in videos:
        job = named[video.video]
        if not job.variant.is_reference:
            takes.setdefault(video.group, {})[job.number, job.seed] = video
    basis = takes.pop("pavdm", {})
    rows = []
    for group, own in takes.items():
        for name in _COMPARED:
            both, gaps = [], []
            for take in own.keys() & basis.keys():
                one, other = mean_of(own[take], name), mean_of(basis[take], name)
                if one is not None and other is not None:
                    both.append(own[take])
                    gaps.append((one - other,))
            if gaps:
                means = [gap for (gap,) in over_prompts(both, gaps)]
                low, high = mean_interval(means)
                row = {"group": group, "measure": name, "pairs": len(gaps), "prompts": _prompts(both)}
                rows.append(row | {"minus_pavdm": statistics.fmean(means), "low": low, "high": high})
    return rows


def _prompts(videos: Sequence[Measured]) -> int:
    return len(set(map(prompt_of, videos)))


def _by_digits(videos: Sequence[Measured]) -> list[dict[str, Any]]:
    rows = []
    for group, own in by_group(videos).items():
        for count in (1, 2):
            asked = [video for video in own if len(parse_prompt(video.prompt or "")) == count]
            found = [(value, video.prompt) for video in asked if (value := mean_of(video, "digit")) is not None]
            if found:
                of_prompt: dict[str | None, list[float]] = {}
                for value, prompt in found:
                    of_prompt.setdefault(prompt, []).append(value)
                worst, prompt = min((statistics.fmean(values), prompt) for prompt, values in of_prompt.items())
                mean = statistics.fmean(value for value, _ in found)
                row: dict[str, Any] = {"group": group, "digits": count, "videos": len(found), "identity": mean}
                rows.append(row | {"worst": worst, "worst_prompt": prompt})
    return rows


def _group_row(
    group: str,
    own: Sequence[Measured],
    videos: Sequence[Measured],
    rows: Sequence[Mapping[str, Any]],
    ends: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The line of the table."""
    digit = next((row for row in ends if (row["group"], row["measure"]) == (group, "digit")), {})
    prompts = {video.prompt for video in own}
    real = _mean([mean_of(video, "motion") for video in videos if video.group == "real" and video.prompt in prompts])
    motion = _mean([mean_of(video, "motion") for video in own])
    row: dict[str, Any] = {
        "group": group,
        "videos": len(own),
        "prompts": _prompts(own),
        "digit_first_10s": digit.get("first_10s"),
        "digit_last_10s": digit.get("last_10s"),
        "digit_ratio": digit.get("ratio"),
    }
    means = ("digit", "colour", "speed_ratio", "direction", "trajectory_error", "law_error", "bounce", "join")
    row |= {name: _mean([mean_of(video, name) for video in own]) for name in means}
    for name in ("sharpness", "saturation"):
        slope = next((one for one in rows if (one["group"], one["measure"]) == (group, name)), {})
        row |= {f"{name}_slope": slope.get("slope"), f"{name}_low": slope.get("low"), f"{name}_high": slope.get("high")}
    row["motion"] = motion
    row["motion_over_real"] = motion / real if motion is not None and real else None
    row["frechet_distance_eff"] = None if group == "real" else _distance(own, videos)
    for name in ("dynamic_degree", "calls_per_s", "latents_per_s"):
        row[name] = _mean([video.whole.get(name) for video in own])
    row["cpu_s_per_s"] = _mean([_cpu(video) for video in own])
    return row


def _distance(own: Sequence[Measured], videos: Sequence[Measured]) -> float | None:
    """Frechet distance of a group's half seconds to those of the real scenes, of the prompts that both have.

    Of the scenes only as much is taken as the group's videos last: the distance depends on how many pictures there are.
    """
    real = {video.prompt: video.features for video in videos if video.group == "real" and video.features is not None}
    found = [(video.prompt, video.features) for video in own if video.features is not None and video.prompt in real]
    if not found:
        return None
    longest = {prompt: max(len(one) for name, one in found if name == prompt) for prompt, _ in found}
    made = np.concatenate([features for _, features in found])
    scenes = np.concatenate([real[prompt][:length] for prompt, length in longest.items()])
    return frechet_distance(made, scenes) if min(len(made), len(scenes)) > 1 else None


def _cpu(video: Measured) -> float | None:
    """CPU seconds per second of sampled video, decoding and writing included; None where it was not made in one go."""
    try:
        cost = json.loads(Path(cost_path(video.video)).read_text())
        spent, made = cost["cpu_seconds"], cost["seconds_of_video"]
    except (OSError, ValueError, KeyError):
        return None
    return None if spent is None else spent / made


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def table(result: Mapping[str, Any]) -> str:
    """The groups as text, a line for every figure and a column for every group."""
    groups = result["groups"]
    width = max([10, *(len(row["group"]) + 2 for row in groups)])
    lines = [f"{'':20}" + "".join(f"{row['group']:>{width}}" for row in groups)]
    for name in [name for name in groups[0] if name != "group"] if groups else []:
        lines.append(f"{name:20}" + "".join(f"{_cell(row[name]):>{width}}" for row in groups))
    for row in result["paired"]:
        if row["measure"] in ("digit", "trajectory_error", "law_error"):
            what = f"{row['group']} minus pavdm, {row['measure']}, {row['pairs']} pairs of {row['prompts']} prompts"
            interval = "" if row["low"] is None else f" ({row['low']:+.4f} to {row['high']:+.4f})"
            lines.append(f"{what}: {row['minus_pavdm']:+.4f}{interval}")
    for row in result["digits"]:
        what = f"{row['group']}, prompts of {row['digits']}: identity {row['identity']:.3f}"
        lines.append(f"{what}, worst {row['worst']:.3f} ({row['worst_prompt']})")
    return "\n".join(lines)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_all(
    folder: Path, result: Mapping[str, Any], videos: Sequence[Measured], unmeasured: Mapping[str, str], shown: int
) -> None:
    """``drift.json``, plots and a sheet of frames for each shown prompt, beside what ``pavdm eval`` writes."""
    failed = [{"video": path, "error": error} for path, error in unmeasured.items()]
    report = {"videos": [video.as_json() for video in videos], "failed": failed, "whole": result["whole"]}
    report["summary"] = result["summary"]
    drawn = plots(videos)
    names = [name for name in _CURVES if any(name in video.chunks for video in videos)]
    drawn["drift"] = overview(videos, names)
    for number, (title, own) in enumerate(list(side_by_side(videos).items())[:shown]):
        drawn[f"frames-{number:02d}"] = sheet(title, own)
    inside = {name: png for name, png in drawn.items() if not name.startswith(("frames-", "drift"))}
    text = page(videos, failed, result["summary"], inside, shown)
    write_report(folder, report, text, drawn, overwrite=True)
    with atomic_write(folder / "drift.json", "w") as file:
        json.dump(dict(result), file, indent=1)


def sheet(title: str, videos: Sequence[Measured]) -> bytes:
    """Frames of one prompt, a row for every group and a column for every moment, as PNG; none of an unreadable one."""
    rows = [(video.group, pictures_of(video.video)[0]) for video in videos]
    side = 64 * _ZOOM
    columns = [moment for moment in MOMENTS if any(moment in dict(frames) for _, frames in rows)]
    size = (_NAME + len(columns) * (side + 4), 2 * _LINE + len(rows) * (side + 4))
    drawn = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(drawn)
    pen.text((2, 1), title, fill="black")
    for column, moment in enumerate(columns):
        pen.text((_NAME + column * (side + 4), _LINE), f"{moment:g} s", fill="black")
    for row, (group, frames) in enumerate(rows):
        top = 2 * _LINE + row * (side + 4)
        pen.text((2, top), group, fill="black")
        for moment, png in frames:
            picture = Image.open(io.BytesIO(png)).resize((side, side), Image.Resampling.NEAREST)
            drawn.paste(picture, (_NAME + columns.index(moment) * (side + 4), top))
    file = io.BytesIO()
    drawn.save(file, "png", optimize=True)
    return file.getvalue()
