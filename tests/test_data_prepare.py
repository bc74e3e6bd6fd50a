"""`pavdm data prepare`: what comes out, that it is the same however it was made, and settings that are refused."""

from __future__ import annotations

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
from prepared_sets import BUCKETS, contents, write_source
from safetensors.torch import save_file
from videos import numbered, shipped_videos, write_video

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.commands.train import dry_run_command
from pavdm_dist.data import prepare as prepare_module
from pavdm_dist.data.dataset import CachedClips, PixelClips
from pavdm_dist.data.index import read_sources
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.data.settled import without
from pavdm_dist.data.shards import open_shard
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def config(source: Path, model: Path) -> PrepareConfig:
    return PrepareConfig([str(source)], "unset", str(model), BUCKETS, shard_clips=2)


@pytest.fixture(scope="module")
def plain(config: PrepareConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The data set that one process makes in one go, and its report."""
    output = tmp_path_factory.mktemp("plain") / "set"
    return output, prepare_command(replace(config, output=str(output)))


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


def test_gpus_that_stay_idle_are_told_of(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def enough(_: Path) -> Any:
        raise ConfigError("all is checked")

    monkeypatch.setattr(prepare_module, "_locked", enough)
    all_of_them = "2 GPUs of this machine stay idle: device=cpu encodes videos on CPUs"
    one = "1 of 2 GPUs of this machine stay idle: processes=1 use one each; processes=2 use all"
    cases: list[tuple[int, dict[str, Any], str | None]] = [
        (0, {}, None),
        (2, {}, all_of_them),
        (2, {"device": "cuda", "processes": 2}, None),
        (2, {"device": "cuda", "processes": 1}, one),
        (2, {"encode": False}, None),
        (2, {"ray_address": "auto"}, None),
    ]
    for count, changes, told in cases:
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        caplog.clear()
        with pytest.raises(ConfigError, match="all is checked"):
            prepare_command(replace(config, output=str(tmp_path / "out"), **changes))
        said = [record.getMessage() for record in caplog.records if "stay idle" in record.getMessage()]
        assert len(said) == (told is not None) and all(line.startswith(told or "") for line in said)


def test_latents_of_another_model_are_refused(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.folder=.* was prepared with codec .*, model=.*embedded has .*: prepare it again"
    ):
        CachedClips(plain[0], Checkpoint.open())
    with pytest.raises(ConfigError, match="holds no data set"):
        CachedClips(tmp_path)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not complete: run `pavdm data prepare` again"):
        CachedClips(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 9}')
    with pytest.raises(ConfigError, match="has format version 9, this package reads 1"):
        CachedClips(tmp_path)


def test_what_is_no_data_set_is_one_sentence(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    file, whole = tmp_path / "file", json.loads((plain[0] / "index.json").read_text())
    file.write_text("no folder")
    dry = ["data.model=embedded", "model.caption_channels=96", f"data.folder={file}"]
    for setting, read in (
        ("data.folder", lambda: CachedClips(file)),
        ("data.folder", lambda: dry_run_command(load_config(TrainConfig, None, dry))),
        ("besides", lambda: without(read_sources([whole["root"]], "stem"), [str(file)])),
    ):
        said = rf"^{setting}={file} cannot be read \(Not a directory\): name a folder of"
        with pytest.raises(ConfigError, match=said):
            read()
    for lost in ("root", "buckets", "identities", "shard_clips", "skipped"):
        (tmp_path / "index.json").write_text(json.dumps({name: whole[name] for name in whole if name != lost}))
        with pytest.raises(ConfigError, match=rf"index\.json is damaged, it lacks {lost}: run `pavdm data prepare`"):
            CachedClips(tmp_path)
    del whole["buckets"][1]["clips"]
    (tmp_path / "index.json").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=r"index\.json is damaged, it lacks buckets\[1\]\.clips"):
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


def test_a_shard_that_is_not_of_its_place_is_named_and_made_again(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, tmp_path: Path
) -> None:
    """By its header alone: its tensors have the right shapes."""
    shutil.copytree(plain[0], tmp_path / "set")
    shard = tmp_path / "set" / "bucket-0-00001.safetensors"
    with open_shard(shard) as reader:
        tensors = {name: reader.get_tensor(name) for name in ("latents", "text", "text_mask")}
        header = json.loads(reader.metadata()["pavdm"])
    elsewhere = [{**clip, "video": "elsewhere.mp4"} for clip in header["clips"]]
    cases = {
        r"was made with codec another, its data set with \w+": {**header, "codec": "another"},
        r"was made with bucket 16x16x2@8, its data set with 32x48x3@24": {**header, "bucket": "16x16x2@8"},
        r"holds other clips than clips-0\.jsonl lists there": {**header, "clips": elsewhere},
        r"has not the header of a shard": {"bucket": header["bucket"]},
    }
    for said, other in cases.items():
        save_file(tensors, shard, {"pavdm": json.dumps(other)})
        clips = CachedClips(tmp_path / "set")
        clips.load(0, [0, 1])
        with pytest.raises(MediaError, match=rf"bucket-0-00001\.safetensors {said}; delete it and run `pavdm data"):
            clips.load(0, [2])
    save_file(tensors, shard, {"pavdm": json.dumps({"clips": header["clips"]})})
    CachedClips(tmp_path / "set").load(0, [2])  # what a header does not say is not held against it
    shutil.copy(shard.with_stem("bucket-0-00000"), shard)
    with pytest.raises(MediaError, match="holds other clips"):
        CachedClips(tmp_path / "set").load(0, [3])
    shard.unlink()
    prepare_command(replace(config, output=str(tmp_path / "set")))
    assert contents(tmp_path / "set") == contents(plain[0]), "the advice helps"


def test_a_damaged_list_of_clips_is_named(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(plain[0], tmp_path / "set")
    listed = tmp_path / "set" / "clips-0.jsonl"
    lines = listed.read_text().splitlines(keepends=True)
    for left in ("\n", "{\n", "[1]\n", '{"first": 9}\n'):
        listed.write_text("".join([lines[0], left, *lines[2:]]))
        for read in (lambda clips: clips.load(0, [0]), lambda clips: clips.videos(0)):
            with pytest.raises(ConfigError, match=r"clips-0\.jsonl: line 2 is no clip .*: the data set is damaged"):
                read(CachedClips(tmp_path / "set"))
    listed.write_text("".join(lines[:3]))
    with pytest.raises(ConfigError, match=r"clips-0\.jsonl lists 3 clips, the index has 7: the data set is damaged"):
        CachedClips(tmp_path / "set")


@pytest.mark.parametrize("left", ["", '{"version": 1'])
def test_a_damaged_index_is_made_again(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, tmp_path: Path, left: str
) -> None:
    shutil.copytree(plain[0], tmp_path / "set")
    (tmp_path / "set" / "index.json").write_text(left)
    with pytest.raises(ConfigError, match=r"index\.json is not valid JSON"):
        CachedClips(tmp_path / "set")
    shards = {path: path.stat().st_ino for path in (tmp_path / "set").glob("*.safetensors")}
    again = replace(config, output=str(tmp_path / "set"))
    prepare_command(again)
    assert contents(tmp_path / "set") == contents(plain[0])
    assert shards and shards == {path: path.stat().st_ino for path in (tmp_path / "set").glob("*.safetensors")}
    # One that cannot be read for a moment is there all the same.
    whole = (tmp_path / "set" / "index.json").read_bytes()
    (tmp_path / "set" / "index.json").unlink()
    (tmp_path / "set" / "index.json").mkdir()
    with pytest.raises(MediaError, match=r"Is a directory: .*; run again to go on"):
        prepare_command(again)
    (tmp_path / "set" / "index.json").rmdir()
    (tmp_path / "set" / "index.json").write_bytes(whole)
    # Where the videos do not give what the shards hold, these would be clips of other names.
    listed = tmp_path / "set" / "clips-0.jsonl"
    listed.write_text(before := "".join(listed.read_text().splitlines(keepends=True)[1:]))
    (tmp_path / "set" / "index.json").unlink()
    with pytest.raises(ConfigError, match=r"output=.*set: its shards of \S+ hold other clips than the videos give now"):
        prepare_command(again)
    assert listed.read_text() == before


def test_videos_that_moved_are_found_where_they_are(
    plain: tuple[Path, dict[str, Any]], config: PrepareConfig, source: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain[0], tmp_path / "set")
    shutil.copytree(source, tmp_path / "moved")
    moved = replace(config, output=str(tmp_path / "set"), source=[str(tmp_path / "moved")])
    prepare_command(moved)
    assert json.loads((tmp_path / "set" / "index.json").read_text())["root"] == str(tmp_path / "moved")
    PixelClips(tmp_path / "set", Checkpoint.open(model).codec).load(2, [0])


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
