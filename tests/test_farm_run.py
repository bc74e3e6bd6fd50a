"""``pavdm farm`` in one process: what a manifest asks for is made once, whatever happens to the farm meanwhile."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from farms import (
    FRAMES,
    PROMPTS,
    farm_config,
    latents_of,
    packets_of,
    run_farm,
    some_shots,
    stops_at_chunk,
    write_manifest,
)
from forked import Program
from helpers import tiny_checkpoint
from PIL import Image

from pavdm_dist import cli
from pavdm_dist.commands.signals import Stopped
from pavdm_dist.config import ClusterConfig, DisplacedConfig
from pavdm_dist.errors import CheckpointError, ConfigError, FailedVideosError
from pavdm_dist.farm.intake import Intake
from pavdm_dist.farm.kinds import OVERRIDES, Kinds
from pavdm_dist.farm.manifest import ManifestError, checked
from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.progress import FarmProgress
from pavdm_dist.farm.settings import FarmConfig, PoolConfig, validate_farm
from pavdm_dist.farm.shot import Shot, seed_of
from pavdm_dist.farm.sizing import sized
from pavdm_dist.farm.status import status_report
from pavdm_dist.farm.tree import Failure, Tree
from pavdm_dist.io.lock import OutputLock
from pavdm_dist.io.metadata import read_sidecar, versions
from pavdm_dist.pipeline import PAVDMPipeline

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def _until(is_so: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A farm's folder with three finished shots, one of them of another size and mode of sampling."""
    folder = tmp_path_factory.mktemp("done")
    shots = some_shots(2)
    shots.append({"id": "other", "prompt": PROMPTS[2], "size": "32x48", "overrides": {"num_inference_steps": 9}})
    report = run_farm(farm_config(model), write_manifest(folder / "m.jsonl", shots), folder / "out")
    assert (report["shots"], report["done"], report["left"], report["failed"]) == (3, 3, 0, 0)
    return folder / "out"


def test_a_shot_is_what_sample_makes_of_the_same_words(done: Path, model: Path, tmp_path: Path) -> None:
    for id, prompt, more in (
        ("shot-001", PROMPTS[1], []),
        ("other", PROMPTS[2], ["height=48", "width=32", "num_inference_steps=9"]),
    ):
        seed = seed_of(Shot(id, prompt), 0)
        output = tmp_path / f"{id}.mp4"
        words = [
            prompt,
            f"model={model}",
            f"num_frames={FRAMES}",
            "guidance_scale=1",
            f"seed={seed}",
            f"output={output}",
        ]
        assert cli.main(["sample", *words, *more]) == 0
        mine, other = (
            json.loads(path.read_text()) for path in (done / f"shots/{id}/video.json", output.with_suffix(".json"))
        )
        assert mine["latents_sha256"] == other["latents_sha256"] and mine["identity"] == other["identity"]
        assert packets_of(done / f"shots/{id}/video.mp4") == packets_of(output)
    assert sorted(path.name for path in (done / "shots/shot-001").iterdir()) == ["video.json", "video.mp4"]


def test_finished_shots_are_never_made_again(done: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.glob("shots/*/*")}
    monkeypatch.setattr("pavdm_dist.farm.pool.Pool.open", lambda _: pytest.fail("nothing is to be rendered"))
    report = run_farm(farm_config(model), None, done)
    assert (report["done"], report["done_before"], report["frames"]) == (0, 3, 0)
    assert {path: path.stat().st_mtime_ns for path in done.glob("shots/*/*")} == before
    manifest = write_manifest(done.parent / "changed.jsonl", [{"id": "shot-000", "prompt": "another"}])
    with pytest.raises(
        ManifestError, match=r'line 1: id=shot-000 was made with prompt="a red three drifting up" \(now "a'
    ):
        run_farm(farm_config(model), manifest, done)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_frames": 30}, rf"num_frames={FRAMES} \(now 30\);"),
        ({"seconds": 2}, rf"num_frames={FRAMES} \(now 48\);"),
        (
            {"negative_prompt": "grey", "overrides": {"guidance_scale": 2}},
            r'negative_prompt=null \(now "grey"\), sampling.guidance_scale=1.0 \(now 2.0\);',
        ),
        ({"size": "32x48"}, r"sampling.height=\d+ \(now 48\), sampling.width=\d+ \(now 32\);"),
        ({"overrides": {"num_inference_steps": 9}}, r"sampling.num_inference_steps=\d+ \(now 9\);"),
        (
            {"overrides": {"timed_prompts": {"0s": PROMPTS[0], "0.2s": "a blue seven"}}},
            r'prompt_schedule=\[\] \(now \[\[1, "a blue seven"\]\]\);',
        ),
        ({"image": "picture.png"}, r'image=absent \(now "given"\);'),
        ({"seed": 5}, r"seed=\d{3,} \(now 5\);"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_complete_shot_that_is_asked_for_otherwise_is_refused(
    done: Path, model: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    (tmp_path / "picture.png").touch()
    shot = {"id": "shot-000", "prompt": PROMPTS[0], **changed}
    manifest = write_manifest(tmp_path / "m.jsonl", [shot])
    with pytest.raises(ManifestError, match=rf"line 1: id=shot-000 was made with {said} give what is changed"):
        Intake(str(manifest), Tree(str(done)), Kinds(farm_config(model))).first()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preview_decoder": "rgb"}, 'was made with preview_decoder=absent (now "rgb")'),
        ({"decoder_tile": 32}, "was made with decoder_tile=absent (now 32)"),
        ({"threads_per_stage": 2}, "was made with threads=1 (now 2)"),
        ({"save_latents": True}, "is complete, without the latents of save_latents=true"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_complete_shot_is_compared_as_sample_compares_its_videos(
    done: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], said: str
) -> None:
    """A preview is no deliverable, and latents that are asked for are there or the shot is not complete."""
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(1))
    with pytest.raises(ManifestError, match=re.escape(f"line 1: id=shot-000 {said}; give what is changed")):
        Intake(str(manifest), Tree(str(done)), Kinds(farm_config(model, **settings))).first()
    (tmp_path / "sampled").mkdir()
    for name in ("video.mp4", "video.json"):
        shutil.copy(done / "shots/shot-000" / name, tmp_path / "sampled" / name)
    words = [PROMPTS[0], f"model={model}", f"num_frames={FRAMES}", "guidance_scale=1"]
    words += [f"seed={seed_of(Shot('shot-000', ''), 0)}", f"output={tmp_path}/sampled/video.mp4"]
    assert cli.main(["sample", *words, *(f"{name}={value}" for name, value in settings.items())]) == 2
    assert f"output={tmp_path}/sampled/video.mp4 {said}, and its sidecar" in capsys.readouterr().err


def test_latents_that_are_there_are_those_that_are_asked_for(model: Path, tmp_path: Path) -> None:
    manifest, out = write_manifest(tmp_path / "m.jsonl", some_shots(1)), tmp_path / "out"
    config = farm_config(model, save_latents=True)
    assert run_farm(config, manifest, out)["done"] == 1
    assert run_farm(config, manifest, out)["done_before"] == 1
    (out / "shots/shot-000/video.safetensors").unlink()
    with pytest.raises(ManifestError, match="without the latents"):
        run_farm(config, manifest, out)


def test_a_complete_shot_is_that_of_the_same_words_and_weights_on_whatever_it_was_made(
    done: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots = [*some_shots(2), {"id": "other", "prompt": PROMPTS[2], "size": "32x48", "seconds": FRAMES / 24}]
    shots[2]["overrides"] = {"num_inference_steps": 9}
    manifest = write_manifest(tmp_path / "m.jsonl", shots)
    tree = Tree(str(done))
    monkeypatch.setattr(tree, "keep", lambda _, found, __: len(list(found)))
    monkeypatch.setattr(tree, "shots_of", lambda _: iter(checked(str(manifest))))
    kinds = Kinds(farm_config(model))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("pavdm_dist.commands.origin.versions", lambda: dict.fromkeys(versions(), "9"))
        elsewhere.setattr(PAVDMPipeline, "computed_on", {"device": "cuda", "decoder_device": "cuda"})
        elsewhere.setattr(PAVDMPipeline, "dtype_name", "bfloat16")
        assert Intake(str(manifest), tree, kinds).first().done == 3
    kinds._identity = "other weights"
    with pytest.raises(ManifestError, match=r'3 line\(s\) .*id=shot-000 was made with weights="'):
        Intake(str(manifest), tree, kinds).first()


def test_status_says_what_the_files_say(
    done: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = status_report(str(done))
    assert (report["shots"], report["done"], report["queued"]) == (3, 3, 0)
    assert report["seconds_of_video"] == pytest.approx(3 * FRAMES / 24, abs=0.01) and report["seconds_left"] == 0
    assert cli.main(["farm", "status", str(done), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 3
    with pytest.raises(ConfigError, match="is no folder of a farm"):
        status_report(str(tmp_path))
    tree = Tree(str(tmp_path))
    assert tree.state("x").standing == "queued"
    lock = OutputLock.acquire(tree.output("x"))
    state = tree.state("x")
    assert state.standing == "running" and state.by.startswith(f"process {os.getpid()} on")
    lock.release()
    assert tree.state("x").standing == "queued"
    tree.mark("x", "skip")
    assert tree.state("x").standing == "skipped"
    tree.unmark("x")
    tree.fail("x", Failure("why", log=("one", "two"), shot={"id": "x"}))
    failure = tree.state("x").failure
    assert failure is not None and (failure.error, failure.log) == ("why", ("one", "two"))


def test_bad_shots_fail_alone_are_recorded_and_tried_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shots = some_shots(2)
    shots[0]["prompt"] = "a green three"
    shots.insert(1, {"id": "bad", "prompt": "a red three", "image": "picture.png", "priority": 5})
    (tmp_path / "picture.png").write_bytes(b"no picture")
    manifest, out = write_manifest(tmp_path / "m.jsonl", shots), tmp_path / "out"
    words = [
        "farm",
        "run",
        str(manifest),
        "--out",
        str(out),
        f"model={model}",
        f"num_frames={FRAMES}",
        "guidance_scale=1",
    ]
    assert cli.main(words) == 101
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"pavdm: 1 of 3 shots failed, none are left: `pavdm farm status \S+` says why", said)
    assert sorted(latents_of(out)) == ["shot-000", "shot-001"]
    failure = Tree(str(out)).state("bad").failure
    assert failure is not None and failure.kind == "input" and "picture.png: is no readable picture" in failure.error
    assert any("shot bad: failed" in line for line in failure.log)
    (line,) = (out / "failed.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "bad"
    assert [shot.id for shot in checked(str(out / "failed.jsonl"))] == ["bad"]
    assert cli.main(words) == 101  # it stays failed
    report = status_report(str(out))
    assert report["failures"] == [{"id": "bad", "kind": "input", "error": failure.error}]
    (log,) = out.glob("logs/*.jsonl")
    told = [json.loads(text) for text in log.read_text().splitlines()]
    assert any(entry.get("shot") == "bad" and entry["renderer"] == "renderer-1" for entry in told)
    texts = [entry for entry in told if entry["logger"] == "pavdm_dist.codecs.text"]
    assert [entry["shot"] for entry in texts] == ["shot-000"], "rooms below, which know no shots, say whose a line is"
    Image.new("RGB", (48, 32)).save(tmp_path / "picture.png")
    assert cli.main(["farm", "retry", str(out), "none"]) == 2
    assert "id=none: has not failed in" in capsys.readouterr().err
    record = (out / "shots/bad/failed.json").read_bytes()
    for word, refused in (("model=none", "none"), ("height=50", "height=50")):  # before or while the model is opened
        assert cli.main(["farm", "retry", str(out), word]) == 2
        assert refused in capsys.readouterr().err
        assert (out / "shots/bad/failed.json").read_bytes() == record
    assert cli.main(["farm", "retry", str(out)]) == 0
    assert sorted(latents_of(out)) == ["bad", "shot-000", "shot-001"]


def test_marked_shots_are_left_out_and_too_many_failures_end_it(model: Path, tmp_path: Path) -> None:
    shots, out = some_shots(3), tmp_path / "out"
    Tree(str(out)).mark("shot-001", "skip")
    report = run_farm(farm_config(model), write_manifest(tmp_path / "m.jsonl", shots), out)
    assert (report["done"], report["cancelled"], sorted(latents_of(out))) == (2, 1, ["shot-000", "shot-002"])
    (tmp_path / "bad.png").write_bytes(b"")
    bad = [{"id": f"bad-{i}", "prompt": "a red three", "image": "bad.png", "priority": 9 - i} for i in range(3)]
    manifest = write_manifest(tmp_path / "more.jsonl", [*bad, *some_shots(3, size="32x48", seed=3)])
    with pytest.raises(FailedVideosError, match="2 of 6 shots failed, 4 are left") as ended:
        run_farm(farm_config(model, {"max_failed": 1}), manifest, tmp_path / "out2")
    assert ended.value.count == 2


def test_new_lines_are_taken_in_and_bad_ones_told_of(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, grew = write_manifest(tmp_path / "m.jsonl", some_shots(1)), Pool.grew
    fault = "new shots cannot be taken in: ManifestError: "

    def grow(self: Pool, renderer: Any, shot: Shot, chunk: Any) -> None:
        grew(self, renderer, shot, chunk)
        if chunk.index == 0 and shot.id == "shot-000":
            with manifest.open("a") as file:
                file.write('{"id": "x"}\n')
            _until(lambda: fault in caplog.text)
            write_manifest(manifest, some_shots(3))

    monkeypatch.setattr(Pool, "grew", grow)
    monkeypatch.setattr("pavdm_dist.farm.run.TICK_S", 0.02)
    report = run_farm(farm_config(model), manifest, tmp_path / "out")
    assert (report["shots"], report["done"], len(latents_of(tmp_path / "out"))) == (3, 3, 3)
    assert f"{fault}manifest={manifest}: 1 line(s) cannot be used: line 2: prompt is missing; it must" in caplog.text


def test_a_line_whose_clip_is_still_being_copied_is_taken_in_once_it_is_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The manifest does not change again; what is wrong is told of once."""
    manifest, picture, grew = write_manifest(tmp_path / "m.jsonl", some_shots(1)), tmp_path / "late.png", Pool.grew
    late = {"id": "late", "prompt": PROMPTS[0], "image": "late.png"}

    def grow(self: Pool, renderer: Any, shot: Shot, chunk: Any) -> None:
        grew(self, renderer, shot, chunk)
        if chunk.index == 0 and shot.id == "shot-000":
            write_manifest(manifest, [*some_shots(1), late])
            _until(lambda: caplog.text.count("late.png: no such file") == 1)
            looked = len(looks)
            _until(lambda: len(looks) > looked + 1)
            Image.new("RGB", (48, 32)).save(picture)

    looks, more = list[None](), Intake.more
    monkeypatch.setattr(Intake, "more", lambda self: looks.append(None) or more(self))
    monkeypatch.setattr(Pool, "grew", grow)
    monkeypatch.setattr("pavdm_dist.farm.run.TICK_S", 0.02)
    report = run_farm(farm_config(model), manifest, tmp_path / "out")
    assert (report["shots"], report["done"], sorted(latents_of(tmp_path / "out"))) == (2, 2, ["late", "shot-000"])
    assert caplog.text.count("late.png: no such file") == 1


def test_a_fault_of_the_manifest_that_stays_ends_the_farm_by_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 0 would say that what it asks for is there. What has failed is listed and said all the same."""
    (tmp_path / "bad.png").write_bytes(b"")
    shots = [{"id": "bad", "prompt": "a red three", "image": "bad.png", "priority": 9}, *some_shots(1)]
    manifest, out, grew = write_manifest(tmp_path / "m.jsonl", shots), tmp_path / "out", Pool.grew

    def grow(self: Pool, renderer: Any, shot: Shot, chunk: Any) -> None:
        grew(self, renderer, shot, chunk)
        write_manifest(manifest, [*shots, {"id": "x", "prompt": "a", "video": "none.mp4"}])

    monkeypatch.setattr(Pool, "grew", grow)
    words = ["farm", "run", str(manifest), "--out", str(out), f"model={model}", f"num_frames={FRAMES}"]
    assert cli.main([*words, "guidance_scale=1"]) == 2
    said = f"none.mp4: no such file; 1 of 2 shots failed (`pavdm farm status {out}` says why)"
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)
    assert list(latents_of(out)) == ["shot-000"]
    assert [shot.id for shot in checked(str(out / "failed.jsonl"))] == ["bad"]


def test_new_lines_that_cannot_be_taken_in_now_are_tried_again_beside_the_rendering(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub is away, then a disk; meanwhile renderers are looked after."""
    manifest, out = write_manifest(tmp_path / "m.jsonl", some_shots(1, num_frames=40)), tmp_path / "out"
    prepare, grew, tick = Kinds.prepare_texts, Pool.grew, Pool.tick
    faults: list[Exception | None] = [None, CheckpointError("no such hub"), OSError("no such disk"), None]
    taken_in, looked_after = threading.Event(), threading.Event()
    asked = list[list[str]]()

    def prepared(self: Kinds, shots: list[Shot]) -> None:
        asked.append([shot.id for shot in shots])
        if (fault := faults.pop(0)) is not None:
            raise fault
        prepare(self, shots)
        if len(shots) == 2:
            looked_after.clear()
            assert looked_after.wait(20)
            taken_in.set()

    def slow(self: Pool, renderer: Any, shot: Shot, chunk: Any) -> None:
        grew(self, renderer, shot, chunk)
        if chunk.index == 0 and shot.id == "shot-000":
            write_manifest(manifest, some_shots(3, num_frames=40))
            assert taken_in.wait(20)

    def ticked(self: Pool) -> None:
        tick(self)
        looked_after.set()

    monkeypatch.setattr("pavdm_dist.farm.run.TICK_S", 0.02)
    monkeypatch.setattr(Kinds, "prepare_texts", prepared)
    monkeypatch.setattr(Pool, "grew", slow)
    monkeypatch.setattr(Pool, "tick", ticked)
    report = run_farm(farm_config(model), manifest, out)
    assert (report["shots"], report["done"], report["left"], report["frames"]) == (3, 3, 0, 120)
    assert asked == [["shot-000"], *3 * [["shot-001", "shot-002"]]]
    for fault in ("CheckpointError: no such hub", "OSError: no such disk"):
        assert f"new shots cannot be taken in: {fault}; they are tried again" in caplog.text


@pytest.mark.parametrize(
    ("fault", "said"), [(CheckpointError("no such hub"), "no such hub"), (OSError("away"), "taken in: OSError: away")]
)
def test_new_lines_that_cannot_be_taken_in_end_a_farm_that_has_nothing_else_to_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, said: str
) -> None:
    """No status 0 for what nobody has rendered."""
    manifest, out, more = write_manifest(tmp_path / "m.jsonl", some_shots(1)), tmp_path / "out", Intake.more

    def late(self: Intake) -> Any:
        if latents_of(out):
            write_manifest(manifest, some_shots(2))
        return more(self)

    def prepared(_: Kinds, shots: list[Shot]) -> None:
        if shots[0].id == "shot-001":
            raise fault

    monkeypatch.setattr(Intake, "more", late)
    monkeypatch.setattr(Kinds, "prepare_texts", prepared)
    with pytest.raises(ConfigError, match=said):
        run_farm(farm_config(model), manifest, out)
    assert list(latents_of(out)) == ["shot-000"]


def test_a_shot_in_other_hands_is_waited_for_and_taken_over(model: Path, tmp_path: Path) -> None:
    """Its holder is alive at first; then it is gone, and left its lock."""
    out = tmp_path / "out"
    output = out / "shots/shot-000/video.mp4"
    code = f"from pavdm_dist.io.lock import OutputLock\nlock = OutputLock.acquire({str(output)!r})\n"
    code += "print('held', flush=True)"
    holder = Program(["-c", f"{code}\nimport time\ntime.sleep(100)"])
    assert any("held" in line for line in holder.lines())
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(2))
    order: list[str] = []

    def end_it() -> None:
        while "shot-001" not in latents_of(out):
            time.sleep(0.02)
        order.append("the other is done")
        assert Tree(str(out)).state("shot-000").standing == "running"
        holder.kill()

    thread = threading.Thread(target=end_it)
    thread.start()
    report = run_farm(farm_config(model), manifest, out)
    thread.join()
    assert order and (report["done"], report["failed"]) == (2, 0)


def test_a_farm_that_is_told_to_end_saves_all_and_the_next_goes_on(done: Path, model: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of a long shot: status 143, and the same command ends with the same video."""
    long, out = 300, tmp_path / "out"
    manifest = write_manifest(tmp_path / "m.jsonl", [{"id": "long", "prompt": PROMPTS[0], "num_frames": long}])
    words = ["farm", "run", str(manifest), f"model={model}", "guidance_scale=1", "chunks_per_segment=2"]
    process = Program(["-m", "pavdm_dist", *words, "--out", str(out), "--openjd", "--json"])
    parts = out / "shots/long/video.mp4.parts"
    lines, early = process.lines(), list[str]()
    for line in lines:
        early.append(line)
        if len(list(parts.glob("segment-*.mp4"))) >= 2 or "openjd_progress: 2" in line:
            break
    process.send_signal(signal.SIGTERM)
    said = [*early, *lines]
    assert process.returncode == 143, said
    assert any(line.startswith("openjd_status: 0/1 shots, 1 running") for line in said)
    assert said[-1] == "pavdm: interrupted: 1 shots are left, the same command goes on" and parts.is_dir()
    assert Tree(str(out)).state("long").standing == "begun"
    assert status_report(str(out))["begun"] == 1
    again = run_farm(farm_config(model, chunks_per_segment=2), manifest, out)
    whole = run_farm(farm_config(model, chunks_per_segment=2), manifest, tmp_path / "whole")
    assert 0 < again["frames"] < whole["frames"] == long
    assert latents_of(out) == latents_of(tmp_path / "whole")
    assert packets_of(out / "shots/long/video.mp4") == packets_of(tmp_path / "whole/shots/long/video.mp4")


@pytest.mark.parametrize(
    ("moment", "said"),
    [("Intake.first", "nothing was begun, the same command begins"), ("Kinds.prepare_texts", "2 shots are left, the")],
)
def test_a_farm_that_is_told_to_end_while_it_gets_ready_has_nothing_to_save(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    moment: str, said: str,
) -> None:  # fmt: skip
    """No status 0 for what nobody has rendered."""
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(2))
    told = [signal.SIGTERM, signal.SIGINT]
    room = {"Intake": "intake", "Kinds": "kinds"}[moment.partition(".")[0]]
    monkeypatch.setattr(f"pavdm_dist.farm.{room}.{moment}", lambda *_: signal.raise_signal(told.pop(0)))
    words = ["farm", "run", str(manifest), "--out", str(tmp_path / "out"), f"model={model}", f"num_frames={FRAMES}"]
    for status in (143, 130):
        assert cli.main(words) == status
        assert f"pavdm: interrupted: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["SIGTERM", "drain"])
@pytest.mark.parametrize(("shots", "status"), [(1, 101), (2, 143)], ids=["none left", "one left"])
def test_a_farm_that_is_told_to_end_hides_no_failure(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    by: str, shots: int, status: int,
) -> None:  # fmt: skip
    """Beside a shot that has failed; a signal and the marker are the same."""
    (tmp_path / "bad.png").write_bytes(b"")
    bad = {"id": "bad", "prompt": "a red three", "image": "bad.png", "priority": 9}
    manifest, out = write_manifest(tmp_path / "m.jsonl", [bad, *some_shots(shots)]), tmp_path / "out"
    ended, tick = Pool.ended, Pool.tick
    over = threading.Event()

    def told(self: Pool, renderer: Any, shot: Shot, how: Any) -> None:
        ended(self, renderer, shot, how)
        if shot.id == "shot-000" and how.how == "done":
            if by == "drain":
                (out / "drain").touch()
            over.set()
            _until(lambda: self._draining_since is not None or shots == 1)

    def ticked(self: Pool) -> None:
        if over.is_set() and by == "SIGTERM" and self._draining_since is None:
            over.clear()
            signal.raise_signal(signal.SIGTERM)
        tick(self)

    monkeypatch.setattr(Pool, "ended", told)
    monkeypatch.setattr(Pool, "tick", ticked)
    monkeypatch.setattr("pavdm_dist.farm.run.TICK_S", 0.02)
    words = ["farm", "run", str(manifest), "--out", str(out), f"model={model}", f"num_frames={FRAMES}"]
    assert cli.main([*words, "guidance_scale=1", "farm.poll_s=0.05"]) == status
    said = "1 of 2 shots failed, none are left" if shots == 1 else "interrupted: 1 shots are left and 1 failed, the"
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert list(latents_of(out)) == ["shot-000"] and (out / "failed.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["progress=deadline"], (["Progress: 25%", "Progress: 100%"], [])),
        (["progress=openjd"], (["openjd_progress: 25.0", "openjd_progress: 100.0"], [])),
        (["--openjd"], ([], ["openjd_progress: 25.0", "openjd_progress: 100.0"])),
        (["--openjd", "progress=openjd"], ([], ["openjd_progress: 25.0", "openjd_progress: 100.0"])),
        ([], ([], [])),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_farm_tells_a_render_farm_what_every_command_tells_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], lines: tuple[list[str], list[str]],
) -> None:  # fmt: skip
    def run(config: Any, manifest: Any, out: Any, progress: Any, only: Any) -> dict[str, Any]:
        bar = progress(24.0)
        bar.total = 200
        for frames in (50, 50, 200):
            bar.show(frames, frames, "1/4 shots")
        return {}

    monkeypatch.setattr("pavdm_dist.farm.run.run_command", run)
    assert cli.main(["farm", "run", "m.jsonl", "--out", str(tmp_path), f"model={model}", *words]) == 0
    captured = capsys.readouterr()
    told = [[line for line in text.splitlines() if "rogress: " in line] for text in (captured.err, captured.out)]
    assert tuple(told) == lines


def test_time_left_follows_from_what_was_written_here_and_what_is_left_of_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ten of a hundred frames were written here in ten seconds; of the rest sixty are there by other hands."""
    now, said = [0.0], io.StringIO()
    bar = FarmProgress(24.0, openjd=said, file=io.StringIO(), clock=lambda: now[0])
    bar.total, bar.before, now[0] = 100, 20, 10.0
    with caplog.at_level(logging.INFO, "pavdm_dist"):
        bar.show(10, 50, "2/4 shots")
    assert "70/100 frames, 2/4 shots" in caplog.text and "0:30 left" in caplog.text
    bar.show(12, 90, "4/4 shots")
    percents = [line for line in said.getvalue().splitlines() if "progress" in line]
    assert percents == ["openjd_progress: 70.0", "openjd_progress: 100.0"]


def test_a_shot_that_grows_is_told_of_though_no_other_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Schedulers end what has logged nothing for too long: a line every ten seconds, and none where nothing comes."""
    now = [0.0]
    bar = FarmProgress(24.0, file=io.StringIO(), clock=lambda: now[0])
    bar.total = 1000
    with caplog.at_level(logging.INFO, "pavdm_dist"):
        for second in range(1, 61):
            now[0] = float(second)
            bar.show(min(second, 40), min(second, 40), "0/1 shots, 1 running")
    told = [int(message.partition("/")[0]) for message in caplog.messages]
    assert told == [10, 20, 30, 40]


def test_a_marker_drains_the_farm(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/drain").touch()
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(3))
    with pytest.raises(Stopped, match=r"^[1-3] shots are left, the same command goes on$") as ended:
        run_farm(farm_config(model), manifest, tmp_path / "out")
    assert ended.value.number == signal.SIGTERM


def test_bad_input_is_one_sentence_before_anything_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, devices = tmp_path / "out", ["cluster.devices=2"]
    cases = [
        ([{"prompt": "a", "overrides": {"model": "x"}}], [], r"line 1: overrides: model is not a shot's to change"),
        ([{"prompt": "a", "overrides": {"mode": "sideways"}}], [], r"line 1: overrides: mode=sideways: must be"),
        ([{"prompt": "a", "overrides": {"fps": {}}}], [], r"line 1: overrides: fps=\{\}: must be a number"),
        ([{"prompt": "a", "overrides": {"displaced": 3}}], [], r"line 1: overrides: displaced=3: is a section"),
        ([{"prompt": "a", "size": "50x50"}], [], r"line 1: height=50 cannot be .*nearest legal"),
        ([{"prompt": "a " * 50}], [], r"line 1: .*tokens|line 1: .*words"),
        ([{"prompt": "a", "video": "none.mp4"}], [], r"line 1: video=\S+none.mp4: no such file"),
        ([{"prompt": "a"}], ["prompt=b"], r"prompt=b: is a shot's own; write it into the manifest"),
        ([{"prompt": "a"}], ["farm.renderers=2"], r"farm.renderers=2: without stages this process is the only one"),
        ([{"prompt": "a"}], [*devices, "cluster.chart=a.png"], r"cluster.chart=a.png: .* pavdm plan draws one"),
        ([{"prompt": "a"}], [*devices, "cluster.videos=3"], r"cluster.videos=3: the manifest says how many; leave"),
        ([{"prompt": "a"}], ["farm.trace=true"], r"farm.trace=true: without stages there is nothing to trace"),
        ([{"prompt": "a"}], ["farm.rederers=2"], r"farm: no such key 'rederers', did you mean renderers"),
    ]  # fmt: skip
    for shots, words, said in cases:
        manifest = write_manifest(tmp_path / "m.jsonl", shots)
        assert cli.main(["farm", "run", str(manifest), "--out", str(out), f"model={model}", *words]) == 2
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("pavdm: ")]
        assert re.search(said, line), line
        assert not (out / "shots").exists() and not list(out.glob("manifests/*.jsonl"))


def test_overrides_of_a_wrong_kind_are_refused_whichever_they_are(model: Path) -> None:
    """Each setting with values of every kind of JSON: what it cannot be is a sentence, and never a fault."""
    kinds, refused = Kinds(farm_config(model)), dict[str, str]()
    for name in OVERRIDES:
        for value in ({"a": {}}, [None], "x", 10**400):
            try:
                kinds.check(Shot("a", "a red three", overrides={name: value}))
            except ConfigError as error:
                refused[name] = str(error)
    assert refused.keys() == set(OVERRIDES)
    assert all("\n" not in said and len(said) < 1000 for said in refused.values())


def test_a_dry_run_plans_and_writes_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shots = [*some_shots(3), *some_shots(1, id="x", size="32x48", seconds=2)]
    manifest = write_manifest(tmp_path / "m.jsonl", shots)
    words = ["farm", "run", str(manifest), "--out", str(tmp_path / "out"), f"model={model}", f"num_frames={FRAMES}"]
    priced = ["cluster.devices=2", "cluster.price_per_device_hour=2"]
    assert cli.main([*words, "--dry-run", "--json", *priced]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["shots"], report["kinds"]) == (4, 2) and not (tmp_path / "out").exists()
    assert report["seconds_of_video"] == pytest.approx(3 * FRAMES / 24 + 2, abs=0.001)
    first, second = report["plans"]
    assert (first["shots"], second["shots"], second["size"], second["num_frames"]) == (3, 1, "32x48", 48)
    assert first["memory_gib"] and first["renderers"] >= 1 and report["total_cost"] >= 0
    assert cli.main([*words, "--dry-run"]) == 0 and "layer_split" in capsys.readouterr().out.replace(
        "layers", "layer_split"
    )


def test_settings_are_kept_without_secrets(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    manifest = "memory://me:word@host/m.jsonl"
    with fsspec.open(manifest, "w") as file:
        file.write('{"id": "x", "prompt": "a red three"}\n')
    monkeypatch.setattr("pavdm_dist.farm.run._rendered", lambda *_: None)
    config = farm_config(model, num_stages=1, ray_address="ray://me:word@host:10001")
    try:
        run_farm(config, manifest, tmp_path / "out")  # type: ignore[arg-type]
    finally:
        fsspec.filesystem("memory").rm("/", recursive=True)
    kept = json.loads((tmp_path / "out/farm.json").read_text())
    assert kept["manifest"] == "memory://***@host/m.jsonl"
    assert kept["settings"]["ray_address"] == "ray://***@host:10001"
    assert "word" not in "".join(path.read_text() for path in tmp_path.rglob("*.json*"))


def test_in_a_store_as_on_a_disk(model: Path, tmp_path: Path) -> None:
    """fsspec's memory stands for any store: the tree is the same, and finished shots are known again."""
    from fsspec.implementations.memory import MemoryFileSystem

    out = "memory://farm-test"
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(2))
    try:
        report = run_farm(farm_config(model), manifest, out)  # type: ignore[arg-type]
        assert report["done"] == 2
        assert run_farm(farm_config(model), None, out)["done_before"] == 2  # type: ignore[arg-type]
        tree = Tree(out)
        assert {tree.state(id, names).standing for id, names in tree.scan().items()} == {"done"}
        assert status_report(out)["done"] == 2
    finally:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.slow  # above is what it is made of
def test_two_farms_on_one_folder_share_the_shots(model: Path, tmp_path: Path) -> None:
    """Each shot is made by one of them, and both end when all is done."""
    logging.getLogger("pavdm_dist").setLevel(logging.INFO)
    shots, out = some_shots(6, num_frames=80), tmp_path / "out"
    manifest = write_manifest(tmp_path / "m.jsonl", shots)
    words = ["farm", "run", str(manifest), "--out", str(out), f"model={model}", "guidance_scale=1", "farm.poll_s=0.1"]
    other = Program(["-m", "pavdm_dist", *words])
    for line in other.lines():
        if ": begun" in line:
            break
    mine = run_farm(farm_config(model), manifest, out)
    said, _ = other.communicate(60)
    assert other.returncode == 0, said
    assert len(latents_of(out)) == 6 and mine["failed"] == 0
    made: dict[str, list[str]] = {shot["id"]: [] for shot in shots}
    for log in out.glob("logs/*.jsonl"):
        for text in log.read_text().splitlines():
            entry = json.loads(text)
            if entry["message"].endswith(": done"):
                made[entry["shot"]].append(log.name)
    assert all(len(by) == 1 for by in made.values()), made
    assert len({by[0] for by in made.values()}) == 2, "the other one had nothing to do"


def test_what_is_left_of_a_complete_shot_is_tidied_up(done: Path, model: Path) -> None:
    """Its process was killed between the sidecar and the end, and left its lock."""
    parts = done / "shots/shot-000/video.mp4.parts"
    code = f"import os\nfrom pavdm_dist.io.lock import OutputLock\nlock = OutputLock.acquire({str(parts)[:-6]!r})\n"
    Program(["-c", f"{code}os.kill(os.getpid(), 9)"]).communicate(60)
    (parts / "playlist.ffconcat").write_text("ffconcat version 1.0\n")
    assert (parts / "lock.json").exists()
    assert run_farm(farm_config(model), None, done)["done_before"] == 3
    assert not parts.exists()


def test_a_cancelled_shot_ends_at_its_next_chunk_and_may_go_on_later(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, grew = tmp_path / "out", Pool.grew
    tree = Tree(str(out))

    def mark(self: Pool, renderer: Any, shot: Shot, chunk: Any) -> None:
        grew(self, renderer, shot, chunk)
        if shot.id == "shot-000" and chunk.index == 1:
            tree.mark(shot.id, "cancel")
            time.sleep(0.1)  # longer than the farm looks away
            self.tick()

    monkeypatch.setattr(Pool, "grew", mark)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(2, num_frames=60))
    report = run_farm(farm_config(model, chunks_per_segment=1), manifest, out)
    assert (report["done"], report["cancelled"], report["left"]) == (1, 1, 0)
    assert tree.state("shot-000").standing == "cancelled" and tree.seconds_rendered("shot-000") > 0
    tree.unmark("shot-000")
    again = run_farm(farm_config(model, chunks_per_segment=1), manifest, out)
    assert again["done"] == 1 and again["frames"] < 60


def test_the_planner_sizes_the_pool(model: Path) -> None:
    config = farm_config(model, {"plan": True}, cluster=ClusterConfig(devices=3, tflops=1e-6))
    chosen = sized(config, 100)
    # The model fits one device: with many shots plain replicas do the most work.
    assert (chosen.farm.renderers, chosen.num_stages, chosen.mode) == (3, 1, "window")
    alone = sized(config, 1)
    assert alone.farm.renderers == 1 and alone.num_stages >= 1
    with pytest.raises(ConfigError, match=r"farm.plan=true: the planner needs to know of devices"):
        validate_farm(FarmConfig(farm=PoolConfig(plan=True)))


def test_latents_that_are_not_finite_fail_their_shot_at_once(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (weights,) = broken.glob("transformer/*.safetensors")
    tensors = load_file(weights)
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"] * float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(FailedVideosError, match="1 of 1 shots failed"):
        run_farm(farm_config(broken), write_manifest(tmp_path / "m.jsonl", some_shots(1)), tmp_path / "out")
    failure = Tree(str(tmp_path / "out")).state("shot-000").failure
    assert failure is not None and (failure.kind, failure.attempts) == ("video", 1)
    assert "not finite" in failure.error


def test_a_farm_that_is_not_to_wait_saves_what_is_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a second signal, or the end of ``drain_s``, tells it."""
    out, config = tmp_path / "out", farm_config(model, chunks_per_segment=2)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(1, num_frames=400))
    with monkeypatch.context() as patched:
        patched.setattr(Pool, "grew", stops_at_chunk(4))
        report = run_farm(config, manifest, out)
    assert (report["done"], report["left"]) == (0, 1) and Tree(str(out)).state("shot-000").standing == "begun"
    told, shown = FarmProgress.show, list[tuple[int, int]]()

    def show(self: FarmProgress, frames: int, reached: int, status: str) -> None:
        shown.append((frames, reached))
        told(self, frames, reached, status)

    with monkeypatch.context() as patched:
        patched.setattr(FarmProgress, "show", show)
        again = run_farm(config, manifest, out)
    whole = run_farm(config, manifest, tmp_path / "whole")
    assert again["frames"] < whole["frames"] == 400 and latents_of(out) == latents_of(tmp_path / "whole")
    assert shown[-1] == (again["frames"], 400), "what was there before counts, and an end is the end"


def test_of_what_adaptive_resync_did_nothing_is_kept_but_in_the_sidecars(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renderer's pipeline has one run for as long as it lives."""
    adaptive = DisplacedConfig(None, exact_growing=False, adaptive=1e-6)
    config = farm_config(model, mode="displaced", displaced=adaptive, num_inference_steps=9)
    pipelines, make = list[PAVDMPipeline](), Kinds.pipeline
    monkeypatch.setattr(Kinds, "pipeline", lambda *given: pipelines.append(make(*given)) or pipelines[-1])
    shots = some_shots(2, num_frames=40)
    assert run_farm(config, write_manifest(tmp_path / "m.jsonl", shots), tmp_path / "out")["done"] == 2
    assert pipelines and not any(pipeline.resyncs for pipeline in pipelines)
    for shot in shots:
        sidecar = read_sidecar(tmp_path / "out/shots" / shot["id"] / "video.mp4")
        assert sidecar["extra"]["resyncs"][:2] == [6, 9]
