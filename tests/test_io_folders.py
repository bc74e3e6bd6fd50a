"""Folders are whole or absent, and what is somebody's stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pavdm_dist.errors import ConfigError
from pavdm_dist.io.folders import check_only, touches, whole_folder


def fill(folder: Path, content: str) -> None:
    with whole_folder(folder, replaces=True) as staged:
        (staged / "file").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_the_new_one_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "model"
    fill(folder, "one")
    fill(folder, "two")
    assert names(folder.parent) == ["model"] and (folder / "file").read_text() == "two"
    with pytest.raises(OSError, match="full"), whole_folder(folder, replaces=True):
        raise OSError("full")
    moves, replace = [0], os.replace

    def fails_once(source: Path, target: Path) -> None:
        moves[0] += 1
        if moves[0] == 2:  # the old one has stepped back
            raise OSError("away")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OSError, match="away"):
        fill(folder, "three")
    assert moves == [3] and names(folder.parent) == ["model"] and (folder / "file").read_text() == "two"


def test_a_path_without_a_name_is_the_folder_it_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fill(Path("."), "one")
    assert names(tmp_path) == ["here"] and (tmp_path / "here" / "file").read_text() == "one"


def test_what_came_meanwhile_stays(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis").touch()
    with pytest.raises(OSError, match="not empty"), whole_folder(folder, replaces=False):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis"]


@pytest.mark.parametrize(
    ("target", "relation"), [("a", "is"), (".", "holds"), ("a/b", "lies in"), ("c", ""), ("link", "is")]
)
def test_how_two_folders_touch(target: str, relation: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    assert touches(tmp_path / target, tmp_path / "a") == relation


def test_more_than_what_is_replaced_is_named(tmp_path: Path) -> None:
    for name in ("a", ".DS_Store", "._a"):
        (tmp_path / name).touch()
    check_only(tmp_path, {"a", "not there"}, "output", "a model")
    (tmp_path / "plots").mkdir()
    with pytest.raises(ConfigError, match=rf"output={tmp_path}: holds plots, which is no part of a model and would be"):
        check_only(tmp_path, {"a"}, "output", "a model")
    (tmp_path / "plots" / "b").touch()
    with pytest.raises(ConfigError, match="holds plots/b, which"):
        check_only(tmp_path, (), "output", "a model", "plots")
