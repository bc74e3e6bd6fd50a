"""``pavdm farm run --dry-run``: it refuses what the run would, and its totals are of what the run would render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from farms import FRAMES, farm_config, finished_tree, some_shots, write_manifest
from helpers import tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.config import ClusterConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm import forecast
from pavdm_dist.farm.forecast import dry_run
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.manifest import ManifestError
from pavdm_dist.farm.shot import make_shot
from pavdm_dist.farm.tree import Failure
from pavdm_dist.io.parts import PARTS_SUFFIX
from pavdm_dist.io.segments import PLAYLIST


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def _calls(model: Path, frames: int) -> int:
    """Model calls of one video."""
    kinds = Kinds(farm_config(model))
    params = kinds.base.params
    spec = kinds.checkpoint.codec_spec
    return params.plan(spec.chunks_for_frames(frames, params.latent_chunk_size, params.warm)).num_calls


def test_a_complete_shot_that_is_asked_for_otherwise_is_refused_as_by_the_run(model: Path, tmp_path: Path) -> None:
    done = {"id": "a", "prompt": "a red three", "seed": 100}
    tree = finished_tree(tmp_path / "out", [done], model)
    config = farm_config(model)
    for manifest in (write_manifest(tmp_path / "m.jsonl", [done]), None):
        report = dry_run(config, manifest and str(manifest), tree.root)
        assert (report["shots"], report["done"], report["plans"]) == (1, 1, [])
    changed = write_manifest(tmp_path / "m.jsonl", [{**done, "prompt": "a blue seven"}])
    said = r'line 1: id=a was made with prompt="a red three" \(now "a blue seven"\); give what is'
    with pytest.raises(ManifestError, match=said):
        dry_run(config, str(changed), tree.root)
    tree.keep("shots.jsonl", [make_shot({**done, "seed": 7}, "test")])
    with pytest.raises(ConfigError, match=r"id=a was made with seed=100 \(now 7\); give what is changed another id"):
        dry_run(config, None, tree.root)
    Path(tree.folder("a"), "video.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"line 1: id=a: \S+/shots/a/video.json is none of this program's"):
        dry_run(config, str(changed), tree.root)
    with pytest.raises(ConfigError, match="none: keeps no manifest; name one"):
        dry_run(config, None, str(tmp_path / "none"))


def test_totals_are_of_what_is_left_of_all_shots_whatever_is_listed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve lengths, of which eight are listed; shots that the run would leave out; one that is half done."""
    shots = some_shots(16, num_frames=48)
    shots[4:] = [{**shot, "num_frames": 60 + 12 * number} for number, shot in enumerate(shots[4:])]
    tree = finished_tree(tmp_path / "out", [{"id": "a", "prompt": "a red three", "seed": 100}], model)
    tree.fail("shot-000", Failure("no picture", "input"))
    tree.mark("shot-001", "skip")
    tree.mark("shot-002", "cancel")
    parts = Path(tree.output("shot-003") + PARTS_SUFFIX)
    parts.mkdir(parents=True)
    (parts / PLAYLIST).write_text("ffconcat version 1.0\nfile segment-000000-000001.mp4\nduration 0.5\n")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"id": "a", "prompt": "a red three", "seed": 100}, *shots])
    report = dry_run(farm_config(model), str(manifest), tree.root)
    counts = ("shots", "done", "failed", "skipped", "cancelled", "kinds")
    assert [report[name] for name in counts] == [17, 1, 1, 1, 1, 13]
    lengths = [60 + 12 * number for number in range(12)]
    assert report["seconds_of_video"] == pytest.approx((2 - 0.5) + sum(lengths) / 24)
    calls = sum(_calls(model, frames) for frames in lengths) + 0.75 * _calls(model, 48)
    assert report["total_model_calls"] == round(calls)
    assert len(report["plans"]) == 8 and report["not_planned"] == "5 rarer kinds and lengths"
    (begun,) = [row for row in report["plans"] if "left" in row]
    assert (begun["shots"], begun["left"], begun["num_frames"]) == (1, 0.75, 48)
    words = ["farm", "run", str(manifest), "--out", tree.root, f"model={model}", f"num_frames={FRAMES}"]
    assert cli.main([*words, "guidance_scale=1", "--dry-run"]) == 0
    assert "total_model_calls" in capsys.readouterr().out


def test_times_of_what_is_not_planned_follow_from_its_flop(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three lengths and two sizes, on one slow device: of one plan the times of all are those of all plans."""
    shots = [
        {"id": f"{frames}-{size}-{nth}", "prompt": "a red three", "num_frames": frames, "size": size}
        for frames, size, count in ((96, "48x32", 3), (240, "48x32", 2), (480, "32x32", 1))
        for nth in range(count)
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", shots)
    config = farm_config(model, cluster=ClusterConfig(devices=1, tflops=1e-5, price_per_device_hour=2.0))

    def totals() -> list[Any]:
        report = dry_run(config, str(manifest), str(tmp_path / "out"))
        return [report[f"total_{name}"] for name in ("model_calls", "device_hours", "cost", "hours")]

    whole = totals()
    assert whole[1] == pytest.approx(whole[3], rel=0.01) and whole[2] == pytest.approx(2 * whole[1], rel=0.01)
    monkeypatch.setattr(forecast, "PLANNED", 1)
    assert totals() == [whole[0], *(pytest.approx(value, rel=0.1) for value in whole[1:])]
    # What is too long for a forecast, row by row, is counted with the rest.
    monkeypatch.setattr(forecast, "PLANNED", 8)
    monkeypatch.setattr(forecast, "MAX_ROWS", 50)
    assert totals() == [whole[0], *(pytest.approx(value, rel=0.1) for value in whole[1:])]


def test_thousands_of_lengths_are_not_planned_one_by_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    real = forecast.plan_report
    monkeypatch.setattr(forecast, "plan_report", lambda plan: planned.append(plan.num_frames) or real(plan))
    manifest = write_manifest(
        tmp_path / "m.jsonl", [{**shot, "num_frames": 5 + number} for number, shot in enumerate(some_shots(1000))]
    )
    report = dry_run(farm_config(model), str(manifest), str(tmp_path / "out"))
    assert report["kinds"] == 1000 and len(planned) == 8
    assert report["total_model_calls"] > 1000 * 8
