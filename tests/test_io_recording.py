"""One video's files: interrupted at every place and gone on with, they equal those of an undisturbed run."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io import latents as latents_file
from pavdm_dist.io import lock, processes, recording, saver, state
from pavdm_dist.io.latents import LatentsWriter, latents_sha256, read_latents
from pavdm_dist.io.metadata import Sidecar, is_complete, read_sidecar
from pavdm_dist.io.recording import Recording, check_recording
from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.io.state import Point, State, read_state, write_state
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.stream import ResumePoint
from pavdm_dist.method.window import WindowSnapshot
from pavdm_dist.request import SamplingParams, VideoRequest
from pavdm_dist.streams import build_stream

HEIGHT, WIDTH, RATE, CHUNKS, LATENTS = 32, 48, 24, 7, 2
IDENTITY = {"prompt": "a red three", "seed": 3, "sampling": {"num_inference_steps": 6, "levels": [1, 0.5]}}
FACTS = {"config": {}, "prompt": "a red three", "negative_prompt": None, "seed": 3, "device": "cpu", "threads": 1}

SIDECAR = json.dumps({"versions": {"pavdm_dist": "0.0.1"}})


class Sampler:
    """Chunks that follow from one another, as those of a window do."""

    def __init__(self, point: Point | None) -> None:
        self.chunk = 0 if point is None else point.facts["chunk"]
        self.x = torch.linspace(-1, 1, 2 * LATENTS * 2 * 3).reshape(2, LATENTS, 2, 3)
        if point is not None:
            self.x = point.tensors["x"]

    def __next__(self) -> Tensor:
        self.x = torch.sin(3 * self.x + self.chunk)
        self.chunk += 1
        return self.x


class Decoder:
    """Four frames a latent, one for the first, that show the two latents before it as well."""

    def __init__(self, warm: Tensor | None) -> None:
        self.seen: list[Tensor] = [] if warm is None else list(warm.unbind(1))

    def __call__(self, latents: Tensor) -> np.ndarray:
        frames = []
        for latent in latents.unbind(1):
            count = 4 if self.seen else 1
            self.seen = [*self.seen[-2:], latent]
            shown = sum((0.5**age * 60 * seen[0] for age, seen in enumerate(reversed(self.seen))), torch.tensor(128.0))
            picture = shown.clamp(0, 255).to(torch.uint8).repeat_interleave(16, 0).repeat_interleave(16, 1)
            frames += [torch.stack([picture + step, picture, 255 - picture], dim=-1).numpy() for step in range(count)]
        return np.stack(frames)


class Clock:
    """Seconds that pass by ``step`` at every look."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@dataclass(frozen=True)
class Way:
    """A way to record: chunks in a segment, every how many chunks a sampler gives a point (0 = never), the clock."""

    group: int = 2
    points: int = 1
    step: float = 0.0

    def open(self, output: Path | str, **options: Any) -> Recording:
        settings = {"identity": IDENTITY, "chunks_per_segment": self.group, "save_latents": True} | options
        size = {"fps": RATE, "height": HEIGHT, "width": WIDTH}
        return Recording.open(output, **size, **settings, clock=Clock(self.step))

    def go_on(self, made: Recording, until: int = CHUNKS) -> None:
        """Does what a driver does with a recording, up to chunk ``until``, which is not made."""
        decode, following = Decoder(made.warm), Sampler(made.point)
        for index, latents in made.pending.items():
            if index < until:
                made.write(index, decode(latents), latents)
        for index in range(made.next_chunk, until):
            latents = next(following)
            point = None
            if self.points and (index + 1) % self.points == 0:
                warm = torch.cat([seen.unsqueeze(1) for seen in [*decode.seen, *latents.unbind(1)]][-3:], dim=1)
                point = Point({"x": latents}, {"chunk": index + 1}, warm)
            made.write(index, decode(latents), latents, point)


def packets(path: Path | str) -> list[tuple[int, int, bytes]]:
    """Times and bytes of a file's packets."""
    with av.open(str(path)) as container:
        assert container.streams.video[0].time_base is not None
        return [(packet.pts, packet.duration, bytes(packet)) for packet in container.demux(video=0) if packet.size]


def result(output: Path) -> tuple[Any, ...]:
    """All of a complete video that must be the same however it came about."""
    assert not Path(f"{output}.parts").exists()
    sidecar = read_sidecar(output)
    latents = read_latents(output.with_suffix(".safetensors"))
    assert sidecar["latents_sha256"] == latents_sha256(latents)
    assert len(sidecar["chunk_seconds"]) == CHUNKS
    return packets(output), latents.numpy().tobytes(), sidecar["latents_sha256"], sidecar["num_frames"]


def kill(made: Recording) -> None:
    """What is left in memory is gone, nothing was tidied up."""
    segments = made._segments
    segments._encoder = None  # the file it was writing stays, unfinished
    with suppress(Killed):
        made._saver.wait()  # its thread is this process'
    made._lock.release()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Any, ...]]:
    """By chunks in a segment, the result of a run without interruption."""
    results: dict[int, tuple[Any, ...]] = {}

    def of(group: int) -> tuple[Any, ...]:
        if group not in results:
            output = tmp_path_factory.mktemp("undisturbed") / "v.mp4"
            made = Way(group).open(output)
            Way(group).go_on(made)
            done = made.finish(FACTS, {"seed": 3})
            results[group] = result(output)
            assert done.num_frames == results[group][3] == 5 + 8 * (CHUNKS - 1)
            assert done.latents_sha256 == results[group][2]
        return results[group]

    return of


def test_the_files_are_those_of_the_frames(tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]) -> None:
    following, decode, plain = Sampler(None), Decoder(None), SegmentWriter(tmp_path / "v.mp4", RATE, HEIGHT, WIDTH, 2)
    latents = [next(following).clone() for _ in range(CHUNKS)]
    for index, part in enumerate(latents):
        plain.write_chunk(index, decode(part))
    plain.finish()
    assert undisturbed(2)[:2] == (packets(tmp_path / "v.mp4"), torch.cat(latents, dim=1).numpy().tobytes())


@pytest.mark.parametrize("step", [0.0, recording.SAVE_SECONDS])
@pytest.mark.parametrize(
    ("group", "points"),
    [
        *((1, 1), (2, 0), (2, 3), (3, 1)),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((1, 0), (1, 3), (2, 1), (3, 0), (3, 3))),
    ],
)
def test_killed_after_any_chunk_it_goes_on(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]], group: int, points: int, step: float
) -> None:
    way = Way(group, points, step)
    for killed in range(CHUNKS + 1):
        output = tmp_path / f"{killed}.mp4"
        made = way.open(output)
        way.go_on(made, until=killed)
        kill(made)
        again = way.open(output, resume=True)
        closed = killed // group * group
        if points == 0:
            assert (again.next_chunk, again.point, again.pending) == (0, None, {})
        elif points == 1:
            assert again.next_chunk == (killed if step else closed), "nothing that was saved is sampled again"
            assert list(again.pending) == list(range(closed, again.next_chunk))
        assert again.next_chunk <= killed and not again.complete
        way.go_on(again)
        again.finish(FACTS, {"seed": 3})
        assert result(output) == undisturbed(group)


def test_killed_again_and_again_it_still_ends(tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]) -> None:
    for seed in range(8):
        chance, output = random.Random(seed), tmp_path / f"{seed}.mp4"
        way = Way(chance.choice([2, 3]), chance.choice([1, 2, 3]), chance.choice([0.0, 25.0, 60.0]))
        made = way.open(output)
        for _ in range(5):
            # Sometimes before what was pending has been decoded again.
            way.go_on(made, until=chance.randint(0, CHUNKS))
            kill(made)
            made = way.open(output, resume=True)
        way.go_on(made)
        made.finish(FACTS, {"seed": 3})
        assert result(output) == undisturbed(way.group)


class Killed(BaseException):
    """Stands for the end of a process."""


STEPS: list[tuple[str, Any, str]] = [
    ("between the last segment and the state", saver, "write_state"),
    ("before the mp4", SegmentWriter, "join"),
    ("between mp4 and latents", LatentsWriter, "join"),
    ("between latents and sidecar", Sidecar, "write"),
    ("between sidecar and removal", SegmentWriter, "remove"),
    ("in the middle of the removal", recording.storage, "remove_matching"),
]


@pytest.mark.parametrize(("step", "owner", "name"), STEPS, ids=[step for step, _, _ in STEPS])
@pytest.mark.parametrize("points", [0, 1])
def test_killed_between_any_two_steps_of_the_end_it_is_finished_or_made_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[int], tuple[Any, ...]],
    step: str,
    owner: Any,
    name: str,
    points: int,
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    way, output = Way(2, points), tmp_path / "v.mp4"
    made = way.open(output)
    way.go_on(made)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        with pytest.raises(Killed):
            made.finish(FACTS, {"seed": 3})
    kill(made)
    there = [(tmp_path / file).exists() for file in ("v.mp4", "v.safetensors", "v.json")]
    assert there == sorted(there, reverse=True), "mp4, latents, sidecar, in this order"
    assert is_complete(output) == step.endswith("removal")
    if is_complete(output):
        with pytest.raises(ConfigError, match=r"output=.*v\.mp4 is complete: its sidecar .*v\.json exists"):
            way.open(output, resume=True)
    else:
        with pytest.raises(ConfigError, match="--overwrite"):
            way.open(output)
        again = way.open(output, resume=True)
        assert again.complete == ("state" not in step)
        assert again.next_chunk == (CHUNKS if again.complete else 6 if points else 0)
        way.go_on(again)
        again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def child(output: str, way: Way, then: str) -> subprocess.Popen[str]:
    """Another process that records; ``then`` is what it does with ``made``, ``way`` and this module as ``t``."""
    script = f"""
import os, signal, sys, time
import test_io_recording as t
way = t.Way({way.group}, {way.points}, {way.step})
made = way.open({output!r}, **({{"resume": True}} if os.path.exists({output + ".parts"!r}) else {{}}))
print("open", flush=True)
{then}
"""
    folders = os.pathsep.join(str(Path(__file__).parent / folder) for folder in (".", ".."))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": folders},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


SUICIDE = "lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"


def test_really_killed_while_it_writes_and_while_it_finishes(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way(2, 1)
    # At an arbitrary moment: in the encoder, in a state that is being written, between two files.
    first = child(
        str(output), way, "while True: way.go_on(made); made.abort(); made = way.open(made.output, resume=True)"
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "v.mp4.parts" / state.PREVIOUS).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    first.kill()
    assert first.wait(60) == -signal.SIGKILL
    second = child(str(output), way, f"way.go_on(made); t.LatentsWriter.join = {SUICIDE}; made.finish(t.FACTS)")
    assert second.wait(60) == -signal.SIGKILL
    assert output.exists() and not is_complete(output)
    again = way.open(output, resume=True)
    assert again.complete
    way.go_on(again)
    again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)
    assert {path.name for path in tmp_path.iterdir()} == {"v.mp4", "v.safetensors", "v.json"}


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
    theirs, waits = State({"mine": False}), threading.Event()
    real = state.storage.make_durable

    def slow(path: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert waits.wait(30)
        real(path)

    monkeypatch.setattr(state.storage, "make_durable", slow)
    made._saver.save(State({"mine": True}))
    (parts / state.storage.LOCK_NAME).unlink()  # taken over
    write_state(parts, theirs)
    assert made._lock.lost
    waits.set()
    assert made.abort() is None
    assert read_state(parts).identity == theirs.identity
    assert not [path for path in parts.iterdir() if path.name.endswith(".tmp")]


def test_a_state_is_on_the_disk_before_the_one_before_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path, State({}))
    seen: list[str] = []
    for owner, name in ((state.storage, "make_durable"), (os, "replace")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *paths, name=name, real=real: (seen.append(f"{name} {Path(paths[0]).name[:6]}"), real(*paths)),
        )
    write_state(tmp_path, State({}))
    assert seen == ["make_durable .state", "replace state.", "replace .state", f"make_durable {tmp_path.name[:6]}"]


def test_a_state_of_another_version_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, way, parts = tmp_path / "v.mp4", Way(2, 1), tmp_path / "v.mp4.parts"
    made = way.open(output)
    way.go_on(made, until=4)
    kill(made)
    for identity, by in (({"versions": {"pavdm_dist": "9.8.7"}}, "pavdm_dist 9.8.7"), ([], "another pavdm_dist")):
        facts = json.dumps({"version": 99, "identity": identity})  # and nothing else as we know it
        save_file({"x": torch.zeros(3)}, parts / state.STATE, {"state": facts})
        said = rf"output=.*v\.mp4: .*{state.STATE} is a state of version 99, written by {by}; .* --overwrite"
        before = {path: path.read_bytes() for path in parts.iterdir()}
        for refused in (lambda: way.open(output, resume=True), lambda: check_recording(output, facts={})):
            with pytest.raises(ConfigError, match=said):
                refused()
        assert {path: path.read_bytes() for path in parts.iterdir()} == before
    kill(way.open(output, overwrite=True))


def test_states_hold_what_they_were_given(tmp_path: Path) -> None:
    tensors = {
        "a.b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
        "row": torch.tensor(7),
        "none": torch.empty(0, 4),
        "mask": torch.tensor([True, False]),
    }
    shared = torch.randn(2, 4, 3, 3)
    given = State(
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
    write_state(tmp_path, State({}))
    assert read_state(tmp_path) == State({}, chunk_seconds=array("f"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [state.PREVIOUS, state.STATE]


def test_a_state_grows_by_four_bytes_a_chunk(tmp_path: Path) -> None:
    sizes = []
    for chunks in (10_000, 20_000):
        seconds = array("f", [0.1]) * chunks
        write_state(tmp_path, State({}, chunks, chunks, chunk_seconds=seconds))
        assert read_state(tmp_path) == State({}, chunks, chunks, chunk_seconds=seconds)
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


def test_latents_that_are_not_what_was_written_are_told(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    damages: list[Callable[[Path], Any]] = [flip, lambda path: path.write_bytes(path.read_bytes()[:-10])]
    damages += [lambda path: path.write_bytes(b""), lambda path: save_file({"latents": torch.zeros(2, 4, 2, 3)}, path)]
    for number, damage in enumerate(damages):
        output, way = tmp_path / str(number) / "v.mp4", Way(2, 1)
        made = way.open(output)
        way.go_on(made, until=5)
        kill(made)
        damaged = Path(f"{output}.parts") / "latents-000002-000003.safetensors"
        damage(damaged)
        caplog.clear()
        again = way.open(output, resume=True)
        assert f"{damaged} is not what was written there" in caplog.text
        assert (again.next_chunk, again.point) == (0, None), "at once, not when all has been sampled"
        way.go_on(again)
        damage(damaged)  # behind this process' back
        with pytest.raises(MediaError, match=r"no longer what was written there|not a readable safetensors"):
            again.finish(FACTS)
        again.abort()
        assert not output.exists() and not is_complete(output)
        last = way.open(output, resume=True)
        assert (last.next_chunk, last.complete) == (0, False)
        way.go_on(last)
        last.finish(FACTS, {"seed": 3})
        assert result(output) == undisturbed(2)


def test_files_that_are_gone_are_made_again(tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]) -> None:
    for name in ("segment-000000-000001.mp4", "segment-000002-000003.mp4", "latents-000002-000003.safetensors"):
        output, way = tmp_path / name / "v.mp4", Way(2, 1)
        made = way.open(output)
        way.go_on(made, until=5)
        kill(made)
        (tmp_path / name / "v.mp4.parts" / name).unlink()
        again = way.open(output, resume=True)
        assert (again.next_chunk, again.point, again.pending) == (0, None, {})
        way.go_on(again)
        again.finish(FACTS, {"seed": 3})
        assert result(output) == undisturbed(2)


def test_the_state_is_written_when_a_segment_closes_and_every_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[State] = []
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


def test_points_inside_a_segment_wait_where_no_decoder_could_be_warmed(tmp_path: Path) -> None:
    way, output = Way(2, 3, recording.SAVE_SECONDS), tmp_path / "v.mp4"  # points after chunks 2 and 5
    made = way.open(output)
    way.go_on(made, until=3)
    kill(made)
    again = way.open(output, resume=True)
    # No point came with chunk 1, so a decoder cannot be warmed before chunk 2 of segment 2..3.
    assert (again.next_chunk, again.pending) == (0, {})
    way.go_on(again, until=4)
    kill(again)
    again = way.open(output, resume=True)
    assert (again.next_chunk, again.pending) == (3, {})
    assert again.warm is not None and again.warm.shape[1] == 3


def test_killed_between_a_segment_and_its_state_it_loses_no_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    def killed(folder: str, state: State, check: Callable[[], None]) -> None:
        if state.closed_chunks == 4:
            raise Killed
        write_state(folder, state, check)

    way, output = Way(2, 1, recording.SAVE_SECONDS), tmp_path / "v.mp4"
    made = way.open(output)
    with monkeypatch.context() as patched:
        patched.setattr(saver, "write_state", killed)
        with suppress(Killed):  # said when the next state is due, or below
            way.go_on(made)
        kill(made)
    again = way.open(output, resume=True)
    assert (again.next_chunk, list(again.pending)) == (3, [2])
    way.go_on(again, until=5)
    kill(again)
    again = way.open(output, resume=True)
    assert (again.next_chunk, list(again.pending)) == (5, [4])
    way.go_on(again)
    again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_abort_leaves_what_can_be_played_and_gone_on_with(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way(2, 1)
    nothing = way.open(output)
    assert nothing.abort() is None
    assert list(tmp_path.iterdir()) == []
    made = way.open(output)
    way.go_on(made, until=5)
    playlist = tmp_path / "v.mp4.parts" / "playlist.ffconcat"
    assert made.abort() == f"37 frames of {output} are playable in {playlist}"
    with av.open(str(playlist), format="concat") as container:
        assert sum(1 for _ in container.decode(video=0)) == 37
    assert not (tmp_path / "v.mp4.parts" / "lock.json").exists()
    again = way.open(output, resume=True)
    assert (again.next_chunk, list(again.pending)) == (5, [4])
    way.go_on(again)
    again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_a_full_disk_at_the_end_leaves_a_video_that_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    output, way = tmp_path / "v.mp4", Way(2, 0)
    made = way.open(output)
    way.go_on(made)
    with monkeypatch.context() as patched:
        patched.setattr(LatentsWriter, "join", full)
        with pytest.raises(OSError, match="No space left"):
            made.finish(FACTS)
        assert "53 frames" in (made.abort() or "")
    again = way.open(output, resume=True)
    assert again.complete
    again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_the_input_stands_in_front_and_counts_for_no_group(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way(2, 1)
    frames = Decoder(None)(next(Sampler(None)))
    made = way.open(output)
    made.write_input(frames)
    way.go_on(made, until=3)
    kill(made)
    again = way.open(output, resume=True)
    assert again.next_chunk == 2
    again.write_input(frames)
    way.go_on(again)
    assert again.finish(FACTS, {"seed": 3}).num_frames == 5 + 53
    assert [packet for _, _, packet in packets(output)[5:]] == [packet for _, _, packet in undisturbed(2)[0]]
    assert read_sidecar(output)["latents_sha256"] == undisturbed(2)[2]


def test_overwrite_starts_anew_and_the_old_sidecar_goes_first(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way(2, 1)
    output.write_bytes(b"an old video")
    for name, sentence in (
        ("v.mp4", "exists; choose another"),
        ("v.json", "its sidecar"),
        ("v.safetensors", "its lat"),
    ):
        if name == "v.safetensors":
            save_file({"latents": torch.zeros(4, 1, 4, 6)}, tmp_path / name, dict(latents_file._METADATA))
        else:
            (tmp_path / name).write_text(SIDECAR)
        for options in ({}, {"resume": True}):
            with pytest.raises(ConfigError, match=f"{sentence}.*--overwrite|is complete"):
                way.open(output, **options)
        (tmp_path / name).unlink()
    assert list(tmp_path.iterdir()) == []
    output.write_bytes(b"an old video")
    (tmp_path / "v.json").write_text(SIDECAR)
    made = way.open(output, overwrite=True)
    assert not is_complete(output) and output.read_bytes() == b"an old video"
    way.go_on(made, until=4)
    kill(made)
    again = way.open(output, resume=True)
    assert again.next_chunk == 4
    kill(again)
    afresh = way.open(output, overwrite=True)
    assert (afresh.next_chunk, afresh.point) == (0, None)
    way.go_on(afresh)
    afresh.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_chunks_come_in_order(tmp_path: Path) -> None:
    made = Way().open(tmp_path / "v.mp4")
    latents = next(Sampler(None))
    frames = Decoder(None)(latents)
    with pytest.raises(ValueError, match="cannot be finished: chunk 0 is next"):
        made.finish(FACTS)
    assert made.write(0, frames, latents)
    assert not made.write(0, frames, latents)
    with pytest.raises(ValueError, match="chunk 2 arrived, 1 is next"):
        made.write(2, frames, latents)
    assert made.finish(FACTS).latents_sha256 == latents_sha256(latents)


def test_a_remote_store(tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]) -> None:
    import fsspec

    output, way, store = "memory://recordings/v.mp4", Way(2, 1, recording.SAVE_SECONDS), fsspec.filesystem("memory")
    made = way.open(output)
    way.go_on(made, until=5)
    with pytest.raises(ConfigError, match="is being written"):
        way.open(output, resume=True)
    kill(made)
    again = way.open(output, resume=True)
    assert (again.next_chunk, list(again.pending)) == (5, [4])
    way.go_on(again)
    again.finish(FACTS, {"seed": 3})
    store.get("/recordings/v.json", str(tmp_path / "v.json"))
    store.get("/recordings/v.mp4", str(tmp_path / "v.mp4"))
    store.get("/recordings/v.safetensors", str(tmp_path / "v.safetensors"))
    assert store.find("/recordings") == [f"/recordings/v.{name}" for name in ("json", "mp4", "safetensors")]
    assert result(tmp_path / "v.mp4") == undisturbed(2)
    store.rm("/recordings", recursive=True)


def test_the_real_sampler_and_decoder_go_on_behind_any_chunk(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    params = SamplingParams.resolve(checkpoint)
    stream = build_stream(VideoRequest("a red three drifting up", 1, 45), 0, params, checkpoint)
    receptive = checkpoint.codec.receptive_latents()
    size = {"fps": params.fps, "height": params.height, "width": params.width}

    def go_on(made: Recording, until: int) -> None:
        decoder, latest = checkpoint.codec.decoder(), []
        if made.warm is not None:
            decoder.warm(made.warm)
            latest = list(made.warm.unbind(1))
        for index, latents in made.pending.items():
            made.write(index, decoder.decode(latents), latents)
            latest += latents.unbind(1)
        snapshot = None
        if made.point is not None:
            tensors = {int(name): tensor for name, tensor in made.point.tensors.items()}
            snapshot = WindowSnapshot(made.point.facts["row"], tensors)
        here = replace(stream, resume=None if snapshot is None else ResumePoint(snapshot))
        window = here.window()
        for clean in sample(window, StreamDenoiser(checkpoint.backbone, here), here.guidance_scale):
            if clean.index == until:
                return
            latest += clean.latents.unbind(1)
            at = window.snapshot()
            warm = torch.stack(latest[-receptive - 1 :], dim=1)
            point = Point({str(chunk): value for chunk, value in at.latents.items()}, {"row": at.row}, warm)
            made.write(clean.index, decoder.decode(clean.latents), clean.latents, point)

    results = []
    for killed in (None, 0, 1, 2, 3, 4, 5):
        output = tmp_path / f"{killed}.mp4"
        options = {**size, "identity": IDENTITY, "chunks_per_segment": 2, "save_latents": True}
        made = Recording.open(output, **options, clock=Clock(recording.SAVE_SECONDS))
        if killed is not None:
            go_on(made, killed + 1)
            kill(made)
            made = Recording.open(output, **options, resume=True)
            assert made.next_chunk == killed + 1
        go_on(made, 99)
        made.finish(FACTS)
        results.append((packets(output), read_latents(output.with_suffix(".safetensors")).numpy().tobytes()))
    assert all(found == results[0] for found in results)
