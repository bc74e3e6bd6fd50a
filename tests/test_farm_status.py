"""How fast a farm goes, by its files; and what status, retry and report say of files that are damaged."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from farms import farm_config

from pavdm_dist import cli
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.shot import make_shot
from pavdm_dist.farm.status import RECENT_S, failed_shots, status_report
from pavdm_dist.farm.tree import Failure, Tree
from pavdm_dist.io.lock import OutputLock
from pavdm_dist.io.metadata import Sidecar
from pavdm_dist.io.parts import PARTS_SUFFIX
from pavdm_dist.io.segments import PLAYLIST
from pavdm_dist.serve.asked import tree_at
from pavdm_dist.values.merging import to_dict

NOW = 1_790_000_000.0
# Of each video, at 24 frames per second.
SECONDS, FRAMES = 10.0, 240


class _Farm:
    """A farm's folder with made-up times, all before ``NOW``."""

    def __init__(self, folder: Path) -> None:
        self.tree = Tree(str(folder))
        self.shots: list[dict[str, Any]] = []
        self.locks: list[OutputLock] = []

    def _shot(self) -> str:
        self.shots.append({"id": f"s{len(self.shots)}", "prompt": "a red three", "num_frames": FRAMES})
        return str(self.shots[-1]["id"])

    def done(self, ago: float, took: float) -> None:
        """A shot that was finished so many seconds ago."""
        id, created = self._shot(), datetime.fromtimestamp(NOW - ago, UTC).isoformat()
        Path(self.tree.folder(id)).mkdir(parents=True)
        facts: dict[str, Any] = {"fps": 24.0, "height": 32, "width": 48, "device": "cpu", "threads": 1}
        Sidecar(
            {}, "", None, 0, FRAMES, **facts, chunk_seconds=[took / 4] * 4, video_sha256="0", created=created
        ).write(self.tree.output(id))

    def running(self, begun_ago: float, takes: float) -> None:
        """A shot under way; what of it there is, is playable."""
        id = self._shot()
        self.locks.append(OutputLock.acquire(self.tree.output(id)))
        parts = Path(self.tree.output(id) + PARTS_SUFFIX)
        segment = f"file segment-000000-000005.mp4\nduration {SECONDS * begun_ago / takes}\n"
        (parts / PLAYLIST).write_text(f"ffconcat version 1.0\n{segment}")

    def queued(self, count: int) -> None:
        for _ in range(count):
            self._shot()

    def status(self) -> dict[str, Any]:
        self.tree.keep("shots.jsonl", [make_shot(shot, "test") for shot in self.shots])
        self.tree.write_settings({"settings": to_dict(farm_config(Path("embedded")))})
        report = status_report(self.tree.root, NOW)
        for lock in self.locks:
            lock.release()
        return report


@pytest.mark.parametrize(("together", "took"), [(1, 2400.0), (5, 150.0), (5, 600.0), (8, 6 * 3600.0)])
@pytest.mark.parametrize("in_waves", [False, True], ids=["one by one", "in waves"])
@pytest.mark.parametrize("behind", [0.3, 0.9])
def test_a_steady_farm_of_n_shots_at_a_time_makes_n_in_the_time_of_one(
    tmp_path: Path, together: int, took: float, in_waves: bool, behind: float
) -> None:
    """Each renderer is at this share of a shot, one by one at others between; all of them have made some before."""
    farm = _Farm(tmp_path)
    for renderer in range(together):
        age = took * (behind if in_waves else (behind + renderer / together) % 1)
        farm.running(age, took)
        for nth in range(max(2, round(2 * RECENT_S / took))):
            farm.done(age + nth * took, took)
    report = farm.status()
    assert report["running"] == together
    assert report["seconds_of_video_per_minute"] == pytest.approx(60 * together * SECONDS / took, rel=0.01, abs=0.001)


def test_a_first_wave_that_has_just_ended_says_how_long_the_others_take(tmp_path: Path) -> None:
    farm = _Farm(tmp_path)
    for nth in range(8):
        farm.done(2 - 0.1 * nth, 600)
    farm.queued(92)
    report = farm.status()
    assert report["minutes_left"] == pytest.approx(92 / 8 * 10, rel=0.01)


def test_one_shot_is_enough_and_a_farm_that_has_ended_keeps_its_rate(tmp_path: Path) -> None:
    for ago in (10.0, 40 * 60.0, 86_400.0):
        farm = _Farm(tmp_path / str(ago))
        farm.done(ago, 2400)
        farm.done(ago + 86_400, 2400)  # the night before
        farm.queued(3)
        report = farm.status()
        assert report["seconds_of_video_per_minute"] == pytest.approx(60 * SECONDS / 2400)
        assert report["minutes_left"] == pytest.approx(3 * 40)
    nothing = _Farm(tmp_path / "nothing")
    nothing.queued(3)
    assert nothing.status()["minutes_left"] is None


def test_a_shot_without_times_says_nothing_of_how_fast_it_goes(tmp_path: Path) -> None:
    farm = _Farm(tmp_path)
    for _ in range(3):
        farm.done(10, 600)
    for id, changed in (("s1", {"chunk_seconds": []}), ("s2", {"created": "0001-01-01T00:00:00"})):
        path = Path(farm.tree.folder(id), "video.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    report = farm.status()
    assert report["done"] == 3 and report["seconds_of_video_per_minute"] == pytest.approx(60 * SECONDS / 600)


@pytest.mark.parametrize("action", ["status", "retry", "report"])
def test_damaged_settings_are_one_sentence(tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "{", "[" * 100_000, "\xff", "[]", "null", "{}", '{"settings": 3}'):
        (tmp_path / "farm.json").write_text(text, encoding="latin-1")
        assert cli.main(["farm", action, str(tmp_path)]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"pavdm: {tmp_path}/farm.json: ") and len(said) < 300


def test_a_shot_is_tried_again_with_the_settings_that_it_failed_with_or_with_those_that_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder keeps those of its newest run, which may be another manifest's. Where it is rendered is no matter."""
    embedded, out = Path("embedded"), str(tmp_path)
    tree, newest = Tree(out), Tree(out)
    tree.keep("m.jsonl", [make_shot({"id": id, "prompt": "a red three"}, "test") for id in ("one", "two", "old")])
    first, then = farm_config(embedded), farm_config(embedded, num_inference_steps=6, num_stages=2, streams=2)
    Tree(out).fail("old", Failure("of an earlier version, which kept no settings"))
    for at, config, id in ((tree, first, "one"), (newest, then, "two")):
        at.write_settings({"settings": to_dict(config)})
        at.fail(id, Failure("why"))
    record = Path(tree.folder("one"), "failed.json").read_bytes()
    assert cli.main(["farm", "retry", out]) == cli.main(["farm", "retry", out, "one", "seed=0"]) == 2
    said = "pavdm: id=one: failed in a run with num_inference_steps=null (now 6); say what is to hold, as `pavdm farm"
    assert all(line.startswith(said) for line in capsys.readouterr().err.splitlines())
    assert Path(tree.folder("one"), "failed.json").read_bytes() == record
    assert failed_shots(out, ["two", "old"], then) == ["two", "old"]
    assert failed_shots(out, [], then, ["num_inference_steps"]) == ["one", "two", "old"]
    assert failed_shots(out, ["one"], first) == ["one"], "as it was"


@pytest.mark.parametrize("words", [["run", "--dry-run", "--out"], ["status"], ["retry"], ["report"]], ids=" ".join)
def test_no_name_is_no_folder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As a variable of a script that is not set: it must not be the root of all files."""
    assert cli.main(["farm", *words, ""]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "pavdm: out='': is no folder; name one, or . for the one that you are in"
    with pytest.raises(ConfigError, match=r"^out='': is no folder"):
        tree_at("")
