"""Videos that end the process which reads them: named, looked at alone, skipped; the others are prepared."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from videos import numbered, write_video

from pavdm_dist.data import prepare as prepare_module
from pavdm_dist.data import readers as readers_module
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.data.readers import NOTES, forget, left_behind, reading, survived
from pavdm_dist.data.workers import workers
from pavdm_dist.errors import EngineError

# A worker learns from its environment which videos are deadly: it imports everything anew.
POISON = """
import os, av
real = av.open
def deadly(file, *words, **more):
    if "poison" in str(getattr(file, "name", file)):
        os._exit(139)
    return real(file, *words, **more)
av.open = deadly
"""


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    film = write_video(tmp_path / "v" / "a.mp4", numbered(20))
    for name in ("b", "c-poison", "d"):
        shutil.copy(film, tmp_path / "v" / f"{name}.mp4")
    model = tiny_checkpoint(tmp_path / "model")
    buckets = ["32x48x3@24"]
    return PrepareConfig(
        [str(tmp_path / "v")], str(tmp_path / "set"), str(model), buckets, captions="stem", encode=False
    )


def test_notes_are_taken_and_taken_away(tmp_path: Path) -> None:
    with reading(tmp_path, "ä.mp4"):
        assert left_behind(tmp_path) == ["ä.mp4"]
        with pytest.raises(KeyError), reading(tmp_path, "b.mp4"):
            raise KeyError
    assert left_behind(tmp_path) == []
    (tmp_path / NOTES / "host-1.txt").write_text("c.mp4")
    assert left_behind(tmp_path) == ["c.mp4"]
    forget(tmp_path)
    forget(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(60)
def test_what_a_process_of_its_own_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert survived(abs, -3) == 3
    assert survived(os._exit, 9) is None
    monkeypatch.setattr(readers_module, "follow_parent", partial(os._exit, 1))
    with pytest.raises(EngineError, match="no process of its own can be started"):
        survived(abs, -3)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("library", ["pickle", "struct"])
def test_a_script_named_like_a_library_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """Processes are started with the current folder first among the places that Python imports from."""
    (tmp_path / f"{library}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert survived(abs, -3) == 3
    with workers(2, None, 1, False) as run:
        assert sorted(run(abs, [(-1,), (-2,)])) == [1, 2]
    assert not (tmp_path / "ran").exists() and "PYTHONSAFEPATH" not in os.environ


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_video_that_ends_its_reader_is_skipped_by_name(
    deadly: None, config: PrepareConfig, caplog: pytest.LogCaptureFixture
) -> None:
    report = prepare_command(replace(config, processes=2))
    assert report["clips"] == {"32x48x3@24": 6} and report["frames_read"] == 60
    (skipped,) = report["skipped"]
    assert (skipped["video"], skipped["skipped"]) == ("c-poison.mp4", "unreadable")
    assert skipped["reason"].startswith("c-poison.mp4: it ended the process that read it")
    assert any("c-poison.mp4" in record.getMessage() for record in caplog.records)
    assert not (Path(config.output) / NOTES).exists()


@pytest.mark.timeout(120)
def test_the_run_after_one_that_was_ended_knows_what_it_read(deadly: None, config: PrepareConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_look", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_command(config)
    notes = Path(config.output) / NOTES
    notes.mkdir()
    (notes / "host-1.txt").write_text("c-poison.mp4")
    (notes / "host-3.txt").write_text("of another time.mp4")
    report = prepare_command(config)
    assert report["clips"] == {"32x48x3@24": 6} and report["frames_read"] == 60
    assert [entry["video"] for entry in report["skipped"]] == ["c-poison.mp4"]
    assert not notes.exists()


def test_a_reader_that_dies_while_latents_are_made_is_named(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_: object) -> None:
        note = Path(config.output) / NOTES / "host-1.txt"
        note.parent.mkdir(exist_ok=True)
        note.write_text("d.mp4")
        raise prepare_module.WorkerDied("a worker process died; run again to go on")

    monkeypatch.setattr(prepare_module, "encode_shard", died)
    with pytest.raises(EngineError, match=r"run again to go on; it was reading d\.mp4: where that ends every run"):
        prepare_command(replace(config, encode=True))
