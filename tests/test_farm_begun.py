"""Shots that another farm has begun: what they need to go on with, and what becomes of those that cannot here."""

from __future__ import annotations

import logging
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from farms import farm_config, latents_of, run_farm, some_shots, stops_at_chunk, write_manifest
from helpers import tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.commands.origin import is_of_machine
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError, FailedVideosError
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.settings import FarmConfig
from pavdm_dist.farm.shot import make_shot
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.leftovers import identity_begun_with, settings_begun_with
from pavdm_dist.io.metadata import read_sidecar, versions
from pavdm_dist.io.parts import parts_folder
from pavdm_dist.io.state import BegunOtherwiseError, RecordingState, write_state
from pavdm_dist.serve.settings import ServeConfig

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def _begin(config: Any, manifest: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Pool, "grew", stops_at_chunk(3))
        assert run_farm(config, manifest, out)["left"] == 1
    assert Tree(str(out)).state("shot-000").standing == "begun"


def _open(kinds: Kinds, out: Path, line: dict[str, Any]) -> None:
    """A shot's files as a renderer opens them; what is wrong with them is raised."""
    videos = kinds.videos(make_shot(line, "test"), Tree(str(out)).output(line["id"]), kinds.pipeline())
    assert not list(videos.begun([]))
    (video,) = videos.all
    assert video.error is not None and video.error.__cause__ is not None
    raise video.error.__cause__


def test_a_shot_begun_by_other_versions_is_left_to_who_has_these(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are rendered; it stays begun, is no failure, and goes on where it fits."""
    out, tree, config = tmp_path / "out", Tree(str(tmp_path / "out")), farm_config(model, chunks_per_segment=2)
    first = write_manifest(tmp_path / "first.jsonl", some_shots(1, num_frames=60))
    _begin(config, first, out, monkeypatch)
    both = write_manifest(tmp_path / "m.jsonl", some_shots(2, num_frames=60))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("pavdm_dist.commands.origin.versions", lambda: {**versions(), "torch": "9.9"})
        words = ["farm", "run", str(both), "--out", str(out), f"model={model}", "guidance_scale=1"]
        assert cli.main([*words, "chunks_per_segment=2", "farm.poll_s=0.05"]) == 2
        *log, said = capsys.readouterr().err.splitlines()
        assert said.startswith(f"pavdm: out={out}: 1 of 2 shots are left, 1 begun by other versions, on other")
        with pytest.raises(BegunOtherwiseError, match="1 of 1 shots are left"):
            run_farm(config, first, out)
    assert list(latents_of(out)) == ["shot-001"] and tree.state("shot-000").standing == "begun"
    (told,) = [line for line in log if "WARNING shot shot-000: left as it was begun: " in line]
    assert 'was begun with versions.torch="' in told and '(now "9.9"); it goes on where all is the same' in told
    assert "--overwrite" not in "".join(log)
    assert run_farm(config, both, out)["done"] == 1 and tree.state("shot-000").standing == "done"


@pytest.mark.parametrize("how", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_begun_shot_that_is_asked_for_otherwise_is_refused_before_anything_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    """As a complete one is; the command that began it goes on. Shots that nobody has begun cost no look at a state."""
    out, config = tmp_path / "out", farm_config(model)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(2, num_frames=60))
    _begin(config, write_manifest(tmp_path / "first.jsonl", some_shots(1, num_frames=60)), out, monkeypatch)
    looked: list[str] = []

    def look(output: str) -> Any:
        looked.append(output)
        return identity_begun_with(output)

    monkeypatch.setattr("pavdm_dist.farm.begun.identity_begun_with", look)
    words = ["farm", "run", str(manifest), "--out", str(out), f"model={model}", "guidance_scale=1", *how]
    assert cli.main([*words, "seed=5", "num_inference_steps=9"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "line 1: id=shot-000 was begun with seed=" in said and "sampling.num_inference_steps=" in said
    assert said.endswith(f"or remove {out}/shots/shot-000/video.mp4.parts, and it is begun anew")
    assert looked == [f"{out}/shots/shot-000/video.mp4"]
    tree = Tree(str(out))
    assert tree.state("shot-000").standing == "begun" and list(tree.scan()) == ["shot-000"]
    tree.mark("shot-000", "skip")  # nothing of it is asked for
    assert cli.main([*words, "seed=5", "--dry-run"]) == 0
    tree.unmark("shot-000")
    assert run_farm(config, manifest, out)["done"] == 2


def test_a_shot_that_was_begun_otherwise_meanwhile_stays_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said of it is nothing that no farm can take."""
    out, config = tmp_path / "out", farm_config(model)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(1, num_frames=60))
    _begin(config, manifest, out, monkeypatch)
    other = write_manifest(tmp_path / "other.jsonl", some_shots(1, num_frames=60, seed=7))
    with monkeypatch.context() as before:
        before.setattr("pavdm_dist.farm.begun.check_begun", lambda *_: None)
        assert cli.main(["farm", "run", str(other), "--out", str(out), f"model={model}", "guidance_scale=1"]) == 2
    *log, said = capsys.readouterr().err.splitlines()
    assert "1 of 1 shots are left, 1 begun by other versions, on other devices or with other settings" in said
    (told,) = [line for line in log if "WARNING shot shot-000: left as it was begun: " in line]
    assert "was begun with seed=" in told and "--overwrite" not in "".join(log)
    assert f"once {out}/shots/shot-000/video.mp4.parts is removed (where it counts as failed, by `pavdm farm" in told
    assert not (out / "shots/shot-000/failed.json").exists()
    assert run_farm(config, manifest, out)["done"] == 1


def test_what_a_video_was_begun_with_is_in_the_head_of_a_state_that_has_one(tmp_path: Path) -> None:
    output = str(tmp_path / "video.mp4")
    parts = Path(parts_folder(output))
    parts.mkdir()
    assert identity_begun_with(output) is None
    for seed in (1, 2):
        write_state(parts, RecordingState({"seed": seed}))
    assert identity_begun_with(output) == {"seed": 2}
    whole = (parts / "state.safetensors").read_bytes()
    for torn in (b"", b"\xff" * 100, whole[:40], whole[:8] + b"[]" + whole[10:]):
        (parts / "state.safetensors").write_bytes(torn)
        assert identity_begun_with(output) == {"seed": 1}, "that of the state before"
    (parts / "state.previous.safetensors").unlink()
    assert identity_begun_with(output) is None


@pytest.mark.parametrize(("steps", "failed"), [(9, 1), (6, 0)])
def test_a_shot_that_another_process_has_made_otherwise_meanwhile_is_none_of_this_farms(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    steps: int, failed: int,
) -> None:  # fmt: skip
    """It fails here, and its record stays that of a complete one; made as it is asked for it is done."""
    out, elsewhere, shots = tmp_path / "out", tmp_path / "elsewhere", some_shots(2)
    other = farm_config(model, num_inference_steps=steps)
    run_farm(other, write_manifest(tmp_path / "other.jsonl", shots[1:]), elsewhere)
    grew = Pool.grew
    caplog.set_level(logging.INFO, "pavdm_dist")

    def comes(self: Pool, renderer: Any, shot: Any, chunk: Any) -> None:
        grew(self, renderer, shot, chunk)
        if not (out / "shots/shot-001").exists():
            shutil.copytree(elsewhere / "shots/shot-001", out / "shots/shot-001")

    monkeypatch.setattr(Pool, "grew", comes)
    config, manifest = farm_config(model, num_inference_steps=6), write_manifest(tmp_path / "m.jsonl", shots)
    if failed:
        with pytest.raises(
            FailedVideosError, match=r"0 of 2 .* are left, 1 completed by another process, not as"
        ) as ended:
            run_farm(config, manifest, out)
        assert ended.value.count == 1
        said = "shot shot-001: failed: id=shot-001 was made with sampling.num_inference_steps=9 (now 6)"
    else:
        assert run_farm(config, manifest, out)["done"] == 2
        said = "shot shot-001: is complete already"
    assert said in caplog.text
    assert Tree(str(out)).state("shot-001").standing == "done"
    assert not list(out.glob("shots/*/failed.json")) and not (out / "failed.jsonl").read_text()


def test_what_the_machine_decides_is_what_nobody_has_said() -> None:
    auto, said = SampleConfig(), SampleConfig(dtype="bfloat16", compile="false")
    names = ("versions.torch", "device", "decoder_device", "decoder_threads", "dtype", "compile", "threads", "seed")
    assert [is_of_machine(name, auto) for name in names] == [True] * 6 + [False] * 2
    assert [is_of_machine(name, said) for name in names] == [True] * 4 + [False] * 4


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_micro_batches_that_a_machine_chose_are_those_that_a_shot_was_begun_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, now: int
) -> None:
    """Another number of stages, of videos in flight, or of GPUs would choose others; nobody has asked for any."""
    monkeypatch.setattr("pavdm_dist.commands.resolve._on_gpus", lambda _: True)
    out, config = tmp_path / "out", farm_config(model, mode="displaced", num_inference_steps=9)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(1, num_frames=60))

    def chooses(chunks: int) -> None:
        monkeypatch.setattr("pavdm_dist.commands.resolve.suited_chunks_per_unit", lambda *_: chunks)

    chooses(before)
    _begin(config, manifest, out, monkeypatch)
    (out / "shots/shot-000/video.mp4.parts/settings.yaml").unlink()  # a disk was full when it was written: all the same
    chooses(now)
    assert run_farm(config, manifest, out)["done"] == 1
    sidecar = read_sidecar(out / "shots/shot-000/video.mp4")
    assert sidecar["identity"]["sampling"]["chunks_per_unit"] == before
    assert run_farm(config, manifest, out)["done_before"] == 1, "nor is a complete one asked for otherwise"


@pytest.mark.parametrize(("first", "then"), [(FarmConfig, ServeConfig), (ServeConfig, FarmConfig)])
def test_servers_and_farms_go_on_with_each_others_segments(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: type[FarmConfig], then: type[FarmConfig]
) -> None:
    """Their own sizes of segments differ; of one that somebody has asked for nothing is taken back."""

    def config(kind: type[FarmConfig], **settings: Any) -> FarmConfig:
        plain = farm_config(model)
        shared = {entry.name: getattr(plain, entry.name) for entry in fields(FarmConfig)}
        del shared["chunks_per_segment"]
        return kind(**{**shared, **settings})

    out, manifest = tmp_path / "out", write_manifest(tmp_path / "m.jsonl", some_shots(1, num_frames=60))
    _begin(config(first), manifest, out, monkeypatch)
    assert settings_begun_with(f"{out}/shots/shot-000/video.mp4")["chunks_per_segment"] == first().chunks_per_segment
    kinds = Kinds(config(then, chunks_per_segment=2))
    with pytest.raises(ConfigError, match=rf"chunks_per_segment={first().chunks_per_segment} \(now 2\)"):
        _open(kinds, out, some_shots(1, num_frames=60)[0])
    assert run_farm(config(then), manifest, out)["done"] == 1
    assert read_sidecar(out / "shots/shot-000/video.mp4")["config"]["chunks_per_segment"] == first().chunks_per_segment


def test_a_shot_whose_state_cannot_be_saved_is_not_said_to_be(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full when the farm is told to end: its newest chunks are lost, and what was saved before goes on."""
    out, config = tmp_path / "out", farm_config(model, chunks_per_segment=100)
    manifest = write_manifest(tmp_path / "m.jsonl", some_shots(1, num_frames=60))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def told(self: Pool, renderer: Any, shot: Any, chunk: Any) -> None:
        if chunk.index == 2:
            patched.setattr("pavdm_dist.io.saver.write_state", full)
        stops_at(self, renderer, shot, chunk)

    stops_at = stops_at_chunk(3)
    with monkeypatch.context() as patched, caplog.at_level(logging.INFO, "pavdm_dist"):
        patched.setattr(Pool, "grew", told)
        assert run_farm(config, manifest, out)["left"] == 1
    assert (
        "its newest state is not saved ([Errno 28] No space left on device), it goes on from one before" in caplog.text
    )
    assert "shot-000: not saved, goes on later from its state before: [Errno 28] No space left" in caplog.text
    assert "saved, to go on later" not in caplog.text
    assert run_farm(config, manifest, out)["done"] == 1
