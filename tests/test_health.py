"""Videos that cannot be made end alone, each with its reason: full disks, values out of range, decoders."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import threading
from fractions import Fraction
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from forked import Program
from helpers import tiny_checkpoint, tiny_model, tiny_stream
from safetensors.torch import load_file, save_file

from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import check_videos, render_command
from pavdm_dist.config import SampleConfig
from pavdm_dist.data import prepare
from pavdm_dist.engine import inline
from pavdm_dist.engine.inline import InlineEngine
from pavdm_dist.engine.trace import read_trace, write_trace
from pavdm_dist.engine.watchdog import Patience, Watchdog
from pavdm_dist.errors import CheckpointError, ConfigError, FailedVideosError, VideoError
from pavdm_dist.io import recording, saver, storage
from pavdm_dist.io.encode import EncoderOptions, VideoEncoder
from pavdm_dist.io.metadata import is_complete
from pavdm_dist.train import save_writing

pytestmark = pytest.mark.timeout(180)
# Renders with a small disk and a read-only one in the place of two videos' parts, and again once both have room.
ON_SMALL_DISKS = """
import ctypes, subprocess, sys
from pavdm_dist.cli import main

printed, full, read_only, *words = sys.argv[1:]
sys.stdout = open(printed, "w")
assert ctypes.CDLL(None).unshare(0x00020000) == 0, "no mounts of its own"
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
def mount(folder, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
mount(full, "size=36k")
mount(read_only, "ro")
first = main(words)
mount(full, "remount,size=4m")
mount(read_only, "remount,rw")
print(first, main(words))
"""


def can_mount(tmp: str) -> bool:
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", tmp], capture_output=True).returncode == 0
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which the word "seven" drives everything out of range."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    encoder = WordTextEncoder.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        encoder.embedding.weight[encoder._index["seven"]] = float("inf")
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def config(model: Path, folder: Path, prompts: list[str], **settings: Any) -> SampleConfig:
    (folder / "prompts.txt").write_text("\n".join(prompts))
    chosen = {"num_frames": 45, "guidance_scale": 1.0, "chunks_per_segment": 1, **settings}
    return SampleConfig(model=str(model), prompts=str(folder / "prompts.txt"), output=str(folder / "out"), **chosen)


def made(folder: Path) -> list[str]:
    return sorted(path.name[:4] for path in (folder / "out").glob("*.mp4") if is_complete(path))


@pytest.mark.skipif(not can_mount("/mnt"), reason="no right to mount file systems here")
def test_full_and_read_only_disks_and_values_out_of_range_end_their_own_videos(model: Path, tmp_path: Path) -> None:
    chosen = config(model, tmp_path, ["a red three", "a blue three", "a three up", "a seven up", "red three"])
    names = ["0001-a-blue-three-s1", "0002-a-three-up-s2"]
    parts = [tmp_path / "out" / f"{name}.mp4.parts" for name in names]
    for folder in parts:
        folder.mkdir(parents=True)
    words = [
        f"{name}={getattr(chosen, name)}"
        for name in ("model", "prompts", "output", "num_frames", "guidance_scale", "chunks_per_segment")
    ]
    printed = tmp_path / "printed"
    run = Program(["-c", ON_SMALL_DISKS, *map(str, (printed, *parts)), "sample", *words])
    errors, _ = run.communicate(timeout=150)
    assert printed.read_text() == "103 101\n" and "Traceback" not in errors, errors
    said, again = (line for line in errors.splitlines() if line.startswith("pavdm: "))
    assert said.startswith("pavdm: 3 of 5 videos failed, the others are complete: "), said
    full, read_only, range_ = said.partition("complete: ")[2].split("; ")
    assert re.search(rf"{names[0]}\.mp4: cannot be written: .*No space left on device", full)
    assert re.search(rf"{names[1]}\.mp4: cannot be written: .*Read-only file system", read_only)
    assert re.search(r"0003-a-seven-up-s3\.mp4: chunk 0 holds values that are not finite after step \d+", range_)
    assert again.startswith("pavdm: 1 of 5 videos failed, the others are complete: ") and "0003-a-seven-up-s3" in again
    assert made(tmp_path) == ["0000", "0001", "0002", "0004"]


@pytest.mark.slow  # above is what it is made of; tests/test_engine_driver.py has such a video on stages in this process
@pytest.mark.parametrize("runs", [1, 2])
def test_a_video_out_of_range_ends_alone_on_stages(ray_cluster: None, model: Path, tmp_path: Path, runs: int) -> None:
    """Its trace is of that run; the same command again, which tries the failed one again, writes it anew."""
    trace = tmp_path / "t.json"
    chosen = config(model, tmp_path, ["a red three", "a seven"], num_stages=1, num_frames=13, trace=str(trace))
    stages = []
    for _ in range(runs):
        with pytest.raises(VideoError, match=r"1 of 2 videos failed.*0001-a-seven-s1.mp4: chunk 0 .* not finite"):
            render_command(chosen, False, ChunkProgress)
        stages.append(read_trace(trace))
    assert made(tmp_path) == ["0000"]
    check_videos(chosen, overwrite=False)
    if runs == 2:
        assert len(stages[0][0]) > len(stages[1][0]) > 0, "of one video the second time"


def test_only_a_trace_is_replaced_by_one(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    chosen = config(model, tmp_path, ["a red three"], num_stages=1, trace=str(trace))
    for content in ("", "{}", "[]", '{"version": 1, "stages": 3}', '{"version": 99, "stages": []}', '{"mine": 1}'):
        trace.write_text(content)
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=r"trace=.*t\.json exists and is no trace of this program; choose"):
                check_videos(chosen, overwrite)
        assert trace.read_text() == content
    write_trace(trace, [])
    check_videos(chosen, overwrite=False)


@pytest.mark.parametrize("stages", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_pixels_out_of_range_are_an_error_of_their_chunk(
    ray_cluster: None, model: Path, tmp_path: Path, stages: int
) -> None:
    broken = tmp_path / "m"
    shutil.copytree(model, broken)
    file = broken / "vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latents_mean": [0] * 4}))
    (file,) = (broken / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights["post_quant_conv.weight"].fill_(3e38)  # nothing of nothing, and too much of anything else
    weights["post_quant_conv.bias"].zero_()
    save_file(weights, file, {"format": "pt"})
    chosen = config(broken, tmp_path, ["a red three", "red"], num_stages=stages, num_frames=5)
    sentence = "chunk 0 could not be decoded: the codec gave pixels that are not finite"
    with pytest.raises(VideoError, match=f"2 of 2 videos failed.*{sentence}.*{sentence}"):
        render_command(chosen, False, ChunkProgress)
    assert made(tmp_path) == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_codec_that_gives_no_numbers_is_refused(model: Path, tmp_path: Path, value: str) -> None:
    shutil.copytree(model / "vae", tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights["decoder.conv_out.bias"][0] = float(value)
    save_file(weights, file, {"format": "pt"})
    codec = WanCodec.from_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="gives pixels that are not finite whatever it decodes"):
        codec.receptive_latents()
    with pytest.raises(VideoError, match="the codec gave pixels that are not finite"):
        codec.decoder().decode(torch.zeros(4, 1, 4, 6))


def test_a_decoder_that_fails_in_this_process_ends_its_video(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, given = WanCodec.decoder, list[Any]()

    def decoder(codec: WanCodec) -> Any:
        given.append(real(codec))
        if len(given) == 1:

            def decode(latents: torch.Tensor) -> torch.Tensor:
                raise torch.OutOfMemoryError("the device is full")

            given[0].decode = decode
        return given[-1]

    monkeypatch.setattr(WanCodec, "decoder", decoder)
    monkeypatch.setattr(WanCodec, "receptive_latents", lambda codec: 3)
    with pytest.raises(
        VideoError, match=r"1 of 2 .*0000-a-red-s0.mp4: chunk 0 could not be decoded: the device is full"
    ):
        render_command(config(model, tmp_path, ["a red", "red"], num_frames=5), False, ChunkProgress)
    assert made(tmp_path) == ["0001"] and "Traceback" in caplog.text, "a fault keeps its traceback"


def test_what_cannot_be_tidied_up_costs_no_video(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A share that goes away when a video is complete: it is, and so are those behind it."""
    real = recording.remove_own

    def away(parts: str) -> None:
        if "0000-a-red" in parts:
            raise OSError(errno.ESTALE, "Stale file handle")
        real(parts)

    monkeypatch.setattr(recording, "remove_own", away)
    render_command(config(model, tmp_path, ["a red", "red"], num_frames=5), False, ChunkProgress)
    assert made(tmp_path) == ["0000", "0001"] and "0000-a-red-s0.mp4.parts cannot be removed" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("state")]


def test_a_state_that_cannot_be_written_ends_its_own_video(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kind of error it is, and however late it is found."""
    real, fault = saver.write_state, [OSError(errno.ENOSPC, "No space left on device"), ValueError("a fault of ours")]

    def full(folder: str, state: Any, check: Any) -> None:
        if "0000-" in folder:
            raise fault[0]
        real(folder, state, check)

    monkeypatch.setattr(saver, "write_state", full)
    with pytest.raises(FailedVideosError, match=r"1 of 2 .*0000-a-red-s0.mp4: cannot be written: .*No space left"):
        render_command(config(model, tmp_path, ["a red", "red"]), False, ChunkProgress)
    assert made(tmp_path) == ["0001"]
    fault.pop(0)
    with pytest.raises(ValueError, match="a fault of ours"):
        render_command(config(model, tmp_path, ["a red", "red"]), True, ChunkProgress)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("state")]
    monkeypatch.undo()
    render_command(config(model, tmp_path, ["a red", "red"]), False, ChunkProgress)
    assert made(tmp_path) == ["0000", "0001"]


def test_a_video_that_stands_still_in_this_process_is_reported(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with how long and what is usual; the consumer's own time is not its."""
    real, now, looked = WanCodec.decoder, [0.0], threading.Event()

    def clock() -> float:
        if threading.current_thread() is not threading.main_thread():
            looked.set()
        return now[0]

    def stand_still(seconds: float) -> None:
        for _ in range(int(seconds / 2)):  # more between two looks would be a process that was stopped
            now[0] += 2.0
            looked.clear()
            assert looked.wait(30)

    def decoder(codec: WanCodec) -> Any:
        found, calls = real(codec), count(1)
        decode = found.decode

        def slow(latents: torch.Tensor) -> torch.Tensor:
            stand_still(62.0 if next(calls) == 3 else 2.0)
            return decode(latents)

        found.decode = slow
        return found

    before = set(threading.enumerate())
    monkeypatch.setattr(WanCodec, "decoder", decoder)
    monkeypatch.setattr(inline, "LOOK_S", 0.01)
    monkeypatch.setattr(inline, "Watchdog", partial(Watchdog, clock=clock))
    codec = WanCodec.from_pretrained(model / "vae")
    for limit in (1000.0, 15.0):  # before the limit, and where that comes first
        caplog.clear()
        engine = InlineEngine(tiny_model(), codec, patience=Patience(factor=10, floor_s=5, limit_s=limit))
        for finished in engine.run([tiny_stream(7, num_chunks=4)]):
            if finished.clean.index == 1:
                stand_still(60.0)
        (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert re.fullmatch(r"video 7: nothing has come for \d\d+ s, usually 2\.0 s a chunk", said), said
    assert set(threading.enumerate()) <= before


def test_what_an_encoder_says_is_an_error_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VideoEncoder(tmp_path / "v.mp4", Fraction(24), 32, 48, EncoderOptions())

    class Broken:
        def encode(self, _: Any) -> Any:
            raise av.error.ExternalError(1, "generic error in an external library")

    encoder._stream = Broken()
    with pytest.raises(OSError, match=r"the encoder failed: .*generic error"):
        encoder.write(np.zeros((32, 48, 3), np.uint8))


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """``os.fsync`` that fails with an error number, for folders or for all."""
    number, of = request.param
    real, refused = os.fsync, list[str]()

    def fsync(handle: int) -> None:
        if of == "all" or stat.S_ISDIR(os.fstat(handle).st_mode):
            refused.append(of)
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return refused


@pytest.mark.parametrize(
    "refusing", [(errno.EINVAL, "folders"), (errno.ENOTSUP, "folders"), (errno.EINVAL, "all")], indirect=True
)
def test_a_share_that_cannot_fsync_ends_no_video(refusing: list[str], model: Path, tmp_path: Path) -> None:
    render_command(config(model, tmp_path, ["a red"], num_frames=13), False, ChunkProgress)
    assert made(tmp_path) == ["0000"] and len(refusing) > 5
    save_writing._write(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"


@pytest.mark.parametrize("refusing", [(errno.EIO, "all"), (errno.ENOSPC, "all")], indirect=True)
def test_a_disk_that_breaks_is_no_such_share(refusing: list[str], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space|Input/output"), storage.atomic_write(tmp_path / "x") as file:
        file.write(b"x")
    assert not list(tmp_path.iterdir()) and refusing


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EWOULDBLOCK])
def test_a_share_that_knows_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(prepare.fcntl, "flock", flock)
    if number == errno.EWOULDBLOCK:
        with pytest.raises(ConfigError, match="another run is preparing this folder"), prepare._locked(tmp_path / "d"):
            pass
        return
    with prepare._locked(tmp_path / "d"):
        assert "its file system knows no locks" in caplog.text
