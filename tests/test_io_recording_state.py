"""What a recording keeps to go on from: whole, of this video and version, on the disk before what it replaces."""

from __future__ import annotations

import json
import os
import shutil
import threading
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from recordings import (
    FACTS,
    HEIGHT,
    IDENTITY,
    RATE,
    WIDTH,
    Clock,
    Decoder,
    Killed,
    Sampler,
    Way,
    kill,
    result,
    undisturbed_runs,
)
from safetensors import safe_open
from safetensors.torch import save_file

from pavdm_dist.errors import ConfigError
from pavdm_dist.io import recording, saver, state
from pavdm_dist.io.leftovers import check_recording
from pavdm_dist.io.parts import LOCK_NAME
from pavdm_dist.io.recording import Recording
from pavdm_dist.io.state import Point, RecordingState, read_state, write_state


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Any, ...]]:
    return undisturbed_runs(tmp_path_factory)


def test_a_torn_or_foreign_state_is_told_and_the_one_before_is_used(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way(2, 1)
    parts = tmp_path / "v.mp4.parts"

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    damages: list[Callable[[Path], Any]] = [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b""),
        lambda path: save_file({"x": torch.zeros(3)}, path),
        lambda path: save_file({"x": torch.zeros(3)}, path, {"state": "{}", "sha256": "0"}),
        lambda path: path.unlink(),
    ]
    made = way.open(output)
    way.go_on(made, until=5)
    kill(made)
    shutil.copytree(parts, tmp_path / "kept")
    for damage in damages:
        shutil.rmtree(parts)
        shutil.copytree(tmp_path / "kept", parts)
        assert read_state(parts).next_chunk == 4
        damage(parts / state.STATE)
        assert read_state(parts).next_chunk == 2
        kill(way.open(output, resume=True))
        assert damage != flip or not (parts / state.STATE).exists(), "who may write there takes it away"
    again = way.open(output, resume=True)
    assert (again.next_chunk, again.pending) == (2, {})
    way.go_on(again)
    again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)

    shutil.copytree(tmp_path / "kept", parts)
    output.unlink()
    (tmp_path / "v.json").unlink()
    for name in (state.STATE, state.PREVIOUS):
        flip(parts / name)
    with pytest.raises(ConfigError, match=r"v\.mp4\.parts holds no state to go on from; pass --overwrite"):
        way.open(output, resume=True)
    assert (parts / "segment-000000-000001.mp4").exists()


def test_a_torn_state_does_not_push_out_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way, parts = tmp_path / "v.mp4", Way(2, 1), tmp_path / "v.mp4.parts"
    made = way.open(output)
    way.go_on(made, until=5)
    kill(made)
    (parts / state.STATE).write_bytes(b"torn")
    again = way.open(output, resume=True)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)  # of the next state; the torn one is gone
        with pytest.raises(Killed):
            write_state(parts, replace(read_state(parts), next_chunk=3))
    assert read_state(parts).next_chunk == 2, "the one before is whole still"
    way.go_on(again)
    again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_a_state_that_was_on_its_way_when_the_lock_was_lost_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, parts = Way(2, 1).open(tmp_path / "v.mp4"), tmp_path / "v.mp4.parts"
    theirs, waits = RecordingState({"mine": False}), threading.Event()
    real = state.storage.make_durable

    def slow(path: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert waits.wait(30)
        real(path)

    monkeypatch.setattr(state.storage, "make_durable", slow)
    made._saver.save(RecordingState({"mine": True}))
    (parts / LOCK_NAME).unlink()  # taken over
    write_state(parts, theirs)
    assert made._lock.lost
    waits.set()
    assert made.abort() is None
    assert read_state(parts).identity == theirs.identity
    assert not [path for path in parts.iterdir() if path.name.endswith(".tmp")]


def test_a_state_is_on_the_disk_before_the_one_before_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path, RecordingState({}))
    seen: list[str] = []
    for owner, name in ((state.storage, "make_durable"), (os, "replace")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *paths, name=name, real=real: (seen.append(f"{name} {Path(paths[0]).name[:6]}"), real(*paths)),
        )
    write_state(tmp_path, RecordingState({}))
    assert seen == ["make_durable .state", "replace state.", "replace .state", f"make_durable {tmp_path.name[:6]}"]


def test_a_state_of_another_version_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, way, parts = tmp_path / "v.mp4", Way(2, 1), tmp_path / "v.mp4.parts"
    made = way.open(output)
    way.go_on(made, until=4)
    kill(made)
    for identity, by in (({"versions": {"pavdm_dist": "9.8.7"}}, "pavdm_dist 9.8.7"), ([], "another pavdm_dist")):
        facts = json.dumps({"version": 99, "identity": identity})  # and nothing else as we know it
        save_file({"x": torch.zeros(3)}, parts / state.STATE, {"state": facts})
        said = rf"output=.*v\.mp4: .*{state.STATE} is a state of version 99, written by {by}; this one goes on with"
        said += r" versions 2 and 3: .* --overwrite"
        before = {path: path.read_bytes() for path in parts.iterdir()}
        for refused in (lambda: way.open(output, resume=True), lambda: check_recording(output, facts={})):
            with pytest.raises(ConfigError, match=said):
                refused()
        assert {path: path.read_bytes() for path in parts.iterdir()} == before
    kill(way.open(output, overwrite=True))


def test_clean_latents_make_a_state_of_a_version_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program which knows none refuses the file; what holds none can be gone on with by older ones."""

    def written(version: int, tensors: dict[str, torch.Tensor]) -> None:
        write_state(tmp_path, RecordingState({}, 4, 4, "ab", point=Point(tensors, {})))
        with safe_open(tmp_path / state.STATE, "pt") as file:
            assert json.loads(file.metadata()["state"])["version"] == version

    def read() -> dict[str, torch.Tensor]:
        found = read_state(tmp_path)
        assert found is not None and found.point is not None
        return dict(found.point.tensors)

    plain = {"4": torch.randn(4, 2, 3, 3), "left.0.4": torch.randn(2, 5)}
    clean = {f"{state.CLEAN}{chunk}": torch.randn(4, 2, 3, 3) for chunk in (0, 3)}
    for version, tensors in ((2, plain), (3, plain | clean), (2, {})):
        written(version, tensors)
        found = read()
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], x) for name, x in tensors.items())
    with monkeypatch.context() as patch:
        patch.setattr(state, "_WITH_CLEAN", 2)  # as they were written at first
        written(2, clean)
    assert read().keys() == clean.keys()
    written(3, clean)
    with monkeypatch.context() as patch:
        patch.setattr(state, "_WITH_CLEAN", 2)  # what knows of version 2 alone
        with pytest.raises(ConfigError, match="is a state of version 3, written by another pavdm_dist; "):
            read_state(tmp_path)


def test_states_hold_what_they_were_given(tmp_path: Path) -> None:
    tensors = {
        "a.b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
        "row": torch.tensor(7),
        "none": torch.empty(0, 4),
        "mask": torch.tensor([True, False]),
    }
    shared = torch.randn(2, 4, 3, 3)
    given = RecordingState(
        {"prompt": "ü"}, 9, 8, "ab", array("f", [0.25, 1.5]), False, Point(tensors, {"rows": [1, 2]}), shared[:, :3],
        {8: shared[:, 1:3], 10: shared[:, :2]},
    )  # fmt: skip
    write_state(tmp_path, given)
    found = read_state(tmp_path)
    assert found is not None and found.point is not None and found.warm is not None
    assert found.point.facts == {"rows": [1, 2]} and set(found.point.tensors) == set(tensors)
    assert all(torch.equal(found.point.tensors[name], value) for name, value in tensors.items())
    assert found.point.tensors["a.b"].dtype == torch.bfloat16
    assert torch.equal(found.warm, shared[:, :3])
    assert list(found.pending) == [8, 10] and torch.equal(found.pending[8], shared[:, 1:3])
    plain = {"point": None, "warm": None, "pending": {}}
    assert replace(found, **plain) == replace(given, **plain)
    write_state(tmp_path, RecordingState({}))
    assert read_state(tmp_path) == RecordingState({}, chunk_seconds=array("f"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [state.PREVIOUS, state.STATE]


def test_a_state_is_written_without_a_copy_of_what_lies_in_memory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several in the same memory, which the format does not hold, all but one are copied."""
    key, window = torch.randn(1, 2, 6, 4).bfloat16(), torch.randn(4, 9, 2, 2)
    views = {"0": window[:, :3], "1": window[:1], "2": window[0], "left.k": key, "again": key}
    written, save = dict[str, torch.Tensor](), safetensors.torch.save

    def seen(tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> bytes:
        written.update(tensors)
        return save(tensors, facts)

    monkeypatch.setattr(safetensors.torch, "save", seen)
    write_state(tmp_path, RecordingState({}, 1, point=Point(views, {}, None), pending={0: window}))
    assert written["point.left.k"].data_ptr() == key.data_ptr() != written["point.again"].data_ptr()
    found = read_state(tmp_path)
    assert found is not None and found.point is not None and torch.equal(found.pending[0], window)
    assert found.point.tensors.keys() == views.keys()
    assert all(torch.equal(found.point.tensors[name], tensor) for name, tensor in views.items())


def test_a_state_grows_by_four_bytes_a_chunk(tmp_path: Path) -> None:
    sizes = []
    for chunks in (10_000, 20_000):
        seconds = array("f", [0.1]) * chunks
        write_state(tmp_path, RecordingState({}, chunks, chunks, chunk_seconds=seconds))
        assert read_state(tmp_path) == RecordingState({}, chunks, chunks, chunk_seconds=seconds)
        sizes.append((tmp_path / state.STATE).stat().st_size)
    assert sizes[1] - sizes[0] == 4 * 10_000


def test_another_identity_is_refused_by_name(tmp_path: Path) -> None:
    output = tmp_path / "v.mp4"
    made = Way().open(output)
    Way().go_on(made, until=3)
    kill(made)
    changed = {**IDENTITY, "seed": 4, "sampling": {"num_inference_steps": 6, "levels": [1, 0.25]}, "extra": True}
    with pytest.raises(ConfigError) as refused:
        Way().open(output, resume=True, identity=changed)
    assert "seed=3 (now 4), sampling.levels=[1, 0.5] (now [1, 0.25]), extra=absent (now true)" in str(refused.value)
    with pytest.raises(ConfigError, match=r"begun with chunks_per_segment=2 \(now 3\); give the same to go on"):
        Way(3).open(output, resume=True)
    with pytest.raises(ConfigError, match=r"save_latents=true \(now false\)"):
        Way().open(output, resume=True, save_latents=False)
    assert Way().open(output, resume=True).next_chunk == 2
    with pytest.raises(ValueError, match="choose one"):
        Way().open(output, resume=True, overwrite=True)


def test_the_state_is_written_when_a_segment_closes_and_every_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[RecordingState] = []
    for module in (recording, saver):
        monkeypatch.setattr(module, "write_state", lambda folder, state, *_: saved.append(state))
    clock = Clock()
    size = {"fps": RATE, "height": HEIGHT, "width": WIDTH, "identity": IDENTITY, "chunks_per_segment": 4}
    made = Recording.open(tmp_path / "v.mp4", **size, clock=clock)
    decode, following = Decoder(None), Sampler(None)
    found = []
    for index, (seconds, durable) in enumerate(
        [(59, True), (0.5, True), (1, False), (9, True), (59, False), (2, True)]
    ):
        clock.now += seconds
        latents = next(following)
        point = Point({}, {"chunk": index + 1}, latents) if durable else None
        made.write(index, decode(latents), latents, point)
        made._saver.wait()
        found.append([(state.closed_chunks, state.next_chunk, list(state.pending)) for state in saved[1:]])
        saved[1:] = []
    assert found == [[], [], [(0, 2, [0, 1])], [(4, 4, [])], [], [(4, 6, [4, 5])]]
