"""A manifest that others write to: what of it is taken in, and what a farm's folder keeps of it."""

from __future__ import annotations

import json
import logging
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pavdm_dist.farm.intake import Intake
from pavdm_dist.farm.manifest import ManifestError
from pavdm_dist.farm.tree import Tree


def _intake(manifest: Path, out: Path) -> Intake:
    kinds: Any = SimpleNamespace(check=lambda _: None, frames=lambda _: 1)
    return Intake(str(manifest), Tree(str(out)), kinds)


def _append(path: Path, text: str) -> None:
    before = path.stat().st_mtime_ns if path.exists() else 0
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
    os.utime(path, ns=(before + 10**9, before + 10**9))  # of two writes in one tick of the clock


def _prompts(found: Any) -> list[str]:
    return [] if found is None else [shot.prompt for shot in found.left]


@pytest.mark.parametrize(
    ("name", "begin", "line", "prompt"),
    [
        ("m.txt", "one\n", "a red three drifting", "a red three drifting"),
        ("m.csv", "id,prompt\nx,one\n", "y,a red three", "a red three"),
        ("m.tsv", "id\tprompt\nx\tone\n", 'y\t"a red\nthree"', "a red\nthree"),
        ("m.jsonl", '{"prompt": "one"}\n', '{"prompt": "a red three"}', "a red three"),
    ],
)
def test_a_line_counts_from_its_line_break_on(tmp_path: Path, name: str, begin: str, line: str, prompt: str) -> None:
    path, tree = tmp_path / name, Tree(str(tmp_path / "out"))
    _append(path, begin)
    intake = _intake(path, tmp_path / "out")
    assert _prompts(intake.first()) == ["one"]
    half = len(line) * 2 // 3
    _append(path, line[:half])
    if "\n" in line[:half]:  # a text in quotes that goes over it: no line of a table yet
        with pytest.raises(ManifestError, match="is no line of a table: unexpected end of data"):
            intake.more()
    else:
        assert _prompts(intake.more()) == []
    _append(path, line[half:])
    assert _prompts(intake.more()) == [] and len(list(tree.shots())) == 1
    _append(path, "\n")
    assert _prompts(intake.more()) == [prompt]
    assert [shot.prompt for shot in tree.shots()] == ["one", prompt]


def test_a_last_line_that_was_there_at_the_start_needs_no_line_break(tmp_path: Path) -> None:
    path, tree = tmp_path / "m.txt", Tree(str(tmp_path / "out"))
    _append(path, "one\ntwo")
    intake = _intake(path, tmp_path / "out")
    assert _prompts(intake.first()) == ["one", "two"]
    _append(path, "")
    assert intake.more() is None
    assert [shot.prompt for shot in tree.shots()] == ["one", "two"], "it is still kept"
    _append(path, "\nthree\n")
    assert _prompts(intake.more()) == ["three"]


def test_a_manifest_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    path, tree = tmp_path / ("ä" * 124 + ".jsonl"), Tree(str(tmp_path / "out"))
    other = tmp_path / ("m" * 249 + ".jsonl")
    for number, one in enumerate((path, other)):
        _append(one, f'{{"prompt": "{number}"}}\n')
        assert _prompts(_intake(one, tmp_path / "out").first()) == [str(number)]
    assert sorted(shot.prompt for shot in tree.shots()) == ["0", "1"]


def test_manifests_of_one_path_on_several_machines_do_not_replace_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tree = tmp_path / "m.txt", Tree(str(tmp_path / "out"))

    def run(machine: str, lines: str) -> list[str]:
        """A farm on that machine; what the folder then keeps."""
        monkeypatch.setattr("pavdm_dist.io.processes.machine", lambda: machine)
        path.write_text(lines)
        _intake(path, tmp_path / "out").first()
        return [shot.prompt for shot in tree.shots()]

    def copies() -> int:
        return len(list((tmp_path / "out/manifests").glob("m-*.jsonl")))

    assert run("one", "a\nb\n") == ["a", "b"]
    assert run("one", "c\n") == ["c"], "rewritten where it was"
    assert sorted(run("two", "d\ne\n")) == ["c", "d", "e"] and copies() == 2
    # A share, or a container of another name: the same file, whatever has been added or taken out.
    assert sorted(run("three", "e\nf\n")) == ["c", "e", "f"] and copies() == 2
    assert sorted(run("one", "c\ng\n")) == ["c", "e", "f", "g"] and copies() == 2


def test_a_line_that_changes_while_it_is_rendered_is_told_of_and_kept_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, tree = tmp_path / "m.csv", Tree(str(tmp_path / "out"))
    _append(path, "id,prompt\nx,a red\ny,one\n")
    intake = _intake(path, tmp_path / "out")
    assert _prompts(intake.first()) == ["a red", "one"]
    path.write_text("id,prompt\nx,a red three\ny,one\nz,two\n")
    with caplog.at_level(logging.WARNING, "pavdm_dist"):
        assert _prompts(intake.more()) == ["two"]
    (said,) = caplog.messages
    assert f"manifest={path}: id=x: changed after it was taken in" in said
    assert [json.loads(shot.to_line())["prompt"] for shot in tree.shots()] == ["a red", "one", "two"]


def test_of_a_long_manifest_ids_are_held_and_shots_while_they_wait(tmp_path: Path) -> None:
    """Bytes a shot: what a hundred thousand of them are told to take."""

    def held(lines: int) -> tuple[int, int]:
        path = tmp_path / f"{lines}.jsonl"
        path.write_text("".join(f'{{"id": "shot-{i:06d}", "prompt": "a red three {i}"}}\n' for i in range(lines)))
        intake = _intake(path, tmp_path / f"{lines}")
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        found = intake.first()
        waiting = tracemalloc.get_traced_memory()[0] - before
        found.left.clear()
        taken = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        return waiting, taken

    held(100)  # Python keeps some of what it uses first
    (few_wait, few), (many_wait, many) = held(200), held(1000)
    assert (many_wait - few_wait) / 800 < 700 and (many - few) / 800 < 200
