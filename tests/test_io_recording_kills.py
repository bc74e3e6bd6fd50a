"""A recording that is killed at any place, and gone on with, equals one that was left alone."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from recordings import CHUNKS, FACTS, IDENTITY, Clock, Killed, Way, child, kill, packets, result, undisturbed_runs

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import ConfigError
from pavdm_dist.io import recording, saver, state
from pavdm_dist.io.latents import LatentsWriter, read_latents
from pavdm_dist.io.metadata import Sidecar, is_complete
from pavdm_dist.io.recording import Recording
from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.io.state import Point, RecordingState, write_state
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.window import WindowSnapshot
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream
from pavdm_dist.request.video_request import VideoRequest


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Any, ...]]:
    return undisturbed_runs(tmp_path_factory)


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
    second = child(str(output), way, f"way.go_on(made); LatentsWriter.join = {SUICIDE}; made.finish(t.FACTS)")
    assert second.wait(60) == -signal.SIGKILL
    assert output.exists() and not is_complete(output)
    again = way.open(output, resume=True)
    assert again.complete
    way.go_on(again)
    again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)
    assert {path.name for path in tmp_path.iterdir()} == {"v.mp4", "v.safetensors", "v.json"}


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
    def killed(folder: str, state: RecordingState, check: Callable[[], None]) -> None:
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
