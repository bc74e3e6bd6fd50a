"""What is made of a finished farm's folder: a page that holds all it shows, and folders as VBench looks for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from farms import finished_tree

from pavdm_dist import cli
from pavdm_dist.engine.order import Unit
from pavdm_dist.engine.spans import RunReport, Span
from pavdm_dist.engine.trace import write_trace
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.farm.report import _pictures, write_report
from pavdm_dist.farm.status import status_report
from pavdm_dist.farm.traces import keep_shots, shot_times, trace_path
from pavdm_dist.farm.tree import Failure
from pavdm_dist.farm.vbench import export_vbench
from pavdm_dist.io.encode import EncoderOptions, export_to_video

THREE, SEVEN = "a red three", "a blue seven, drifting"


class _Page(HTMLParser):
    """Every address that a page asks for, every tag, and what is to be read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_and_prompts_are_text_in_it(tmp_path: Path) -> None:
    hostile = '<script>alert(1)</script> & "three"'
    tree = finished_tree(tmp_path, [{"id": "a", "prompt": hostile}, {"id": "b", "prompt": SEVEN, "tags": ["reel-1"]}])
    tree.keep("more.jsonl", [*tree.shots_of("shots.jsonl")])
    Path(tree.folder("b"), "video.json").unlink()
    tree.fail(
        "b", Failure("picture.png: is no <picture>", "input", log=("12:00:00 INFO begun", "12:00:01 WARNING <b>"))
    )
    report = write_report(str(tmp_path))
    assert (report["complete"], report["failed"]) == (1, 1)
    page = _Page((tmp_path / "index.html").read_text())
    assert "script" not in page.tags and "b" not in page.tags
    assert hostile in page.text and "picture.png: is no <picture>" in page.text and "WARNING <b>" in page.text
    videos = [asked for asked in page.asked if not asked.startswith("data:")]
    assert videos == ["shots/a/video.mp4"] and (tmp_path / videos[0]).exists()
    assert len([asked for asked in page.asked if asked.startswith("data:image/jpeg;base64,")]) == 1
    assert page.tags.count("svg") == 1 and "1 of 2 shots complete, 1 failed" in page.text
    with pytest.raises(ConfigError, match="is no folder of a farm"):
        write_report(str(tmp_path / "none"))


def test_shots_that_were_traced_have_a_chart_of_their_stages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two stages, three videos of one renderer, of which the first two are shots here; a damaged trace beside it."""
    tree = finished_tree(tmp_path, [{"id": id, "prompt": SEVEN} for id in ("a", "b", "untraced")])
    path = trace_path(tree, "renderer-1")

    def spans(rank: int) -> list[Span]:
        starts = [(stream, 10.0 * stream + 2 * row + rank) for stream in range(3) for row in range(3)]
        return [
            Span(Unit(order, stream, 0, 0, True, True, (), False, False), start, start, start + 1.5)
            for order, (stream, start) in enumerate(starts)
        ]

    write_trace(path, [RunReport(0.0, trace=spans(rank)) for rank in range(2)])
    keep_shots(path, {0: "a", 1: "b"})
    Path(trace_path(tree, "renderer-2")).write_text("{")
    keep_shots(trace_path(tree, "renderer-2"), {0: "untraced"})
    times = shot_times(tree)
    assert times["a"] == times["b"] == [[(0.0, 1.5), (2.0, 3.5), (4.0, 5.5)], [(1.0, 2.5), (3.0, 4.5), (5.0, 6.5)]]
    assert times.keys() == {"a", "b"} and "renderer-2" in caplog.text
    write_report(str(tmp_path))
    text = (tmp_path / "index.html").read_text()
    page = _Page(text)
    assert text.count('aria-label="when each stage computed"') == 2
    assert page.text.count("6.5 s; busy with this shot: stage 0 69%, stage 1 69%") == 2
    # 260 pixels are 6.5 seconds; of the second stage the first bar begins a second later, in a row below.
    assert "M0 0h60v10H0z" in text and "M40 12h60v10H40z" in text


class _Counting:
    """A container that counts what of it is decoded."""

    def __init__(self, container: Any, decoded: list[int]) -> None:
        self._container, self._frames = container, decoded

    def __enter__(self) -> Any:
        self._container.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._container.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def decode(self, stream: Any) -> Iterator[Any]:
        for frame in self._container.decode(stream):
            self._frames.append(frame.pts)
            yield frame


@pytest.mark.parametrize(("length", "most"), [(241, 6 * 24), (30, 30), (3, 3), (1, 1)])
def test_a_contact_sheet_decodes_what_lies_behind_key_frames_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, most: int
) -> None:
    import av

    path = tmp_path / "video.mp4"
    shades = (np.full((32, 48, 3), 255 * number // length, dtype=np.uint8) for number in range(length))
    export_to_video(shades, path, 24, EncoderOptions(preset="fast", keyframe_seconds=1.0))
    wanted = [round(index * (length - 1) / 5) for index in range(6)]
    with av.open(path) as container:
        every = [frame.to_image().resize((108, 72)) for frame in container.decode(video=0)]
    decoded: list[int] = []
    with monkeypatch.context() as patch:
        opened = av.open
        patch.setattr(av, "open", lambda name: _Counting(opened(name), decoded))
        pictures = list(_pictures(str(path), length))
    assert len(every) == length
    assert [one.tobytes() for one in pictures] == [every[number].tobytes() for number in sorted(set(wanted))]
    assert len(decoded) <= most
    # A sidecar that tells of more than there is: what there is, is shown.
    assert len(list(_pictures(str(path), 10 * length))) == 1


def test_status_and_report_take_sidecars_of_others_for_what_they_are(tmp_path: Path) -> None:
    tree = finished_tree(tmp_path, [{"id": id, "prompt": THREE} for id in "abcd"])
    for id, changed in (("a", {"created": None}), ("b", {"fps": 0}), ("c", {"num_frames": "many"})):
        path = Path(tree.folder(id), "video.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    report = status_report(str(tmp_path))
    assert (report["done"], report["seconds_of_video"]) == (4, 0.75), "two have length and rate: nine frames at 24"
    assert write_report(str(tmp_path))["complete"] == 2
    assert tree.sidecar("a") is not None and tree.sidecar("b") is None is tree.sidecar("c")


@pytest.mark.parametrize(
    "changed",
    [
        {"chunk_seconds": [None, 0.5]},
        {"chunk_seconds": [0.5, "long"]},
        {"chunk_seconds": [-1.0]},
        {"chunk_seconds": [float("inf")]},
        {"chunk_seconds": {"0": 0.5}},
        {"chunk_seconds": "0.5"},
        {"num_frames": float("inf")},
        {"num_frames": 10**400},
        {"config": [2]},
        {"versions": 3},
    ],
    ids=str,
)
def test_a_damaged_sidecar_is_told_of_and_left_out_of_the_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, Any]
) -> None:
    tree = finished_tree(tmp_path, [{"id": id, "prompt": THREE} for id in "abc"])
    sidecars = [Path(tree.folder(id), "video.json") for id in "abc"]
    for path, facts in zip(sidecars, (changed, {"config": {"num_stages": "two"}, "chunk_seconds": None}), strict=False):
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    assert write_report(str(tmp_path))["complete"] == 2
    (said,) = caplog.messages
    assert said == f"{sidecars[0]}: is none of this program's, or damaged; left out"
    page = (tmp_path / "index.html").read_text()
    assert "shots/a/" not in page and "shots/b/" in page and "shots/c/" in page


def test_vbench_finds_prompts_and_numbers_in_names_and_nothing_else(tmp_path: Path) -> None:
    shots = [{"id": f"{name}{i}", "prompt": prompt} for i in range(2) for name, prompt in (("t", THREE), ("s", SEVEN))]
    tree = finished_tree(tmp_path / "farm", shots)
    Path(tree.folder("s1"), "video.json").unlink()  # not finished
    report = export_vbench(str(tmp_path / "farm"), str(tmp_path / "v"))
    assert (report["videos"], report["prompts"], report["samples"]) == (3, 2, [1, 2])
    names = sorted(path.name for path in (tmp_path / "v").iterdir())
    assert names == [f"{SEVEN}-0.mp4", f"{THREE}-0.mp4", f"{THREE}-1.mp4"]
    assert (tmp_path / "v" / names[1]).samefile(tree.output("t0")) and (tmp_path / "v" / names[2]).samefile(
        tree.output("t1")
    )
    samples = json.loads((tmp_path / "v.samples.json").read_text())
    assert samples[names[2]] == {"id": "t1", "prompt": THREE, "seed": 102}
    with pytest.raises(ConfigError, match=r"v exists; name a new folder"):
        export_vbench(str(tmp_path / "farm"), str(tmp_path / "v"))


def test_complete_shots_are_told_by_the_prompt_that_they_were_made_with(tmp_path: Path) -> None:
    """Two begin with a timed prompt, one is asked for with another prompt by now, of one the sidecar has none."""
    timed = {"overrides": {"timed_prompts": {"2s": SEVEN, "0s": THREE}}}
    shots = [{"id": "a", **timed}, {"id": "b", **timed}, {"id": "c", "prompt": THREE}, {"id": "d", "prompt": "nine"}]
    tree = finished_tree(tmp_path / "farm", [*shots, {"id": "lost", **timed}])
    for id, prompt in (("a", THREE), ("b", THREE), ("c", SEVEN), ("d", None)):
        path = Path(tree.folder(id), "video.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "prompt": prompt}))
    Path(tree.folder("lost"), "video.json").unlink()
    tree.fail("lost", Failure("no frame is finite"))
    report = export_vbench(tree.root, str(tmp_path / "v"))
    assert (report["form"], report["prompts"], report["samples"]) == ("standard", 3, [1, 2])
    names = {f"{THREE}-0.mp4": THREE, f"{THREE}-1.mp4": THREE, f"{SEVEN}-0.mp4": SEVEN, "nine-0.mp4": "nine"}
    assert {path.name for path in (tmp_path / "v").iterdir()} == names.keys()
    samples = json.loads((tmp_path / "v.samples.json").read_text())
    assert {name: sample["prompt"] for name, sample in samples.items()} == names
    assert [sample["id"] for sample in samples.values()] == ["a", "b", "c", "d"]
    export_vbench(tree.root, str(tmp_path / "numbers"), "custom")
    assert list(json.loads((tmp_path / "numbers.prompts.json").read_text()).values()) == [THREE, THREE, SEVEN, "nine"]
    write_report(tree.root)
    page = (tmp_path / "farm/index.html").read_text()
    shown = re.findall('<p class="prompt">(.*)</p>', page)
    assert shown == [THREE, THREE, THREE, SEVEN, "nine"], "the failed one first"


def test_prompts_that_are_no_names_become_numbers_which_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = finished_tree(tmp_path / "farm", [{"id": "a", "prompt": "ä" * 130}, {"id": "b", "prompt": THREE}])
    words = ["export", "vbench", str(tmp_path / "farm"), "--out", str(tmp_path / "v"), "--json"]
    assert cli.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["form"] == "custom" and "the prompt of a is longer than a name of 255 bytes" in report["note"]
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == ["00000.mp4", "00001.mp4"]
    assert json.loads((tmp_path / "v.prompts.json").read_text()) == {"00000.mp4": "ä" * 130, "00001.mp4": THREE}
    assert tree.sidecar("a") is not None


def test_what_cannot_be_made_for_vbench_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    tags = ["dimension:" + "x" * 300]
    good = finished_tree(tmp_path / "good", [{"id": "a", "prompt": THREE, "tags": ["dimension:Camera"]}])
    finished_tree(tmp_path / "long", [{"id": "a", "prompt": THREE, "tags": tags}])
    cases = [
        ("good", tmp_path / "file/x", r"out=\S+/file/x: cannot be made \(\S+: Not a directory\)"),
        (
            "good",
            Path("/proc/nope/x"),
            r"out=/proc/nope/x: cannot be made \(/proc/nope\S*: No such file or directory\)",
        ),
        ("good", tmp_path / ("y" * 300), r"out=\S+/y+: cannot be made \(\S+: File name too long\)"),
        (
            "long",
            tmp_path / "v",
            r"id=a: tag dimension:x+\.\.\.: 300 bytes are too long for the name of a folder; use at",
        ),
    ]
    for farm, out, said in cases:
        words = ["export", "vbench", str(tmp_path / farm), "--out", str(out), "--dimensions"]
        assert cli.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(f"pavdm: {said}", line), line
    Path(good.output("a")).unlink()
    with pytest.raises(MediaError, match=r"out=\S+/v: cannot be made \(\S+/a/video.mp4: No such file or directory\)"):
        export_vbench(good.root, str(tmp_path / "v"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "good", "long"]


def test_a_dimension_that_is_named_twice_is_one(tmp_path: Path) -> None:
    finished_tree(tmp_path / "farm", [{"id": "a", "prompt": THREE, "tags": ["dimension:x", "dimension:x"]}])
    report = export_vbench(str(tmp_path / "farm"), str(tmp_path / "v"), by_dimension=True)
    assert (report["videos"], report["samples"]) == (1, [1, 1])
    assert [path.name for path in (tmp_path / "v/x").iterdir()] == [f"{THREE}-0.mp4"]


def test_vbench2_has_a_folder_for_each_dimension_and_cuts_prompts(tmp_path: Path) -> None:
    long = "x" * 300
    shots = [
        {"id": "a", "prompt": long, "tags": ["dimension:Diversity", "dimension:Camera"]},
        {"id": "b", "prompt": long, "tags": ["dimension:Diversity"]},
        {"id": "c", "prompt": THREE},
    ]
    finished_tree(tmp_path / "farm", shots)
    export_vbench(str(tmp_path / "farm"), str(tmp_path / "v"), "vbench2")
    found = sorted(path.relative_to(tmp_path / "v").as_posix() for path in (tmp_path / "v").rglob("*.mp4"))
    assert found == [f"Camera/{'x' * 180}-0.mp4", f"Diversity/{'x' * 180}-0.mp4", f"Diversity/{'x' * 180}-1.mp4"]
    tags = ["dimension:D"]
    alike = [{"id": "a", "prompt": long, "tags": tags}, {"id": "b", "prompt": long + "y", "tags": tags}]
    finished_tree(tmp_path / "alike", alike)
    with pytest.raises(ConfigError, match="prompts that differ behind 180 characters only; use --custom"):
        export_vbench(str(tmp_path / "alike"), str(tmp_path / "w"), "vbench2")
    finished_tree(tmp_path / "bad", [{"id": "a", "prompt": THREE, "tags": ["dimension:../x"]}])
    with pytest.raises(ConfigError, match=re.escape("tag dimension:../x: is no name of a folder")):
        export_vbench(str(tmp_path / "bad"), str(tmp_path / "x"), "vbench2")
