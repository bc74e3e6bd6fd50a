"""An engine on Ray in everyday life: slow consumers, abandoned runs, videos that fail, actors that freeze."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import reference_chunks, tiny_checkpoint, tiny_model, tiny_stream
from previews import light_frames

from pavdm_dist.engine.events import Failed, Finished
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.ray_engine import RayEngine
from pavdm_dist.errors import ConfigError, EngineError, PAVDMError, VideoError
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.method.window import CleanChunk, WindowSnapshot
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.request.video_request import VideoRequest

pytestmark = pytest.mark.timeout(120)
PROMPT = "a red three drifting up"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def staged(ray_cluster: None, model: Path) -> Iterator[PAVDMPipeline]:
    """Two stages and a decoder that outlive every test here that leaves them whole: bringing them up takes longest."""
    with PAVDMPipeline.from_pretrained(model, num_stages=2) as up:
        yield up


@pytest.fixture
def engine(staged: PAVDMPipeline) -> RayEngine:
    """What is behind that pipeline, without what it makes of requests."""
    if staged._engines.current is None or staged._engines.current.is_over:
        staged(PROMPT, num_frames=5, output_type="latent")
    assert isinstance(staged._engines.current, RayEngine)
    return staged._engines.current


def _engine(model: Path, decoder: bool = True, **options: object) -> RayEngine:
    chosen, codec = EngineOptions(1, **options), light_frames(model) if decoder else None  # type: ignore[arg-type]
    return RayEngine(str(model / "transformer"), [(0, 4)], chosen, codec)


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


def _check(finished: list[Finished], stream: Stream) -> None:
    """The stream's chunks, bit for bit, with frames."""
    expected = reference_chunks(tiny_model(), stream)
    mine = [f for f in finished if f.stream == stream.id]
    assert [f.clean.index for f in mine] == [clean.index for clean in expected]
    assert all(torch.equal(f.clean.latents, clean.latents) for f, clean in zip(mine, expected, strict=True))
    assert all(f.frames is not None and f.frames.dtype == torch.uint8 for f in mine)


def test_a_consumer_that_sleeps_does_not_stop_the_stages(engine: RayEngine) -> None:
    stream = tiny_stream(0, num_chunks=10)
    run = engine.run([stream])
    finished = [next(run)]
    # Nothing more is asked for: the others are made all the same.
    _until(lambda: engine._run is not None and len(engine._run.outputs) == 9)
    _check([*finished, *run], stream)


def test_a_source_that_thinks_does_not_stop_the_stages(engine: RayEngine) -> None:
    first, second = tiny_stream(0, num_chunks=6), tiny_stream(1, seed=1, num_chunks=2)
    thought = threading.Event()

    def source() -> Iterator[Stream]:
        yield first
        assert thought.wait(60)
        yield second

    run, finished = engine.run(source(), 2), list[Finished]()
    while not finished or not finished[-1].last:
        finished.append(next(run))
    thought.set()
    finished += run
    _check(finished, first)
    _check(finished, second)


@pytest.mark.slow  # tests/test_engine_driver.py has the bound
def test_what_waits_for_the_consumer_is_bounded(ray_cluster: None, model: Path) -> None:
    stream = tiny_stream(0, num_chunks=40, guidance_scale=1.0)
    frame_bytes = 3 * 32 * 48
    with _engine(model, backlog_bytes=5 * 8 * frame_bytes) as engine:
        run = engine.run([stream])
        finished, seen = [next(run)], 0
        for _ in range(60):  # longer than all forty would take
            time.sleep(0.05)
            assert engine._run is not None
            seen = max(seen, engine._run.held_bytes)
        assert seen <= (5 + 6) * 8 * frame_bytes, "five chunks, and those of the epochs that were sealed before"
        _check([*finished, *run], stream)


def test_an_abandoned_run_leaves_the_pipeline(engine: RayEngine) -> None:
    run = engine.run([tiny_stream(0, num_chunks=4000), tiny_stream(1, num_chunks=4000)], 2)
    next(run)
    run.close()
    # A run that nobody closes ends with the next one.
    left = engine.run([tiny_stream(0, num_chunks=4000)])
    next(left)
    stream = tiny_stream(0, seed=3)
    _check(list(engine.run([stream])), stream)
    with pytest.raises(ConfigError, match="ended by a later one"):
        next(left)
    with pytest.raises(ConfigError, match="streams=0: at least 1"):
        next(engine.run([stream], 0))


def test_a_source_that_raises_ends_its_run_and_no_more(engine: RayEngine) -> None:
    def source() -> Iterator[Stream]:
        yield tiny_stream(0)
        raise LookupError("no such row")

    with pytest.raises(LookupError, match="no such row"):
        list(engine.run(source()))
    stream = tiny_stream(0, seed=4)
    _check(list(engine.run([stream])), stream)


def test_videos_fail_alone(engine: RayEngine) -> None:
    good = [tiny_stream(0, seed=1), tiny_stream(4, seed=2, num_chunks=2)]
    texts = tiny_stream(1).conditioning
    text, null = next(iter(texts.texts.values())), texts.texts[texts.null or ""]
    poisoned = replace(tiny_stream(1), conditioning=Conditioning.build([(0, text * float("nan"))], null))
    # Sampled long ago, only its last frames are missing; and of three channels, where the codec has four.
    lost = CleanChunk(3, torch.zeros(3, 2, 4, 6))
    misfit = replace(tiny_stream(2), resume=ResumePoint(WindowSnapshot(12, {}), undecoded=(lost,)))
    failed: dict[int, PAVDMError] = {}
    streams = [good[0], poisoned, misfit, Failed(3, ConfigError("prompt: too long")), good[1]]
    finished = list(engine.run(streams, 3, on_failed=failed.__setitem__))
    for stream in good:
        _check(finished, stream)
    assert set(failed) == {1, 2, 3} and {f.stream for f in finished} == {0, 4}
    assert "chunk 0 holds values that are not finite after step 1" in str(failed[1])
    assert str(failed[2]).startswith("chunk 3 could not be decoded: ") and "[4, n >= 1, h, w]" in str(failed[2])
    assert str(failed[3]) == "prompt: too long"
    with pytest.raises(VideoError, match="not finite"):  # nobody was named to be told
        list(engine.run([poisoned]))


def test_an_endless_video_is_stopped(engine: RayEngine) -> None:
    plan = tiny_stream().plan
    endless, finished = replace(tiny_stream(0), plan=replace(plan, num_chunks=None)), list[Finished]()
    for f in engine.run([endless]):
        finished.append(f)
        if len(finished) == 5:
            engine.stop(0)
    assert finished[-1].last and len(finished) >= 8
    _check(finished, replace(endless, plan=replace(plan, num_chunks=len(finished))))


@pytest.fixture(scope="module", params=[0, 2])
def pipeline(request: pytest.FixtureRequest, staged: PAVDMPipeline, model: Path) -> PAVDMPipeline:
    """In this process and on stages."""
    return staged if request.param else PAVDMPipeline.from_pretrained(model)


def test_one_video_is_cancelled_and_the_others_go_on(pipeline: PAVDMPipeline) -> None:
    requests, found = [VideoRequest(PROMPT, 0, 4000), VideoRequest(PROMPT, 1, 29)], list[int]()
    for chunk in pipeline.iter_chunks(requests, pipeline.params(), 2):
        found.append(chunk.video)
        if found.count(0) == 2:
            pipeline.cancel(0)
    assert found.count(1) == 4 and found.count(0) < 40


@pytest.mark.parametrize("what", ["cancel", "stop", "set_prompt"])
def test_what_is_asked_while_the_engine_comes_up_is_kept(
    pipeline: PAVDMPipeline, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes minutes for a large model; here it is a moment, in which all is asked."""
    known = list(pipeline.iter_chunks([VideoRequest("a blue seven", 0, 9)], pipeline.params()))
    name = "on_stages" if pipeline.num_stages else "inline"
    come_up = getattr(pipeline._engines, name)

    def asked_meanwhile(*arguments: object) -> object:
        getattr(pipeline, what)(0, *((0, "a blue seven") if what == "set_prompt" else ()))
        return come_up(*arguments)

    monkeypatch.setattr(pipeline._engines, name, asked_meanwhile)
    requests = [VideoRequest(PROMPT, 0, 9 if what == "set_prompt" else None), VideoRequest(PROMPT, 1, 9)]
    chunks = pipeline.iter_chunks(requests, pipeline.params(), 2)
    found = list(islice(chunks, 30))
    chunks.close()
    mine = [chunk for chunk in found if chunk.video == 0]
    assert [chunk.last for chunk in found if chunk.video == 1] == [False, True], "the other goes on"
    if what == "cancel":
        assert not mine
    elif what == "stop":
        assert mine[-1].last
    else:
        assert all(torch.equal(one.latents, other.latents) for one, other in zip(mine, known, strict=True))
    # It was for that run alone.
    monkeypatch.undo()
    again = list(pipeline.iter_chunks([VideoRequest("a blue seven", 0, 9)], pipeline.params()))
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(again, known, strict=True))
    with pytest.raises(ConfigError, match="no video is running"):
        pipeline.set_prompt(0, 0, PROMPT)


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_stage_that_freezes_alone_is_noticed(ray_cluster: None, model: Path) -> None:
    with _engine(model, decoder=False, link_timeout_s=2, max_restarts=0) as engine:
        run = engine.run([tiny_stream(0, num_chunks=4000)])
        next(run)
        with (
            _stopped(engine._gang._cast.places[0].pid),
            pytest.raises(EngineError, match=r"stage 0 of 1 .* does not answer"),
        ):
            list(run)
        with pytest.raises(EngineError, match="does not answer"):
            list(engine.run([tiny_stream(0)]))


# That one dies is in tests/test_recovery.py, too.
@pytest.mark.parametrize("fate", ["freezes", pytest.param("dies", marks=pytest.mark.slow)])
def test_a_decoder_that_ends_is_noticed(ray_cluster: None, model: Path, fate: str) -> None:
    with _engine(model, link_timeout_s=2, max_restarts=0) as engine:
        run = engine.run([tiny_stream(0, num_chunks=4000)])
        next(run)
        assert engine._gang._cast.decoding is not None and engine._gang._cast.decoding.place is not None
        pid = engine._gang._cast.decoding.place.pid
        if fate == "dies":
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineError, match=r"the decode actor \(.*\) died: .* \(1 times in a row\)"):
                list(run)
            return
        with _stopped(pid), pytest.raises(EngineError, match=rf"the decode actor \(.*pid {pid}\) is frozen"):
            list(run)


@pytest.mark.parametrize("num_stages", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_closed_pipeline_starts_anew(ray_cluster: None, model: Path, num_stages: int) -> None:
    with PAVDMPipeline.from_pretrained(model, num_stages=num_stages) as pipeline:
        first = pipeline(PROMPT, num_frames=9, output_type="latent").frames[0]
    assert torch.equal(first, pipeline(PROMPT, num_frames=9, output_type="latent").frames[0])
    pipeline.close()


def test_a_pipeline_goes_on_from_a_chunk_and_ends_endless_videos(pipeline: PAVDMPipeline) -> None:
    params = pipeline.params()
    request = VideoRequest(PROMPT, 5, 29)
    points: list = []
    whole = list(pipeline.iter_chunks([request], params, on_grown=lambda video, point: points.append((0, point))))
    points += [(chunk.index + 1, chunk.resume) for chunk in whole]
    assert [done for done, _ in points] == [0, 0, 1, 2, 3, 4] and sum(len(c.frames) for c in whole) == 29
    for done, point in points:
        rest = list(pipeline.iter_chunks([replace(request, resume=point)], params))
        assert [chunk.index for chunk in rest] == list(range(done, 4))
        for chunk, before in zip(rest, whole[done:], strict=True):
            assert torch.equal(chunk.latents, before.latents) and torch.equal(chunk.frames, before.frames)
            assert chunk.last == before.last
    endless = []
    for chunk in pipeline.iter_chunks([VideoRequest(PROMPT, 5, None)], params):
        endless.append(chunk)
        if len(endless) == 3:
            pipeline.stop(0)
    assert endless[-1].last and len(endless) >= 5
    assert torch.equal(endless[0].frames, whole[0].frames)


def test_a_request_that_cannot_be_built_fails_alone(pipeline: PAVDMPipeline) -> None:
    requests = [VideoRequest(PROMPT, 1, 9), VideoRequest("a " * 40, 1, 9), VideoRequest(PROMPT, 2, 9)]
    failed: dict[int, PAVDMError] = {}
    done = list(pipeline.iter_chunks(requests, pipeline.params(), on_failed=failed.__setitem__))
    assert {chunk.video for chunk in done if chunk.last} == {0, 2}
    assert list(failed) == [1] and "tokens" in str(failed[1])
    with pytest.raises(ConfigError, match="tokens"):
        list(pipeline.iter_chunks(requests[1:2], pipeline.params()))


def test_a_pipeline_keeps_its_stages_until_it_is_closed(staged: PAVDMPipeline, model: Path) -> None:
    """The last one here: whoever comes next has to bring stages up again."""
    alone = PAVDMPipeline.from_pretrained(model)
    with staged:
        first = staged(PROMPT, num_frames=9, output_type="latent").frames[0]
        running = staged._engines.current
        again = staged(PROMPT, num_frames=9, seed=1, output_type="latent").frames[0]
        assert staged._engines.current is running is not None
        assert torch.equal(first, alone(PROMPT, num_frames=9, output_type="latent").frames[0])
        assert torch.equal(again, alone(PROMPT, num_frames=9, seed=1, output_type="latent").frames[0])
    assert staged._engines.current is None
