"""Frames of rendered videos side by side: one row a video, one column a moment, prompt and seconds written in.

python benchmarks/contact_sheet.py OUT.png VIDEO.mp4 [VIDEO.mp4 ...] [--seconds 0 15 30 45 60] [--json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.io.video import probe, read_clip

MARGIN, LINE = 4, 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--seconds", type=float, nargs="+", default=[0, 1, 2, 5, 15, 30, 45, 60])
    parser.add_argument("--zoom", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="first and last moment only")
    parser.add_argument("--json", action="store_true", help="print what was drawn as one JSON object")
    arguments = parser.parse_args()
    seconds = [arguments.seconds[0], arguments.seconds[-1]] if arguments.quick else arguments.seconds
    sheet = draw(arguments.videos, seconds, arguments.zoom)
    sheet.save(arguments.out, optimize=True)
    if arguments.json:
        print(json.dumps({"out": arguments.out, "videos": arguments.videos, "seconds": seconds, "size": sheet.size}))


def draw(videos: list[str], seconds: list[float], zoom: int) -> Image.Image:
    """The sheet; moments past a video's end show its last frame."""
    info = probe(videos[0])
    cell = (info.width * zoom + MARGIN, info.height * zoom + MARGIN)
    sheet = Image.new("RGB", (cell[0] * len(seconds) + MARGIN, (cell[1] + LINE) * len(videos) + LINE), "white")
    pen = ImageDraw.Draw(sheet)
    for column, second in enumerate(seconds):
        pen.text((column * cell[0] + MARGIN, 1), f"{second:g} s", fill="black")
    for row, video in enumerate(videos):
        top = LINE + row * (cell[1] + LINE)
        pen.text((MARGIN, top), _prompt(video), fill="black")
        frames = read_clip(video)
        for column, second in enumerate(seconds):
            frame = frames[min(round(second * info.fps), len(frames) - 1)]
            picture = Image.fromarray(frame).resize((info.width * zoom, info.height * zoom), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * cell[0] + MARGIN, top + LINE))
    return sheet


def _prompt(video: str) -> str:
    """The prompt from the sidecar, else the file's name."""
    if Path(video).with_suffix(".json").exists():
        return read_sidecar(video)["prompt"]
    return Path(video).name


if __name__ == "__main__":
    main()
