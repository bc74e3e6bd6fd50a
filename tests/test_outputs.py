"""Outputs that cannot be written: names that no file can have, folders, read-only and full disks.

Each is one sentence and a status that is not 0; what was finished stays, the other videos of a command are made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_checkpoint

from pavdm_dist.cli import main
from pavdm_dist.commands import terminal
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.io.parts import check_output

pytestmark = pytest.mark.timeout(180)
SHORT = ["num_frames=61", "chunks_per_segment=2", "guidance_scale=1", "save_latents=true"]

# Renders with a small disk in the place of one video's parts, and again once there is room; runs where only it mounts.
ON_A_FULL_DISK = """
import json, os, shutil, subprocess, sys
from pavdm_dist.cli import main

parts, kept, size, *words = sys.argv[1:]
os.makedirs(parts)
def mount(*options):
    subprocess.run(["mount", *options], check=True)
mount("-t", "tmpfs", "-o", f"size={size}", "none", parts)
status = main(words)
left = sorted(os.listdir(os.path.dirname(parts)) + os.listdir(parts))
mount("-o", "remount,size=4m", parts)
again = main(words)
shutil.copytree(os.path.dirname(parts), kept)
print(json.dumps([status, left, again]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mounts() -> list[str]:
    """What a command is begun with whose mounts are its own."""
    own = ["unshare", "--mount"]
    mount = "mount -t tmpfs none /mnt"
    if shutil.which("unshare") is None or subprocess.run([*own, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this process has no right to mount a file system of its own")
    return own


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["output=\udcff.mp4"], "output='\\udcff.mp4': is not text that a file or its name can hold"),
        (["output=a/\udcff"], "output='a/\\udcff': is not text"),
        (["output=o.mp4", "prompts=\udcff.txt"], "prompts='\\udcff.txt': is not text"),
        (["output=o.mp4", "model=\udcff"], "model='\\udcff': is not text"),
        (["output=o.mp4", "\udcff.yaml"], "\\udcff.yaml: no such config file"),
        (["--resume", "\udcff.mp4.parts"], "--resume \\udcff.mp4.parts: is no folder of an interrupted video"),
        (["output=" + "x" * 230 + ".mp4"], "a name of 234 bytes is too long"),
        (["output=" + "ü" * 120 + ".mp4"], "a name of 244 bytes is too long"),
        (["output=" + "x" * 300 + "/o.mp4"], "a name of 300 bytes is too long"),
        (["output=" + "/".join(["x" * 100] * 45) + "/o.mp4"], "the whole path is too long"),
        (["output=folder.mp4"], "folder.mp4 is a folder; name a file in it"),
        (["output=/dev/full"], "/dev/full is a file, not a folder"),
        (["output=/dev/full/o.mp4"], "/dev/full is a file, not a folder"),
        (["output=o.mp4", "num_stages=1", "trace=/dev/full/t.json"], "trace=/dev/full/t.json: /dev/full is a file"),
        (["output="], "output: name an .mp4 file or a folder"),
        (["output=o.mov"], "output=o.mov: videos are written as .mp4; use output=o.mp4, or name a folder"),
        (["output=a.b/o.GIF"], "output=a.b/o.GIF: videos are written as .mp4; use output=a.b/o.mp4"),
        (
            ["output=o.mp4", "prompt_schedule=[{from_chunk: 9, prompt: a three}]"],
            "at 2.875 s: the video has chunks 0 to 7",
        ),
        (
            ["output=o.mp4", "prompt_schedule=[{from_chunk: 1, prompt: ' '}]"],
            "prompt_schedule: from_chunk=1 has an empty prompt",
        ),
        (["output=o.mp4", "negative_prompt=a seven"], "negative_prompt='a seven': guidance_scale=1 uses none"),
        (["output=there.mp4"], "output=there.mp4 exists; choose another name or pass --overwrite"),
        (["output=o.mp4", "start=chunk", "video=there.mp4"], "there.mp4 is not a video"),
        (["output=o.mp4", "image=there.mp4"], "image=there.mp4: is no readable picture"),
        (["output=o.mp4", "preview_decoder=nowhere"], "preview_decoder=nowhere: no such file"),
        (["output=file:///x/o.mp4"], "is on a disk of this machine; write it as a path, output=/x/o.mp4"),
        (["output=sftp://host/o.mp4"], "in sftp:// files would appear before they are whole; name an object store (s3"),
    ],
)
@pytest.mark.parametrize("only", [[], ["--dry-run"]], ids=["run", "dry"])
def test_names_that_cannot_be_are_refused_before_anything_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str],
    said: str, only: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "there.mp4").write_text("no video")
    prompt = [] if any(word.startswith(("prompts=", "--resume")) for word in words) else ["a red three"]
    assert main(["sample", *prompt, f"model={model}", *SHORT, *words, *only]) == 2
    err = capsys.readouterr().err.encode(errors="backslashreplace").decode()
    assert err.startswith("pavdm: ") and err.count("\n") == 1 and said in err, err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder.mp4", "there.mp4"]


def test_the_longest_name_that_is_taken_can_be_made(model: Path, tmp_path: Path) -> None:
    output = tmp_path / ("x" * 229 + ".mp4")
    check_output(output)
    assert main(["sample", "a red three", f"model={model}", f"output={output}", *SHORT, "num_frames=8"]) == 0
    assert read_sidecar(output)["num_frames"] == 8


@pytest.mark.slow
def test_a_read_only_disk_is_told_before_anything_is_done(model: Path, tmp_path: Path, mounts: list[str]) -> None:
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    words = ["sample", "a red three", f"model={model}", f"output={tmp_path}/o.mp4", *SHORT]
    done = subprocess.run(
        [*mounts, "sh", "-c", script, str(tmp_path), sys.executable, "-m", "pavdm_dist", *words],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"pavdm: output={tmp_path}/o.mp4: no right to write in {tmp_path}\n"


@pytest.mark.slow  # tests/test_health.py has one that always runs
@pytest.mark.parametrize("size", ["8k", "20k", "28k", "40k", "52k", "64k", "80k"])
def test_a_full_disk_ends_one_video_and_the_same_command_goes_on(
    model: Path, tmp_path: Path, mounts: list[str], size: str
) -> None:
    prompts, out, kept = tmp_path / "prompts.txt", tmp_path / "out", tmp_path / "kept"
    prompts.write_text("a red three\na blue seven\na three up\n")
    parts = out / "0001-a-blue-seven-s1.mp4.parts"
    words = ["sample", f"prompts={prompts}", f"model={model}", f"output={out}", *SHORT]
    done = subprocess.run(
        [*mounts, sys.executable, "-c", ON_A_FULL_DISK, str(parts), str(kept), size, *words],
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    status, left, again = json.loads(done.stdout)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("pavdm: ")]
    assert status == 101 and said.startswith("pavdm: 1 of 3 videos failed, the others are complete: ")
    assert (
        "0001-a-blue-seven-s1.mp4: cannot be written: " in said or "cannot be written: [Errno 28] No space left" in said
    )
    made = {f"{name}.{kind}" for name in ("0000-a-red-three-s0", "0002-a-three-up-s2") for kind in ("mp4", "json")}
    assert made <= set(left) and not {"0001-a-blue-seven-s1.mp4", "0001-a-blue-seven-s1.json"} & set(left)
    assert not [name for name in left if name.endswith(".tmp") or name == "lock.json"]
    assert again == 0
    alone = tmp_path / "alone.mp4"
    assert main(["sample", "a blue seven", "seed=1", f"model={model}", f"output={alone}", *SHORT]) == 0
    assert read_sidecar(kept / "0001-a-blue-seven-s1.mp4")["latents_sha256"] == read_sidecar(alone)["latents_sha256"]


def test_a_standard_output_without_letters_is_one_sentence() -> None:
    words = [sys.executable, "-m", "pavdm_dist", "sample", "--print-config", "prompt=Ümlaut"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"pavdm: standard output takes ascii only, not '\\xdc'; set PYTHONIOENCODING=utf-8")


def test_names_that_are_no_text_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say("caf\udce9.mp4 is short")
    assert capsys.readouterr().out == "caf\\udce9.mp4 is short\n"


def test_a_folder_whose_name_is_no_text_can_be_worked_in(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(there)
    monkeypatch.chdir(there)
    assert main(["sample", "a red three", f"model={model}", "output=o.mp4", *SHORT, "num_frames=8"]) == 0
    assert sorted(os.listdir(there)) == ["o.json", "o.mp4", "o.safetensors"]


def test_a_full_standard_output_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pavdm_dist", "configs", "ls"], stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr.decode() == f"pavdm: standard output cannot be written: {os.strerror(28)}\n"
