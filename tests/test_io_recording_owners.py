"""Whose a recording's files are: one process writes at a time, and nothing of anybody else is touched."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recordings import FACTS, Way, child, kill, result, undisturbed_runs

from pavdm_dist.errors import ConfigError
from pavdm_dist.io import lock, processes
from pavdm_dist.io.leftovers import check_recording


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Any, ...]]:
    return undisturbed_runs(tmp_path_factory)


def test_an_output_that_another_live_process_writes_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "v.mp4"
    waiting = "way.go_on(made, 3); made._saver.wait(); print('wrote', flush=True); sys.stdin.read()"
    other = child(str(output), Way(), waiting)
    assert other.stdout is not None and other.stdout.readline() == "wrote\n"
    before = sorted(path.name for path in Path(f"{output}.parts").iterdir())
    sentence = rf"output=.*v\.mp4 is being written by process {other.pid} on this machine"
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ConfigError, match=sentence):
            Way().open(output, **options)
    with pytest.raises(ConfigError, match=sentence):
        check_recording(output, overwrite=True)
    assert sorted(path.name for path in Path(f"{output}.parts").iterdir()) == before
    other.kill()
    # Dead as soon as it has ended, whether or not its parent has looked.
    while "State:\tZ" not in Path(f"/proc/{other.pid}/status").read_text():
        time.sleep(0.01)
    assert Way().open(output, resume=True).next_chunk == 2
    other.wait(60)


def test_locks(tmp_path: Path) -> None:
    output = tmp_path / "v.mp4"
    file = tmp_path / "v.mp4.parts" / "lock.json"
    made = Way().open(output)
    with pytest.raises(ConfigError, match=f"is being written by process {os.getpid()} on this machine"):
        Way().open(output, overwrite=True)
    mine = json.loads(file.read_text())
    del made
    gc.collect()
    assert not file.exists(), "who drops a recording gives it free"

    def put(**changes: Any) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({**mine, **changes}))

    put(started=mine["started"] - 1)  # our number was another process' before
    kill(Way().open(output, overwrite=True))
    put()  # a lock of somebody who is still there, though not through this object
    with pytest.raises(ConfigError, match="is being written"):
        Way().open(output, overwrite=True)


@pytest.mark.parametrize("then", ["made.abort()", "way.go_on(made)"])
def test_an_owner_that_stood_still_and_was_replaced_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[int], tuple[Any, ...]], then: str
) -> None:
    output, way, machine = tmp_path / "v.mp4", Way(2, 1), processes.machine
    parts = tmp_path / "v.mp4.parts"
    # At once after it has gone on, before its thread can have looked.
    waiting = f"way.go_on(made, 3); made._saver.wait(); print('wrote', flush=True); sys.stdin.readline(); {then}"
    other = child(str(output), way, waiting)
    assert other.stdout is not None and other.stdout.readline() == "wrote\n"
    os.kill(other.pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(lock, "SILENCE_S", 1.5)
        patched.setattr(processes, "machine", lambda: f"not {machine()}")  # as seen from another machine
        mine = way.open(output, resume=True)
    way.go_on(mine, 5)
    mine._saver.wait()  # or the thread's own files come and go below
    before = {path: path.read_bytes() for path in parts.rglob("*") if path.is_file()}
    os.kill(other.pid, signal.SIGCONT)
    other.communicate("\n", timeout=30)
    assert (other.returncode == 0) == ("abort" in then)
    assert {path: path.read_bytes() for path in parts.rglob("*") if path.is_file()} == before
    way.go_on(mine)
    mine.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_nothing_foreign_is_touched(tmp_path: Path) -> None:
    output, way = tmp_path / "v.mp4", Way(2, 1)
    parts = tmp_path / "v.mp4.parts"
    made = way.open(output)
    way.go_on(made, until=5)
    kill(made)
    foreign = {"notes.txt", "state.txt", "latents-000000-000001.npy", ".x.safetensors.01234567.tmp"}
    for name in foreign:
        (parts / name).write_text("mine")
    own = {".state.safetensors.01234567.tmp", ".segment.mp4.89abcdef.tmp", "latents-000004-000004.safetensors"}
    for path in (*(parts / name for name in own), tmp_path / ".v.mp4.01234567.tmp"):
        if path.suffix == ".tmp":  # staged, with what a library writes beside it
            path.mkdir()
            (path / ".tmpKp2YVX").write_text("left by a kill")
        else:
            path.write_text("left by a kill")
    (tmp_path / ".w.mp4.01234567.tmp").write_text("another's")
    again = way.open(output, resume=True)
    there = {path.name for path in parts.iterdir()}
    assert foreign <= there
    assert not own - {".state.safetensors.01234567.tmp"} & there
    way.go_on(again)
    again.finish(FACTS)
    assert {path.name for path in parts.iterdir()} == foreign
    assert {path.name for path in tmp_path.glob(".*")} == {".w.mp4.01234567.tmp"}


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_what_a_kill_has_staged_goes_however_the_video_is_opened(tmp_path: Path, options: dict[str, bool]) -> None:
    for name in ("v.mp4", "v.safetensors", "v.json", "w.mp4"):
        (tmp_path / f".{name}.01234567.tmp").mkdir()
        (tmp_path / f".{name}.01234567.tmp" / name).write_text("left by a kill")
    made = Way().open(tmp_path / "v.mp4", **options)
    assert {path.name for path in tmp_path.iterdir()} == {".w.mp4.01234567.tmp", "v.mp4.parts"}
    kill(made)


def test_a_film_that_has_come_meanwhile_is_nobodys_to_replace(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way()
    made = way.open(output)
    way.go_on(made, 4)
    made.abort()
    output.write_bytes(b"somebody else's film")
    said = rf"output={output}: a file of that name has come there since the video was begun; move it"
    with pytest.raises(ConfigError, match=said):
        check_recording(output, facts=made._facts)
    with pytest.raises(ConfigError, match=said):
        way.open(output, resume=True)
    output.rename(tmp_path / "theirs.mp4")
    made = way.open(output, resume=True)
    way.go_on(made)
    (tmp_path / "theirs.mp4").rename(output)
    with pytest.raises(ConfigError, match=said):
        made.finish(FACTS)
    made.abort()
    assert output.read_bytes() == b"somebody else's film"
    output.unlink()
    made = way.open(output, resume=True)
    way.go_on(made)
    made.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_what_was_to_be_replaced_still_is_after_an_interruption(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way()
    output.write_bytes(b"an earlier film")
    made = way.open(output, overwrite=True)
    way.go_on(made, 4)
    made.abort()
    made = way.open(output, resume=True)
    way.go_on(made)
    made.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_file_of_the_sidecars_name_is_nobodys_to_replace(tmp_path: Path, options: dict[str, bool]) -> None:
    output, mine, way = tmp_path / "v.mp4", tmp_path / "v.json", Way()
    refused = rf"output={output}: {mine} exists, which is the name of its sidecar, and is none of this program"
    mine.write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match=refused):
        way.open(output, **options)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=refused):
            check_recording(output, overwrite, facts={})
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"] and mine.read_text() == '{"mine": 1}'
    mine.unlink()
    made = way.open(output, **options)
    way.go_on(made)
    mine.write_text('{"mine": 1}')  # meanwhile
    with pytest.raises(ConfigError, match=refused):
        made.finish(FACTS)
    assert "53 frames" in (made.abort() or "") and mine.read_text() == '{"mine": 1}'
    mine.unlink()
    again = way.open(output, resume=True)
    assert again.complete
    again.finish(FACTS)
