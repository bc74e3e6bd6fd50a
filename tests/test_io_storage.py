"""Atomic files, refused outputs, latents, checksums and the sidecar."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.latents import LatentsHash, LatentsWriter, latents_sha256, read_latents
from pavdm_dist.io.metadata import Sidecar, is_complete, read_sidecar, sidecar_path, weights_identity
from pavdm_dist.io.storage import atomic_path, atomic_write, check_output, exists, parts_folder, same_path, sha256_file


def test_atomic_write_replaces_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(target, "w") as file:
        file.write("erste")
        assert not target.exists()

    def interrupted() -> None:
        with atomic_write(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "erste"
    with atomic_path(target) as staged:
        assert staged.parent == target.parent  # a rename never crosses disks
        staged.write_text("zweite")
    assert target.read_text() == "zweite"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_write_to_a_store() -> None:
    path = "memory://bucket/deep/a.bin"
    with atomic_write(path) as file:
        file.write(b"abc")
        assert not exists(path)
    assert exists(path)
    assert sha256_file(path) == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(ConfigError, match="cannot be reached"):
        exists("nonsense://bucket/a")


def test_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert all(same_path("v.json", other) for other in ("./v.json", tmp_path / "v.json", "link/v.json", "a/../v.json"))
    assert not same_path("v.json", "w.json")
    assert same_path("s3://b/v.json", "s3://b/v.json") and not same_path("s3://b/v.json", "v.json")


def test_check_output(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "out.mp4"
    check_output(path)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match=r"output=.* is a folder; name a file in it"):
        check_output(tmp_path)
    (tmp_path / "a").write_text("a file")
    with pytest.raises(ConfigError, match=rf"output=.*: {tmp_path / 'a'} is a file, not a folder"):
        check_output(path)
    done = tmp_path / "out.mp4"
    done.write_bytes(b"video")
    with pytest.raises(ConfigError, match=r"output=.*out\.mp4 exists; choose another name or pass --overwrite"):
        check_output(done)
    check_output(done, overwrite=True)
    assert done.read_bytes() == b"video"
    done.unlink()
    Path(parts_folder(done)).mkdir()
    check_output(done)
    (Path(parts_folder(done)) / "segment-000000-000001.mp4").touch()
    with pytest.raises(ConfigError, match="segments of an interrupted run"):
        check_output(done)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="no right to write in"):
        check_output(tmp_path / "locked" / "out.mp4")


def test_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match=rf"no right to write in {tmp_path}"):
        check_output(tmp_path / "missing" / "out.mp4")


LATENTS = torch.randn(4, 11, 3, 5, generator=torch.Generator().manual_seed(0))


def test_checksum_is_the_documented_bytes_for_any_chunking() -> None:
    expected = hashlib.sha256(np.ascontiguousarray(LATENTS.numpy().transpose(1, 0, 2, 3)).astype("<f4")).hexdigest()
    assert latents_sha256(LATENTS) == expected
    for sizes in ([11], [5, 6], [1] * 11, [3, 1, 7]):
        digest = LatentsHash()
        for part in LATENTS.split(sizes, dim=1):
            digest.update(part)
        assert digest.hexdigest() == expected
    changed = LATENTS.clone()
    changed[3, 10, 2, 4] += 1e-6
    assert latents_sha256(changed) != expected
    assert latents_sha256(LATENTS.flip(1)) != expected


@pytest.mark.parametrize("copied", [1 << 22, 15 * 4])
def test_latents_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: int) -> None:
    monkeypatch.setattr("pavdm_dist.io.latents._COPY_VALUES", copied)  # 60: four frames of one channel at a time
    path = tmp_path / "deep" / "out.safetensors"
    writer = LatentsWriter(path, {"seed": "7"})
    for index, part in enumerate(LATENTS.split([5, 5, 1], dim=1)):
        assert writer.write_chunk(index, part)
        assert not writer.write_chunk(index, part)
        assert list(path.parent.iterdir()) == []
    with pytest.raises(ValueError, match="chunk 5 arrived, 3 is next"):
        writer.write_chunk(5, LATENTS)
    with pytest.raises(ValueError, match="has frames"):
        writer.write_chunk(3, LATENTS[:, :, :2])
    writer.finish()
    assert list(path.parent.iterdir()) == [path]
    # The public library reads it, too.
    assert torch.equal(load_file(path)["latents"], LATENTS)
    assert torch.equal(read_latents(path), LATENTS)


def test_unfinished_latents_leave_nothing(tmp_path: Path) -> None:
    writer = LatentsWriter(tmp_path / "a.safetensors")
    writer.write_chunk(0, LATENTS)
    writer.abort()
    with pytest.raises(ValueError, match="no latents were written"):
        LatentsWriter(tmp_path / "a.safetensors").finish()
    assert list(tmp_path.iterdir()) == []


def test_unreadable_latents(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(MediaError, match="no such file"):
        read_latents(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(MediaError, match="not a readable safetensors file"):
        read_latents(path)
    save_file({"latents": torch.zeros(2, 3)}, path)
    with pytest.raises(MediaError, match=r"no tensor 'latents' of shape \[C, N, h, w\]; it holds .*\[2, 3\]"):
        read_latents(path)


def sidecar(**changes: object) -> Sidecar:
    fields: dict = {
        "config": {"num_frames": 17, "mode": "window"},
        "prompt": "a red three, drifting – slowly",
        "negative_prompt": None,
        "seed": 3,
        "num_frames": 17,
        "fps": 24.0,
        "height": 64,
        "width": 64,
        "device": "cpu",
        "threads": 1,
        "chunk_seconds": [0.5, 0.25],
    }
    return Sidecar(**{**fields, **changes})


def test_sidecar(tmp_path: Path) -> None:
    video = tmp_path / "out.v2.mp4"
    video.write_bytes(b"video")
    assert sidecar_path(video) == str(tmp_path / "out.v2.json")
    assert sidecar_path("plain") == "plain.json"
    assert not is_complete(video)
    with pytest.raises(MediaError, match="is not complete"):
        read_sidecar(video)
    assert sidecar(latents_sha256="ab").write(video) == str(tmp_path / "out.v2.json")
    assert is_complete(video)
    read = read_sidecar(video)
    assert read["video_sha256"] == hashlib.sha256(b"video").hexdigest()
    assert read["prompt"] == "a red three, drifting – slowly"
    assert read["latents_sha256"] == "ab"
    assert {"python", "pavdm_dist", "torch", "ray", "diffusers", "av", "numpy"} <= set(read["versions"])
    assert read["versions"]["torch"] == torch.__version__


def test_a_sidecar_that_cannot_be_written_leaves_none(tmp_path: Path) -> None:
    video = tmp_path / "out.mp4"
    with pytest.raises(FileNotFoundError):  # no video, so it cannot be complete
        sidecar().write(video)
    video.write_bytes(b"video")
    with pytest.raises(TypeError):
        sidecar(extra={"tensor": torch.zeros(1)}).write(video)
    assert not is_complete(video)
    Path(sidecar_path(video)).write_text("{")
    with pytest.raises(MediaError, match="not valid JSON"):
        read_sidecar(video)


def test_weights_identity(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"z_dim": 4}))
    save_file({"w": torch.zeros(3)}, tmp_path / "vae" / "model.safetensors")
    first = weights_identity(tmp_path)
    (tmp_path / "README.md").write_text("no part of the weights")
    assert weights_identity(tmp_path) == first
    save_file({"w": torch.ones(3)}, tmp_path / "vae" / "model.safetensors")
    assert weights_identity(tmp_path) != first
