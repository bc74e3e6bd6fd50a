"""``pavdm eval``: measures against closed forms and known videos; one bad file stops nothing."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_checkpoint
from numpy.typing import NDArray
from PIL import Image
from videos import numbered, write_video

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.cli import main
from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig
from pavdm_dist.digits.world import NUMBERS, render, sample_scene, scene_prompt
from pavdm_dist.errors import ConfigError
from pavdm_dist.evaluate.command import _videos
from pavdm_dist.evaluate.drift import Drift, mean_interval
from pavdm_dist.evaluate.features import FeatureMeter, frechet_distance, subject_consistency
from pavdm_dist.evaluate.made import cost_of, group_of
from pavdm_dist.evaluate.measured import Measured, measure
from pavdm_dist.evaluate.motion import MotionMeter
from pavdm_dist.evaluate.page import MOMENTS, moments, page, side_by_side
from pavdm_dist.evaluate.pixel_meter import PixelMeter
from pavdm_dist.evaluate.plots import _curves, plots
from pavdm_dist.evaluate.report import summary
from pavdm_dist.evaluate.scenes import SceneMeter
from pavdm_dist.evaluate.settings import EvalConfig
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.io.video import export_to_video
from pavdm_dist.request.sampling import SamplingParams

Frames = NDArray[np.uint8]
RNG = np.random.default_rng(0)


def texture(side: int = 64, seed: int = 0) -> NDArray[np.float64]:
    """Smooth noise on a torus, 0..255: whatever moves over it can be followed."""
    cells = np.fft.rfft2(np.random.default_rng(seed).normal(size=(side, side)))
    rate = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    smooth = np.fft.irfft2(cells * np.exp(-((rate / 0.08) ** 2)), (side, side))
    return 255 * (smooth - smooth.min()) / np.ptp(smooth)


def moving(count: int, pixels: float, side: int = 64) -> Frames:
    """A texture that moves to the right by so many whole pixels a frame."""
    picture = texture(side).astype(np.uint8)
    return np.stack([np.repeat(np.roll(picture, round(i * pixels), 1)[..., None], 3, -1) for i in range(count)])


def metered(frames: Frames, chunk: int = 8, fps: float = 8.0) -> PixelMeter:
    meter = PixelMeter(fps)
    for number, frame in enumerate(frames):
        meter.add(frame, number % chunk == 0)
    return meter


# --- pixels ----------------------------------------------------------------------------------------------


def test_flicker_is_vbenchs() -> None:
    frames = RNG.integers(0, 256, (16, 20, 24, 3), dtype=np.uint8)
    found = metered(frames).per_chunk()["flicker"]
    steps = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
    assert found == pytest.approx([(255 - steps[:7].mean()) / 255, (255 - steps[7:].mean()) / 255])


def test_measures_follow_what_is_done_to_a_picture() -> None:
    picture = np.repeat(texture()[..., None], 3, -1)
    blurred = sum(np.roll(picture, (i, j), (0, 1)) for i in range(-4, 5) for j in range(-4, 5)) / 81
    coloured = picture * np.array([1.0, 0.5, 0.25])
    cases = {"plain": picture, "blurred": blurred, "dark": picture / 2, "coloured": coloured}
    found = {
        name: metered(np.stack([case.astype(np.uint8)] * 8)).per_chunk() for name, case in cases.items()
    }  # fmt: skip

    def value(case: str, name: str) -> float:
        (only,) = found[case][name]
        assert only is not None
        return only

    assert value("blurred", "sharpness") < 0.7 * value("plain", "sharpness")
    assert value("dark", "brightness") == pytest.approx(value("plain", "brightness") / 2, abs=0.003)
    assert value("dark", "contrast") == pytest.approx(value("plain", "contrast") / 2, rel=0.02)
    assert value("plain", "saturation") == 0 and value("coloured", "saturation") == pytest.approx(0.75, abs=0.02)
    assert value("plain", "frozen") == value("plain", "flicker") == 1


def test_a_seam_at_borders_is_seen_and_none_elsewhere() -> None:
    smooth = moving(32, 1)
    assert metered(smooth).per_chunk()["join"][1:] == pytest.approx([1, 1, 1], abs=0.05)
    seam = smooth.copy()
    for start in range(8, 32, 8):
        seam[start:] = np.roll(seam[start:], 9, 1)
    assert min(value or 0 for value in metered(seam).per_chunk()["join"][1:]) > 2
    shift = metered(np.concatenate([smooth[:8], smooth[:8] // 2])).per_chunk()["colour_shift"]
    assert shift[0] == 0 and shift[1] == pytest.approx(np.sqrt(3) * smooth[:8].mean() / 2 / 255, rel=0.02)


def test_colours_of_large_flat_pictures_are_what_they_are() -> None:
    """Sums over eight million pixels are past what float32 counts in ones."""
    frames = np.stack([np.full((2160, 3840, 3), value, np.uint8) for value in (103, 109)])
    found = metered(frames, chunk=1).per_chunk()
    assert found["colour_shift"] == pytest.approx([0, np.sqrt(3) * 6 / 255], abs=1e-6)
    assert found["brightness"] == pytest.approx([103 / 255, 109 / 255], abs=1e-6)
    assert found["flicker"] == [None, pytest.approx(1 - 6 / 255, abs=1e-6)]
    assert found["contrast"] == found["saturation"] == found["sharpness"] == pytest.approx([0, 0], abs=1e-6)


def test_loops_are_found_and_standing_still_is_none() -> None:
    once = moving(128, 0.37, 128)
    noisy = (once.astype(int) + RNG.integers(0, 60, (128, 1, 1, 1))).clip(0, 255).astype(np.uint8)
    assert metered(noisy).loop_score() == 0
    assert metered(np.concatenate([noisy, noisy])).loop_score() == pytest.approx(32 / 60, abs=0.04)
    assert metered(noisy[:1].repeat(64, 0)).loop_score() is None
    assert metered(noisy[:8]).loop_score() is None, "too short to repeat itself"


# --- motion, scenes, features ----------------------------------------------------------------------------


@pytest.mark.parametrize(("pixels", "dynamic"), [(0, 0.0), (1, 0.0), (4, 1.0)])
def test_motion_is_as_fast_as_it_is(pixels: int, dynamic: float) -> None:
    meter = MotionMeter(8.0)
    for number, frame in enumerate(moving(16, pixels, 128)):
        meter.add(frame, number % 8 == 0)
    assert meter.dynamic_degree() == dynamic
    for speed in meter.per_chunk():
        assert speed == pytest.approx(pixels / 128 * 8, rel=0.25, abs=0.01)


@pytest.mark.parametrize(("fps", "pixels", "dynamic"), [(10, 4, 0), (4, 9, 1), (25, 1, 0), (25, 4, 1), (24, 3, 1)])
def test_dynamic_degree_is_of_steps_of_whole_frames(fps: float, pixels: int, dynamic: int) -> None:
    """VBench compares frames round(fps / 8) apart, and asks for six pixels a step whatever the rate."""
    meter = MotionMeter(fps)
    for frame in moving(25, pixels, 256):
        meter.add(frame, not meter._fast)
    assert meter.dynamic_degree() == dynamic


def test_two_frames_that_are_one_do_not_move() -> None:
    meter = MotionMeter(8.0)
    for frame in moving(2, 0, 32):
        meter.add(frame, False) if meter._fast else meter.add(frame, True)
    assert meter.dynamic_degree() == 0


def test_scenes_are_counted() -> None:
    meter = SceneMeter(24.0)
    for scene, colour in enumerate(np.eye(3)):
        for frame in [(texture(64, scene)[..., None] * colour).astype(np.uint8)] * 30:
            meter.add(frame, False)
    assert meter.count() == 3


def test_subject_consistency_is_what_it_says() -> None:
    features = RNG.normal(size=(5, 8))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = [(max(0, unit[i] @ unit[i - 1]) + max(0, unit[i] @ unit[0])) / 2 for i in range(1, 5)]
    assert subject_consistency(features) == pytest.approx(expected)


@pytest.mark.parametrize("pictures", [(40, 50), (4, 50), (4, 5)], ids=["many", "few and many", "few"])
def test_a_distance_is_that_of_the_covariances(pictures: tuple[int, int]) -> None:
    one, other = RNG.normal(size=(pictures[0], 6)), RNG.normal(1, 2, size=(pictures[1], 6))
    first, second = np.cov(one.T), np.cov(other.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    distance = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * middle
    assert frechet_distance(one, other) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_features_know_what_a_picture_shows() -> None:
    def seen(frames: Frames) -> list[float | None]:
        meter = FeatureMeter(2.0)
        for number, frame in enumerate(frames):
            meter.add(frame, number % 2 == 0)
        return meter.per_chunk()

    still = np.repeat(np.repeat(texture()[..., None], 3, -1)[None], 4, 0).astype(np.uint8)
    assert seen(still) == pytest.approx([1, 1], abs=1e-5)
    other = still.copy()
    other[2:] = RNG.integers(0, 256, other[2:].shape)
    assert (seen(other)[1] or 0) < 0.8


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three seconds of a scene, and what is to be seen in it."""
    scene = sample_scene(np.random.default_rng(3), "heldout", num_digits=1)
    path = tmp_path_factory.mktemp("digits") / "scene.mp4"
    export_to_video(render(scene, 0, 72), str(path), 24)
    return path, scene_prompt(scene)


def test_digits_are_read_and_wrong_prompts_found_out(digits: tuple[Path, str]) -> None:
    path, prompt = digits
    plain = EvalConfig(prompt=prompt, motion="off", scenes="off", features="off")
    found = measure(str(path), plain)
    assert len(found.times) == 3 and found.drift["digit"].minimum > 0.9 and found.drift["colour"].mean == 1
    numbers = list(NUMBERS)
    word = next(word for word in prompt.split() if word in numbers)
    other = prompt.replace(word, numbers[(numbers.index(word) + 1) % 10])
    assert measure(str(path), EvalConfig(**{**plain.__dict__, "prompt": other})).drift["digit"].mean < 0.2


def test_a_sidecars_prompt_is_that_of_its_video(digits: tuple[Path, str], tmp_path: Path) -> None:
    path = tmp_path / "scene.mp4"
    path.write_bytes(digits[0].read_bytes())
    plain = EvalConfig(prompt="another film", motion="off", scenes="off", features="off", digits="off")
    for said, prompt in (
        ({"versions": {}, "prompt": digits[1]}, digits[1]),
        ({"versions": {}}, "another film"),
        ({"prompt": "of a file that is no sidecar"}, "another film"),
    ):
        path.with_suffix(".json").write_text(json.dumps(said))
        assert measure(str(path), plain).prompt == prompt


def test_chunks_are_those_of_the_sidecar(digits: tuple[Path, str], tmp_path: Path) -> None:
    path = tmp_path / "scene.mp4"
    path.write_bytes(digits[0].read_bytes())
    said = {"versions": {}, "prompt": "a film", "config": {"method": "pavdm"}, "extra": {"chunk_frames": [17, 20]}}
    path.with_suffix(".json").write_text(json.dumps(said))
    config = EvalConfig(motion="off", scenes="off", features="off")
    found = measure(str(path), config)
    assert found.times == pytest.approx([0, 17 / 24, 37 / 24, 57 / 24])
    assert found.group == "pavdm" and "digit" not in found.drift, "no sentence of that world"
    config.chunk_seconds = 1.5
    assert measure(str(path), config).times == [0, 1.5]
    said["config"] = {"include_input": True}
    path.with_suffix(".json").write_text(json.dumps(said))
    assert measure(str(path), EvalConfig(motion="off", scenes="off", features="off")).times == [0, 1, 2]


def test_chunks_begin_where_the_file_says(tmp_path: Path) -> None:
    times = [*range(0, 2000, 42), *range(2000, 10000, 500)]
    path = write_video(tmp_path / "varying.mkv", numbered(80, 32, 32)[: len(times)], 24, [5000 + at for at in times])
    found = measure(str(path), EvalConfig(motion="off", scenes="off", features="off", chunk_seconds=1.0))
    starts = np.cumsum([0, *found.lengths])[:-1]
    assert found.times == pytest.approx([times[start] / 1000 for start in starts], abs=0.002)
    assert sum(found.lengths) == len(times)
    assert [round(time) for time, _ in moments(str(path))] == [1], "of its own seconds, from its first frame on"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (range(0, 4000, 40), {1: 25}),
        ([0, 900, 1100, 14000, 31000, 31040], {1: 1, 15: 3, 30: 3}),  # one frame is on the screen at two moments
        ([5000, 6000, 20000], {1: 1, 15: 2}),
    ],
)
def test_what_is_shown_at_a_moment_was_on_the_screen_then(
    times: Sequence[int], expected: dict[int, int], tmp_path: Path
) -> None:
    frames = np.zeros((len(times), 32, 32, 3), np.uint8) + (np.arange(len(times)) % 80 * 3)[:, None, None, None]
    path = write_video(tmp_path / "varying.mkv", frames.astype(np.uint8), 25, list(times))
    found = {round(time): Image.open(io.BytesIO(png)) for time, png in moments(str(path))}
    assert {time: round(np.asarray(picture).mean() / 3) for time, picture in found.items()} == expected


def test_a_video_of_a_minute_is_shown_at_its_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "minute.mp4", np.zeros((120, 16, 16, 3), np.uint8), 2)
    assert [time for time, _ in moments(str(path))] == list(MOMENTS)
    path = write_video(tmp_path / "shorter.mp4", np.zeros((119, 16, 16, 3), np.uint8), 2)
    assert [time for time, _ in moments(str(path))] == list(MOMENTS)[:-1]


def test_a_report_goes_on_past_bad_files(
    digits: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(digits[0].read_bytes())
    (videos / "b.mp4").write_text("no film")
    export_to_video(moving(1, 0), str(videos / "c.mp4"), 24)
    (videos / "d.mp4.parts").mkdir()
    (videos / "d.mp4.parts" / "00.mp4").write_text("unfinished")
    words = ["eval", str(videos), f"output={tmp_path / 'out'}", f"reference={json.dumps([str(digits[0])])}", "--json"]
    assert main(words) == 102
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [video["video"] for video in report["videos"]] == [str(videos / "a.mp4")]
    assert [Path(row["video"]).name for row in report["failed"]] == ["b.mp4", "c.mp4"]
    assert re.search(r"pavdm: 2 of 3 videos could not be measured; the first: \S+b\.mp4 is not a video", captured.err)
    assert report["whole"][0]["frechet_distance_eff"] == pytest.approx(0, abs=1e-6)
    assert report["whole"][0]["scenes"] == 1 and "dynamic_degree" in report["whole"][0]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= len(report["videos"][0]["drift"]) + 1 and "no film" not in page
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is fetched"
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    (tmp_path / "out" / ".DS_Store").touch()
    assert main([*words, "--overwrite"]) == 102
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["plots", "report.html", "report.json"]


@pytest.mark.parametrize(
    "said", ['{"versions": {}, "prompt": 5}', '{"versions": {}, "config": {"method": ["x"]}}', "[1]", "no JSON", None]
)
def test_what_lies_beside_a_video_may_be_anybodys(said: str | None, digits: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(digits[0].read_bytes())
    sidecar = tmp_path / "a.json"
    sidecar.mkdir() if said is None else sidecar.write_text(said)
    off = [f"{name}=off" for name in ("motion", "scenes", "features")]
    assert main(["eval", str(tmp_path), *off, f"output={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["videos"][0]["group"] == "unknown"


def test_a_fault_of_a_detector_is_one_videos(
    digits: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(PixelMeter, "add", breaks)
    assert main(["eval", str(digits[0])]) == 101
    assert "scene.mp4: ZeroDivisionError: inside" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["pavdm", "replacement", "fifo", "autoregressive"])
def test_cost_is_that_of_the_plan(method: str) -> None:
    params = SamplingParams.resolve(Checkpoint.open("embedded"), method=method)
    sidecar = json.loads(json.dumps({
        "num_frames": 77, "chunk_seconds": [1.0] * 4, "config": {"method": method, "mode": "window"},
        "extra": {"sampling": asdict(params), "chunk_frames": [17, 20]},
    }))  # fmt: skip
    plan, seconds = params.plan(4), 77 / 24
    assert cost_of(sidecar) == pytest.approx({
        "calls_per_s": 2 * plan.num_calls / seconds, "latents_per_s": 2 * plan.latent_evaluations / seconds,
        "seconds_per_s": 4 / seconds,
    })  # fmt: skip
    assert group_of("a/b.mp4", sidecar, "method") == method and group_of("a/b.mp4", sidecar, "folder") == "a"
    sidecar["extra"]["sampling"] |= {"guidance_scale": 1.0}
    assert cost_of(sidecar)["calls_per_s"] == pytest.approx(plan.num_calls / seconds), "one branch"


def test_a_chunk_at_a_time_holds_less_than_windows() -> None:
    params = SamplingParams.resolve(Checkpoint.open("embedded"), mode="causal")
    said = {"sampling": asdict(params), "chunk_frames": [17, 20]}
    sidecar = {
        "num_frames": 477,
        "config": {"method": "pavdm", "mode": "causal"},
        "extra": said,
        "chunk_seconds": [1.0],
    }
    plan, found = params.plan(24), cost_of(sidecar)
    assert found["calls_per_s"] > 4 * 2 * plan.num_calls / (477 / 24)
    assert found["latents_per_s"] < 2 * plan.latent_evaluations / (477 / 24)
    assert group_of("b.mp4", sidecar, "method") == "pavdm, causal" and group_of("b.mp4", {}, "folder") == "."


@pytest.mark.parametrize(("start", "asked"), [("chunk", 20), ("clip", 16)])
def test_frames_that_were_given_cost_nothing(start: str, asked: int, tmp_path: Path) -> None:
    """The same work, shown with the film that it goes on from and without."""
    model, film = tiny_checkpoint(tmp_path / "model"), tmp_path / "film.mp4"
    export_to_video(moving(45, 1, 32), str(film), 24)
    found = {}
    for shown in (False, True):
        output = tmp_path / f"{shown}.mp4"
        config = SampleConfig(prompt="a film", model=str(model), output=str(output), video=str(film), num_frames=asked)
        config.start, config.include_input = start, shown
        render_command(config, overwrite=False, progress=ChunkProgress)
        found[shown] = read_sidecar(output)
    costs = {shown: cost_of({**sidecar, "chunk_seconds": [0.5] * 3}) for shown, sidecar in found.items()}
    assert found[True]["num_frames"] > asked == found[False]["num_frames"]
    assert costs[True] == costs[False] and costs[True]["seconds_per_s"] == pytest.approx(1.5 * 24 / asked)
    # Of an endless one, which was ended, the chunks that it has tell.
    endless = found[True] | {"identity": {"num_frames": None}, "chunk_seconds": [0.5] * 3}
    whole = found[False] | {"num_frames": 24, "chunk_seconds": [0.5] * 3}
    assert cost_of(endless) == cost_of(whole) != {}


@pytest.mark.parametrize(
    "extra", [None, [], {"sampling": 5}, {"sampling": {"displaced": {"x": 1}}, "chunk_frames": [1]}]
)
def test_what_anybodys_sidecar_says_of_cost_is_nothing(extra: object) -> None:
    assert cost_of({"num_frames": 77, "extra": extra}) == {} == cost_of({})


def test_the_same_prompt_of_every_group_stands_together(digits: tuple[Path, str]) -> None:
    plain = EvalConfig(prompt=digits[1], motion="off", scenes="off", features="off", digits="off")
    one = replace(measure(str(digits[0]), plain), whole={"latents_per_s": 100.0})
    other = replace(one, group="replacement", whole={"latents_per_s": 80.0})
    takes = side_by_side([one, replace(one, prompt="a film"), one, other, replace(other, prompt=None)])
    assert {title: [video.group for video in own] for title, own in takes.items()} == {
        digits[1]: ["unknown", "replacement"],
        "a film": ["unknown"],
        f"{digits[1]} (2)": ["unknown"],
        str(digits[0]): ["replacement"],
    }
    drawn = plots([one, other])
    assert "quality_over_cost" in drawn and "quality_over_cost" not in plots([one, one])
    text = page([one, other], [], summary([one, other]), drawn, 0)
    assert "1 more are measured and not shown" in text and "<figure>" not in text
    rows = page([one, other], [], summary([one, other]), {}, 1).split("<figure>")[1].split("</figure>")[0]
    assert rows.count("<img") == 2 and rows.index(">unknown<") < rows.index(">replacement<"), "at one second"


def test_curves_meet_by_time() -> None:
    """Chunks of one video may last a third of those of another."""

    def video(step: float, count: int) -> Measured:
        times = [step * i for i in range(count)]
        return Measured(
            "v", None, 1, 1, 24, 1, 1, "pavdm", times, [24] * count, {"x": [time or None for time in times]}, {}, {}
        )

    times, rows = _curves([video(1, 4), video(1 / 3, 12)], "x")
    assert times[-1] == pytest.approx(11 / 3)
    known = ~np.isnan(rows)
    assert np.allclose(rows[known], np.broadcast_to(times, rows.shape)[known]) and known.sum(1).tolist() == [7, 11]


def of_slope(slope: float | None, prompt: str | None = None, **drift: float) -> Measured:
    found = replace(Drift(1, slope, None, None, 1, 1, 1, 0), **drift)
    return Measured("v", prompt, 1, 1, 24, 1, 1, "pavdm", [0.0], [24], {}, {"x": found}, {})


def test_the_only_slope_gives_the_interval() -> None:
    (found,) = summary([of_slope(None), of_slope(2.0, low=1.0, high=3.0)])
    assert (found["slope"], found["low"], found["high"], found["hold"]) == (2.0, 1.0, 3.0, "0 of 1")


def test_takes_of_one_prompt_are_not_independent() -> None:
    """Six prompts of four takes, half of whose variance is the prompt's: as often right as said."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        slopes = rng.normal(size=(6, 1)) + rng.normal(size=(6, 4))
        (found,) = summary([of_slope(float(one), f"{i}") for i, own in enumerate(slopes) for one in own])
        held += found["low"] <= 0 <= found["high"]
    assert 0.93 <= held / 400 <= 0.97, "0.79 where they count as 24"
    assert (found["videos"], found["prompts"]) == (24, 6)
    assert (found["low"], found["high"]) == pytest.approx(mean_interval(slopes.mean(1).tolist()))


@pytest.mark.parametrize("prompts", [["a", "b", "c"], [None, None, None], ["a", "a", "a"]])
def test_videos_count_singly_of_unlike_unknown_or_only_one_prompt(prompts: list[str | None]) -> None:
    slopes = [0.3, -0.1, 0.7]
    videos = [replace(of_slope(*one), video=f"{i}") for i, one in enumerate(zip(slopes, prompts, strict=True))]
    (found,) = summary(videos)
    assert (found["low"], found["high"]) == mean_interval(slopes) and found["slope"] == pytest.approx(0.3)
    assert (found["videos"], found["prompts"]) == (3, 1 if prompts[0] == prompts[1] == "a" else 3)


def test_of_folders_what_other_systems_leave_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    left = ("out/._a.mp4", "out/.Trash-0/old.mp4", "out/@eaDir/a.mp4/thumb.mp4", "out/b/#recycle/gone.webm")
    kept = ("out/a.mp4", "out/b/c.gif")
    for name in (*left, *kept, "out/d.mp4.parts/00000.mp4", "out/notes.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    with caplog.at_level("INFO"):
        assert _videos(["out"]) == list(kept)
    assert "videos=out: 4 hidden files and folders are passed over, such as out/" in caplog.text
    for name in kept:
        Path(name).unlink()
    with pytest.raises(ConfigError, match=r"videos=out: holds no video \(.*\.mp4, .*gif\); 4 hidden files and folders"):
        _videos(["out"])
    assert _videos(["out/.Trash-0", "out/._a.mp4"]) == ["out/.Trash-0/old.mp4", "out/._a.mp4"]  # who names one means it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "videos: must be given"),
        (["{empty}"], r"videos=\S+empty: holds no video"),
        (["{film}", "digits=on"], r"digits=on: \S+scene\.mp4: no prompt is known; prompt=TEXT says it"),
        (["{film}", "digits=on", "prompt=a cat"], r"digits=on: .*cat"),
        (["{film}", "features=off", "reference=[{film}]"], "features=off takes none"),
        (["{film}", "chunk_seconds=0"], "chunk_seconds=0"),
        (["{film}", "seed=-1"], "seed=-1: must be 0 or more"),
        (["{film}", "output={empty}", "--overwrite"], "holds no report that could be replaced"),
    ],
)
def test_bad_settings_are_one_sentence(
    words: list[str], said: str, digits: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    given = [word.format(empty=tmp_path / "empty", film=digits[0]) for word in words]
    assert main(["eval", *given]) in (2, 101)
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("package", "setting"), [("cv2", "motion"), ("scenedetect", "scenes"), ("efficientnet_lite_pytorch", "features")]
)
def test_what_is_not_installed_is_named_or_left_out(
    package: str, setting: str, digits: tuple[Path, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    off = [f"{name}=off" for name in ("motion", "scenes", "features", "digits") if name != setting]
    assert main(["eval", str(digits[0]), *off]) == 0
    assert main(["eval", str(digits[0]), *off, f"{setting}=on"]) == 101
    assert re.search(rf"{setting}=on needs .*pip install 'pavdm-dist\[metrics\]'", capsys.readouterr().err)
