"""``--resume``: unfinished videos by their folders alone, and what cannot be finished by its name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint, tiny_model
from interrupting import interrupted, render
from safetensors.torch import save_file

from pavdm_dist import cli
from pavdm_dist.commands.videos import WantedVideo
from pavdm_dist.config import LoraConfig, SampleConfig
from pavdm_dist.errors import EngineError, FailedVideosError
from pavdm_dist.io.encode import EncoderOptions, VideoEncoder
from pavdm_dist.io.metadata import read_sidecar

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


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
    expected = {Path(v["output"]).name: v for v in render(Path("m"), Path("whole"), **settings)}
    # Two unfinished videos: the third is begun as the first is, by hand.
    interrupted(Path("m"), Path("cut"), monkeypatch, 2, **settings)
    shutil.move(there / "cut", there / "kept")
    interrupted(Path("m"), Path("cut"), monkeypatch, 5, **settings)
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
    assert cli.main(["sample", "--resume", ".", "--json", "--dry-run"]) == 0
    assert [plan["num_frames"] for plan in json.loads(capsys.readouterr().out)["videos"]] == [21, 21]
    assert cli.main(["sample", "--resume", ".", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["videos"]
    assert [Path(v["output"]).name for v in made] == ["0000-a-red-three-s0.mp4", "0001-a-blue-seven-s1.mp4"]
    for v in made:
        assert v["latents_sha256"] == expected[Path(v["output"]).name]["latents_sha256"]
    assert not list((tmp_path / "copy").glob("*.parts")) and not list(elsewhere.iterdir())
    assert cli.main(["sample", "--resume", "."]) == 2
    assert "is no folder of an interrupted video" in capsys.readouterr().err


def test_changes_of_the_weights_are_found_from_another_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    (there / "loras/mine").mkdir(parents=True)
    elsewhere.mkdir()
    name, (outside, inside) = next(
        (name.removesuffix(".weight"), tensor.shape)
        for name, tensor in tiny_model().state_dict().items()
        if name.startswith("spatial_blocks.") and name.endswith(".weight") and tensor.ndim == 2
    )
    pair = {f"{name}.lora_A.weight": torch.ones(1, inside), f"{name}.lora_B.weight": torch.ones(outside, 1)}
    save_file(pair, there / "loras/mine/adapter_model.safetensors")
    monkeypatch.chdir(there)
    settings = {"lora": [LoraConfig("loras/mine", 0.5)]}
    (whole,) = render(model, Path("whole.mp4"), **settings)
    interrupted(model, Path("v.mp4"), monkeypatch, 2, **settings)
    monkeypatch.chdir(elsewhere)
    assert cli.main(["sample", "--resume", str(there / "v.mp4.parts"), "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["videos"]
    assert made["latents_sha256"] == whole["latents_sha256"]


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
    assert cli.main(["sample", "--resume", str(tmp_path)]) == 101
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
    (whole,) = render(model, tmp_path / "whole.mp4")
    interrupted(model, tmp_path / "lr=3/v.MP4", monkeypatch, 2)
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


def test_a_group_that_fails_when_all_is_there_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, length in (("a", 5), ("b", 13), ("c", 13)):
        parts = tmp_path / f"{name}.mp4.parts"
        parts.mkdir()
        (parts / "settings.yaml").write_text(f"prompt: a three\nnum_frames: {length}\n")

    def render(config: SampleConfig, overwrite: bool, progress: object, shots: list[WantedVideo]) -> dict[str, Any]:
        if len(shots) == 1:
            (tmp_path / "a.json").write_text("{}")
            raise EngineError("the trace cannot be written")
        raise FailedVideosError("both failed", 2)

    monkeypatch.setattr("pavdm_dist.commands.resume.render_command", render)
    monkeypatch.setattr("pavdm_dist.commands.resume.is_complete", lambda output: True)
    assert cli.main(["sample", "--resume", str(tmp_path)]) == 103


def test_groups_that_name_one_trace_write_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, length in (("a", 5), ("b", 13), ("c", 13), ("d", 21)):
        parts = tmp_path / f"{name}.mp4.parts"
        parts.mkdir()
        (parts / "settings.yaml").write_text(f"prompt: a three\nnum_frames: {length}\nnum_stages: 1\ntrace: t.json\n")
    traces: list[tuple[str | None, int]] = []

    def render(config: SampleConfig, overwrite: bool, progress: object, shots: list[WantedVideo]) -> dict[str, Any]:
        traces.append((config.trace, len(shots)))
        return {"videos": [], "seconds": 1.0, "frames_per_second": 0.0}

    monkeypatch.setattr("pavdm_dist.commands.resume.render_command", render)
    assert cli.main(["sample", "--resume", str(tmp_path)]) == 0
    assert traces == [("t.json", 1), ("t-2.json", 2), ("t-3.json", 1)]
