"""What tells weights from others: right whatever lies beside them, and not read again by the next command."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from test_stdit3_weights import by_block, shard

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import CheckpointError
from pavdm_dist.io import checksums
from pavdm_dist.io.checksums import kept_sha256
from pavdm_dist.io.storage import sha256_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything counts as large, and is kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "KEPT_BYTES", 1)
    monkeypatch.setattr(checksums, "_SETTLED_NS", 0)
    return tmp_path / "cache" / "pavdm_dist" / "sha256"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files that are read from beginning to end."""
    found: list[str] = []

    def read(path: str | Path) -> str:
        found.append(Path(path).name)
        return sha256_file(path)

    monkeypatch.setattr(checksums, "sha256_file", read)
    return found


def test_a_file_is_read_once_while_it_is_the_same(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"weights")
    time.sleep(0.02)
    first = kept_sha256(file)
    assert first == sha256_file(file) == kept_sha256(file) and reads == [file.name]
    (tmp_path / "link").symlink_to(file)
    assert kept_sha256(tmp_path / "link") == first and reads == [file.name]
    # Other bytes of the same size, under the same times.
    before = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kept_sha256(file) == sha256_file(file) != first and len(reads) == 2
    other = tmp_path / "other"
    other.write_bytes(b"weights")
    os.replace(other, file)
    assert kept_sha256(file) == first and len(reads) == 3
    for damage in ("", "[]", "{}", '{"file": {}, "sha256": "0"}', "\x00"):
        for entry in cache.iterdir():
            entry.write_text(damage)
        assert kept_sha256(file) == first


def test_a_file_that_changed_just_now_is_not_trusted(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_SETTLED_NS", 10**12)
    file = tmp_path / "w"
    file.write_bytes(b"weights")
    assert [kept_sha256(file) for _ in range(2)] == [sha256_file(file)] * 2 and len(reads) == 2


@pytest.mark.parametrize("home", ["", "relative", "/dev/full", "/proc/none"])
def test_nowhere_to_keep_it_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/dev/full")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "w"
    file.write_bytes(b"weights")
    assert kept_sha256(file) == sha256_file(file)
    assert os.listdir(tmp_path) == ["w"]


def test_what_takes_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("pavdm_dist").propagate = True
    monkeypatch.setattr(checksums, "TOLD_BYTES", 1)
    file = tmp_path / "w"
    file.write_bytes(b"weights")
    with caplog.at_level(logging.INFO):
        kept_sha256(file)
        kept_sha256(file)
    assert caplog.text.count("reading 0.0 GB once for the checksum that tells these weights from others") == 1


@pytest.mark.parametrize("sharded", [False, True])
def test_only_what_is_used_counts(tmp_path: Path, reads: list[str], sharded: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    if sharded:
        shard(folder / "transformer", by_block)
    first = Checkpoint.open(folder).identity
    assert {"model_index.json", "config.json"} <= set(reads)
    reads.clear()
    (folder / "unused.safetensors").write_bytes(b"another precision")
    (folder / "transformer" / "optimizer.safetensors").write_bytes(b"what a trainer leaves")
    (folder / "notes.json").write_text("{}")
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    assert Checkpoint.open(moved).identity == first
    assert not {"unused.safetensors", "optimizer.safetensors", "notes.json"} & set(reads)
    with open(moved / "vae" / "config.json", "a") as file:
        file.write("\n")
    assert Checkpoint.open(moved).identity != first


def test_weights_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    checkpoint = Checkpoint.open(folder)

    def read(path: str | Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checksums, "sha256_file", read)
    with pytest.raises(CheckpointError, match=rf"model={folder}: {folder}/.* cannot be read: Input/output error"):
        _ = checkpoint.identity
