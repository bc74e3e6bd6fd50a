"""What is only looked at, traces, logs, lists and bars, may fail to be written: shots, renderers and status stay.

What a run is asked for may not, and is looked at before anything is taken."""

from __future__ import annotations

import errno
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from farms import FRAMES, farm_config, finished_tree, latents_of, some_shots, write_manifest
from helpers import tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.engine.events import GangLost
from pavdm_dist.engine.kept import Engines
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.spans import RunReport
from pavdm_dist.engine.trace import write_trace
from pavdm_dist.errors import TraceError
from pavdm_dist.farm.desk import Ended
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.logs import ShotLog
from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.said import Said
from pavdm_dist.farm.shot import Shot, make_shot
from pavdm_dist.farm.traces import keep_shots, shot_times
from pavdm_dist.farm.tree import Failure, Tree
from pavdm_dist.pipeline import PAVDMPipeline

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@dataclass
class Gang:
    """One stage in this process, which stands for a gang on a cluster; ``at_end`` is what happens as it finishes."""

    options: EngineOptions
    sampled: Any
    at_end: Callable[[str], None]
    blocks: tuple[tuple[int, int], ...] = ((0, 4),)
    devices: tuple[str, ...] = ("cpu",)
    kernels: dict[str, str] = field(default_factory=dict)
    decoded: tuple[Any, ...] = ()
    relative_error: float | None = None
    closed: bool = False

    def run(self, streams: Any, in_flight: int, on_grown: Any, on_failed: Any) -> Iterator[Any]:
        return self.sampled.run(streams, on_grown, on_failed)

    def finish(self) -> list[RunReport]:
        assert self.options.trace_file is not None
        self.at_end(self.options.trace_file)
        return [RunReport(0.0)]

    def close(self) -> None:
        self.closed = True


def folder_in_the_way(trace: str) -> None:
    Path(trace).mkdir(parents=True)


def folder_in_the_way_of_the_shots(trace: str) -> None:
    Path(trace.removesuffix(".json") + ".shots.json").mkdir(parents=True)


def dead_stages(trace: str) -> None:
    raise GangLost("stage 0 died")


def all_well(trace: str) -> None:
    """A trace that can be written."""


@pytest.mark.parametrize(
    ("at_end", "cause"),
    [
        (folder_in_the_way, "renderer-1.json: cannot be written (Is a directory); the videos are not touched by that"),
        (folder_in_the_way_of_the_shots, "renderer-1.shots.json: cannot be written (Is a directory)"),
        (dead_stages, "renderer-1.json: the stages do not tell what they did (stage 0 died); the videos are not"),
        (all_well, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_trace_that_cannot_be_kept_costs_charts_and_no_renderer(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at_end: Callable[[str], None],
    cause: str,
) -> None:
    config = farm_config(
        model, {"trace": True, "renderers": 1, "min_renderers": 0, "idle_s": 0.0, "retry_s": 60.0}, num_stages=1
    )
    gangs: list[Gang] = []

    def on_stages(engines: Engines, _: object, options: EngineOptions, *__: object) -> Gang:
        sampled = PAVDMPipeline(Checkpoint.open(str(model)))._load()
        gangs.append(Gang(options, sampled, at_end))
        return engines._hold(gangs[-1])  # type: ignore[type-var]

    monkeypatch.setattr(Engines, "on_stages", on_stages)
    tree = Tree(str(tmp_path / "out"))
    pool = Pool(Kinds(config), tree, endless=True)
    shots = [make_shot(shot, "test") for shot in some_shots(3)]

    def until_no_renderer_is_up() -> None:
        end = time.monotonic() + 60
        while pool.figures["running"] or pool.figures["waiting"] or pool._crew.hands:
            assert time.monotonic() < end
            pool.tick()
            pool.wait(0.05)

    with caplog.at_level(logging.INFO, "pavdm_dist"):
        pool.submit(shots[:2])
        until_no_renderer_is_up()
        assert (pool._crew.lost, dict(pool.ends)) == (0, {"done": 2}) and gangs[0].closed
        # Nor does the next one wait, as it would behind a lost one.
        pool.submit(shots[2:])
        until_no_renderer_is_up()
    pool.close()
    assert (pool._crew.lost, dict(pool.ends), len(gangs)) == (0, {"done": 3}, 2)
    assert [tree.state(shot.id).standing for shot in shots] == ["done"] * 3
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    if not cause:
        assert not said and len(list((tmp_path / "out/traces").glob("*.shots.json"))) == 2
        return
    first = said[0]
    assert first.getMessage().startswith(
        "renderer-1: the report will have no chart of what its stages did of shot-000, shot-001: "
    )
    assert cause in first.getMessage() and first.renderer == "renderer-1"  # type: ignore[attr-defined]
    assert [record.renderer for record in said] == ["renderer-1", "renderer-2"]  # type: ignore[attr-defined]
    assert shot_times(tree) == {}


def test_a_log_and_a_list_that_cannot_be_written_and_no_standard_error_change_no_status(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where the folder of logs would be, a folder where the list of failed shots would be."""
    out = tmp_path / "out"
    (out / "failed.jsonl").mkdir(parents=True)
    (out / "logs").write_text("mine")
    shots = [*some_shots(2), {"id": "bad", "prompt": "a red three", "image": str(tmp_path / "none.png")}]
    (tmp_path / "none.png").write_text("no picture")
    good, both = (write_manifest(tmp_path / f"{len(some)}.jsonl", some) for some in (shots[:2], shots))
    words = [f"model={model}", f"num_frames={FRAMES}", "guidance_scale=1", "--out", str(out)]
    monkeypatch.setattr(logging.getLogger("pavdm_dist"), "propagate", True)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", None)
        patched.setattr("pavdm_dist.commands.progress.setup_logging", lambda _: None)
        statuses = [cli.main(["farm", "run", str(manifest), *words]) for manifest in (good, both)]
    assert statuses == [0, 101] and sorted(latents_of(out)) == ["shot-000", "shot-001"]
    assert (out / "logs").read_text() == "mine" and not list((out / "failed.jsonl").iterdir())
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("no log is written beside the shots" in line for line in said), said
    assert sum(line.startswith("failed.jsonl, the list of failed shots, cannot be written") for line in said) == 2


def test_a_store_that_is_away_has_errors_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Away(Tree):
        def fail(self, id: str, failure: Failure) -> None:
            raise RuntimeError("SlowDown")

    Said(Away(str(tmp_path)), ShotLog()).ended("renderer-1", Shot("a", "a red three"), Ended("failed", "input"), 1)
    assert "a: its failure cannot be written yet: SlowDown" in caplog.text
    for write in (write_trace, keep_shots):
        with pytest.raises(TraceError, match=r"nowhere://x/t\.(shots\.)?json: cannot be written \(.*nowhere"):
            write("nowhere://x/t.json", {})  # type: ignore[operator]


def test_what_no_file_can_hold_is_escaped_in_the_record_of_a_failure(tmp_path: Path) -> None:
    """A name of a file may hold bytes that are no text."""
    package, log, tree = logging.getLogger("pavdm_dist"), ShotLog(), Tree(str(tmp_path))
    package.addHandler(log)
    package.propagate = False  # nor can what pytest keeps of logs travel between its processes
    try:
        log.begun("renderer-1", "a")
        package.warning("b\udcff.mp4 is gone", extra={"shot": "a"})
        Said(tree, log).ended("renderer-1", Shot("a", "a red three"), Ended("failed", "input", "why"), 1)
    finally:
        package.removeHandler(log)
        log.close()
    failure = tree.state("a").failure
    assert failure is not None and failure.error == "why" and failure.log[0].endswith("WARNING b\\udcff.mp4 is gone")


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And charts, sheets and figures of foreign files are left out of one that can."""
    tree = finished_tree(tmp_path / "out", [{"id": "a", "prompt": "a red three"}])
    (tmp_path / "out/traces").write_text("mine")
    Path(tree.output("a")).write_text("no video")
    assert cli.main(["farm", "report", str(tmp_path / "out"), "--json"]) == 0
    (tmp_path / "out/index.html").unlink()
    (tmp_path / "out/index.html").mkdir()
    assert cli.main(["farm", "report", str(tmp_path / "out")]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pavdm: ")]
    assert said.endswith("index.html: cannot be written (Is a directory)")


def test_where_nothing_can_be_written_is_said_before_a_worker_is_taken(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where a folder would be, or a folder where a file would be."""
    monkeypatch.setattr("pavdm_dist.farm.run.Pool", None)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(1))
    traced = ["num_stages=1", "farm.trace=true"]
    cases: list[tuple[str, str, list[str], str]] = [
        ("one", "", [], r"out=\S+/one: is a file; name a folder"),
        ("two/shots", "", [], r"out=\S+/two/shots/~/video.mp4: \S+/two/shots is a file, not a folder"),
        ("three/manifests", "", [], r"out=\S+: \S+/three/manifests is a file, not a folder"),
        ("", "four/farm.json", [], r"out=\S+/four/farm.json is a folder"),
        ("five/traces", "", traced, r"out=\S+: \S+/five/traces is a file, not a folder"),
        ("six/traces", "", [*traced, "--dry-run"], r"out=\S+: \S+/six/traces is a file, not a folder"),
    ]
    for file, folder, words, said in cases:
        (tmp_path / (folder or file)).parent.mkdir(exist_ok=True)
        (tmp_path / (folder or file)).mkdir() if folder else (tmp_path / file).write_text("mine")
        out, before = tmp_path / Path(folder or file).parts[0], sorted(tmp_path.rglob("*"))
        command = ["farm", "run", str(manifest), "--out", str(out), f"model={model}", f"num_frames={FRAMES}", *words]
        assert cli.main(command) == 2
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("pavdm: ")]
        assert re.search(said, line), line
        assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_full_when_a_farm_begins_is_one_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tree: Tree, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", tree.path("farm.json"))

    monkeypatch.setattr(Tree, "write_settings", full)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(1))
    assert cli.main(["farm", "run", str(manifest), "--out", str(tmp_path / "out"), f"model={model}"]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("pavdm: ")]
    assert line.endswith(f"out={tmp_path}/out: {tmp_path}/out/farm.json: No space left on device")
