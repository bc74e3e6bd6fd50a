"""Actors that really die or freeze in the middle of videos: nothing is lost, doubled or changed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from helpers import reference_chunks, tiny_checkpoint, tiny_model, tiny_stream, until_gone
from previews import light_frames

from pavdm_dist.engine import actors
from pavdm_dist.engine.actors import DecodeActor
from pavdm_dist.engine.events import Finished, Place
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.ray_engine import RayEngine
from pavdm_dist.errors import EngineError
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream

pytestmark = pytest.mark.timeout(180)
CUTS = {1: [(0, 4)], 2: [(0, 2), (2, 4)], 3: [(0, 1), (1, 3), (3, 4)]}
FRAME_BYTES = 3 * 32 * 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def _engine(model: Path, stages: int, decoder: bool = True, **options: object) -> RayEngine:
    chosen = EngineOptions(stages, restart_backoff_s=0.1, **options)  # type: ignore[arg-type]
    codec = light_frames(model) if decoder else None
    return RayEngine(str(model / "transformer"), CUTS[stages], chosen, codec, CUTS.__getitem__)


def _place(engine: RayEngine, victim: int | str) -> Place:
    if isinstance(victim, int):
        return engine._gang._cast.places[victim]
    assert engine._gang._cast.decoding is not None and engine._gang._cast.decoding.place is not None
    return engine._gang._cast.decoding.place


def _streams(mode: Mode) -> list[Stream]:
    displaced = Displaced(6, exact_growing=False)
    first = tiny_stream(0, 1, 1.0, mode, displaced, num_chunks=30)
    return [first, tiny_stream(1, 2, 1.0, mode, displaced, start="clip", num_chunks=20)]


def _check(model: Path, finished: list[Finished], streams: list[Stream], frames: bool = True) -> None:
    codec = light_frames(model).load()
    for stream in streams:
        expected, decoder = reference_chunks(tiny_model(), stream), codec.decoder()
        mine = [f for f in finished if f.stream == stream.id]
        assert [f.clean.index for f in mine] == [clean.index for clean in expected]
        for f, clean in zip(mine, expected, strict=True):
            assert torch.equal(f.clean.latents, clean.latents)
            if frames:
                assert f.frames is not None and torch.equal(f.frames, decoder.decode(clean.latents))


def _run(engine: RayEngine, streams: list[Stream], strikes: dict[int, Callable[[], None]]) -> list[Finished]:
    """All chunks; after some numbers of them something happens."""
    finished: list[Finished] = []
    for f in engine.run(streams, 2):
        finished.append(f)
        if len(finished) in strikes:
            strikes.pop(len(finished))()
    assert not strikes
    return finished


@pytest.mark.parametrize(
    ("mode", "stages", "victims"),
    [
        # Below the same, of one mode, in less time; tests/test_engine_driver.py loses gangs of all of them.
        pytest.param("window", 2, (0, "decoder"), marks=pytest.mark.slow),
        pytest.param("causal", 3, (1, 2), marks=pytest.mark.slow),
        pytest.param("displaced", 2, (1, 0), marks=pytest.mark.slow),
    ],
)
def test_videos_outlive_the_actors_that_make_them(
    ray_cluster: None, model: Path, mode: Mode, stages: int, victims: tuple[int | str, ...]
) -> None:
    streams = _streams(mode)
    with _engine(model, stages) as engine:

        def kill(victim: int | str) -> None:
            os.kill(_place(engine, victim).pid, signal.SIGKILL)

        finished = _run(engine, streams, {3 + 12 * i: (lambda v=victim: kill(v)) for i, victim in enumerate(victims)})
        assert engine.generation == 1 + sum(isinstance(victim, int) for victim in victims)
    _check(model, finished, streams)


# One gang for both: bringing actors up takes most of a test's time.
@pytest.mark.parametrize(
    ("frozen", "killed"),
    [
        (1, "decoder"),
        pytest.param("decoder", 0, marks=pytest.mark.slow),  # tests/test_engine_life.py has a decoder that freezes
    ],
)
def test_what_freezes_and_what_dies_is_replaced(
    ray_cluster: None, model: Path, frozen: int | str, killed: int | str
) -> None:
    streams, struck = _streams("window"), list[psutil.Process]()
    # Few chunks wait for whoever consumes: there is more to be made whenever something is struck.
    with _engine(model, 2, link_timeout_s=3, backlog_bytes=5 * 8 * FRAME_BYTES) as engine:

        def strike(victim: int | str, number: int) -> None:
            struck.append(psutil.Process(_place(engine, victim).pid))
            struck[-1].send_signal(number)

        def kill() -> None:
            assert _place(engine, frozen).pid != struck[0].pid
            strike(killed, signal.SIGKILL)

        finished = _run(engine, streams, {4: lambda: strike(frozen, signal.SIGSTOP), 24: kill})
        assert engine.generation == 2 and _place(engine, killed).pid != struck[1].pid
    _check(model, finished, streams)
    until_gone(struck[:1])  # the frozen one holds its memory no more


@pytest.mark.slow  # tests/test_engine_driver.py has a loss at every event, those of a growing window too
def test_a_killed_growing_window_goes_on(ray_cluster: None, model: Path) -> None:
    stream = tiny_stream(0, num_inference_steps=60, window_chunks=6, num_chunks=3)
    with _engine(model, 2, decoder=False) as engine:
        grown: list[int] = []

        def strike(_: int, point: object) -> None:
            grown.append(_)
            if len(grown) == 2:
                os.kill(_place(engine, 0).pid, signal.SIGKILL)

        finished = list(engine.run([stream], on_grown=strike))
        assert engine.generation == 2
    _check(model, finished, [stream], frames=False)


def test_fewer_stages_go_on_where_there_is_no_room_for_as_many(ray_cluster: None, model: Path) -> None:
    import ray

    @ray.remote(num_cpus=5)
    class Other:
        def is_here(self) -> bool:
            return True

    streams, others = _streams("window"), []
    limits = {"cpus_per_stage": 3, "node_wait_s": 1, "placement_timeout_s": 2}
    with _engine(model, 2, decoder=False, **limits) as engine:

        def strike() -> None:
            others.append(Other.remote())  # waits for CPUs, and gets those of the stages as soon as they are gone
            os.kill(_place(engine, 0).pid, signal.SIGKILL)

        finished = _run(engine, streams, {5: strike})
        assert ray.get(others[0].is_here.remote()) and engine.generation == 2 and len(engine._gang._cast.places) == 1
        ray.kill(others[0])
    _check(model, finished, streams, frames=False)


def test_the_budget_is_spent_in_words(ray_cluster: None, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _engine(model, 1, decoder=False, max_restarts=1) as engine:
        # As if nothing were finished between the losses, where a node kills whatever is put on it.
        engine._restarts.went_on = lambda: None  # type: ignore[method-assign]
        struck, killed, losses = 0, time.monotonic(), list[EngineError]()
        try:
            for _ in engine.run([tiny_stream(0, num_chunks=4000)]):
                if engine.generation == struck + 1:
                    os.kill(_place(engine, 0).pid, signal.SIGKILL)
                    struck, killed = struck + 1, time.monotonic()
        except EngineError as error:
            losses.append(error)
            assert time.monotonic() - killed < 60
    assert re.match(r"stage 0 of 1 \(node .*, pid \d+\) died: .*; max_restarts=1 is spent", str(losses[0]))
    assert struck == 2 and "the log of what was lost" in caplog.text and "restart 1 of 1 in" in caplog.text


@pytest.mark.slow  # tests/test_engine_stalls.py has the watchdog with a clock of its own
def test_a_video_that_never_gets_its_frames_ends_alone(
    ray_cluster: None, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Endless(DecodeActor):
        """Works on and on at the first chunk of the first video, and can be seen to work."""

        def decode(self, key: int, latents: torch.Tensor) -> object:
            if key == 0:
                while key not in self._dropped:
                    self._latents += 1
                    time.sleep(0.05)
                return None
            return super().decode(key, latents)

    monkeypatch.setattr(actors, "DecodeActor", Endless)
    streams, failed = _streams("window"), dict[int, str]()
    began = time.monotonic()
    with _engine(model, 1, link_timeout_s=3, stall_factor=2, stall_floor_s=2, stall_limit_s=8) as engine:
        run = engine.run(streams, 2, on_failed=lambda stream, error: failed.update({stream: str(error)}))
        finished = list(run)
        assert engine.generation == 1
    assert time.monotonic() - began < 60
    assert list(failed) == [0] and re.match(r"nothing has come for \d+ s, usually .*; chunk 0 is with", failed[0])
    assert "video 0: nothing has come for" in caplog.text and "video 1: nothing" not in caplog.text
    _check(model, [f for f in finished if f.stream == 1], streams[1:])
    assert not [f for f in finished if f.stream == 0]
