"""Stage actors on Ray, connected by gloo: equal to the sampler bit for bit, and clear about failures."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

import pytest
import ray
import torch
from helpers import reference_chunks, tiny_model, tiny_stream

from pavdm_dist.cluster.room import fits
from pavdm_dist.engine import lines
from pavdm_dist.engine.actors import StageActor
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.order import Unit
from pavdm_dist.engine.ray_engine import RayEngine
from pavdm_dist.engine.rehearsal import rehearsal
from pavdm_dist.errors import ConfigError, EngineError, PAVDMError
from pavdm_dist.io.metadata import cpu_model
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import Mode, PlanRow
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk, WindowSnapshot
from pavdm_dist.models.base import Activation, Costs
from pavdm_dist.models.loading import convert
from pavdm_dist.models.source import Source
from pavdm_dist.planning.partition import partition

pytestmark = pytest.mark.timeout(120)
BLOCKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stdit3")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gang(ray_cluster: None, folder: Path) -> Iterator[Callable[[int], RayEngine]]:
    """Stages by their number, started once: bringing processes up takes most of a test's time."""
    engines: dict[int, RayEngine] = {}

    def of(num_stages: int) -> RayEngine:
        if num_stages not in engines:
            engines[num_stages] = RayEngine(str(folder), _cut(num_stages), EngineOptions(num_stages, cpus_per_stage=0))
        return engines[num_stages]

    yield of
    for engine in engines.values():
        engine.close()


def _cut(num_stages: int) -> list[tuple[int, int]]:
    return partition(Costs((1.0,) * BLOCKS), num_stages)


def _streams(mode: Mode, ids: Iterator[int]) -> list[Stream]:
    streams = [
        tiny_stream(next(ids), seed=1, mode=mode),
        tiny_stream(next(ids), seed=2, guidance_scale=1.0, num_chunks=2, mode=mode),
        tiny_stream(next(ids), seed=3, start="clip", end="cut", num_chunks=3, mode=mode),
        tiny_stream(next(ids), seed=4, start="chunk", num_chunks=1, mode=mode),
    ]
    if mode == "window":
        streams.append(tiny_stream(next(ids), seed=6, num_chunks=3, window_chunks=6, partitions=3, lookahead=True))
    return streams


@pytest.mark.slow  # tests/test_devices.py has stages in bfloat16
def test_actors_in_bfloat16_equal_the_bfloat16_model(ray_cluster: None, folder: Path) -> None:
    model, stream = tiny_model(), tiny_stream(20, mode="causal")
    convert(model, torch.bfloat16, "cpu", model.keeps_float32)
    with RayEngine(str(folder), _cut(2), EngineOptions(2, dtype="bfloat16")) as engine:
        assert engine.devices == [f"cpu {cpu_model()}"]
        found = [finished.clean for finished in engine.run([stream])]
    for clean, reference in zip(found, reference_chunks(model, stream), strict=True):
        assert clean.latents.dtype == torch.float32 and torch.equal(clean.latents, reference.latents)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.timeout(280)
def test_actors_rehearse_before_they_are_linked(
    ray_cluster: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # of all of them
    stream, found = replace(tiny_stream(21, mode="causal"), chunks_per_unit=2), []
    prepared = rehearsal(tiny_model(), stream.plan, stream.latent_shape, stream.info, mode="causal", chunks_per_unit=2)
    for stages in (2, 1):
        with RayEngine(str(folder), _cut(stages), EngineOptions(stages, compile=True), rehearsal=prepared) as engine:
            assert engine.relative_error is not None and engine.relative_error < 1e-5
            found.append([finished.clean.latents for finished in engine.run([stream])])
    for two, one, plain in zip(*found, reference_chunks(tiny_model(), stream), strict=True):
        assert torch.equal(two, one)
        assert (one - plain.latents).norm() < 1e-5 * plain.latents.norm()


def test_a_model_that_is_not_on_a_node_is_said(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(PAVDMError, match=r"gone/transformer is not on .*: a model folder must have the same path"):
        RayEngine(Source(str(tmp_path / "gone"), component="transformer"), _cut(1), EngineOptions(1))


@pytest.mark.parametrize(
    ("num_stages", "in_flight"),
    [
        pytest.param(1, (2,), marks=pytest.mark.slow),
        (2, (1, 3)),
        pytest.param(3, (2,), marks=pytest.mark.slow),
        pytest.param(4, (4,), marks=pytest.mark.slow),
    ],
)
def test_actors_equal_the_sampler(ray_cluster: None, folder: Path, num_stages: int, in_flight: tuple[int, ...]) -> None:
    """In all modes, one after another on the same gang."""
    ids, streams = count(10), list[Stream]()
    snapshots: dict[int, list] = defaultdict(list)
    chunks: dict[int, list] = defaultdict(list)

    def keep(stream: int, point: ResumePoint) -> None:
        snapshots[stream].append(point.snapshot)

    with RayEngine(str(folder), _cut(num_stages), EngineOptions(num_stages, trace=True)) as engine:
        for mode in get_args(Mode):
            for places in in_flight:
                some = _streams(mode, ids)
                some = some if num_stages != 3 else some[::-1]  # another order of arrival
                for finished in engine.run(some, places, on_grown=keep):
                    chunks[finished.stream].append(finished.clean)
                    if finished.resume is not None:
                        keep(finished.stream, finished.resume)
                streams += some
        reports = engine.finish()
    model = tiny_model()
    for stream in streams:
        expected = reference_chunks(model, stream)
        assert [c.index for c in chunks[stream.id]] == [c.index for c in expected]
        for clean, reference in zip(chunks[stream.id], expected, strict=True):
            assert torch.equal(clean.latents, reference.latents)
        ends = [row.index + 1 for row in stream.plan.rows() if stream.plan.closes_shift(row.index)]
        exact = [row for row in ends if row == stream.plan.num_rows or row % 7 == 0]
        assert [snapshot.row for snapshot in snapshots[stream.id]] == (exact if stream.mode == "displaced" else ends)
    units = sum(stream.branches * len(_frames(stream, row)) for stream in streams for row in stream.plan.rows())
    orders = [[span.unit for span in report.trace] for report in reports]
    assert all(order == orders[0] for order in orders) and len(orders[0]) == units
    assert [unit.order for unit in orders[0]] == list(range(units))
    _check_bytes(streams, reports, num_stages)


def _frames(stream: Stream, row: PlanRow) -> list[int]:
    """Latent frames of every micro-batch of a row."""
    batches = stream.batches
    held = [batches.held(row, chunk) for chunk, _ in batches.parts(row.index)]
    return [stream.plan.latent_chunk_size * len(chunks) for chunks in held]


def _check_bytes(streams: list, reports: list, num_stages: int) -> None:
    """Bytes per hop are what the shapes say: header, tokens, per-frame modulation and time; latents back."""
    dim, tokens = 32, 2 * 3
    forward = back = 0
    for stream in streams:
        for row in stream.plan.rows():
            for frames in _frames(stream, row):
                forward += stream.branches * (64 + 4 * frames * dim * (tokens + 6 + 1))
            # Everything that was there at the row before and is still read.
            for chunk in stream.batches.sent(row.index - 1) if row.index else ():
                chunks = len(stream.batches.returned(stream.plan.row(row.index - 1), chunk))
                back += 64 + 4 * 4 * stream.plan.latent_chunk_size * chunks * 4 * 6
    assert [report.bytes_forward for report in reports] == [forward] * (num_stages - 1) + [0]
    assert [report.bytes_feedback for report in reports] == [0] * (num_stages - 1) + [back]


@pytest.mark.parametrize("mode", ["window", "causal"])
def test_snapshot_goes_on_bitwise(gang: Callable[[int], RayEngine], mode: Mode) -> None:
    stream = tiny_stream(0, seed=5, mode=mode)
    _check_every_snapshot(gang(2), stream, expected=[2, 4, 6, 8, 10, 12])


def test_displaced_goes_on_bitwise_from_every_exact_row(gang: Callable[[int], RayEngine]) -> None:
    displaced = Displaced(5, exact_growing=False, exact_draining=False)
    stream = tiny_stream(0, seed=5, mode="displaced", displaced=displaced, num_chunks=8)
    # Shifts end every two rows from row 6 on; of these, rows 10 and 20 are exact, and the video ends at 20.
    _check_every_snapshot(gang(2), stream, expected=[10, 20])


def test_adaptive_goes_on_bitwise_with_what_was_decided(gang: Callable[[int], RayEngine]) -> None:
    adaptive = Displaced(None, exact_growing=False, adaptive=0.2)
    stream = tiny_stream(0, num_chunks=8, num_inference_steps=9, mode="displaced", displaced=adaptive)
    snapshots = _check_every_snapshot(gang(2), stream)
    assert any(len(snapshot.exact_rows) > 1 for snapshot in snapshots), "a decision about the shift after the next"


def _check_every_snapshot(engine: RayEngine, stream: Stream, expected: list[int] | None = None) -> list[WindowSnapshot]:
    snapshots: list[WindowSnapshot] = []
    whole: list[CleanChunk] = []
    exact: tuple[int, ...] = ()
    for finished in engine.run([stream], on_grown=lambda _, point: snapshots.append(point.snapshot)):
        whole.append(finished.clean)
        exact = finished.resyncs
        if finished.resume is not None:
            snapshots.append(finished.resume.snapshot)
    rows = [snapshot.row for snapshot in snapshots]
    assert rows == expected or (expected is None and set(rows[:-1]) == {r for r in exact if r >= 9})
    assert rows[-1] == stream.plan.num_rows
    assert not list(engine.run([replace(stream, id=1, resume=ResumePoint(snapshots[-1]))])), "all is sampled"
    for snapshot in snapshots[:-1]:
        rest = list(engine.run([replace(stream, id=1, resume=ResumePoint(snapshot))]))
        assert rest[-1].clean.index == whole[-1].index
        assert rest[-1].resyncs == tuple(row for row in exact if row >= snapshot.row)
        for again, before in zip(rest, whole[-len(rest) :], strict=True):
            assert torch.equal(again.clean.latents, before.latents)
    return snapshots


@pytest.mark.parametrize(
    ("num_stages", "steps"),
    [pytest.param(1, 6, marks=pytest.mark.slow), (2, 6), pytest.param(3, 9, marks=pytest.mark.slow)],
)
def test_adaptive_resync_is_the_samplers(gang: Callable[[int], RayEngine], num_stages: int, steps: int) -> None:
    adaptive = Displaced(None, exact_growing=False, adaptive=0.2)
    plan = {"num_inference_steps": steps, "mode": "displaced", "displaced": adaptive}
    streams = [tiny_stream(i, seed=i, num_chunks=8 + i, **plan) for i in range(3)]
    chunks: dict[int, list] = {stream.id: [] for stream in streams}
    rows: dict[int, tuple[int, ...]] = {}
    engine = gang(num_stages)
    with pytest.raises(ConfigError, match=r"adaptive=0.2: needs at least 2 steps per shift"):
        next(engine.run([replace(streams[0], plan=replace(streams[0].plan, num_inference_steps=3))]))
    for finished in engine.run(streams, 2):
        chunks[finished.stream].append(finished.clean)
        rows[finished.stream] = finished.resyncs
    for stream in streams:
        exact = rows[stream.id]
        denoiser = StreamDenoiser(tiny_model(), stream)
        expected = list(sample(stream.window(), denoiser, stream.guidance_scale))
        assert exact and set(exact) == denoiser.batches.exact_rows
        for clean, reference in zip(chunks[stream.id], expected, strict=True):
            assert torch.equal(clean.latents, reference.latents)


@pytest.mark.slow  # tests/test_recovery.py spends the budget of one restart on the same death, as quickly
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_stage_ends_the_run_quickly(ray_cluster: None, folder: Path, victim: int) -> None:
    stream = tiny_stream(0, num_chunks=4000)
    with RayEngine(str(folder), _cut(2), EngineOptions(2, max_restarts=0)) as engine:
        import ray

        pid = ray.get(engine._gang._cast.stages[victim].where.remote()).pid
        run = engine.run([stream])
        next(run)
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(EngineError, match=rf"stage {victim} of 2 .*pid {pid}.* died"):
            for _ in run:
                pass
        assert time.monotonic() - killed < 15


@pytest.mark.slow  # tests/test_recovery.py has one that is replaced, too
def test_a_frozen_stage_is_noticed_by_its_peer(ray_cluster: None, folder: Path) -> None:
    stream = tiny_stream(0, num_chunks=4000)
    with RayEngine(str(folder), _cut(2), EngineOptions(2, link_timeout_s=3, max_restarts=0)) as engine:
        import ray

        pid = ray.get(engine._gang._cast.stages[1].where.remote()).pid
        run = engine.run([stream])
        next(run)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(EngineError, match=r"stage 0 of 2 .* failed"):
                for _ in run:
                    pass
        finally:
            os.kill(pid, signal.SIGCONT)


def test_the_driver_rests_while_one_stage_has_taken_a_video_in_and_another_has_not(
    gang: Callable[[int], RayEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, looks = gang(2), list[float]()
    mine, pid = engine._gang, ray.get(engine._gang._cast.stages[1].where.remote()).pid
    collect = mine._collect

    def counted(timeout: float) -> None:
        looks.append(time.monotonic())
        collect(timeout)

    monkeypatch.setattr(mine, "_collect", counted)
    found: list[CleanChunk] = []
    run = threading.Thread(target=lambda: found.extend(chunk.clean for chunk in engine.run([tiny_stream(0)])))
    os.kill(pid, signal.SIGSTOP)
    try:
        run.start()
        until = time.monotonic() + 20
        while not mine._taken_in and time.monotonic() < until:
            time.sleep(0.05)
        assert len(mine._taken_in) == 1, "stage 0 has answered"
        looks.clear()
        time.sleep(1)
        assert len(looks) < 100
    finally:
        os.kill(pid, signal.SIGCONT)
    run.join(60)
    assert found and not mine._taken_in


def test_what_actors_log_is_told_with_their_stage(
    gang: Callable[[int], RayEngine], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the video, where it is of one."""
    monkeypatch.setattr(lines, "ASK_S", 0.0)

    def say(actor: StageActor) -> None:
        run = actor._stage.run

        def said(unit: Unit, incoming: Activation | None) -> Any:
            if unit.row == 0:
                logging.getLogger("pavdm_dist.engine.stage").info("row 0 on process %d", os.getpid())
            return run(unit, incoming)

        actor._stage.run = said  # type: ignore[method-assign]

    def hush(actor: StageActor) -> None:
        del actor._stage.run  # type: ignore[method-assign]

    engine = gang(2)
    engine._gang._lines = lines.Listener()  # that of an earlier test has asked a moment ago
    stages = list(engine._gang._cast.stages)
    ray.get([stage.__ray_call__.remote(say) for stage in stages])
    places = [ray.get(stage.where.remote()).pid for stage in stages]
    with caplog.at_level(logging.INFO, "pavdm_dist"):
        list(engine.run([tiny_stream(77, num_chunks=40, guidance_scale=1.0)]))
    told = [record for record in caplog.records if "row 0" in record.getMessage()]
    found = {(record.stage, record.video, record.getMessage()) for record in told}  # type: ignore[attr-defined]
    assert found == {(rank, 77, f"stage {rank} of 2: row 0 on process {pid}") for rank, pid in enumerate(places)}
    ray.get([stage.__ray_call__.remote(hush) for stage in stages])


def test_a_fault_inside_a_stage_keeps_its_traceback(
    ray_cluster: None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = tiny_stream(0)
    broken = replace(stream, latent_shape=(3, 4, 6))  # one latent channel too few for the model
    engine = RayEngine(str(folder), _cut(1), EngineOptions(1))
    with engine, pytest.raises(EngineError, match=r"stage 0 of 1 .* failed"):
        list(engine.run([broken]))
    assert 'stdit3.py", line' in caplog.text and "to have 4 channels, but got 3" in caplog.text


def test_too_few_resources_are_refused_at_once(ray_cluster: None, folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"num_stages=2 needs 200 CPU.*cluster has 8 CPU"):
        RayEngine(str(folder), _cut(2), EngineOptions(2, cpus_per_stage=100))
    assert time.monotonic() - started < 5


def test_busy_resources_are_waited_for_and_then_named(ray_cluster: None, folder: Path) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    other = placement_group([{"CPU": 6}])  # somebody else's
    try:
        assert other.wait(60)
        with pytest.raises(EngineError, match=r"other jobs hold the rest"):
            RayEngine(str(folder), _cut(1), EngineOptions(1, cpus_per_stage=6, placement_timeout_s=2))
    finally:
        remove_placement_group(other)


def test_every_bundle_needs_one_node() -> None:
    assert fits([{"CPU": 2.0}] * 2, [{"CPU": 3.0}, {"CPU": 2.0}])
    assert not fits([{"CPU": 3.0}], [{"CPU": 2.0}, {"CPU": 2.0}])
    assert not fits([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 8.0}])


def test_stages_may_share_cpus_or_reserve_none() -> None:
    assert EngineOptions(2, cpus_per_stage=0.5, cpus_per_decoder=1).bundles() == [{"CPU": 0.5}] * 2 + [{"CPU": 1.0}]
    assert EngineOptions(1, cpus_per_stage=0, gpus_per_stage=1).bundles() == [{"GPU": 1.0}]
    assert EngineOptions(3, cpus_per_stage=0).bundles() == [{"CPU": 0.001}] * 3


def test_options_refuse() -> None:
    with pytest.raises(ConfigError, match=r"backend='mpi'"):
        EngineOptions(2, backend="mpi")
    with pytest.raises(ConfigError, match=r"nccl needs gpus_per_stage"):
        EngineOptions(2, backend="nccl")
