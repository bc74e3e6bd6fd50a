"""A command that ends in the middle, however it ends, and is given again: the same video, nothing made twice."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from forked import Program
from helpers import tiny_checkpoint
from interrupting import PROMPT, interrupted, render

from pavdm_dist import cli
from pavdm_dist.commands.progress import PROGRESS
from pavdm_dist.commands.resume import configs_to_resume
from pavdm_dist.commands.sample import check_videos, render_command
from pavdm_dist.commands.videos import Video, WantedVideo
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError, FailedVideosError
from pavdm_dist.io.latents import read_latents
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.io.parts import LOCK_NAME, parts_folder
from pavdm_dist.io.recording import Recording
from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.io.state import read_state

pytestmark = pytest.mark.timeout(180)
SETTINGS = {"num_frames": 149, "save_latents": "true", "chunks_per_segment": 3, "guidance_scale": 1}  # 19 chunks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same video, undisturbed."""
    output = tmp_path_factory.mktemp("whole") / "v.mp4"
    assert cli.main(["sample", *_words(model, output)]) == 0
    return output


def _words(model: Path, output: Path, **settings: object) -> list[str]:
    chosen = {"model": model, "output": output, **SETTINGS, **settings}
    return [PROMPT, *(f"{name}={value}" for name, value in chosen.items())]


# The command, which does not come to its end before it is told to end, however long this process takes for that.
ENDLESS = """
import sys, time
from itertools import count
from pavdm_dist import cli
from pavdm_dist.codecs.wan import WanCodec

real, calls = WanCodec.decoder, count()

def decoder(codec):
    found = real(codec)
    decode = found.decode

    def waits(latents):
        if next(calls) == 15:
            time.sleep(100)
        return decode(latents)

    found.decode = waits
    return found

WanCodec.decoder = decoder
sys.exit(cli.main(sys.argv[1:]))
"""


def _started(model: Path, output: Path, chunk: int) -> Program:
    """The command, once it has told of a chunk, and what was there of closed segments then is kept."""
    process = Program(["-c", ENDLESS, "sample", *_words(model, output)])
    assert any(f"chunk {chunk}:" in line for line in process.lines()), "it ended before"
    end = time.monotonic() + 60
    while (state := read_state(f"{output}.parts")) is None or state.closed_chunks < (chunk + 1) // 3 * 3:
        assert time.monotonic() < end and process.returncode is None
        time.sleep(0.01)
    return process


def _packets(path: Path) -> list[tuple[int, int, bytes]]:
    with av.open(str(path)) as container:
        return [(p.pts, p.dts, bytes(p)) for p in container.demux(container.streams.video[0]) if p.size]


def _check_equal(output: Path, whole: Path) -> None:
    assert torch.equal(
        read_latents(output.with_suffix(".safetensors")), read_latents(whole.with_suffix(".safetensors"))
    )
    assert _packets(output) == _packets(whole)
    mine, other = read_sidecar(output), read_sidecar(whole)
    for name in ("latents_sha256", "num_frames", "prompt", "seed"):
        assert mine[name] == other[name]
    assert len(mine["chunk_seconds"]) == 19
    assert not Path(f"{output}.parts").exists()


@pytest.mark.parametrize(
    ("number", "status", "after"),
    [
        (signal.SIGKILL, -9, 4),
        pytest.param(signal.SIGKILL, -9, 9, marks=pytest.mark.slow),
        (signal.SIGTERM, 143, 6),
        pytest.param(signal.SIGINT, 130, 7, marks=pytest.mark.slow),  # tests/test_pipeline.py presses it, too
        pytest.param(signal.SIGHUP, 129, 2, marks=pytest.mark.slow),  # tests/test_signals.py
    ],
)
def test_the_same_command_again_goes_on(
    model: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
    after: int,
) -> None:
    output = tmp_path / "v.mp4"
    process = _started(model, output, after)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert not output.exists() and not output.with_suffix(".json").exists()
    if number != signal.SIGKILL:
        last = said.splitlines()[-1]
        assert last.startswith("pavdm: interrupted: ") and "are playable in" in last
        assert last.endswith("the same command again goes on") and "Traceback" not in said
    assert cli.main(["sample", *_words(model, output)]) == 0
    said = capsys.readouterr().err
    (went_on,) = (int(line.split()[-1]) for line in said.splitlines() if "goes on at chunk" in line)
    # Killed outright, it has what was there when the last segment was closed; else every chunk that it gave.
    assert went_on >= (after + 1 if number != signal.SIGKILL else (after + 1) // 3 * 3)
    assert f"chunk {went_on}:" in said and "chunk 0:" not in said
    _check_equal(output, whole)


def test_a_video_goes_on_on_stages_and_by_its_folder_alone(
    ray_cluster: None, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "v.mp4"
    interrupted(model, output, monkeypatch, 5, **{**SETTINGS, "save_latents": True})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "--resume", f"{output}.parts", "num_stages=1"]) == 0
    assert "goes on at chunk" in capsys.readouterr().err
    _check_equal(output, whole)
    with pytest.raises(ConfigError, match="is no folder of an interrupted video"):
        configs_to_resume(str(tmp_path))


@pytest.mark.parametrize("full_disk", [False, True])
def test_progress_goes_on_where_the_videos_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full_disk: bool
) -> None:
    """In the middle of one of two, and where all that is left is to join them."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\na blue seven\n")
    settings = {"prompt": None, "prompts": str(prompts), "num_frames": 21}  # three chunks each: 5, 8 and 8 frames

    def join(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if full_disk:
        with monkeypatch.context() as patched:
            patched.setattr(SegmentWriter, "join", join)
            with pytest.raises(FailedVideosError):
                render(model, tmp_path / "cut", **settings)
    else:
        interrupted(model, tmp_path / "cut", monkeypatch, 2, **settings)
    capsys.readouterr()
    config = SampleConfig(model=str(model), output=str(tmp_path / "cut"), guidance_scale=1.0)
    for name, value in settings.items():
        setattr(config, name, value)
    render_command(config, False, PROGRESS["openjd"])
    said = [line.split() for line in capsys.readouterr().err.splitlines()]
    percents = [float(words[1]) for words in said if words[0] == "openjd_progress:"]
    # Of the first video one chunk is there for good; the second, which no keyframe ends, is made again.
    first = 100 if full_disk else 100 * 5 / 42
    assert percents == sorted(percents) and abs(percents[0] - first) < 0.1 and percents[-1] == 100


def test_a_batch_makes_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\na blue seven\na three up\n")
    settings = {"prompt": None, "prompts": str(prompts)}
    expected = render(model, tmp_path / "whole", **settings)
    # Three chunks each: the second video is in the middle.
    interrupted(model, tmp_path / "cut", monkeypatch, 5, **settings)
    first = next((tmp_path / "cut").glob("0000-*.mp4"))
    stamp = first.stat().st_mtime_ns
    caplog.clear()
    with caplog.at_level("INFO"):
        found = render(model, tmp_path / "cut", **settings)
    assert first.stat().st_mtime_ns == stamp and f"{first} is complete already" in caplog.text
    assert "goes on at chunk 2" in caplog.text
    assert [v["latents_sha256"] for v in found] == [v["latents_sha256"] for v in expected]
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cut").iterdir())]
    assert render(model, tmp_path / "cut", **settings) == found, "nothing is left to do"
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "cut").iterdir())]


def test_another_setting_is_refused_and_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "v.mp4"
    interrupted(model, output, monkeypatch, 2)
    before = {path: path.read_bytes() for path in Path(f"{output}.parts").iterdir()}
    with pytest.raises(ConfigError, match=r"begun with seed=0 \(now 1\); give the same to go on, or --overwrite"):
        render(model, output, seed=1)
    with pytest.raises(ConfigError, match=r"begun with sampling.guidance_scale=1.0 \(now 2.0\)"):
        render(model, output, guidance_scale=2.0)
    assert before == {path: path.read_bytes() for path in Path(f"{output}.parts").iterdir()}
    (made,) = render(model, output)
    with pytest.raises(ConfigError, match=r"v.mp4 was made with prompt=.* \(now .*, and its sidecar .* exists"):
        render(model, output, prompt="a blue seven")
    (anew,) = render(model, output, overwrite=True, prompt="a blue seven")
    assert anew["latents_sha256"] != made["latents_sha256"]
    # A sidecar that is not one of ours is nobody's to replace.
    output.with_suffix(".json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(ConfigError, match="exists"):
        render(model, output)


def test_a_torn_state_falls_back_to_the_one_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (whole,) = render(model, tmp_path / "whole.mp4", chunks_per_segment=1)
    output = tmp_path / "v.mp4"
    interrupted(model, output, monkeypatch, 2, chunks_per_segment=1)
    state = Path(f"{output}.parts/state.safetensors")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(bytes(content))
    (found,) = render(model, output, chunks_per_segment=1)
    assert "is torn or not a state of this program" in caplog.text
    assert found["latents_sha256"] == whole["latents_sha256"]


def test_what_is_being_opened_when_all_is_ended_is_left_ready_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stages files are opened in a thread of their own; the command's ends meanwhile."""
    settings = {"model": str(model), "num_frames": 21, "guidance_scale": 1.0}
    shots = [WantedVideo(PROMPT, seed, str(tmp_path / f"{seed}.mp4")) for seed in range(3)]
    videos = check_videos(SampleConfig(PROMPT, **settings), False, shots)
    opening, go = threading.Event(), threading.Event()
    really = Recording.open

    def slow(output: str, **more: Any) -> Recording:
        if output == shots[1].output:
            opening.set()
            assert go.wait(30)
        return really(output, **more)

    monkeypatch.setattr(Recording, "open", slow)
    taken: list[Video] = []
    feed = threading.Thread(target=lambda: list(videos.begun(taken)))
    feed.start()
    assert opening.wait(30)
    end = threading.Thread(target=videos.abort)
    end.start()
    end.join(0.3)
    go.set()
    for thread in (end, feed):
        thread.join(30)
        assert not thread.is_alive()
    assert [video.recording for video in videos.all] == [None] * 3
    assert not list(tmp_path.rglob(LOCK_NAME)) and not Path(parts_folder(shots[2].output)).exists()


def test_one_unwritable_output_ends_alone(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\na blue seven\na three up\n")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "0001-a-blue-seven-s1.mp4.parts").write_text("somebody put a file here")
    others = r"1 of 3 videos failed, the others are complete: .*0001-a-blue-seven-s1.mp4"
    with pytest.raises(FailedVideosError, match=others) as error:
        render(model, folder, prompt=None, prompts=str(prompts))
    assert error.value.count == 1
    made = sorted(path.name for path in folder.glob("*.mp4"))
    assert made == ["0000-a-red-three-s0.mp4", "0002-a-three-up-s2.mp4"]
    with pytest.raises(FailedVideosError, match=r"0001-a-blue-seven-s1.mp4"):
        render(model, folder / "0001-a-blue-seven-s1.mp4", prompt="a blue seven", seed=1)
