"""``pavdm farm report``: one page that needs no server and nothing from the net, beside the videos that it plays."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from pavdm_dist.farm.status import Standing, standings, status_report
from pavdm_dist.farm.tree import VIDEO, Tree
from pavdm_dist.io.storage import atomic_write

logger = logging.getLogger(__name__)

# Pictures of a contact sheet, and their height; shots that have one, and a player: a page of thousands loads for ever.
FRAMES, HEIGHT, SHOWN = 6, 72, 500
_CHART = (260, 36)


@dataclass(frozen=True)
class _Card:
    """What the page shows of a complete shot."""

    id: str
    prompt: str
    video: str
    facts: list[tuple[str, str]]
    sheet: str | None
    chart: str | None
    tags: Sequence[str]


def write_report(out: str) -> dict[str, Any]:
    """Writes ``index.html`` into a farm's folder.

    Args:
        out: the folder, local or remote.

    Returns:
        Its path, and how many complete and failed shots it shows.

    Raises:
        ConfigError: no folder of a farm.
        OSError: it cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    tree = Tree(out)
    status = status_report(out)
    cards, failed, unfinished = list[_Card](), list[Standing](), list[Standing]()
    for one in standings(tree):
        if one.sidecar is not None and len(cards) < SHOWN:
            cards.append(_card(tree, one, one.sidecar))
        elif one.state.standing == "failed":
            failed.append(one)
        elif one.state.standing in ("running", "begun"):
            unfinished.append(one)
    page = Environment(loader=PackageLoader("pavdm_dist.farm"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = page.get_template("report.html").render(
        status={name: value for name, value in status.items() if not isinstance(value, list)},
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        cards=cards,
        failed=failed,
        unfinished=unfinished,
        hidden=max(0, status["done"] - len(cards)),
        stages=_stages(tree),
    )
    path = tree.path("index.html")
    with atomic_write(path, "w") as file:
        file.write(html)
    return {"report": path, "complete": len(cards), "failed": len(failed), "unfinished": len(unfinished)}


def _card(tree: Tree, one: Standing, sidecar: dict[str, Any]) -> _Card:
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
    sheet = _sheet(tree.output(one.shot.id), sidecar["num_frames"])
    return _Card(
        one.shot.id, one.shot.prompt, f"shots/{one.shot.id}/{VIDEO}", facts, sheet, _bars(chunks), one.shot.tags
    )


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
    import av

    wanted = {round(index * (frames - 1) / max(1, FRAMES - 1)) for index in range(FRAMES)}
    with av.open(path) as container:
        for number, frame in enumerate(islice(container.decode(video=0), frames)):
            if number in wanted:
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
        config = one.sidecar.get("config") or {}
        key = str(one.sidecar.get("device")), int(config.get("num_stages") or 0)
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
