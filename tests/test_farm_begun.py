"""Shots that another farm has begun: what they need to go on with, and what becomes of those that cannot here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from farms import farm_config, latents_of, run_farm, some_shots, stops_at_chunk, write_manifest
from helpers import tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.commands.origin import OtherMachineError, is_of_machine
from pavdm_dist.config import SampleConfig
from pavdm_dist.farm.pool import Pool
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.metadata import read_sidecar, versions

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def _begin(config: Any, manifest: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Pool, "grew", stops_at_chunk(3))
        assert run_farm(config, manifest, out)["left"] == 1
    assert Tree(str(out)).state("shot-000").standing == "begun"


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
        assert said.startswith(f"pavdm: out={out}: 1 of 2 shots are left, 1 begun by other versions, or on other")
        with pytest.raises(OtherMachineError, match="1 of 1 shots are left"):
            run_farm(config, first, out)
    assert list(latents_of(out)) == ["shot-001"] and tree.state("shot-000").standing == "begun"
    (told,) = [line for line in log if "WARNING shot shot-000: left to a machine that it fits: " in line]
    assert 'was begun with versions.torch="' in told and '(now "9.9"); it goes on where all is the same' in told
    assert "--overwrite" not in "".join(log)
    assert run_farm(config, both, out)["done"] == 1 and tree.state("shot-000").standing == "done"


def test_a_shot_that_was_begun_otherwise_fails_without_advice_that_no_farm_can_take(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "out", farm_config(model)
    _begin(config, write_manifest(tmp_path / "m.jsonl", some_shots(1, num_frames=60)), out, monkeypatch)
    again = write_manifest(tmp_path / "m.jsonl", some_shots(1, num_frames=60, seed=7))
    assert cli.main(["farm", "run", str(again), "--out", str(out), f"model={model}", "guidance_scale=1"]) == 101
    failure = Tree(str(out)).state("shot-000").failure
    assert failure is not None and failure.kind == "input" and "was begun with seed=" in failure.error
    assert failure.error.endswith(f"is begun anew once {out}/shots/shot-000/video.mp4.parts is removed")
    assert "--overwrite" not in failure.error + capsys.readouterr().err


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
    chooses(now)
    assert run_farm(config, manifest, out)["done"] == 1
    sidecar = read_sidecar(out / "shots/shot-000/video.mp4")
    assert sidecar["identity"]["sampling"]["chunks_per_unit"] == before
    assert run_farm(config, manifest, out)["done_before"] == 1, "nor is a complete one asked for otherwise"


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
