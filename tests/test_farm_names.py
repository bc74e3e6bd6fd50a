"""Lines of manifests in which two names of the same, or one name twice, say different things: it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pavdm_dist.farm.manifest import ManifestError, checked
from pavdm_dist.farm.shot import Shot

SAME = "are names of the same; give one of them"


def _refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ManifestError) as refused:
        list(checked(str(path)))
    assert "1 line(s) cannot be used" in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"path": "a.mp4", "video": "b.mp4"}, f"video=b.mp4 and path=a.mp4: {SAME}"),
        ({"path": "a.mp4", "ref": "b.mp4"}, f"path=a.mp4 and ref=b.mp4: {SAME}"),
        ({"image": "a.png", "ref": "b.png"}, f"image=a.png and ref=b.png: {SAME}"),
        ({"path": "a.mp4", "image": "b.png"}, "a shot begins with one of them"),
        ({"body": {"prompt": "b"}}, f"prompt=a and body.prompt=b: {SAME}"),
        ({"body": {"video": "a.mp4", "input_reference": "b.mp4"}}, f"video=a.mp4 and input_reference=b.mp4: {SAME}"),
        ({"body": {"path": "a.mp4", "input_reference": "b.mp4"}}, f"video=b.mp4 and path=a.mp4: {SAME}"),
    ],
)
def test_two_names_of_the_same_that_differ(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    text = json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "a", **line}) + "\n"
    refused = _refused(tmp_path / "m.jsonl", text)
    assert "line 2: " in refused and said in refused


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: prompt=a and prompt=b: is said twice; give one of them"),
        (
            "m.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "overrides": {"step": 1, "step": 2}}',
            "line 2: step=1 and step=2: is said twice; give one of them",
        ),
        ("m.csv", "id,prompt,prompt\nx,a,b\ny,c,d\n", "line 1: prompt: is the name of several columns; give one of"),
        ("m.tsv", "prompt\tid\t prompt\na\tx\tb\n", "line 1: prompt: is the name of several columns; give one of"),
        (
            "m.csv",
            'prompt,overrides\na,"{""step"": 1, ""step"": 2}"\n',
            "line 2: overrides: step=1 and step=2: is said twice",
        ),
        ("m.csv", "prompt,path,ref\na,a.mp4,b.mp4\n", f"line 2: path=a.mp4 and ref=b.mp4: {SAME}"),
    ],
)
def test_a_name_that_is_there_twice(tmp_path: Path, name: str, text: str, said: str) -> None:
    assert said in _refused(tmp_path / name, text)


NO_PATH = "must be text, the path of a clip or a picture"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            {"body": {"input_reference": {"image_url": "https://x/y.png"}}},
            f"image_url': 'https://x/y.png'}}: {NO_PATH}",
        ),
        ({"body": {"input_reference": ["clip.mp4"]}}, f"input_reference=['clip.mp4']: {NO_PATH}"),
        ({"path": ["clip.mp4"]}, f"path=['clip.mp4']: {NO_PATH}"),
        ({"body": {"ref": 5}}, f"ref=5: {NO_PATH}"),
        ({"ref": False}, f"ref=False: {NO_PATH}"),
        ({"input_reference": "clip.mp4"}, "no such field input_reference; the fields are id, prompt,"),
        ({"model": "sora-2"}, "no such field model; the fields are id, prompt,"),
        ({"resolution": "720p"}, "no such field resolution; the fields are id, prompt,"),
        ({"body": {"resolution": "720p"}}, "no such field resolution; the fields are id, prompt,"),
    ],
)
def test_what_is_asked_for_is_never_passed_over(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    refused = _refused(tmp_path / "m.jsonl", json.dumps({"prompt": "a", **line}))
    assert "line 1: " in refused and said in refused


def test_facts_of_tables_and_batch_lines_ask_for_nothing(tmp_path: Path) -> None:
    table, lines = tmp_path / "m.csv", tmp_path / "m.jsonl"
    table.write_text("id,text,path,resolution,aes,model\nx,a,b.mp4,720p,5.1,m\n")
    lines.write_text('{"id": "x", "body": {"model": "m", "prompt": "a", "path": "b.mp4", "input_reference": null}}')
    (first,), (second,) = checked(str(table)), checked(str(lines))
    assert first == second == Shot("x", "a", video=str(tmp_path / "b.mp4"))


def test_what_says_the_same_is_read(tmp_path: Path) -> None:
    lines = tmp_path / "m.jsonl"
    lines.write_text(
        '{"id": "x", "prompt": "a", "prompt": "a", "path": "b.mp4", "ref": "b.mp4", "video": "b.mp4", "image": null}\n'
        '{"id": "y", "prompt": "a", "model": "m", "body": {"model": "n", "prompt": "a", "id": null, "path": "b.mp4"}}\n'
    )
    table = tmp_path / "m.csv"
    table.write_text("id,prompt,path,ref,,\nx,a,b.mp4,b.mp4,,\n")  # as spreadsheets end a line
    first, second = checked(str(lines))
    (third,) = checked(str(table))
    assert [(shot.id, shot.prompt) for shot in (first, second, third)] == [("x", "a"), ("y", "a"), ("x", "a")]
    assert {shot.video for shot in (first, second, third)} == {str(tmp_path / "b.mp4")}
