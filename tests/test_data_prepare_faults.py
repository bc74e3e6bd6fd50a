"""`pavdm data prepare` where videos, disks, folders or workers are at fault: named, and what is done is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_checkpoint
from prepared_sets import BUCKETS, scanned_then_replaced, write_captioned, write_source
from videos import numbered, write_video

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.data import prepare as prepare_module
from pavdm_dist.data import work as work_module
from pavdm_dist.data.clips import Scan
from pavdm_dist.data.index import read_sources
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.errors import ConfigError, EngineError, MediaError, UnreachableError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def config(source: Path, model: Path) -> PrepareConfig:
    return PrepareConfig([str(source)], "unset", str(model), BUCKETS, shard_clips=2)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_fault_in_a_ray_worker_is_its_own_sentence(
    ray_cluster: None, config: PrepareConfig, source: Path, tmp_path: Path
) -> None:
    output = scanned_then_replaced(config, source, tmp_path)
    with pytest.raises(MediaError, match=r"b\.mp4 is not the video that was scanned"):
        prepare_command(replace(output, ray_address="auto"))


def test_strict_ends_with_the_first_corrupt_file_and_keeps_what_was_seen(config: PrepareConfig, tmp_path: Path) -> None:
    strict = replace(config, output=str(tmp_path / "set"), encode=False, strict=True)
    with pytest.raises(ConfigError, match=r"2 of 8 videos cannot be read, the first: .*cut\.mp4.*strict=false skips"):
        prepare_command(strict)
    assert not (tmp_path / "set" / "index.json").exists()
    assert prepare_command(replace(strict, strict=False))["frames_read"] == 0, "the look at the videos is kept"
    with pytest.raises(ConfigError, match="2 of 8 videos cannot be read"):
        prepare_command(strict)


def test_a_video_that_cannot_be_reached_ends_the_run_and_is_in_the_next(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(config, output=str(tmp_path / "set"), encode=False)
    with monkeypatch.context() as away:
        scan = work_module.scan_video

        def timed_out(place: str, *args: Any, **more: Any) -> Scan:
            if place.endswith("b.mp4"):
                raise UnreachableError(f"{place} cannot be read now: timed out")
            return scan(place, *args, **more)

        away.setattr(work_module, "scan_video", timed_out)
        with pytest.raises(EngineError, match=r"b\.mp4 cannot be read now: timed out; run again to go on"):
            prepare_command(wanted)
    assert not (tmp_path / "set" / "index.json").exists()
    skipped = {entry["video"] for entry in prepare_command(wanted)["skipped"]}
    assert not any(name.endswith("b.mp4") for name in skipped)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
@pytest.mark.parametrize("name", ["settings.json", "sizes.json"])
def test_damaged_settings_are_one_sentence(name: str, content: str, config: PrepareConfig, tmp_path: Path) -> None:
    wanted = replace(config, output=str(tmp_path / "set"), encode=False, strict=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        prepare_command(wanted)
    (tmp_path / "set" / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"set: {name}, which says what was begun there, is missing or damaged: "):
        prepare_command(wanted)


@pytest.mark.parametrize("content", ["", "[1]", '{"videos": [{}]}'])
@pytest.mark.parametrize("name", ["scan/000000.json", "reading/alone.json"])
def test_what_was_looked_at_and_is_damaged_is_named_and_looked_at_again(
    name: str, content: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = write_captioned(tmp_path / "videos", ["a three"], 12, 32, 48)
    settings = PrepareConfig([str(videos)], str(tmp_path / "set"), str(model), ["32x48x2@24"], encode=False)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_list_clips", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_command(settings)
    file = tmp_path / "set" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    with pytest.raises(ConfigError, match=rf"{name} is damaged \(.*\): delete it; run again, and its videos are"):
        prepare_command(settings)
    file.unlink()
    assert prepare_command(settings)["clips"] == {"32x48x2@24": 2}, "the advice helps"


def test_missing_videos_and_impossible_captions_are_skipped_by_name(
    config: PrepareConfig, source: Path, tmp_path: Path
) -> None:
    lines = [(source / "e.mp4", "a three"), ("gone.mp4", "a three"), (source / "b.mp4", "three " * 70)]
    (tmp_path / "i.jsonl").write_text("\n".join(json.dumps({"path": str(p), "caption": c}) for p, c in lines))
    report = prepare_command(
        replace(config, source=[str(tmp_path / "i.jsonl")], output=str(tmp_path / "set"), encode=False)
    )
    reasons = [(entry["skipped"], entry["reason"]) for entry in report["skipped"]]
    assert [kind for kind, _ in reasons] == ["unreadable", "caption"]
    assert reasons[0][1].endswith("gone.mp4: no such file")
    assert "has 70 words and commas, at most 64 are legal" in reasons[1][1]
    # The same, with the uncaptioned left out.
    (tmp_path / "j.csv").write_text(f"path,caption\n{source / 'e.mp4'},\n{source / 'b.mp4'},seven\n")
    report = prepare_command(
        replace(config, source=[str(tmp_path / "j.csv")], output=str(tmp_path / "k"), encode=False, captions="skip")
    )
    assert [(entry["skipped"], entry["reason"]) for entry in report["skipped"]] == [("caption", "it has no caption")]


def test_a_video_that_vanished_or_changed_is_named_and_what_is_done_is_kept(
    config: PrepareConfig, source: Path, tmp_path: Path
) -> None:
    settings = scanned_then_replaced(config, source, tmp_path)
    video, other = tmp_path / "videos" / "b.mp4", tmp_path / "videos" / "a.mp4"
    shutil.copy(source / "b.mp4", video)
    other.rename(tmp_path / "away.mp4")
    with pytest.raises(ConfigError, match=r"made with other videos \(a\.mp4 is gone, 1 such; put them back"):
        prepare_command(settings)
    other.symlink_to(tmp_path / "nowhere.mp4")  # listed still
    with pytest.raises(MediaError, match=r"a\.mp4: no such file; its clips are listed: put the video back"):
        prepare_command(settings)
    other.unlink()
    (tmp_path / "away.mp4").rename(other)
    video.write_bytes(video.read_bytes() + bytes(8))
    with pytest.raises(ConfigError, match=r"b\.mp4 had \d+ bytes when the data set was begun .* put it back"):
        prepare_command(settings)
    shutil.copy(source / "b.mp4", video)
    assert prepare_command(settings)["shards"] == 6


def test_what_could_not_be_read_is_looked_at_again(config: PrepareConfig, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "videos")
    broken = tmp_path / "videos" / "cut.mp4"
    (tmp_path / "videos" / "text.mp4").unlink()
    strict = replace(config, source=[str(tmp_path / "videos")], output=str(tmp_path / "set"), strict=True)
    with pytest.raises(ConfigError, match=r"1 of 7 videos cannot be read"):
        prepare_command(strict)
    shutil.copy(source / "b.mp4", broken)
    report = prepare_command(strict)
    assert report["frames_read"] == 30, "the others are not looked at again"
    assert report["skipped"] and not any(entry["skipped"] == "unreadable" for entry in report["skipped"])


def test_what_cannot_be_written_is_one_sentence(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(work_module, "write_shard", full)
    with pytest.raises(MediaError, match=r"output=.*: cannot be written: .*No space left on device; run again"):
        prepare_command(replace(config, output=str(tmp_path / "set")))


def test_a_detector_s_own_fault_skips_one_video(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = work_module.scan_video

    def failing(location: str, cuts: bool) -> Scan:
        assert not location.endswith("b.mp4"), "a bug elsewhere"
        return scan(location, cuts)

    monkeypatch.setattr(work_module, "scan_video", failing)
    report = prepare_command(replace(config, output=str(tmp_path / "set"), encode=False))
    reasons = {entry["video"]: entry["reason"] for entry in report["skipped"]}
    assert "b.mp4: AssertionError: a bug elsewhere" in reasons["b.mp4"] and report["clips"]["32x48x3@24"] > 0


def test_a_machine_without_the_folders_takes_no_video_for_missing(config: PrepareConfig, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(config.model)
    sources = read_sources(config.source)
    job = prepare_module._job(replace(config, output=str(tmp_path)), checkpoint, sources)
    for lost, said in ((replace(job, root=str(tmp_path / "gone")), "source: .*gone"), (job, "output: .*settings.json")):
        with pytest.raises(ConfigError, match=rf"{said} is not there on .*; every machine must share it"):
            work_module.scan_part(lost, 0, sources.videos)


def test_a_kill_at_the_first_write_is_gone_on_from(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("sizes.json", ".settings.json.12345678.tmp"):
        (tmp_path / "set" / name).write_text("{")
    prepare_command(replace(config, output=str(tmp_path / "set"), encode=False))
    prepare_command(replace(config, output=str(tmp_path / "set"), encode=False))
    assert not list((tmp_path / "set").glob(".*.tmp"))


def test_two_runs_in_one_folder_are_kept_apart(config: PrepareConfig, tmp_path: Path) -> None:
    with (
        prepare_module._locked(tmp_path / "set"),
        pytest.raises(ConfigError, match="another run is preparing this folder"),
    ):
        prepare_command(replace(config, output=str(tmp_path / "set")))


@pytest.mark.parametrize(
    "name", ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK", "EBADF", "EINVAL", "EIO", "EACCES", "ESTALE"]
)
def test_a_file_system_without_locks_is_said_and_used(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(prepare_module.fcntl, "flock", refuse)
    with prepare_module._locked(tmp_path / "set"):
        assert "its file system knows no locks" in caplog.text


def test_damaged_videos_give_what_lies_before_the_fault_when_asked(config: PrepareConfig, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", numbered(70).repeat(2, axis=0)).read_bytes()
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    chosen = replace(config, source=[str(tmp_path / "v")], output=str(tmp_path / "set"), captions="stem", encode=False)
    with pytest.raises(ConfigError, match=r"none of 1 videos gives a clip: .*cut\.mkv is .*truncated"):
        prepare_command(chosen)
    report = prepare_command(replace(chosen, damaged="cut"))
    assert report["remarks"] == {"damaged": 1} and not report["skipped"] and sum(report["clips"].values()) > 5
    with pytest.raises(ConfigError, match="made with damaged=cut, this run has skip"):
        prepare_command(chosen)
