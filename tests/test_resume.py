"""A command that ends in the middle, however it ends, and is given again: the same video, nothing made twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import hear_signals, tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError, MediaError, VideoError
from pavdm_dist.io.encode import EncoderOptions, VideoEncoder
from pavdm_dist.io.latents import read_latents
from pavdm_dist.io.metadata import read_sidecar

pytestmark = pytest.mark.timeout(180)
PROMPT = "a red three drifting up"
SETTINGS = {"num_frames": 149, "save_latents": "true", "chunks_per_segment": 3, "guidance_scale": 1}  # 19 chunks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same video, undisturbed."""
    output = tmp_path_factory.mktemp("whole") / "v.mp4"
    done = _start(model, output)
    assert done.wait(120) == 0, done.stderr and done.stderr.read()
    return output


def _words(model: Path, output: Path, **settings: object) -> list[str]:
    chosen = {"model": model, "output": output, **SETTINGS, **settings}
    return [PROMPT, *(f"{name}={value}" for name, value in chosen.items())]


def _start(model: Path, output: Path, *flags: str, **settings: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pavdm_dist", "sample", *_words(model, output, **settings), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals)


def _lines_until(process: subprocess.Popen[str], chunk: int) -> Iterator[str]:
    """Its log until it has given so many chunks."""
    assert process.stderr is not None
    for line in process.stderr:
        yield line
        if f"chunk {chunk}:" in line:
            return
    raise AssertionError("it ended before")


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
        (signal.SIGKILL, -9, 9),
        (signal.SIGTERM, 143, 6),
        (signal.SIGINT, 130, 7),
        (signal.SIGHUP, 129, 2),
    ],
)
def test_the_same_command_again_goes_on(
    model: Path, whole: Path, tmp_path: Path, number: signal.Signals, status: int, after: int
) -> None:
    output = tmp_path / "v.mp4"
    process = _start(model, output)
    list(_lines_until(process, after))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert not output.exists() and not output.with_suffix(".json").exists()
    if number != signal.SIGKILL:
        last = said.splitlines()[-1]
        assert last.startswith("pavdm: interrupted: ") and "are playable in" in last
        assert last.endswith("the same command again goes on") and "Traceback" not in said
    again = _start(model, output)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    (went_on,) = (int(line.split()[-1]) for line in said.splitlines() if "goes on at chunk" in line)
    # Killed outright, it has what was there when the last segment was closed; else every chunk that it gave.
    assert went_on >= (after + 1 if number != signal.SIGKILL else (after + 1) // 3 * 3)
    assert f"chunk {went_on}:" in said and "chunk 0:" not in said
    _check_equal(output, whole)


def test_a_video_goes_on_on_stages_and_by_its_folder_alone(
    ray_cluster: None, model: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "v.mp4"
    process = _start(model, output)
    list(_lines_until(process, 5))
    process.kill()
    process.communicate(timeout=60)
    command = ["--resume", f"{output}.parts", "num_stages=2", "cpus_per_stage=0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "pavdm_dist", "sample", *command], capture_output=True, text=True, timeout=150,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "goes on at chunk" in done.stderr
    _check_equal(output, whole)
    bad = subprocess.run(
        [sys.executable, "-m", "pavdm_dist", "sample", "--resume", str(tmp_path)], capture_output=True, text=True
    )
    assert bad.returncode == 2 and "is no folder of an interrupted video" in bad.stderr


def _render(model: Path, output: Path, overwrite: bool = False, **settings: object) -> list[dict]:
    config = SampleConfig(prompt=PROMPT, model=str(model), output=str(output), num_frames=21, guidance_scale=1.0)
    for name, value in settings.items():
        setattr(config, name, value)
    return render_command(config, overwrite, ChunkProgress)["videos"]


def _interrupted(model: Path, output: Path, monkeypatch: pytest.MonkeyPatch, after: int, **settings: object) -> None:
    """Leaves what a command leaves that is stopped after so many chunks."""
    given: list[int] = []

    def chunk(self: ChunkProgress, stream: int, index: int, frames: int) -> None:
        given.append(index)
        if len(given) == after:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with monkeypatch.context() as patched:
        patched.setattr(ChunkProgress, "chunk", chunk)
        with pytest.raises(KeyboardInterrupt, match="the same command again goes on"):
            _render(model, output, **settings)


def test_a_batch_makes_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\na blue seven\na three up\n")
    settings = {"prompt": None, "prompts": str(prompts)}
    expected = _render(model, tmp_path / "whole", **settings)
    # Three chunks each: the second video is in the middle.
    _interrupted(model, tmp_path / "cut", monkeypatch, 5, **settings)
    first = next((tmp_path / "cut").glob("0000-*.mp4"))
    stamp = first.stat().st_mtime_ns
    caplog.clear()
    with caplog.at_level("INFO"):
        found = _render(model, tmp_path / "cut", **settings)
    assert first.stat().st_mtime_ns == stamp and f"{first} is complete already" in caplog.text
    assert "goes on at chunk 2" in caplog.text
    assert [v["latents_sha256"] for v in found] == [v["latents_sha256"] for v in expected]
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cut").iterdir())]
    assert _render(model, tmp_path / "cut", **settings) == found, "nothing is left to do"
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "cut").iterdir())]


def test_a_folder_says_which_videos_are_finished(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative paths in the settings, other working directories, and no prompt file any more."""
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    elsewhere.mkdir()
    there.mkdir()
    shutil.copytree(model, there / "m")
    encoder = VideoEncoder(there / "clip.mp4", Fraction(24), 32, 48, EncoderOptions())
    for shade in range(60):
        encoder.write(np.full((32, 48, 3), 4 * shade, np.uint8))
    encoder.close()
    monkeypatch.chdir(there)
    (there / "prompts.txt").write_text("a red three\na blue seven\na three up\n")
    settings = {
        "prompt": None, "prompts": "prompts.txt", "video": "clip.mp4", "start": "chunk", "chunks_per_segment": 1,
    }  # fmt: skip
    expected = {Path(v["output"]).name: v for v in _render(Path("m"), Path("whole"), **settings)}
    # Two unfinished videos: the third is begun as the first is, by hand.
    _interrupted(Path("m"), Path("cut"), monkeypatch, 2, **settings)
    shutil.move(there / "cut", there / "kept")
    _interrupted(Path("m"), Path("cut"), monkeypatch, 5, **settings)
    shutil.copytree(there / "kept/0000-a-red-three-s0.mp4.parts", there / "cut/0000-a-red-three-s0.mp4.parts")
    for path in (there / "cut").glob("0000-a-red-three-s0.*[4n]"):
        path.unlink()
    for path in there.glob("*.txt"):
        path.unlink()
    monkeypatch.chdir(elsewhere)
    parts = there / "cut/0001-a-blue-seven-s1.mp4.parts"
    shutil.copytree(there / "cut", tmp_path / "copy")

    assert cli.main(["sample", "--resume", str(parts), "output=x.mp4"]) == 2
    assert "output=x.mp4: --resume" in capsys.readouterr().err
    assert cli.main(["sample", "--resume", f"{parts}/", "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["videos"]
    assert made["output"] == str(parts).removesuffix(".parts")
    assert made["latents_sha256"] == expected["0001-a-blue-seven-s1.mp4"]["latents_sha256"]
    assert (there / "cut/0000-a-red-three-s0.mp4.parts").exists(), "that video only"

    monkeypatch.chdir(tmp_path / "copy")
    assert cli.main(["sample", "--resume", ".", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["videos"]
    assert [Path(v["output"]).name for v in made] == ["0000-a-red-three-s0.mp4", "0001-a-blue-seven-s1.mp4"]
    for v in made:
        assert v["latents_sha256"] == expected[Path(v["output"]).name]["latents_sha256"]
    assert not list((tmp_path / "copy").glob("*.parts")) and not list(elsewhere.iterdir())
    assert cli.main(["sample", "--resume", "."]) == 2
    assert "is no folder of an interrupted video" in capsys.readouterr().err


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no settings.yaml"),
        ("", "settings.yaml: is empty"),
        ("prompt: 2001-99-99", "settings.yaml: not readable as YAML (month must be in 1..12)"),
        ("prompt: " + "[" * 3000, "settings.yaml: not readable as YAML (it is nested too deeply)"),
        (BOMB, "settings.yaml: not readable as YAML (its anchors make it endless, or too large)"),
        ("seed: " + "9" * 5000, "settings.yaml: not readable as YAML (Exceeds the limit"),
        ("- 1", "settings.yaml: must hold `key: value` lines, not [1]"),
        (b"\xff", "settings.yaml: not readable as YAML ("),
        ("folder", "settings.yaml: not readable (Is a directory)"),
        ("loop", f"settings.yaml: not readable ({os.strerror(errno.ELOOP)})"),
        ("sed: 3", "settings.yaml: no such key 'sed', did you mean seed?"),
        ("prompt: a three\nvideo: gone.mp4\nstart: chunk", "video=gone.mp4: no such file"),
        (
            "prompt: a three\nnum_stages: 1\nray_address: ray://***@head:10001",
            "ray_address=ray://***@head:10001: *** stands for a secret that no file keeps; give ray_address=... again",
        ),
        ("prompt: a\ntrace: s3://b/t.json?X-Amz-Signature=***\nnum_stages: 1", "give trace=... again"),
        ("prompt: a\nmodel: https://***@host/m", "give model=... again"),
    ],
)
def test_what_cannot_be_finished_is_named_and_the_others_are(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes | None, said: str
) -> None:
    parts = tmp_path / "a.mp4.parts"
    settings = parts / "settings.yaml"
    parts.mkdir()
    (parts / "state.safetensors").write_bytes(b"")
    if content == "folder":
        settings.mkdir()
    elif content == "loop":
        settings.symlink_to(settings)
    elif content is not None:
        settings.write_bytes(content if isinstance(content, bytes) else content.encode())
    for given in (parts, tmp_path):
        assert cli.main(["sample", "--resume", str(given)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"pavdm: --resume {parts}: ") and said in err and err.count("\n") == 1, err
    # Beside one that can be.
    other = tmp_path / "b.mp4.parts"
    other.mkdir()
    (other / "settings.yaml").write_text(f"prompt: a three\nmodel: {model}\nnum_frames: 5\nguidance_scale: 1.0\n")
    assert cli.main(["sample", "--resume", str(tmp_path)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert (
        last.startswith(f"pavdm: not all could be finished, the others are complete: --resume {parts}: ")
        and said in last
    )
    assert read_sidecar(tmp_path / "b.mp4")["num_frames"] == 5 and not (tmp_path / "a.mp4").exists()


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4.parts").mkdir()

    def iterdir(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", iterdir)  # tests may run as root, whom no folder refuses
    for given in (tmp_path, tmp_path / "a.mp4.parts"):
        assert cli.main(["sample", "--resume", str(given)]) == 2
        assert capsys.readouterr().err == f"pavdm: --resume {given}: cannot be read (Permission denied)\n"


@pytest.mark.parametrize("words", [["--resume", ""], ["--resume", "/"], ["--resume", "//"]])
def test_no_folder_is_not_the_root_of_the_disk(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", *words]) == 2
    assert f"--resume {words[1]!r}: name the .mp4.parts folder of a video" in capsys.readouterr().err


def test_a_folder_is_resumed_whatever_its_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An equals sign in a relative path, capital letters; what only says who was about to begin is passed over."""
    (whole,) = _render(model, tmp_path / "whole.mp4")
    _interrupted(model, tmp_path / "lr=3/v.MP4", monkeypatch, 2)
    shutil.copytree(tmp_path / "lr=3", tmp_path / "x=1")
    (tmp_path / "x=1/w.mp4.parts").mkdir()
    (tmp_path / "x=1/w.mp4.parts/lock.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for given in ("lr=3/v.MP4.parts", "x=1"):
        assert cli.main(["sample", "--resume", given, "--json"]) == 0
        (made,) = json.loads(capsys.readouterr().out)["videos"]
        assert made["output"] == f"{given.partition('/')[0]}/v.MP4"
        assert made["latents_sha256"] == whole["latents_sha256"]
        assert Path(made["output"]).exists() and not Path(f"{made['output']}.parts").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["output=x.mp4"], "output=x.mp4: --resume v.mp4.parts goes on where and as that was; leave it out"),
        (["c.yaml"], "c.yaml: --resume v.mp4.parts goes on where and as that was; leave it out"),
        (["num_stage=2"], "no such key 'num_stage', did you mean num_stages?"),
    ],
)
def test_words_beside_a_folder(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "--resume", "v.mp4.parts", *words]) == 2
    assert capsys.readouterr().err == f"pavdm: {said}\n"


def test_another_setting_is_refused_and_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "v.mp4"
    _interrupted(model, output, monkeypatch, 2)
    before = {path: path.read_bytes() for path in Path(f"{output}.parts").iterdir()}
    with pytest.raises(ConfigError, match=r"begun with seed=0 \(now 1\); give the same to go on, or --overwrite"):
        _render(model, output, seed=1)
    with pytest.raises(ConfigError, match=r"begun with sampling.guidance_scale=1.0 \(now 2.0\)"):
        _render(model, output, guidance_scale=2.0)
    assert before == {path: path.read_bytes() for path in Path(f"{output}.parts").iterdir()}
    (made,) = _render(model, output)
    with pytest.raises(ConfigError, match=r"v.mp4 was made with prompt=.* \(now .*, and its sidecar .* exists"):
        _render(model, output, prompt="a blue seven")
    (anew,) = _render(model, output, overwrite=True, prompt="a blue seven")
    assert anew["latents_sha256"] != made["latents_sha256"]
    # A sidecar that is not one of ours is nobody's to replace.
    output.with_suffix(".json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(ConfigError, match="exists"):
        _render(model, output)


def test_a_torn_state_falls_back_to_the_one_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (whole,) = _render(model, tmp_path / "whole.mp4", chunks_per_segment=1)
    output = tmp_path / "v.mp4"
    _interrupted(model, output, monkeypatch, 2, chunks_per_segment=1)
    state = Path(f"{output}.parts/state.safetensors")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(bytes(content))
    (found,) = _render(model, output, chunks_per_segment=1)
    assert "is torn or not a state of this program" in caplog.text
    assert found["latents_sha256"] == whole["latents_sha256"]


def test_one_unwritable_output_ends_alone(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\na blue seven\na three up\n")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "0001-a-blue-seven-s1.mp4.parts").write_text("somebody put a file here")
    with pytest.raises(VideoError, match=r"1 of 3 videos failed, the others are complete: .*0001-a-blue-seven-s1.mp4"):
        _render(model, folder, prompt=None, prompts=str(prompts))
    made = sorted(path.name for path in folder.glob("*.mp4"))
    assert made == ["0000-a-red-three-s0.mp4", "0002-a-three-up-s2.mp4"]
    with pytest.raises(MediaError, match=r"0001-a-blue-seven-s1.mp4"):
        _render(model, folder / "0001-a-blue-seven-s1.mp4", prompt="a blue seven", seed=1)
