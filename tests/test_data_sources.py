"""Folders, CSV and JSONL files of videos and captions; bucket texts and the choice of a bucket."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.data.buckets import Bucket, order_buckets, parse_buckets
from pavdm_dist.data.index import SourceVideo, locate, read_sources
from pavdm_dist.errors import ConfigError

SPEC = CodecSpec(16, 8)


def touch(folder: Path, **files: str | None) -> Path:
    """Empty videos ``name.mp4`` and their captions; None = no sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, caption in files.items():
        (folder / f"{name}.mp4").touch()
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def test_a_folder_is_searched_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path / "in", b="a blue  seven\n", a="ein rotes Ü")
    touch(tmp_path / "in" / "deep", c="three")
    (tmp_path / "in" / "notes.md").touch()
    found = read_sources([str(tmp_path / "in")])
    assert found.root == str(tmp_path / "in")
    assert found.videos == [
        SourceVideo("a.mp4", "ein rotes Ü"),
        SourceVideo("b.mp4", "a blue seven"),
        SourceVideo("deep/c.mp4", "three"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", 'path,caption\nv/a.mp4,"red, and blue"\nv/b.mp4,seven\n'),
        ("list.csv", '\ufeffvideo,prompt\r\nv/a.mp4,"red, and blue"\r\nv/b.mp4,seven\r\n'),
        ("list.csv", 'path,text,num_frames,height,width,fps\nv/a.mp4,"red, and blue",9,1,1,24\nv/b.mp4,seven,,,,\n'),
        ("list.jsonl", '{"path": "v/a.mp4", "caption": "red, and blue"}\n\n{"file": "v/b.mp4", "text": "seven"}\n'),
    ],
)
def test_index_files_name_videos_relative_to_themselves(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read_sources([str(tmp_path / name)])
    assert found.videos == [SourceVideo("v/a.mp4", "red, and blue"), SourceVideo("v/b.mp4", "seven")]
    assert locate(found.root, found.videos[0].path) == str(tmp_path / "v" / "a.mp4")


def test_several_sources_share_a_root_and_addresses_stay(tmp_path: Path) -> None:
    touch(tmp_path / "x", a="one")
    touch(tmp_path / "y", a="two")
    lines = [{"path": "s3://bucket/z.mp4", "caption": "far"}, {"path": "../y/a.mp4", "caption": "two"}]
    (tmp_path / "x" / "i.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_sources([str(tmp_path / "x"), str(tmp_path / "x" / "i.jsonl")])
    assert [video.path for video in found.videos] == ["a.mp4", "s3://bucket/z.mp4", "../y/a.mp4"]
    assert locate(found.root, "s3://bucket/z.mp4") == "s3://bucket/z.mp4"
    two = read_sources([str(tmp_path / "x"), str(tmp_path / "y")])
    assert [video.path for video in two.videos] == ["x/a.mp4", "y/a.mp4"]


def test_videos_without_captions(tmp_path: Path) -> None:
    folder = str(touch(tmp_path, red_three=" \n", seven="a seven", z=None))
    with pytest.raises(ConfigError, match=r"2 of 3 videos have no caption: .*red_three\.txt \(empty\).*z\.txt \(miss"):
        read_sources([folder])
    assert [video.caption for video in read_sources([folder], "stem").videos] == ["red_three", "a seven", "z"]
    assert [video.caption for video in read_sources([folder], "skip").videos] == [None, "a seven", None]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "path,title\nx.mp4,y\n", r"a\.csv:2: has no column caption or text or prompt; it has path, title"),
        ("a.csv", "path,caption\nx.mp4,y,z\n", r"a\.csv:2: has more fields than the header; quote commas"),
        ("a.csv", "path,caption\n", "names no video"),
        ("a.csv", 'path,caption\na.mp4,"a dog\nb.mp4,a cat\n', "not readable as csv"),
        ("a.csv", 'path,caption\na.mp4,"a dog\nb.mp4,a "big" cat\n', "not readable as csv"),
        ("a.jsonl", '{"path": "x.mp4", "caption": "\\ud83d"}\n', r"a\.jsonl:1': '\\ud83d' is not valid Unicode"),
        ("a.csv", "path,caption\n,seven\n", r"a\.csv:2: the path is empty"),
        ("a.csv", "path,caption\nx.mp4, \n", r"1 of 1 videos have no caption: .*a\.csv:2"),
        ("a.csv", "path,caption\nx.mp4,a\n./x.mp4,b\n", r"x\.mp4 is named twice, at .*a\.csv:2 and .*a\.csv:3"),
        ("a.jsonl", "{nope\n", r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: must be an object"),
        ("a.jsonl", '{"path": "x.mp4", "caption": 3}\n', r"a\.jsonl:1: caption=3: must be text"),
        ("a.parquet", "", r"must be a folder, a video \(.*\) or an index \(\.csv, \.jsonl\)"),
    ],
)
def test_bad_indexes_are_refused(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        read_sources([str(tmp_path / name)])


def test_sources_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source=\[\]: name a folder"):
        read_sources([])
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_sources([str(tmp_path / "gone")])
    with pytest.raises(ConfigError, match=r"holds no video \(\.avi"):
        read_sources([str(tmp_path)])
    (tmp_path / "latin.csv").write_bytes(b"path,caption\nx.mp4,\xe9\n")
    with pytest.raises(ConfigError, match="not readable as csv in UTF-8"):
        read_sources([str(tmp_path / "latin.csv")])


def test_linked_folders_are_searched_once_and_dangling_links_are_reported_later(tmp_path: Path) -> None:
    touch(tmp_path / "disk", b="two")
    touch(tmp_path / "in", a="one", gone="three")
    (tmp_path / "in" / "gone.mp4").unlink()
    (tmp_path / "in" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "in" / "part").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "round").symlink_to(tmp_path / "in")
    found = read_sources([str(tmp_path / "in")])
    assert [(video.path, video.caption) for video in found.videos] == [
        ("a.mp4", "one"),
        ("gone.mp4", "three"),
        ("part/b.mp4", "two"),
    ]


def test_a_linked_source_folder_leads_to_the_videos(tmp_path: Path) -> None:
    touch(tmp_path / "raw", a="one")
    (tmp_path / "far" / "off").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "off")
    (tmp_path / "link" / "list.csv").write_text(f"path,caption\n{tmp_path / 'raw' / 'a.mp4'},one\n")
    found = read_sources([str(tmp_path / "link" / "list.csv")])
    assert Path(locate(found.root, found.videos[0].path)).exists()


def test_a_byte_order_mark_is_no_caption(tmp_path: Path) -> None:
    touch(tmp_path, a="\ufeff", b="\ufeffa seven")
    assert [video.caption for video in read_sources([str(tmp_path)], "skip").videos] == [None, "a seven"]


def test_names_that_are_no_unicode_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, a="one")
    (tmp_path / "a.mp4").rename(tmp_path / os.fsdecode(b"caf\xe9.mp4"))
    with pytest.raises(ConfigError, match=r"caf.udce9\.mp4' is not valid Unicode; rename it"):
        read_sources([str(tmp_path)], "stem")


def test_bucket_texts() -> None:
    assert parse_buckets(["240x424x35@24", "64x64x1", "64x64x9@29.97"], 16, SPEC) == [
        Bucket(240, 424, 35, 24.0), Bucket(64, 64, 1, 16.0), Bucket(64, 64, 9, 29.97),
    ]  # fmt: skip
    bucket = Bucket(64, 96, 3, 29.97)
    assert Bucket.parse(str(bucket)) == bucket
    assert (bucket.num_frames(SPEC), bucket.seconds(SPEC)) == (9, 9 / bucket.rate)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([], r"buckets=\[\]: at least one"),
        (["64x64"], "bucket '64x64': write HEIGHTxWIDTHxLATENTS@FPS, such as 240x424x35@24"),
        (["64x-8x3@24"], "write HEIGHTxWIDTH"),
        (["64x60x3@24"], "bucket 64x60x3@24: width=60 cannot be divided by 8.*nearest legal: 56 or 64"),
        (["64x64x0@24"], "must have at least 1 latent; nearest legal: 64x64x1@24"),
        (["64x64x3@0"], "bucket 64x64x3@0: fps=0.0: must be between 0.001 and 1000"),
        (["64x64x3@24", "64x64x3"], "bucket 64x64x3@24 is given twice"),
    ],
)
def test_bad_buckets_are_refused(texts: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_buckets(texts, 24, SPEC)


def test_the_closest_aspect_decides_then_the_length_then_the_size() -> None:
    texts = ["64x112x9", "64x112x3", "112x64x20", "128x224x9", "720x1280x3"]
    buckets = parse_buckets(texts, 24, SPEC)

    def chosen(height: int, width: int, upscale: bool = False) -> list[str]:
        return [texts[i] for i in order_buckets(buckets, height, width, upscale, SPEC)]

    assert chosen(270, 480) == ["128x224x9", "64x112x9", "64x112x3"]
    assert chosen(480, 270) == ["112x64x20"]
    assert chosen(100, 180) == ["64x112x9", "64x112x3"]
    assert chosen(100, 180, upscale=True) == ["128x224x9", "64x112x9", "720x1280x3", "64x112x3"]
    assert chosen(48, 64) == []


def test_what_other_systems_leave_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path / "in", a="one")
    (tmp_path / "in" / "._a.mp4").write_bytes(bytes(4096))  # what a Mac leaves beside a.mp4 on a share
    (tmp_path / "in" / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xb0\xff")
    folders = (
        ".Trash-0", "@eaDir/a.mp4", "#recycle", "$RECYCLE.BIN", "$Recycle.Bin", "RECYCLER", "Recycled", "__MACOSX",
        "Network Trash Folder", "Temporary Items", "lost+found", "deep/.snapshot",
    )  # fmt: skip
    for folder in folders:
        touch(tmp_path / "in" / folder, old=None)
    with caplog.at_level("INFO"):
        assert read_sources([str(tmp_path / "in")]).videos == [SourceVideo("a.mp4", "one")]
    assert "13 hidden files and folders are passed over, such as" in caplog.text
    (tmp_path / "in" / "a.mp4").unlink()
    with pytest.raises(ConfigError, match=r"holds no video \(\.avi.*\); 13 hidden files and folders are passed over"):
        read_sources([str(tmp_path / "in")])
    # Whoever names one means it.
    touch(tmp_path / ".hidden", b="two")
    assert len(read_sources([str(tmp_path / ".hidden")]).videos) == 1
    (tmp_path / "i.jsonl").write_text('{"path": ".hidden/b.mp4", "caption": "two"}\n')
    assert read_sources([str(tmp_path / "i.jsonl")]).videos == [SourceVideo(".hidden/b.mp4", "two")]


@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_may_be_apart_or_together(tmp_path: Path, on_disk: str, written: str) -> None:
    name = unicodedata.normalize(on_disk, "Fräulein.mp4")
    (tmp_path / name).touch()
    path = unicodedata.normalize(written, name)
    (tmp_path / "i.jsonl").write_text(json.dumps({"path": path, "caption": "a"}), encoding="utf-8")
    found = read_sources([str(tmp_path / "i.jsonl")])
    assert os.path.exists(locate(found.root, found.videos[0].path))
