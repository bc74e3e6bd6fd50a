"""What a farm's folder keeps of manifests that change, and how it reads lines and files that are not as usual."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from farms import FRAMES, farm_config, finished_tree, latents_of, run_farm, some_shots, stops_at_chunk, write_manifest
from helpers import tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.errors import FailedVideosError
from pavdm_dist.farm.forecast import dry_run
from pavdm_dist.farm.manifest import ManifestError, checked
from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.sizing import count_left
from pavdm_dist.farm.status import failed_shots, status_report
from pavdm_dist.farm.tree import Failure, Tree
from pavdm_dist.farm.vbench import export_vbench
from pavdm_dist.io.parts import parts_folder
from pavdm_dist.io.segments import PLAYLIST

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def test_shots_of_a_manifest_that_was_replaced_stay_in_the_record_and_are_rendered_no_more(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One is complete, one has failed, one is begun, one was never begun; then the file is written for the next day."""
    out, tree, config = tmp_path / "out", Tree(str(tmp_path / "out")), farm_config(model)
    (tmp_path / "bad.png").write_bytes(b"")
    bad = {"id": "bad", "prompt": "a red three", "image": "bad.png"}
    begun = {"id": "begun", "prompt": "a red three", "num_frames": 90}
    day = write_manifest(tmp_path / "day.jsonl", [*some_shots(1), bad, begun, {"id": "never", "prompt": "a"}])
    with monkeypatch.context() as patched:
        patched.setattr(Pool, "grew", stops_at_chunk(5))
        with pytest.raises(FailedVideosError, match="1 of 4 shots failed, 2 are left"):
            run_farm(config, day, out)
    assert [tree.state(id).standing for id in ("shot-000", "bad", "begun", "never")] == [
        "done",
        "failed",
        "begun",
        "queued",
    ]
    write_manifest(day, [{"id": "next", "prompt": "a blue seven"}])
    with caplog.at_level(logging.WARNING, "pavdm_dist"):
        assert run_farm(config, day, out)["shots"] == 1
    said = "3 shots of before are no longer in the manifest, and stay in status and report as they are"
    assert f"{said}: shot-000, bad, begun" in caplog.text
    caplog.clear()
    report = status_report(str(out))
    assert {name: report[name] for name in ("shots", "done", "begun", "failed")} == {
        "shots": 4, "done": 2, "begun": 1, "failed": 1,
    }  # fmt: skip
    assert failed_shots(str(out), []) == ["bad"]
    assert export_vbench(str(out), str(tmp_path / "vbench"))["videos"] == 2
    # Nobody asks for them: not the same command again, nor that without a manifest, whatever its settings are.
    other = farm_config(model, seed=5)
    assert run_farm(config, day, out)["shots"] == run_farm(config, None, out)["shots"] == 1
    assert dry_run(config, None, str(out))["shots"] == 1
    with pytest.raises(ManifestError, match="id=next was made with seed"):
        run_farm(other, day, out)
    assert tree.state("begun").standing == "begun" and sorted(latents_of(out)) == ["next", "shot-000"]
    # And whoever does gets them.
    write_manifest(day, [begun, {"id": "next", "prompt": "a blue seven"}])
    assert run_farm(config, day, out)["done"] == 1
    assert [shot.id for shot in tree.shots()] == ["begun", "next", "shot-000", "bad"]
    assert "no longer" not in caplog.text


def test_lines_that_are_taken_out_while_they_are_rendered_stay_in_the_record(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, grew = tmp_path / "out", Pool.grew
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(2))

    def take_out(self: Pool, *given: Any) -> None:
        grew(self, *given)
        write_manifest(manifest, [{"id": "other", "prompt": "a blue seven"}])

    monkeypatch.setattr(Pool, "grew", take_out)
    assert run_farm(farm_config(model), manifest, out)["done"] == 3
    assert status_report(str(out))["done"] == 3


def test_a_manifest_whose_name_begins_with_a_dot_is_kept_as_any_other(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = write_manifest(tmp_path / ".hidden.jsonl", some_shots(1))
    assert run_farm(farm_config(model), manifest, out)["done"] == 1
    assert status_report(str(out))["done"] == 1 and not list(out.glob("manifests/.*"))
    # What other programs keep beside files.
    (kept,) = out.glob("manifests/*.jsonl")
    kept.with_name(f"._{kept.name}").write_bytes(b"\0\5\26\7Mac OS X")
    assert [shot.id for shot in Tree(str(out)).shots()] == ["shot-000"]


def test_shots_that_are_in_the_manifest_again_are_none_of_the_past(tmp_path: Path) -> None:
    """A look may come while an editor writes it anew."""
    tree, shots = Tree(str(tmp_path)), [Shot(id=f"s{i}", prompt="a red three") for i in range(5)]
    queued = {shot.id for shot in shots}.__contains__
    for some in (shots, shots[:2], shots, shots[:3]):
        tree.keep("m.jsonl", some, queued)
    assert [shot.id for shot in tree.shots()] == ["s0", "s1", "s2", "s3", "s4"]
    assert [shot.id for shot in tree.shots(past=False)] == ["s0", "s1", "s2"]
    # Of those that were withdrawn a later farm finds nothing, but for s4.
    tree.keep("m.jsonl", shots[:3], "s4".__eq__)
    assert [shot.id for shot in tree.shots()] == ["s0", "s1", "s2", "s4"]


def test_a_damaged_playlist_is_told_of_and_ends_nothing(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = finished_tree(tmp_path / "out", [{"id": "a", "prompt": "a red three", "seed": 100}], model)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(2))
    tree.keep("m.jsonl", checked(str(manifest)))
    head = b"ffconcat version 1.0\n"
    entry = head + b"file segment-000000-000001.mp4\nduration "
    whole = head + b"# short group\nfile segment-000000-000001.mp4\nduration 0.5\n"
    playlists = [Path(parts_folder(tree.output(f"shot-00{i}")), PLAYLIST) for i in range(2)]
    for playlist in playlists:
        playlist.parent.mkdir(parents=True)
        playlist.write_bytes(whole)
    assert status_report(tree.root)["seconds_of_video"] == 9 / 24 + 2 * 0.5 and not caplog.text
    damages = (b"\n", b"two\n", b"nan\n", b"-3\n", b"1e99\n", b"1.0\n\xff\xfe", b"1.0\nduration 2.0\n", b"1.0")
    for damaged in (b"", head[:5], *(entry + damage for damage in damages)):
        caplog.clear()
        playlists[0].write_bytes(damaged)
        report = status_report(tree.root)
        assert (report["begun"], report["seconds_of_video"]) == (2, 9 / 24 + 0.5), damaged
        assert f"{playlists[0]}: is damaged (" in caplog.text and str(playlists[1]) not in caplog.text
    assert cli.main(["farm", "report", tree.root]) == 0
    assert dry_run(farm_config(model), str(manifest), tree.root)["seconds_of_video"] == round(2 * FRAMES / 24 - 0.5, 3)


def test_a_first_prompt_at_0s_needs_no_other(model: Path, tmp_path: Path) -> None:
    by_time = {"timed_prompts": {"0s": "a red three", "0.4s": "a blue seven"}}
    lines = write_manifest(tmp_path / "m.jsonl", [{"id": "a", "num_frames": 20, "overrides": by_time}])
    table = tmp_path / "m.csv"
    text = json.dumps(by_time).replace('"', '""')
    table.write_text(f'id,prompt,num_frames,overrides\na,,20,"{text}"\n')
    assert list(checked(str(lines))) == list(checked(str(table)))
    assert run_farm(farm_config(model), table, tmp_path / "out")["done"] == 1
    assert json.loads((tmp_path / "out/shots/a/video.json").read_text())["prompt"] == "a red three"
    assert run_farm(farm_config(model), lines, tmp_path / "out")["done_before"] == 1
    none = write_manifest(tmp_path / "none.jsonl", [{"id": "a"}])
    with pytest.raises(ManifestError, match=r"line 1: prompt is missing; it must be text, or timed_prompts among"):
        list(checked(str(none)))


@pytest.mark.parametrize("value", [[], "", 0, False], ids=repr)
def test_overrides_that_are_nothing_of_the_kind_are_refused(tmp_path: Path, value: Any) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"id": "a", "prompt": "a", "overrides": value}])
    with pytest.raises(ManifestError, match="line 1: overrides="):
        list(checked(str(manifest)))
    for nothing in (None, {}):
        write_manifest(manifest, [{"id": "a", "prompt": "a", "overrides": nothing}])
        assert [shot.overrides for shot in checked(str(manifest))] == [{}]


def test_the_planner_is_asked_for_what_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of six is done, one has failed, two are marked."""
    out, asked = tmp_path / "out", list[int]()
    assert run_farm(farm_config(model), write_manifest(tmp_path / "one.jsonl", some_shots(1)), out)["done"] == 1
    tree = Tree(str(out))
    tree.fail("shot-001", Failure("why"))
    tree.mark("shot-002", "skip")
    tree.mark("shot-003", "cancel")
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(6))
    monkeypatch.setattr("pavdm_dist.farm.run.sized", lambda config, shots: asked.append(shots) or config)
    words = ["farm", "run", str(manifest), "--out", str(out), f"model={model}", f"num_frames={FRAMES}"]
    assert cli.main([*words, "guidance_scale=1", "farm.plan=true", "cluster.devices=8"]) == 101
    assert asked == [2] and count_left(None, tree) == 0 and count_left(None, tree, ["shot-001"]) == 1
