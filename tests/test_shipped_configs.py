"""The config files that come with the package are found from everywhere by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pavdm_dist import cli
from pavdm_dist.commands.configs import describe_configs
from pavdm_dist.io.shipped import config_file, configs_root


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("sample", "seed"),
        ("plan", "seed"),
        ("serve", "seed"),
        ("simulate", "chunks"),
        ("convert", "revision"),
        ("train", "threads"),
        ("data prepare", "processes"),
        ("farm run --out renders", "seed"),
    ],
)
def test_every_verb_finds_the_shipped_config_files(
    words: str, key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names that `configs ls` prints, and by those of a checkout, as the examples have them; a file that is here
    wins."""
    there, here = tmp_path / "shipped", tmp_path / "elsewhere"
    for folder, value in ((there, 7), (here, 8)):
        (folder / "kind").mkdir(parents=True)
        (folder / "kind" / "mine.yaml").write_text(f"{key}: {value if key != 'revision' else f'r{value}'}\n")
    monkeypatch.setattr("pavdm_dist.io.shipped.configs_root", lambda: there)
    monkeypatch.chdir(tmp_path)
    values = []
    for name in ("kind/mine.yaml", "configs/kind/mine.yaml", "elsewhere/kind/mine.yaml"):
        assert cli.main([*words.split(), name, "--print-config"]) == 0, capsys.readouterr().err
        values.append(yaml.safe_load(capsys.readouterr().out)[key])
    assert [str(value)[-1] for value in values] == ["7", "7", "8"]
    (tmp_path / "kind").symlink_to(here / "kind")
    assert cli.main([*words.split(), "kind/mine.yaml", "--print-config"]) == 0
    assert str(yaml.safe_load(capsys.readouterr().out)[key])[-1] == "8"


def test_nothing_but_shipped_files_is_found_beside_what_is_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "outside.yaml").write_text("seed: 3")
    monkeypatch.setattr("pavdm_dist.io.shipped.configs_root", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("configs/../outside.yaml", "sample/quik.yaml"):
        assert cli.main(["sample", "a red three", name]) == 2
        assert f"{name}: no such config file" in capsys.readouterr().err


def test_the_first_line_of_each_file_says_all_that_is_listed() -> None:
    for name, about in describe_configs():
        assert about, name
        following = (configs_root() / name).read_text().splitlines()[1]
        goes_on = following.startswith("#") and not following.removeprefix("# ")[0].isupper() and "`" not in following
        assert about.count("(") == about.count(")") and not about.endswith((",", ":", ";")) and not goes_on, name


def test_a_file_is_copied_by_its_last_part_where_no_other_has_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs", "cp", "quick.yaml", "q2.yaml"]) == 0 == cli.main(["configs", "cp", "quick"])
    shipped = (configs_root() / "sample/quick.yaml").read_text()
    assert (tmp_path / "q2.yaml").read_text() == (tmp_path / "quick.yaml").read_text() == shipped
    capsys.readouterr()
    for name, said in {
        "opensora-240p": "there are sample/opensora-240p.yaml and train/opensora-240p.yaml, say which",
        "nope": "no such config; `pavdm configs ls` lists them",
        "sample/nope": "no such config; `pavdm configs ls` lists them",
        "quik": "no such config; did you mean sample/quick.yaml?",
        "opensora": "no such config; did you mean sample/opensora-240p.yaml or train/opensora-240p.yaml?",
    }.items():
        assert cli.main(["configs", "cp", name]) == 2
        assert capsys.readouterr().err == f"pavdm: {name}: {said}\n"


def test_the_examples_of_the_help_name_config_files_that_are_shipped() -> None:
    named = [word for word in cli._EPILOG.split() if word.endswith(".yaml") and "/" in word]
    assert named and all(Path(config_file(name)).is_file() for name in named)
