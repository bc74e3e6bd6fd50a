"""The report of ``pavdm eval``: replaces reports alone, loses nothing that was measured, shows names as they are."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pavdm_dist.cli import main
from pavdm_dist.commands.signals import Stopped
from pavdm_dist.errors import MediaError
from pavdm_dist.evaluate import command
from pavdm_dist.evaluate import page as page_module
from pavdm_dist.evaluate.command import _videos
from pavdm_dist.evaluate.measured import Measured
from pavdm_dist.io.video import export_to_video


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    export_to_video(frames, str(path), 24)
    return path


_OFF = [f"{name}=off" for name in ("motion", "scenes", "features", "digits")]


@pytest.mark.parametrize("foreign", ["film.mp4", "plots/notes.txt", "plots.txt"])
def test_what_is_no_part_of_a_report_is_never_replaced(
    foreign: str, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["eval", str(film), *_OFF, f"output={out}"]
    assert main(words) == 0
    (out / foreign).write_bytes(film.read_bytes())
    assert main([*words, "--overwrite"]) == 2
    assert f"output={out}: holds {foreign}, which is no part of a report and would be gone" in capsys.readouterr().err
    assert (out / foreign).read_bytes() == film.read_bytes()


def test_a_folder_that_comes_while_it_measures_stays(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, drawn = tmp_path / "out", command.plots

    def meanwhile(videos: list[Measured]) -> dict[str, bytes]:
        out.mkdir()
        (out / "thesis.txt").write_text("a year of work")
        return drawn(videos)

    monkeypatch.setattr(command, "plots", meanwhile)
    assert main(["eval", str(film), *_OFF, f"output={out}", "--json"]) == 2
    captured = capsys.readouterr()
    assert f"output={out}: exists already" in captured.err
    assert json.loads(captured.out)["videos"], "what was measured is said all the same"
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_ctrl_c_leaves_what_was_measured(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = command.measure

    def interrupted(path: str, *args: Any) -> Measured:
        if path.endswith("b.mp4"):
            raise Stopped(signal.SIGTERM)
        return measured(path, *args)

    monkeypatch.setattr(command, "measure", interrupted)
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_bytes(film.read_bytes())
    assert main(["eval", str(tmp_path), *_OFF, f"output={tmp_path / 'out'}", "--json"]) == 128 + signal.SIGTERM
    captured = capsys.readouterr()
    assert "interrupted: 2 of 3 videos are not measured" in captured.err
    report = json.loads(captured.out)
    assert len(report["videos"]) == 1 and json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_ctrl_c_while_the_page_is_made_leaves_what_was_measured(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal as the terminal sends it, amidst the frames that the page shows."""
    monkeypatch.setattr(page_module, "moments", lambda _: os.kill(os.getpid(), signal.SIGINT))
    out = tmp_path / "out"
    assert main(["eval", str(film), *_OFF, f"output={out}", "--json"]) == 128 + signal.SIGINT
    captured = capsys.readouterr()
    assert f"interrupted: output={out} was still being made" in captured.err
    assert len(json.loads(captured.out)["videos"]) == 1 and not list(tmp_path.iterdir())


def test_a_second_ctrl_c_ends_the_report_and_loses_nothing(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.mp4").write_bytes(b"")
    measured = command.measure

    def interrupts(number: int, result: Any) -> Any:
        if number:
            raise Stopped(number)
        return result

    monkeypatch.setattr(
        command, "measure", lambda path, *rest: interrupts(15 * path.endswith("b.mp4"), measured(str(film), *rest))
    )
    monkeypatch.setattr(command, "page", lambda *_: interrupts(signal.SIGINT, ""))
    words = ["eval", str(film), str(tmp_path / "b.mp4"), *_OFF, f"output={tmp_path / 'out'}", "--json"]
    assert main(words) == 128 + signal.SIGTERM
    captured = capsys.readouterr()
    assert "interrupted: 1 of 2 videos are not measured" in captured.err
    assert len(json.loads(captured.out)["videos"]) == 1


@pytest.mark.parametrize("part", ["plots", "page", "write_report"])
def test_a_fault_while_the_report_is_made_is_told_after_what_was_measured(
    part: str, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(command, part, breaks)
    with pytest.raises(ZeroDivisionError) as fault:  # which ends a process with its traceback and status 1
        main(["eval", str(film), *_OFF, f"output={tmp_path / 'out'}", "--json"])
    assert fault.traceback[-1].name == "breaks"
    assert len(json.loads(capsys.readouterr().out)["videos"]) == 1


@pytest.mark.parametrize("fault", [ZeroDivisionError("inside"), MediaError("a.mp4: is gone")])
def test_a_video_that_cannot_be_shown_costs_its_own_pictures(
    fault: Exception, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = page_module.moments

    def breaks(path: str) -> list[tuple[float, bytes]]:
        if path.endswith("a.mp4"):
            raise fault
        return shown(path)

    monkeypatch.setattr(page_module, "moments", breaks)
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(film.read_bytes())
    assert main(["eval", str(tmp_path), *_OFF, f"output={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count('<img alt="at 1 s"') == 1 and str(fault) in text.split("Measured, and not shown")[1]


def test_where_no_report_can_be_written_is_said_before_anything_is_measured(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert main(["eval", str(film), f"output={tmp_path / 'file' / 'out'}"]) == 2
    assert re.search(r"output=\S+out: cannot be written \(Not a directory\)", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["eval", str(film), f"output={tmp_path / 'out'}"]) == 2
    assert "plots need matplotlib: pip install 'pavdm-dist[metrics]'" in capsys.readouterr().err


@pytest.mark.parametrize("output", [".", "", "./", "../own", "own/.."])
def test_a_report_where_one_stands_is_refused_and_loses_nothing(
    output: str, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own := tmp_path / "own").mkdir()
    (own / "own").mkdir()
    (own / "notes.txt").write_text("mine")
    (own / "film.mp4").write_bytes(film.read_bytes())
    monkeypatch.chdir(own)
    for more, said in (([], "exists already"), (["--overwrite"], "holds no report that could be replaced")):
        assert main(["eval", "film.mp4", *_OFF, f"output={output}", *more]) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in own.iterdir()) == ["film.mp4", "notes.txt", "own"]


@pytest.mark.parametrize("name", ["cost_$5_to_$10", "a$_{b$", os.fsdecode(b"\xff"), "<b> &", "ü"])
def test_names_are_shown_as_they_are(name: str, film: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / name).mkdir(parents=True)
    for video in "ab":
        (tmp_path / "in" / name / f"{video}.mp4").write_bytes(film.read_bytes())
    said = {"versions": {}, "prompt": "a \ud800 film"}
    (tmp_path / "in" / name / "a.json").write_text(json.dumps(said))
    words = ["eval", str(tmp_path / "in"), "groups=folder", *_OFF, f"output={tmp_path / 'out'}", "--json"]
    assert main(words) == 0 and main(words[:-2]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {video["group"] for video in report["videos"]} == {name}
    shown = html.escape(name).encode("utf-8", "backslashreplace").decode()
    assert f">{shown}</th>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_video_counts_once_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.mp4"):
        Path(name).touch()
    Path("link.mp4").symlink_to("a.mp4")
    assert _videos(["a.mp4", "./a.mp4", str(tmp_path / "b.mp4"), "link.mp4", "b.mp4"]) == [
        "a.mp4", str(tmp_path / "b.mp4"),
    ]  # fmt: skip
