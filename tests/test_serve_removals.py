"""Files of videos that clients have deleted, whatever happens in between; without a model."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import Failure, Tree
from pavdm_dist.io import lock
from pavdm_dist.io.lock import Watch
from pavdm_dist.io.lockfile import Owner
from pavdm_dist.io.parts import parts_folder
from pavdm_dist.serve.asked import REQUEST, keep_time, manifest_name
from pavdm_dist.serve.removals import Removals

ID = "video_0123456789abcdef01234567"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """With one video of everything that there may be, and a farm's manifest beside."""
    tree = Tree(str(tmp_path))
    asked(tree, ID)
    folder = Path(tree.folder(ID))
    for name in ("input.png", "video.mp4", "video.json", "video.safetensors"):
        (folder / name).write_text("{}")
    tree.fail(ID, Failure("x"))
    parts = Path(parts_folder(tree.output(ID)))
    parts.mkdir()
    (parts / "segment-000000-000000.mp4").touch()
    tree.keep("farm.jsonl", [Shot("a", "a red three"), Shot("b", "a")])
    return tree


def asked(tree: Tree, id: str, at: float | None = None) -> None:
    keep_time(tree, id, int(time.time() if at is None else at))
    tree.keep(manifest_name(17, id), [Shot(id, "a secret prompt")])


def files(tree: Tree, id: str = ID) -> list[str]:
    return sorted(entry.name for entry in Path(tree.folder(id)).iterdir())


def manifests(tree: Tree) -> list[str]:
    return sorted(entry.name for entry in Path(tree.path("manifests")).iterdir())


def held(tree: Tree, id: str = ID) -> Path:
    """The lock of a process on another machine."""
    path = Path(parts_folder(tree.output(id))) / "lock.json"
    path.write_text(json.dumps(asdict(Owner("elsewhere", "another machine", 7, 1.0, "token"))))
    return path


def test_nothing_is_left_but_the_mark(tree: Tree) -> None:
    removals = Removals(tree)
    removals.mark(ID)
    assert removals.clear(ID) and files(tree) == ["cancel"] and manifests(tree) == ["farm.jsonl"]
    assert [shot.id for shot in tree.shots()] == ["a", "b"] and tree.state(ID).standing == "cancelled"
    assert removals.clear(ID) and removals.sweep() == []


def test_what_another_machine_writes_is_left_at_once_and_removed_later(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(*_: object) -> None:
        raise AssertionError("nobody may be waited for")

    monkeypatch.setattr(lock.time, "sleep", waits)
    removals, path = Removals(tree), held(tree)
    removals.mark(ID)
    assert not removals.clear(ID) and removals.sweep() == [] and "video.json" in files(tree)
    path.unlink()
    assert removals.sweep() == [ID] and files(tree) == ["cancel"] and removals.sweep() == []
    # One that gives no sign of life for long enough is gone.
    asked(tree, "other")
    Path(parts_folder(tree.output("other"))).mkdir()
    held(tree, "other")
    removals.mark("other")
    assert not removals.clear("other")
    now = lock.processes.now()
    monkeypatch.setattr(lock.processes, "now", lambda: now + lock.SILENCE_S + 1)
    assert removals.sweep() == ["other"] and files(tree, "other") == ["cancel"]


def test_what_a_killed_server_has_left_is_finished(tree: Tree) -> None:
    by_hand, lost, old, taken = (f"video_{name}" for name in ("hand", "lost", "old", "taken"))
    for id in (by_hand, lost, old, taken):
        asked(tree, id, at=time.time() - (0 if id == lost else 90_000))
    for id in (lost, old):  # killed between a request's first file and its manifest
        Path(tree.manifest(manifest_name(17, id))).unlink()
        (Path(tree.folder(id)) / "input.png").touch()
    Removals(tree).mark(ID)  # killed right behind it
    tree.mark(by_hand, "cancel")
    there = tree.scan()
    Removals(tree).finish(there, {shot.id: shot for shot in tree.shots()})
    assert files(tree) == ["cancel"]
    assert files(tree, by_hand) == ["cancel", REQUEST] and files(tree, taken) == [REQUEST]
    # One that another server may just be taking is not touched.
    assert files(tree, lost) == ["input.png", REQUEST] and not Path(tree.folder(old)).exists()
    assert manifests(tree) == sorted(["farm.jsonl", manifest_name(17, by_hand), manifest_name(17, taken)])


def test_a_share_that_is_away_is_tried_again(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    removals = Removals(tree)
    removals.mark(ID)

    def away(_: str) -> list[str]:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("pavdm_dist.serve.removals.list_names", away)
        assert not removals.clear(ID)
    assert removals.sweep() == [ID] and files(tree) == ["cancel"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("SlowDown")], ids=repr)
def test_a_mark_that_cannot_be_read_ends_nothing(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """Whoever renders the video asks, and a server that starts; stores have errors of kinds of their own."""
    removals = Removals(tree)
    removals.mark(ID)

    def away(_: str) -> object:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("pavdm_dist.serve.removals.open_read", away)
        assert not removals.is_deleted(ID) and str(error) in caplog.text
        removals.finish(tree.scan(), {})
    assert removals.is_deleted(ID) and "video.mp4" in files(tree)
    removals.finish(tree.scan(), {})
    assert files(tree) == ["cancel"]


def test_a_store_that_does_not_answer_holds_up_no_other_deletion(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "video_other"
    asked(tree, other)
    removals, waits, answers = Removals(tree), threading.Event(), threading.Event()
    is_free = Watch.is_free

    def slow(watch: Watch, output: str) -> bool:
        if output == tree.output(ID):
            waits.set()
            assert answers.wait(20)
        return is_free(watch, output)

    monkeypatch.setattr(Watch, "is_free", slow)
    for id in (ID, other):
        removals.mark(id)
    cleared: list[bool] = []
    first = threading.Thread(target=lambda: cleared.append(removals.clear(ID)))
    first.start()
    try:
        assert waits.wait(20)
        assert removals.clear(other) and files(tree, other) == ["cancel"]
        assert not removals.clear(ID), "a thread is at it"
    finally:
        answers.set()
        first.join(timeout=20)
    assert cleared == [True] and files(tree) == ["cancel"] and removals.sweep() == []
