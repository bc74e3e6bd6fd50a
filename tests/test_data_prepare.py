"""`pavdm data prepare`: what comes out, that it is the same however it was made, and every refusal."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import tiny_checkpoint, until_gone
from videos import numbered, shipped_videos, shots, write_video

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.data import prepare as prepare_module
from pavdm_dist.data import work as work_module
from pavdm_dist.data.clips import Scan
from pavdm_dist.data.dataset import CachedClips, PixelClips
from pavdm_dist.data.index import read_sources
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.data.shards import open_shard
from pavdm_dist.data.workers import worker_number, workers
from pavdm_dist.errors import ConfigError, EngineError, MediaError

BUCKETS = ["32x48x3@24", "32x48x2@24", "48x32x2@24", "16x96x2@24"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good videos, two corrupt ones, one too small and one too short."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", shots([20, 25]))
    write_video(folder / "b.mp4", numbered(30), 30)
    write_video(folder / "deep" / "tall.mkv", numbered(12, 96, 64))
    write_video(folder / "e.mp4", numbered(11))
    write_video(folder / "short.mp4", numbered(3))
    write_video(folder / "small.mp4", numbered(20, 16, 32))
    whole = (folder / "b.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video at all")
    captions = {"a": "a red three drifting up", "b": "blue seven", "e": "a green three"}
    for path in [*folder.rglob("*.mp4"), *folder.rglob("*.mkv")]:
        path.with_suffix(".txt").write_text(captions.get(path.stem, "a three"))
    return folder


@pytest.fixture(scope="module")
def config(source: Path, model: Path) -> PrepareConfig:
    return PrepareConfig([str(source)], "unset", str(model), BUCKETS, shard_clips=2)


@pytest.fixture(scope="module")
def plain(config: PrepareConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The data set that one process makes in one go, and its report."""
    output = tmp_path_factory.mktemp("plain") / "set"
    return output, prepare_command(replace(config, output=str(output)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_report_and_files(plain: tuple[Path, dict[str, Any]]) -> None:
    output, report = plain
    assert report["clips"] == {"32x48x3@24": 7, "32x48x2@24": 2, "48x32x2@24": 2, "16x96x2@24": 0}
    assert (report["videos"], report["shards"], report["frames_read"]) == (8, 6, 121)
    assert report["captions_with_unknown_words"] == 1
    skipped = {entry["video"]: (entry["skipped"], entry["reason"]) for entry in report["skipped"]}
    assert {name: kind for name, (kind, _) in skipped.items()} == {
        "cut.mp4": "unreadable", "text.mp4": "unreadable", "short.mp4": "short", "small.mp4": "small",
    }  # fmt: skip
    assert "truncated" in skipped["cut.mp4"][1]
    assert "longest scene has 0.12 s" in skipped["short.mp4"][1] and "(shortest 0.21 s)" in skipped["short.mp4"][1]
    assert "16x32 is smaller than every bucket" in skipped["small.mp4"][1]
    assert set(contents(output)) == {
        "settings.json", "sizes.json", "index.json", *(f"clips-{i}.jsonl" for i in range(4)),
        *(f"bucket-{b}-0000{i}.safetensors" for b, i in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0))),
    }  # fmt: skip
    with open_shard(output / "bucket-0-00000.safetensors") as reader:
        shapes = {name: (reader.get_tensor(name).dtype, reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        header = json.loads(reader.metadata()["pavdm"])
    assert shapes == {
        "latents": (torch.float16, [2, 4, 3, 4, 6]),
        "text": (torch.float16, [2, 5, 12]),
        "text_mask": (torch.bool, [2, 5]),
    }
    assert header["bucket"] == "32x48x3@24" and set(header) == {"bucket", "codec", "text_encoder", "clips"}
    assert header["clips"][1] == {
        "video": "a.mp4", "caption": "a red three drifting up", "first": 9, "frames": 9,
        "start": "3/8", "end": "17/24", "scene": [0, 20],
    }  # fmt: skip


def test_a_complete_set_is_left_alone(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, report = plain
    before = contents(output)
    monkeypatch.setattr(prepare_module, "scan_part", None)
    again = prepare_command(replace(config, output=str(output)))
    assert (again["clips"], again["skipped"], again["frames_read"]) == (report["clips"], report["skipped"], 0)
    assert contents(output) == before


@pytest.mark.slow  # below two are killed and go on to the same bytes
@pytest.mark.timeout(120)
def test_two_processes_give_the_same_bytes(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "PART_VIDEOS", 1)  # eight parts for two workers
    prepare_command(replace(config, output=str(tmp_path / "set"), processes=2))
    assert contents(tmp_path / "set") == contents(plain[0])


@pytest.mark.timeout(120)
def test_a_ray_cluster_gives_the_same_bytes(
    ray_cluster: None,
    plain: tuple[Path, dict[str, Any]],
    config: PrepareConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    # Two tasks at a time: each new worker pays for its imports, and the machine may have two cores.
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(prepare_module, "PART_VIDEOS", 3)
    prepare_command(replace(config, output=str(tmp_path / "set"), ray_address="auto"))
    assert contents(tmp_path / "set") == contents(plain[0])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_fault_in_a_ray_worker_is_its_own_sentence(
    ray_cluster: None, config: PrepareConfig, source: Path, tmp_path: Path
) -> None:
    output = _scanned_then_replaced(config, source, tmp_path)
    with pytest.raises(MediaError, match=r"b\.mp4 is not the video that was scanned"):
        prepare_command(replace(output, ray_address="auto"))


@pytest.mark.timeout(120)
def test_a_killed_run_goes_on_to_the_same_bytes(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    settings = replace(config, output=str(output), processes=2)
    # Shards are slowed down so that the kill falls between two of them on any machine.
    script = (
        "import sys, time, pavdm_dist.data.work as work\n"
        "from pavdm_dist.data.prepare import PrepareConfig, prepare_command\n"
        "write = work.write_shard\n"
        "work.write_shard = lambda *given: (write(*given), time.sleep(0.5))\n"
        "if __name__ == '__main__':\n"
        f"    prepare_command({settings!r})\n"
    )
    (tmp_path / "run.py").write_text(script)
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")])
    workers_of: list[psutil.Process] = []
    try:
        while not list(output.glob("*.safetensors")):
            assert run.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        workers_of = psutil.Process(run.pid).children(recursive=True)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    # They end with their parent, and write no more.
    assert len(workers_of) >= 2
    until_gone(workers_of)
    done = contents(output)
    assert "index.json" not in done and len([name for name in done if name.endswith(".safetensors")]) < 6
    (output / ".bucket-0-00003.safetensors.12345678.tmp").write_bytes(b"half a shard")
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    prepare_command(replace(settings, processes=1))
    assert contents(output) == contents(plain[0])
    assert all((output / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items()), "not made again"


def test_killed_while_looking_at_videos(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "PART_VIDEOS", 2)
    scan, seen = prepare_module.scan_part, []

    def interrupted(*task: Any) -> int:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(task[1])
        return scan(*task)

    monkeypatch.setattr(prepare_module, "scan_part", interrupted)
    settings = replace(config, output=str(tmp_path / "set"))
    with pytest.raises(KeyboardInterrupt, match=r"what is done is in .*set; run again to go on"):
        prepare_command(settings)
    seen.append("no more interrupts")
    report = prepare_command(settings)
    assert seen[:3] == [0, 1, "no more interrupts"]
    assert report["frames_read"] < plain[1]["frames_read"]
    assert contents(tmp_path / "set") == contents(plain[0])


def test_cached_latents_are_those_of_the_pixels(plain: tuple[Path, dict[str, Any]], model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    cached = CachedClips(plain[0], checkpoint)
    pixels = PixelClips(plain[0], checkpoint.codec, checkpoint.text_encoder)
    assert cached.buckets == pixels.buckets and cached.counts == pixels.counts == [7, 2, 2, 0]
    for bucket, indices in ((0, [5, 0, 3, 5]), (2, [1])):
        one, other = cached.load(bucket, indices), pixels.load(bucket, indices)
        assert one.ids == other.ids and one.captions == other.captions
        assert one.latents.dtype == other.latents.dtype == torch.float32
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-3, atol=1e-3)
        assert one.text is not None and other.text is not None and one.text_mask is not None
        assert other.text_mask is not None and torch.equal(one.text_mask, other.text_mask)
        torch.testing.assert_close(one.text, other.text, rtol=1e-3, atol=1e-3)
    assert cached.load(0, [5]).ids == ["b.mp4#11"]
    for bucket, indices in ((3, [0]), (0, [7]), (0, []), (4, [0])):
        with pytest.raises(IndexError, match="the buckets hold"):
            cached.load(bucket, indices)


def test_pixels_need_no_latents_and_follow_moved_videos(
    config: PrepareConfig, source: Path, model: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "set")
    report = prepare_command(replace(config, output=output, encode=False))
    assert report["shards"] == 0 and not list((tmp_path / "set").glob("*.safetensors"))
    shutil.copytree(source, tmp_path / "moved")
    clips = PixelClips(output, Checkpoint.open(model).codec, root=tmp_path / "moved").load(2, [0])
    assert clips.ids == ["deep/tall.mkv#0"] and clips.text is None and clips.latents.shape == (1, 4, 2, 6, 4)
    with pytest.raises(MediaError, match="no such file"):
        PixelClips(output, Checkpoint.open(model).codec, root=tmp_path / "gone").load(2, [0])
    with pytest.raises(ConfigError, match="was prepared with encode=false: read its pixels"):
        CachedClips(output)


def test_real_videos_end_to_end(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = shipped_videos()
    (tmp_path / "real.csv").write_text(
        f'path,text,num_frames\n{videos["bikes"]},"bikes, in a town",250\n{videos["carphone_pristine"]},a man,120\n'
    )
    words = [str(tmp_path / "real.csv"), f"model={model}", f"output={tmp_path / 'set'}", "buckets=[64x88x5@12]"]
    assert cli.main(["data", "prepare", *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["clips"], report["frames_read"], report["short_scenes"]) == ({"64x88x5@12": 6}, 370, 2)
    clips = CachedClips(tmp_path / "set").load(0, range(6))
    assert clips.captions == ["bikes, in a town"] * 4 + ["a man"] * 2
    assert clips.latents.shape == (6, 4, 5, 8, 11) and bool(clips.latents.isfinite().all())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"buckets": ["32x48x3@24"]}, r"made with buckets=\['32x48x3@24'.*this run has \['32x48x3@24'\]: name another"),
        ({"shard_clips": 3}, "made with shard_clips=2, this run has 3"),
        ({"scene_cuts": False}, "made with scene_cuts=True, this run has False"),
        ({"upscale": True}, "made with upscale=False, this run has True"),
        ({"encode": False}, "made with encode=True, this run has False"),
        ({"threads": 2}, "made with threads=1, this run has 2"),
        (
            {"captions": "stem", "source": None},
            r"made with other videos \(.*is gone, \d+ such; put them back to go on\)",
        ),
        ({"model": "embedded"}, "made with codec="),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, source: Path, change: dict[str, Any], sentence: str
) -> None:
    if "source" in change:
        change = {**change, "source": [str(source / "a.mp4")]}
    before = contents(plain[0])
    with pytest.raises(ConfigError, match=sentence):
        prepare_command(replace(config, output=str(plain[0]), **change))
    assert contents(plain[0]) == before


def test_bad_settings_write_nothing(config: PrepareConfig, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    (tmp_path / "file").touch()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"processes": 0}, "processes=0: must be at least 1"),
        ({"shard_clips": 0}, "shard_clips=0: must be at least 1"),
        ({"threads": 0}, "threads=0: must be at least 1"),
        ({"output": "s3://bucket/set"}, "must be a local folder"),
        ({"output": str(tmp_path / "file")}, "file is a file; name a folder"),
        ({"output": str(tmp_path / "file" / "sub")}, "sub: cannot be made: Not a directory"),
        ({"output": str(tmp_path)}, "holds file and no data set: name an empty folder"),
        ({"source": [str(source / "text.mp4")]}, r"none of 1 videos gives a clip: text\.mp4: .*is not a video"),
        ({"buckets": ["32x48x90@24"]}, "none of 8 videos gives a clip: a.mp4: its longest scene has 1.04 s"),
        ({"model": str(tmp_path)}, "this is no model folder"),
        ({"buckets": ["30x48x3@24"]}, "height=30 cannot be divided by 8.*nearest legal: 24 or 32"),
    ]
    for change, sentence in cases:
        with pytest.raises(ConfigError, match=sentence):
            prepare_command(replace(config, **{"output": str(output), **change}))
        assert not output.exists()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda: there is no CUDA device here; nearest legal: cpu"):
            prepare_command(replace(config, output=str(output), device="cuda"))


def test_strict_ends_with_the_first_corrupt_file_and_keeps_what_was_seen(config: PrepareConfig, tmp_path: Path) -> None:
    strict = replace(config, output=str(tmp_path / "set"), encode=False, strict=True)
    with pytest.raises(ConfigError, match=r"2 of 8 videos cannot be read, the first: .*cut\.mp4.*strict=false skips"):
        prepare_command(strict)
    assert not (tmp_path / "set" / "index.json").exists()
    assert prepare_command(replace(strict, strict=False))["frames_read"] == 0, "the look at the videos is kept"
    with pytest.raises(ConfigError, match="2 of 8 videos cannot be read"):
        prepare_command(strict)


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


def test_latents_of_another_model_are_refused(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"was prepared with codec .*, model=.*embedded has .*: prepare it again"):
        CachedClips(plain[0], Checkpoint.open())
    with pytest.raises(ConfigError, match="holds no data set"):
        CachedClips(tmp_path)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not complete: run `pavdm data prepare` again"):
        CachedClips(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 9}')
    with pytest.raises(ConfigError, match="has format version 9, this package reads 1"):
        CachedClips(tmp_path)


def test_a_damaged_shard_is_named_and_made_again(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, tmp_path: Path
) -> None:
    shutil.copytree(plain[0], tmp_path / "set")
    shard = tmp_path / "set" / "bucket-0-00001.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    clips = CachedClips(tmp_path / "set")
    clips.load(0, [0, 1])
    with pytest.raises(MediaError, match=r"bucket-0-00001\.safetensors is missing or damaged.*delete it and run"):
        clips.load(0, [2])
    shard.unlink()
    prepare_command(replace(config, output=str(tmp_path / "set")))
    assert contents(tmp_path / "set") == contents(plain[0]), "the advice helps"


def test_videos_that_moved_are_found_where_they_are(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, source: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain[0], tmp_path / "set")
    shutil.copytree(source, tmp_path / "moved")
    moved = replace(config, output=str(tmp_path / "set"), source=[str(tmp_path / "moved")])
    prepare_command(moved)
    assert json.loads((tmp_path / "set" / "index.json").read_text())["root"] == str(tmp_path / "moved")
    PixelClips(tmp_path / "set", Checkpoint.open(model).codec).load(2, [0])


def test_a_video_that_vanished_or_changed_is_named_and_what_is_done_is_kept(
    config: PrepareConfig, source: Path, tmp_path: Path
) -> None:
    settings = _scanned_then_replaced(config, source, tmp_path)
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


@pytest.mark.timeout(60)
def test_what_no_node_has_is_refused(ray_cluster: None) -> None:
    for cpus, gpu, sentence in ((10_000, False, "threads=10000: no node"), (1, True, "threads=1 with device=cuda: no")):
        with pytest.raises(ConfigError, match=sentence), workers(1, "auto", cpus, gpu):
            pass


@pytest.mark.timeout(60)
def test_workers_are_numbered(tmp_path: Path) -> None:
    with workers(2, None, 1, False) as run:
        found = set(run(_number_after_a_while, [()] * 20))
    assert found == {0, 1}


@pytest.mark.timeout(60)
def test_workers_run_no_scripts_of_the_current_folder(tmp_path: Path) -> None:
    for name in ("pickle", "struct"):  # what they import before they are told where from
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a script of somebody else')")
    program = """
import operator, os, sys
sys.path[:] = [folder for folder in sys.path if folder not in ("", os.getcwd())]
from pavdm_dist.data.readers import survived
from pavdm_dist.data.workers import workers
if __name__ == "__main__":
    with workers(2, None, 1, False) as run:
        print(*run(operator.neg, [(5,)]), survived(operator.neg, 7), os.environ.get("PYTHONSAFEPATH"))
"""
    (tmp_path / "in").mkdir()
    script = tmp_path / "in" / "script.py"
    script.write_text(program)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "-5 -7 None\n", done.stderr


def _number_after_a_while() -> int:
    time.sleep(0.2)  # so that every worker gets something to do
    return worker_number()


@pytest.mark.timeout(120)
def test_a_dead_worker_is_reported(config: PrepareConfig, tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"a worker process died.*run again to go on"),
        workers(2, None, cpus=1, gpu=False) as run,
    ):
        list(run(os._exit, [(1,)]))


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


def test_what_files_say_of_their_pictures_is_reported(config: PrepareConfig, tmp_path: Path) -> None:
    write_video(tmp_path / "v" / "square.mp4", numbered(20, 96, 96))
    write_video(tmp_path / "v" / "fits.mp4", numbered(20, 96, 40))
    more = {"source": [str(tmp_path / "v")], "buckets": ["96x32x3@24"], "captions": "stem", "encode": False}
    chosen = replace(config, output=str(tmp_path / "set"), **more)
    assert prepare_command(chosen)["remarks"] == {"cropped": 1}
    assert prepare_command(chosen)["remarks"] == {"cropped": 1}, "a complete set still knows"


def test_captions_whose_end_is_not_read_are_counted(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As large encoders cut them; the one of the embedded model refuses such captions."""
    monkeypatch.setattr(WordTextEncoder, "unread", lambda _, prompt, limit: "and more" if "long" in prompt else "")

    def says(_: WordTextEncoder, prompt: str, limit: int) -> None:
        for name in ("text", "pretrained_text"):
            logging.getLogger(f"pavdm_dist.codecs.{name}").warning("of one prompt: %s", prompt)

    monkeypatch.setattr(WordTextEncoder, "check", says)
    for name in ("long one", "long two", "short"):
        write_video(tmp_path / "v" / f"{name}.mp4", numbered(20, 96, 96))
    more = {"source": [str(tmp_path / "v")], "buckets": ["96x96x3@24"], "captions": "stem", "encode": False}
    report = prepare_command(replace(config, output=str(tmp_path / "set"), **more))
    assert report["remarks"] == {"caption cut": 2}
    assert "have captions that are longer than the text encoder takes: their ends are not read" in caplog.text
    assert "of one prompt" not in caplog.text


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


def test_the_command_line(source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"model: {model}\nbuckets: [32x48x3@24]\nencode: false\n")
    assert cli.main(["data", "prepare", str(source), str(file), "shard_clips=4", "--print-config"]) == 0
    assert f"source:\n- {source}\n" in (shown := capsys.readouterr().out) and "shard_clips: 4" in shown
    smile = source.rename(source.with_name("😀 videos"))  # beyond the basic plane
    try:
        assert cli.main(["data", "prepare", str(smile), str(file), f"output={tmp_path / 'set'}"]) == 0
    finally:
        smile.rename(source)
    assert "32x48x3@24  8" in capsys.readouterr().out
    for words in (["x", "processes=0"], [], ["a.yaml", "b.yaml"], ["x", "bucket=[]"]):
        assert cli.main(["data", "prepare", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def _scanned_then_replaced(config: PrepareConfig, source: Path, tmp_path: Path) -> PrepareConfig:
    """A run that was ended behind its scan, one of whose videos then changed without changing its size."""
    shutil.copytree(source, tmp_path / "videos")
    settings = replace(config, source=[str(tmp_path / "videos")], output=str(tmp_path / "set"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_command(settings)
    video = tmp_path / "videos" / "b.mp4"
    size = video.stat().st_size
    write_video(video, numbered(20), 24)
    os.truncate(video, size)  # zeros behind the last box are legal
    return settings
