"""Atomic files, refused outputs, latents, checksums and the sidecar."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.latents import LatentsHash, LatentsWriter, latents_sha256, read_latents
from pavdm_dist.io.metadata import Sidecar, is_complete, read_sidecar, sidecar_path, weights_identity
from pavdm_dist.io.parts import check_output, parts_folder
from pavdm_dist.io.remote import check_store
from pavdm_dist.io.storage import (
    atomic_path,
    atomic_write,
    create_new,
    discard,
    exists,
    local_copy,
    same_path,
    sha256_file,
    stage,
)


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
        assert staged.parent.parent == target.parent  # a rename never crosses disks
        staged.write_text("zweite")
    assert target.read_text() == "zweite"
    assert list(target.parent.iterdir()) == [target]


def test_files_have_the_mode_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a") as staged:
            save_file({"x": torch.zeros(1)}, staged)  # this library's files are their owner's alone
        (tmp_path / "narrow").touch()
    finally:
        os.umask(before)
    with atomic_path(tmp_path / "b") as staged:
        save_file({"x": torch.zeros(1)}, staged)
    modes = {name: (tmp_path / name).stat().st_mode for name in ("new", "narrow", "a", "b")}
    assert (modes["a"], modes["b"]) == (modes["narrow"], modes["new"])
    assert modes["a"] != modes["b"]


def test_atomic_write_to_a_store() -> None:
    path = "memory://bucket/deep/a.bin"
    with atomic_write(path) as file:
        file.write(b"abc")
        assert not exists(path)
    assert exists(path)
    assert sha256_file(path) == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(ConfigError, match="cannot be reached"):
        exists("nonsense://bucket/a")


def test_a_store_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3://bucket/a needs a package .*s3fs.*pip install 'pavdm-dist\[s3\]'"):
        exists("s3://bucket/a")


def test_outputs_are_in_stores_whose_files_are_whole_or_not_there() -> None:
    for path in ("s3://bucket/a.mp4", "oci://a@b/c.mp4", "gs://bucket/a.mp4", "abfss://a@b/c.mp4", "memory://a.mp4"):
        check_store(path, "output")
    with pytest.raises(ConfigError, match=r"out=file:///a/b: is on a disk of this machine; .* out=/a/b$"):
        Tree("file:///a/b").check_writable(False)
    with pytest.raises(ConfigError, match="output=simplecache::s3://bucket/a: is a chain of stores"):
        check_output("simplecache::s3://bucket/a")
    for path in ("ftp://host/a", "smb://host/a", "https://host/a"):
        with pytest.raises(ConfigError, match="files would appear before they are whole; name an object store"):
            check_output(path)


def test_what_a_killed_process_had_staged_for_a_store_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole video may lie there, in memory on many machines."""
    own = """
import os, sys
from pavdm_dist.io.storage import stage
staged = stage("memory://bucket/a.mp4")
staged.write_bytes(b"frames")
print(staged.parent, flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    begun = [
        subprocess.Popen([sys.executable, "-c", own], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    killed, alive = (Path(one.stdout.readline().decode().strip()) for one in begun if one.stdout)
    begun[0].kill()
    begun[0].wait()
    # As of a container that shares the folder, whose process numbers mean nothing here, and as others name theirs.
    names = killed.name.split("-")
    foreign, other = tmp_path / "-".join([*names[:2], "01234567", *names[3:]]), tmp_path / "pavdm-notes-1"
    foreign.mkdir()
    other.mkdir()
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        staged = stage("memory://bucket/b.mp4")
        assert not killed.exists() and (alive / "a.mp4").exists() and foreign.exists() and other.exists()
        discard(staged)
    finally:
        for one in begun:
            one.communicate(timeout=60)
    assert not staged.parent.exists()


def test_what_a_driver_says_of_its_own_is_an_error_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """As clouds' drivers do of tokens that have run out, or of quotas."""

    class HttpError(Exception):
        pass

    def refused(*_: object, **__: object) -> None:
        raise HttpError("quota exceeded, 403")

    store = type(fsspec.filesystem("memory"))
    for name in ("put_file", "exists"):
        monkeypatch.setattr(store, name, refused)
    with pytest.raises(OSError, match="memory://bucket/x: HttpError: quota exceeded, 403"):
        exists("memory://bucket/x")
    with pytest.raises(OSError, match="HttpError: quota"), atomic_write("memory://bucket/x") as file:
        file.write(b"x")


def test_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert all(same_path("v.json", other) for other in ("./v.json", tmp_path / "v.json", "link/v.json", "a/../v.json"))
    assert not same_path("v.json", "w.json")
    assert same_path("s3://b/v.json", "s3://b/v.json") and not same_path("s3://b/v.json", "v.json")


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_made_by_one_of_many_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    path, link = tmp_path / "new" / "lock.json", os.link

    def linked(staged: Path, target: Path) -> None:
        assert Path(staged).read_bytes() == b"whole"
        if not links:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        link(staged, target)

    monkeypatch.setattr(os, "link", linked)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: create_new(path, b"whole"), range(8))) == 1
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_a_new_file_is_made_though_others_remove_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link, times = tmp_path / "new" / "lock.json", os.link, iter(range(9))

    def removed(staged: Path, target: Path) -> None:
        if next(times) < 2:
            shutil.rmtree(path.parent)
        link(staged, target)

    monkeypatch.setattr(os, "link", removed)
    assert create_new(path, b"whole") and path.read_bytes() == b"whole"


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
    for name in ("lock.json", ".lock.json.01234567.tmp", "lock.json.01234567.stale"):  # left by a kill
        (Path(parts_folder(done)) / name).touch()
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


def test_checksum_is_chained_frame_by_frame_for_any_chunking() -> None:
    state = hashlib.sha256(b"pavdm_dist latents 1").digest()
    assert LatentsHash().state == state
    for frame in range(11):
        state = hashlib.sha256(state + np.ascontiguousarray(LATENTS[:, frame].numpy()).astype("<f4").tobytes()).digest()
    assert latents_sha256(LATENTS) == state.hex()
    for sizes in ([11], [5, 6], [1] * 11, [3, 1, 7]):
        digest = LatentsHash()
        for part in LATENTS.split(sizes, dim=1):
            digest.update(part)
            digest = LatentsHash(digest.state)  # as after a restart
        assert digest.hexdigest() == state.hex()
    changed = LATENTS.clone()
    changed[3, 10, 2, 4] += 1e-6
    assert latents_sha256(changed) != state.hex()
    assert latents_sha256(LATENTS.flip(1)) != state.hex()


CHUNKS = LATENTS.split([5, 5, 1], dim=1)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_latents_file(tmp_path: Path, group: int) -> None:
    path, parts = tmp_path / "deep" / "out.safetensors", tmp_path / "parts"
    writer = LatentsWriter(parts, group)
    for index, part in enumerate(CHUNKS):
        assert writer.write_chunk(index, part)
        assert not writer.write_chunk(index, part)
        assert writer.closed_chunks == (index + 1) // group * group
    with pytest.raises(ValueError, match="chunk 5 arrived, 3 is next"):
        writer.write_chunk(5, LATENTS)
    with pytest.raises(ValueError, match="has frames"):
        writer.write_chunk(3, LATENTS[:, :, :2])
    writer.join(path)
    assert list(path.parent.iterdir()) == [path]
    # The public library reads it, too.
    assert torch.equal(load_file(path)["latents"], LATENTS)
    assert torch.equal(read_latents(path), LATENTS)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"layout": "channels time height width", "scale": "normalised"}


def test_latents_go_on_behind_whole_groups(tmp_path: Path) -> None:
    writer = LatentsWriter(tmp_path / "parts", 2)
    for index, part in enumerate(CHUNKS):
        writer.write_chunk(index, part)
    writer.close()
    (tmp_path / "parts" / "mine.safetensors").write_text("foreign")
    assert LatentsWriter(tmp_path / "parts", 2, resume=True, num_chunks=3).next_chunk == 3
    again = LatentsWriter(tmp_path / "parts", 2, resume=True)
    assert (again.closed_chunks, again.next_chunk) == (2, 2)
    names = {"latents-000000-000001.safetensors", "mine.safetensors"}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == names
    assert not again.write_chunk(1, CHUNKS[1])
    again.write_chunk(2, CHUNKS[2])
    again.join(tmp_path / "out.safetensors")
    assert torch.equal(read_latents(tmp_path / "out.safetensors"), LATENTS)
    LatentsWriter(tmp_path / "parts", 2)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"mine.safetensors"}


def test_no_latents_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no latents were written"):
        LatentsWriter(tmp_path / "parts", 2).join(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_joining_latents_takes_the_memory_of_one_group(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    writer = LatentsWriter(parts, 1)
    for index in range(24):
        writer.write_chunk(index, torch.full((16, 5, 60, 60), float(index)))  # 1.1 MiB
    script = """
import resource, sys
from pathlib import Path
from pavdm_dist.io.latents import LatentsWriter

output = sys.argv[2]
LatentsWriter(sys.argv[1], 1, resume=True).join(output)  # everything is loaded
lines = Path("/proc/self/status").read_text().splitlines()
used = next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 8 * 2**20,) * 2)
LatentsWriter(sys.argv[1], 1, resume=True).join(output)
try:
    bytearray(12 * 2**20)
except MemoryError:
    print("limited")
"""
    command = [sys.executable, "-c", script, str(parts), str(tmp_path / "out.safetensors")]
    # Freed memory is given back, so that what the first time took does not hide what the second takes.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, timeout=120, env=environment, capture_output=True, text=True)
    assert done.stdout == "limited\n"
    # All of it is 26 MiB.
    joined = read_latents(tmp_path / "out.safetensors")
    assert joined.shape == (16, 120, 60, 60)
    assert joined[:, ::5].unique().tolist() == list(range(24))


def test_latents_of_a_remote_store(tmp_path: Path) -> None:
    writer = LatentsWriter("memory://latents/parts", 1)
    for index, part in enumerate(CHUNKS):
        writer.write_chunk(index, part)
    writer.join("memory://latents/out.safetensors")
    with local_copy("memory://latents/out.safetensors") as file:
        assert torch.equal(read_latents(file), LATENTS)
    assert not file.exists()


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
    for content in ("{}", "[]", "{", '{"versions": {"torch": "2"}}'):
        (tmp_path / "mine.json").write_text(content)
        assert not is_complete(tmp_path / "mine.mp4"), "somebody else's file of that name"
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
    names = ["vae/config.json", "vae/model.safetensors"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"z_dim": 4}))
    save_file({"w": torch.zeros(3)}, tmp_path / "vae" / "model.safetensors")
    first = weights_identity(tmp_path, names)
    (tmp_path / "README.md").write_text("no part of the weights")
    assert weights_identity(tmp_path, reversed(names)) == first
    save_file({"w": torch.ones(3)}, tmp_path / "vae" / "model.safetensors")
    assert weights_identity(tmp_path, reversed(names)) != first


def test_weights_in_the_hubs_cache_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cached = tmp_path / "plain", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (plain, cached, blobs):
        folder.mkdir(parents=True)
    save_file({"w": torch.zeros(3)}, plain / "model.safetensors")
    (plain / "config.json").write_text("{}")
    large = blobs / sha256_file(plain / "model.safetensors")
    small = blobs / "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # small files bear git's name
    large.write_bytes((plain / "model.safetensors").read_bytes())
    small.write_text("{}")
    (cached / "model.safetensors").symlink_to(large)
    (cached / "config.json").symlink_to(small)
    read, names = list[Path](), ["config.json", "model.safetensors"]
    monkeypatch.setattr("pavdm_dist.io.metadata.kept_sha256", lambda path: read.append(path) or sha256_file(path))
    assert weights_identity(cached, names) == weights_identity(plain, names)
    assert read == [cached / "config.json", plain / "config.json", plain / "model.safetensors"]


@pytest.mark.parametrize("path", [".", "", "./", "..", "/", "own/..", "memory://store/.."])
def test_a_path_without_a_name_of_its_own_is_refused_and_nothing_beside_it_is_lost(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own" / "precious").mkdir(parents=True)
    (tmp_path / "own" / "precious" / "thesis.txt").write_text("years")
    monkeypatch.chdir(tmp_path / "own")
    with pytest.raises(IsADirectoryError):
        stage(path)
    with pytest.raises(IsADirectoryError), atomic_write(path) as file:
        file.write(b"gone")
    # Whatever comes of it elsewhere: only folders that were made for staging are removed.
    with pytest.raises(ValueError, match="was not staged here"):
        discard(Path(path) / "x")
    with pytest.raises(ValueError, match="was not staged here"):
        discard(Path("precious") / "thesis.txt")
    assert (tmp_path / "own" / "precious" / "thesis.txt").read_text() == "years"


def test_what_is_written_beside_a_staged_file_goes_with_it(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "a.bin") as staged:
        staged.write_bytes(b"whole")
        (staged.parent / ".tmpKp2YVX").write_bytes(b"a library's own way to be atomic")
    staged = stage(tmp_path / "b.bin")
    (staged.parent / ".tmpKp2YVX").write_bytes(b"half")
    discard(staged)
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "a.bin"}
