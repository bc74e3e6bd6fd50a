"""Films as cameras, phones and editors leave them."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from videos import write_video

from cases import LISTED, PROMPT, film, grey, last_line, model, pavdm, python, sentence, went_well

GOING_ON = ("start=chunk", "num_frames=1", "num_inference_steps=6", "output=on.mp4", "--overwrite")
# The command line, and what it took: MiB at the most, seconds of a processor.
MEASURED = """
import re, resource, sys
from pavdm_dist.cli import main
status = main(sys.argv[1:])
most = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(int(most) / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_utime)
sys.exit(status)
"""


def _with_sound(path: Path, pictures_s: int, sound_s: int, rate: int = 22050) -> None:
    options = {"movflags": "frag_keyframe+empty_moov"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        shown, heard = container.add_stream("libx264", rate=24), container.add_stream("aac", rate=rate)
        shown.height, shown.width, shown.pix_fmt = 64, 64, "yuv420p"
        noise = np.random.default_rng(1)
        for index in range(24 * pictures_s):
            picture = av.VideoFrame.from_ndarray(noise.integers(0, 256, (64, 64, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, 24)
            container.mux(shown.encode(picture))
        container.mux(shown.encode(None))
        for start in range(0, sound_s * rate, 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = rate, start, Fraction(1, rate)
            container.mux(heard.encode(silence))
        container.mux(heard.encode(None))


def sound_may_outlast_the_pictures(folder: Path) -> None:
    """A1: the file's length is that of its longest stream; only what no stream reaches is cut off."""
    films = folder / "films"
    films.mkdir()
    for name in ("a.mkv", "b.ts", "fragments.mp4"):
        _with_sound(films / name, 2, 12)
    content = (films / "a.mkv").read_bytes()
    (films / "cut.mkv").write_bytes(content[: len(content) // 3])
    report = pavdm(folder, "data", "prepare", "films", "captions=stem", *LISTED)
    went_well(report)
    found = json.loads(report.stdout)
    assert [entry["video"] for entry in found["skipped"]] == ["cut.mkv"], found["skipped"]
    taken = {json.loads(line)["video"] for line in (folder / "set/clips-0.jsonl").read_text().splitlines()}
    assert found["videos"] == 4 and taken == {"a.mkv", "b.ts", "fragments.mp4"}, found
    went_well(pavdm(folder, "sample", PROMPT, model(folder), "video=films/fragments.mp4", *GOING_ON))


def _colourful(path: Path, *, degrees: int = 0, **flips: bool) -> None:
    """A green mark, top right as stored."""
    picture = np.full((64, 64, 3), 20, np.uint8)
    picture[:16, -16:] = (20, 220, 20)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.set_display_rotation(degrees, **flips)
        for _ in range(21):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _first_shown(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)


def _as_input(folder: Path, name: str, tiny: str, *words: str) -> tuple[np.ndarray, str]:
    """The first picture of a video that begins with a film, and what was said on the way."""
    said = pavdm(folder, "sample", PROMPT, tiny, f"video={name}", "include_input=true", *GOING_ON, *words)
    went_well(said)
    return _first_shown(folder / "on.mp4"), said.stderr


def mirrored_films_are_shown_as_players_show_them(folder: Path) -> None:
    """A2: all of the display matrix counts, not its angle alone."""
    seen, tiny = {}, model(folder)
    turns: dict[str, dict[str, Any]] = {
        "left-right": {"hflip": True},
        "top-bottom": {"vflip": True},
        "turned and left-right": {"degrees": 90, "hflip": True},
    }
    for name, how in turns.items():
        _colourful(folder / "film.mp4", **how)
        picture, _ = _as_input(folder, "film.mp4", tiny, "height=64", "width=64")
        y, x = np.argwhere(picture[..., 1] - picture[..., 0] > 60).mean(0)
        seen[name] = f"{'top' if y < 32 else 'bottom'} {'left' if x < 32 else 'right'}"
    assert seen == {
        "left-right": "top left", "top-bottom": "bottom right", "turned and left-right": "top right"
    }  # fmt: skip


def a_pause_of_an_hour_costs_nothing(folder: Path) -> None:
    """A3: neither time nor memory; and it makes no clip of one still picture."""
    times = [index * 42 + 3_600_000 * (index >= 112) for index in range(220)]
    write_video(folder / "pause.mkv", grey(220), times=times)
    words = ["captions=stem", *LISTED, "buckets=[64x64x10@24]"]
    went_well(pavdm(folder, "data", "prepare", "pause.mkv", *words))
    clips = [json.loads(line) for line in (folder / "set/clips-0.jsonl").read_text().splitlines()]
    assert clips and min(clip["frames"] for clip in clips) >= 18, clips
    words = ["sample", PROMPT, model(folder), "video=pause.mkv", *GOING_ON]
    ended = python(folder, MEASURED, *words, timeout=120)
    went_well(ended)
    assert float(ended.stdout.split()[0]) < 1.2 * 1024


def a_long_film_costs_what_a_short_one_costs(folder: Path) -> None:
    """A5: only its end is encoded where only its end is used."""
    seconds = []
    for frames in (45, 345):
        film(folder / "film.mp4", frames)
        ended = python(folder, MEASURED, "sample", PROMPT, "video=film.mp4", *GOING_ON)
        went_well(ended)
        seconds.append(float(ended.stdout.split()[1]))
    assert seconds[1] - seconds[0] < 5, seconds


def _hdr(path: Path, transfer: int, white: int) -> None:
    """A wall that is as bright as white paper, ten bits a sample; ``transfer``: 16 PQ, 18 HLG."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=24, options={"x265-params": "log-level=none"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 9, 1
        for index in range(30):
            picture = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, value in zip(picture.planes, (white, 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
            picture.pts, picture.time_base = index, Fraction(1, 24)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def bright_films_of_phones_are_not_grey(folder: Path) -> None:
    """A6: PQ and HLG are brought to what a screen shows, and the report says so."""
    films = folder / "films"
    films.mkdir()
    _hdr(films / "one.mp4", 16, 573)  # 203 nits
    _hdr(films / "two.mp4", 18, 721)  # 75 %
    report = pavdm(folder, "data", "prepare", "films", "captions=stem", *LISTED)
    assert re.search(r"\bhdr\b|\bpq\b|\bhlg\b", went_well(report) + report.stdout, re.IGNORECASE), report.stderr
    tiny = model(folder)
    for name in ("one", "two"):
        picture, _ = _as_input(folder, f"films/{name}.mp4", tiny)
        assert picture.mean() > 215, (name, picture.mean())


def a_film_without_a_decoder_is_called_that(folder: Path) -> None:
    """A8: it is whole; and no PyAV is allowed that dies of it."""
    content = film(folder / "ordinary.mp4").read_bytes()
    (folder / "films").mkdir()
    (folder / "films/odd.mp4").write_bytes(content.replace(b"avc1", b"zzz1"))
    said = sentence(pavdm(folder, "sample", PROMPT, model(folder), "video=films/odd.mp4", *GOING_ON))
    assert "no decoder" in said and "odd.mp4" in said and not re.search("corrupt|truncated", said), said
    report = pavdm(folder, "data", "prepare", "films", "captions=stem", *LISTED)
    assert report.returncode == 2 and "no decoder" in last_line(report), report.stderr
    shutil.move(folder / "ordinary.mp4", folder / "films")
    report = pavdm(folder, "data", "prepare", "films", "captions=stem", *LISTED, "output=both")
    went_well(report)
    assert [entry["video"] for entry in json.loads(report.stdout)["skipped"]] == ["odd.mp4"]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (least,) = (re.fullmatch(r"av>=(\d+)\.(\d+)", name) for name in project["dependencies"] if name.startswith("av>"))
    assert least is not None and (int(least[1]), int(least[2])) >= (18, 1)


def what_is_cut_from_a_portrait_is_told(folder: Path) -> None:
    """D6: half of the picture does not vanish without a word."""
    picture = np.full((128, 64, 3), 20, np.uint8)
    picture[:24] = (20, 220, 20)
    write_video(folder / "upright.mp4", np.broadcast_to(picture, (24, 128, 64, 3)))
    shown, said = _as_input(folder, "upright.mp4", model(folder), "height=64", "width=64")
    kept = bool((shown[..., 1] - shown[..., 0] > 60).any())
    assert kept or re.search(r"WARNING.*upright\.mp4", said), said
