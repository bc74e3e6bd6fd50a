"""``pavdm farm report``: one page that needs no server and nothing from the net, beside the videos that it plays."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pavdm_dist.errors import MediaError
from pavdm_dist.farm.prompts import prompt_of
from pavdm_dist.farm.status import Standing, standings, status_report
from pavdm_dist.farm.traces import StageTimes, shot_times
from pavdm_dist.farm.tree import SIDECAR, VIDEO, Tree
from pavdm_dist.io.storage import atomic_write

logger = logging.getLogger(__name__)

# Pictures of a contact sheet, and their height; shots that have one, and a player: a page of thousands loads for ever.
FRAMES, HEIGHT, SHOWN = 6, 72, 500
# Of charts: width and height, and the height of a stage's row.
_CHART, _ROW = (260, 36), 12


@dataclass(frozen=True)
class _Card:
    """What the page shows of a complete shot."""

    id: str
    prompt: str
    video: str
    facts: list[tuple[str, str]]
    sheet: str | None
    chart: str | None
    stages: list[str]
    tags: Sequence[str]


def write_report(out: str) -> dict[str, Any]:
    """Writes ``index.html`` into a farm's folder.

    Args:
        out: the folder, local or remote.

    Returns:
        Its path, and how many complete and failed shots it shows.

    Raises:
        ConfigError: no folder of a farm.
        MediaError: it cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    tree = Tree(out)
    status = status_report(out)
    times = shot_times(tree)
    cards, failed, unfinished = list[_Card](), list[Standing](), list[Standing]()
    for one in standings(tree):
        if one.sidecar is not None and len(cards) < SHOWN:
            cards.append(_card(tree, one, one.sidecar, times.get(one.shot.id, [])))
        elif one.sidecar is None and one.state.standing == "done":
            logger.warning("%s/%s: is none of this program's, or damaged; left out", tree.folder(one.shot.id), SIDECAR)
        elif one.state.standing == "failed" and len(failed) < SHOWN:
            failed.append(one)
        elif one.state.standing in ("running", "begun") and len(unfinished) < SHOWN:
            unfinished.append(one)
    page = Environment(loader=PackageLoader("pavdm_dist.farm"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = page.get_template("report.html").render(
        status={name: value for name, value in status.items() if not isinstance(value, list)},
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        cards=cards,
        failed=failed,
        unfinished=unfinished,
        prompt_of=prompt_of,
        hidden={
            "complete": max(0, status["done"] - len(cards)),
            "failed": max(0, status["failed"] - len(failed)),
            "unfinished": max(0, status["running"] + status["begun"] - len(unfinished)),
        },
        stages=_stages(tree),
    )
    path = tree.path("index.html")
    try:
        with atomic_write(path, "w") as file:
            file.write(html)
    except OSError as error:
        raise MediaError(f"report={path}: cannot be written ({error.strerror or error})") from error
    return {"report": path, "complete": len(cards), "failed": len(failed), "unfinished": len(unfinished)}


def _card(tree: Tree, one: Standing, sidecar: dict[str, Any], times: StageTimes) -> _Card:
    chunks = [float(seconds) for seconds in sidecar.get("chunk_seconds") or ()]
    took = sum(chunks)
    facts = [
        ("length", f"{one.seconds:.1f} s, {sidecar['num_frames']} frames"),
        ("size", f"{sidecar['width']}x{sidecar['height']} at {sidecar['fps']:g} fps"),
        ("seed", str(sidecar.get("seed"))),
        (
            "took",
            f"{took:.1f} s, {len(chunks)} chunks" + (f", {60 * one.seconds / took:.1f} s of video/min" if took else ""),
        ),
        ("device", str(sidecar.get("device"))),
    ]
    if times:
        facts.append(("stages", _busy(times)))
    sheet = _sheet(tree.output(one.shot.id), sidecar["num_frames"])
    return _Card(
        one.shot.id,
        prompt_of(one.shot, sidecar),
        f"shots/{one.shot.id}/{VIDEO}",
        facts,
        sheet,
        _bars(chunks),
        _spans(times),
        one.shot.tags,
    )


def _busy(times: StageTimes) -> str:
    """How long each stage computed for a shot, of the time from the shot's first unit to its last."""
    whole = max(end for spans in times for _, end in spans) or 1.0
    shares = (sum(end - start for start, end in spans) / whole for spans in times)
    return f"{whole:.1f} s; busy with this shot: " + ", ".join(
        f"stage {rank} {share:.0%}" for rank, share in enumerate(shares)
    )


def _spans(times: StageTimes) -> list[str]:
    """When each stage computed for a shot, as the path of an SVG each; as fine as the picture is wide."""
    whole = max((end for spans in times for _, end in spans), default=0.0) or 1.0
    paths = []
    for rank, spans in enumerate(times):
        parts, behind = list[str](), -1
        for start, end in sorted(spans):
            left = max(int(start / whole * _CHART[0]), behind)
            behind = max(math.ceil(end / whole * _CHART[0]), behind)
            if behind > left:
                parts.append(f"M{left} {_ROW * rank}h{behind - left}v{_ROW - 2}H{left}z")
        paths.append("".join(parts))
    return paths


def _sheet(video: str, frames: int) -> str | None:
    """Pictures from beginning to end in one row, as a data address; None where the video cannot be read."""
    from PIL import Image

    from pavdm_dist.io.storage import local_copy

    try:
        with local_copy(video) as file:
            pictures = list(_pictures(str(file), frames))
    except Exception as error:  # whatever a decoder says of a damaged file: the page shows the rest
        logger.warning("%s: no contact sheet: %s", video, error)
        return None
    if not pictures:
        return None
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures), HEIGHT))
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    held = io.BytesIO()
    sheet.save(held, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


def _pictures(path: str, frames: int) -> Iterator[Any]:
    """Six pictures of the first ``frames``, in order; decoded is what lies between each and the key frame before it."""
    import av

    wanted = sorted({round(index * (frames - 1) / max(1, FRAMES - 1)) for index in range(FRAMES)})
    with av.open(path) as container:
        stream = container.streams.video[0]
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.pts is not None]
        times, keys = sorted(pts for pts, _ in packets), sorted(pts for pts, is_key in packets if is_key)
        decoded: Iterator[Any] = iter(())
        behind = -math.inf  # of the last frame that was decoded
        for time in (times[number] for number in wanted if number < len(times)):
            if max((key for key in keys if key <= time), default=times[0]) > behind:
                container.seek(time, stream=stream, backward=True)
                decoded = container.decode(stream)
            frame = next((frame for frame in decoded if frame.pts is not None and frame.pts >= time), None)
            if frame is None:  # the file ends in the middle of one
                return
            behind = frame.pts
            picture = frame.to_image()
            yield picture.resize((max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT))


def _bars(values: Sequence[float]) -> str | None:
    """A chart of bars, one a chunk, as the path of an SVG; None where there is nothing to draw."""
    if not values or max(values) <= 0:
        return None
    width, height = _CHART
    step, top = width / len(values), max(values)
    parts = (
        f"M{index * step:.1f} {height}v{-height * value / top:.1f}h{max(step - 0.5, 0.3):.1f}V{height}z"
        for index, value in enumerate(values)
    )
    return "".join(parts)


def _stages(tree: Tree) -> list[dict[str, Any]]:
    """By machine and number of stages, how many shots were made on it and how fast."""
    found: dict[tuple[str, int], list[float]] = {}
    for one in standings(tree):
        if one.sidecar is None:
            continue
        stages = (one.sidecar.get("config") or {}).get("num_stages")
        key = str(one.sidecar.get("device")), stages if type(stages) is int else 0
        took = sum(one.sidecar.get("chunk_seconds") or ())
        entry = found.setdefault(key, [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += one.seconds
        entry[2] += took
    most = max((entry[1] / entry[2] for entry in found.values() if entry[2]), default=0.0)
    return [
        {
            "device": device,
            "stages": stages,
            "shots": int(entry[0]),
            "rate": 60 * entry[1] / entry[2] if entry[2] else 0.0,
            "share": entry[1] / entry[2] / most if entry[2] and most else 0.0,
        }
        for (device, stages), entry in sorted(found.items())
    ]
