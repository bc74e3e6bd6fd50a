"""Micro-batches that are run again by a graph: the tensors that it was captured with must be those that are meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from captures import Failing, Repeated
from helpers import reference_chunks, tiny_model, tiny_stream
from linked import alone, sampled
from wan_models import tiny_wan

from pavdm_dist.engine import graphs
from pavdm_dist.engine.events import Shift
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.stage import Stage
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.base import Backbone, Grid
from pavdm_dist.models.wan_layers import RotaryGrid


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Repeated:
    made = Repeated()
    monkeypatch.setattr(graphs, "Capture", lambda: made)
    return made


def chunks(model: Backbone, streams: list[Stream], cuts: list[tuple[int, int]]) -> list[list[torch.Tensor]]:
    stages = [Stage(model, blocks, graphs=True) for blocks in cuts]
    found: list[list[torch.Tensor]] = [[] for _ in streams]
    for number, clean in LocalEngine(stages).run(streams):
        found[number].append(clean.latents)
    return found


@pytest.mark.parametrize(
    ("mode", "together", "replays"),
    [("window", 1, True), ("causal", 1, True), ("causal", 2, True), ("displaced", 1, False)],
)
@pytest.mark.parametrize("cuts", [[(0, 4)], [(0, 1), (1, 4)]])
def test_a_graph_gives_the_bits_of_its_kernels(
    capture: Repeated, mode: Mode, together: int, replays: bool, cuts: list[tuple[int, int]]
) -> None:
    model = tiny_model()
    streams = [
        replace(tiny_stream(number, seed=number, mode=mode, num_chunks=6), chunks_per_unit=together)
        for number in range(2)
    ]
    found = chunks(model, streams, cuts)
    for stream, own in zip(streams, found, strict=True):
        expected = [chunk.latents for chunk in reference_chunks(model, stream)]
        assert len(own) == len(expected) and all(map(torch.equal, own, expected))
    assert (capture.captured > 0) == replays and capture.replayed > 2 * capture.captured * replays - 1


@pytest.mark.parametrize("mode", ["window", "causal"])
@pytest.mark.parametrize("build", [tiny_model, tiny_wan])
def test_what_a_graph_reads_stays_when_other_videos_come(
    capture: Repeated, build: Callable[[], Backbone], mode: Mode
) -> None:
    """Of a larger window beside a smaller one: tables of more places, more room."""
    model = build()
    streams = [tiny_stream(mode=mode, num_chunks=8), tiny_stream(1, mode=mode, num_chunks=12, window_chunks=6)]
    stage = Stage(model, (0, model.spec.num_blocks), graphs=True)
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for number, clean in LocalEngine([stage]).run(streams, 2):
        found[number].append(clean.latents)
    for stream in streams:
        expected = [chunk.latents for chunk in reference_chunks(model, stream)]
        assert len(found[stream.id]) == len(expected) and all(map(torch.equal, found[stream.id], expected))
    assert capture.replayed > capture.captured > 0


def test_a_place_has_one_graph_and_a_stream_takes_its_own_along(capture: Repeated) -> None:
    model, stream = tiny_model(), tiny_stream(mode="causal", num_chunks=9)
    stage = Stage(model, (0, 4), graphs=True)
    assert stage._graphs is not None
    held = stage._graphs._slots
    most = 0
    for _ in LocalEngine([stage]).run([stream]):
        most = max(most, len(held.get(stream.id, {})))
    assert most == 2 * 4, "two branches; three places of the window, and the clean chunk's"
    assert not held, "nothing is kept of a stream that has ended"


@pytest.mark.parametrize("at", ["ready", "capture", "replay"])
def test_where_a_graph_cannot_be_made_kernels_are_launched_as_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    failing = Failing(at)
    monkeypatch.setattr(graphs, "Capture", lambda: failing)
    model, stream = tiny_model(), tiny_stream(num_chunks=6)
    stage = Stage(model, (0, 4), graphs=True)
    stage.make_ready()
    found = [clean.latents for _, clean in LocalEngine([stage]).run([stream])]
    expected = [chunk.latents for chunk in reference_chunks(model, stream)]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert failing.captured == (at != "ready") and failing.closed, "it is not tried again"
    assert caplog.text.count("no CUDA graphs from here on") == 1 and "out of memory." in caplog.text
    assert stage._graphs is not None and not stage._graphs._buffers, "and their memory is given up"


@pytest.mark.parametrize("build", [tiny_model, tiny_wan])
def test_large_micro_batches_have_none(
    capture: Repeated, build: Callable[[], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stream = build(), tiny_stream(num_chunks=6)
    blocks = [(0, model.spec.num_blocks)]
    chunks(model, [stream], blocks)
    before = capture.captured
    monkeypatch.setattr(graphs, "LARGEST", 100)
    chunks(model, [stream], blocks)
    assert before and capture.captured == before


@pytest.mark.gpu
@pytest.mark.slow  # tests above have it on the CPU
@pytest.mark.parametrize("mode", ["window", "causal"])
def test_graphs_of_a_gpu(mode: Mode, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """Of two streams, one after the other: all graphs of the first are gone when the second is captured."""
    if device.type == "cpu":
        pytest.skip("there are none on CPUs")
    model = tiny_model().to(device)
    plain, used = (Stage(model, (0, 4), device, graphs=graphs) for graphs in (False, True))
    for seed in range(2):
        stream = replace(tiny_stream(mode=mode, seed=seed, num_chunks=6), chunks_per_unit=1 + (mode == "causal"))
        found: list[list[Any]] = []
        for stage in (plain, used):
            told, _ = sampled([stage], [alone()], [stream])
            found.append([clean.latents for event in told if isinstance(event, Shift) for clean in event.clean])
        assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))
    assert not caplog.records, "a graph that cannot be made is warned of"


def test_rotary_angles_stay_where_a_graph_reads_them() -> None:
    small, cpu = Grid(3, 2, 4, 4, 8), torch.device("cpu")
    rope = RotaryGrid(12)
    given = rope.angles(8, 16, small, cpu)
    rope.angles(0, 400, small, cpu)
    again = rope.angles(8, 16, small, cpu)
    assert [part.data_ptr() for part in again] == [part.data_ptr() for part in given]
    longer = RotaryGrid(12).angles(8, 400, small, cpu)
    assert all(torch.equal(one, other[:16]) for one, other in zip(again, longer, strict=True))
