"""Several chunks of a row as one micro-batch: as chunk by chunk, on any cut, in order, planner and simulator."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain

import pytest
import torch
from helpers import reference_chunks, tiny_model, tiny_stream
from hypothesis import given
from hypothesis import strategies as st
from plans import legal_plans, many
from wan_models import tiny_wan

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.cli import main
from pavdm_dist.commands.resolve import sampling_params
from pavdm_dist.commands.videos import Video, _own_settings
from pavdm_dist.config import ClusterConfig, SampleConfig
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.order import epochs, join_of
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.microbatches import WHOLE, Displaced, MicroBatches
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import WindowSnapshot
from pavdm_dist.planning.forecast import UnitTime, makespan, rows_of, useful_stages, work
from pavdm_dist.planning.planner import choose
from pavdm_dist.planning.simulator import Machine, simulate
from pavdm_dist.planning.unit_size import suited_chunks_per_unit
from pavdm_dist.request.sampling import SamplingParams, tier
from pavdm_dist.request.video_request import VideoRequest

MODES: tuple[Mode, ...] = ("causal", "displaced")
STARTS = {
    "noise": {},
    "clip": {"start": "clip", "end": "cut", "num_chunks": 3},
    "no context": {"context_chunks": 0},
    "short": {"num_chunks": 1},
}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("together", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", STARTS)
def test_chunks_together_are_chunk_by_chunk(start: str, mode: Mode, together: int) -> None:
    stream = tiny_stream(mode=mode, **STARTS[start])
    for build in (tiny_model, tiny_wan) if start == "noise" else (tiny_model,):
        model = build()
        expected = reference_chunks(model, stream)
        found = reference_chunks(model, replace(stream, chunks_per_unit=together))
        assert [clean.index for clean in found] == [clean.index for clean in expected]
        for one, other in zip(found, expected, strict=True):
            assert relative(one.latents, other.latents) < 1e-5


@pytest.mark.parametrize(
    ("mode", "together"),
    [
        ("causal", 2),
        ("displaced", 3),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("causal", 3), ("displaced", 2))),
    ],
)
def test_any_cut_gives_the_same_bits(mode: Mode, together: int) -> None:
    model = tiny_model()
    streams = [
        tiny_stream(0, seed=1, mode=mode, num_chunks=5),
        tiny_stream(1, seed=2, guidance_scale=1.0, num_chunks=2, mode=mode),
        tiny_stream(2, seed=3, start="clip", end="cut", num_chunks=3, mode=mode),
        tiny_stream(3, seed=4, context_chunks=0, mode=mode),
    ]
    streams = [replace(stream, chunks_per_unit=together) for stream in streams]
    sampled = [reference_chunks(model, stream) for stream in streams]
    for cuts in ([(0, 4)], [(0, 1), (1, 4)], [(0, 2), (2, 3), (3, 4)]):
        chunks: dict[int, list] = {stream.id: [] for stream in streams}
        for number, clean in LocalEngine([Stage(model, blocks) for blocks in cuts]).run(streams, 2):
            chunks[number].append(clean.latents)
        for stream, expected in zip(streams, sampled, strict=True):
            assert len(chunks[stream.id]) == len(expected)
            assert all(torch.equal(one, other.latents) for one, other in zip(chunks[stream.id], expected, strict=True))


def snapshots_of(stream: Stream) -> list[WindowSnapshot]:
    """After every shift, from one stage."""
    found, stage = list[WindowSnapshot](), Stage(tiny_model(), (0, 4))
    stage.prepare(stream)
    for unit in chain.from_iterable(epochs(lambda n: None if n else join_of(stream, n), 1)):
        done = stage.run(unit, None)
        if getattr(done, "snapshot", None) is not None:
            found.append(done.snapshot)  # type: ignore[union-attr]
        if getattr(done, "latents", None) is not None:
            stage.feed(unit.stream, unit.row + 1, unit.chunk, done.latents)  # type: ignore[union-attr]
    return found


def test_a_restored_run_goes_on_bit_for_bit() -> None:
    model, stream = tiny_model(), replace(tiny_stream(mode="causal", num_chunks=5), chunks_per_unit=2)
    expected = {clean.index: clean.latents for clean in reference_chunks(model, stream)}
    for snapshot in snapshots_of(stream)[:-1]:
        rest = replace(stream, resume=ResumePoint(snapshot))
        found = list(LocalEngine([Stage(model, blocks) for blocks in ((0, 3), (3, 4))]).run([rest]))
        assert found and all(torch.equal(clean.latents, expected[clean.index]) for _, clean in found)


@given(legal_plans(max_chunks=8), st.integers(1, 5), st.sampled_from(MODES), st.integers(1, 9))
@many(150)
def test_every_chunk_is_computed_once_and_every_message_awaited_once(
    plan: WindowPlan, together: int, mode: Mode, every: int
) -> None:
    displaced = Displaced(every, exact_growing=False) if mode == "displaced" else Displaced()
    batches = MicroBatches(plan, mode, 0, displaced, chunks_per_unit=together)
    on_the_way: tuple[int, ...] = ()
    for row in plan.rows():
        parts = batches.parts(row.index)
        noisy = [batches.held(row, chunk) for chunk, is_context in parts if not is_context]
        whole = parts[-1][0] == WHOLE
        assert [k for held in noisy for k in held] == list(row.window if whole else row.chunks)
        assert whole or all(len(held) == together for held in noisy[:-1])
        assert all(len(batches.held(row, chunk)) == 1 for chunk, is_context in parts if is_context)
        if row.index:
            awaited = batches.fed(row.index)
            assert tuple(chain.from_iterable(awaited)) == on_the_way, "in the order they were sent"
            if not whole and WHOLE not in on_the_way:
                before = plan.row(row.index - 1)
                back = {message: set(batches.returned(before, message)) for message in on_the_way}
                coming, there = set().union(*back.values()), set[int]()
                for (chunk, _), messages in zip(parts, awaited, strict=True):
                    there.update(*(back[message] for message in messages))
                    assert set(batches.held(row, chunk)) & coming <= there, "nothing is computed before it came"
        on_the_way = batches.sent(row.index)


@pytest.mark.parametrize("together", [2, 4, 6])
@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_the_forecast_is_the_simulation(mode: Mode, stages: int, together: int) -> None:
    plan, machine = WindowPlan(30, 6, 1, 1, num_chunks=18), Machine((1.0,) * stages)

    def unit(held: int) -> UnitTime:
        return UnitTime(tuple(seconds * held for seconds in machine.stage_seconds))

    rows = rows_of(plan, mode, None, together)
    for branches, streams in ((1, 1), (2, 1), (2, 2)):
        found = simulate([plan] * streams, mode, branches, streams, machine, None, together)
        assert makespan(rows, branches, streams, streams, unit) == pytest.approx(found.makespan, rel=0.08)
        busy = sum(part.end - part.start for part in found.busy)
        assert work(rows, branches, streams, unit) == pytest.approx(busy)


def test_few_stages_take_large_units_and_many_take_chunks() -> None:
    checkpoint = Checkpoint.open("stdit3-xl")
    chosen = {"allow_untrained_causal": True, "mode": "causal", "num_inference_steps": 30, "window_chunks": 6}
    params = SamplingParams.resolve(checkpoint, **chosen)
    cells = checkpoint.codec_spec.latent_size(params.height, params.width)
    sizes = [suited_chunks_per_unit(checkpoint.shape, params, cells, stages, 1) for stages in (1, 4, 12)]
    assert sizes[0] == params.window_chunks and sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    assert suited_chunks_per_unit(checkpoint.shape, params, cells, 8, 8) >= sizes[1]
    window = SamplingParams.resolve(checkpoint)
    assert suited_chunks_per_unit(checkpoint.shape, window, cells, 1, 1) == 1
    assert useful_stages(replace(params, chunks_per_unit=4), 1) == 4 and useful_stages(params, 1) == 12


def test_the_planner_says_it_where_blocks_have_a_price_of_their_own() -> None:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, mode="causal")
    plan, dear = params.plan(20), ClusterConfig(devices=1, tflops=0.02, block_overhead_ms=50)
    assert choose(checkpoint, params, plan, dear)[0].chunks_per_unit == params.window_chunks
    assert choose(checkpoint, params, plan, replace(dear, block_overhead_ms=0.0))[0].chunks_per_unit == 1
    (one,) = {setup.chunks_per_unit for setup in choose(checkpoint, params, plan, replace(dear, devices=8))[1]
              if setup.num_stages == 8}  # fmt: skip
    assert one < params.window_chunks


def test_it_is_recorded_as_another_tier() -> None:
    params = SamplingParams.resolve(Checkpoint.open("embedded"), mode="causal")
    assert tier(params, compiled=False) == "same bits"
    assert tier(params, compiled=True) == tier(replace(params, chunks_per_unit=2), False) == "same mathematics"
    assert tier(replace(params, mode="displaced"), False) == "approximate"
    assert tier(replace(params, mode="displaced", displaced=Displaced(1)), False) == "same bits"


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"chunks_per_unit": 2}, r"chunks_per_unit=2: in mode=window a micro-batch is the whole window"),
        (
            {"partitions": 3, "chunks_per_unit": 2},
            r"=2: partitions=3 says already .*use chunks_per_unit=1$",
        ),
        ({"lookahead": True, "chunks_per_unit": 2}, r"chunks_per_unit=2: lookahead=true says already"),
        ({"method": "fifo", "chunks_per_unit": 3}, r"chunks_per_unit=3: lookahead=true says already"),
        (
            {"method": "replacement", "chunks_per_unit": 2},
            r"=2: blocks of 6 chunks, .*use chunks_per_unit=1",
        ),
        ({"method": "replacement-noise", "chunks_per_unit": 2}, r"chunks_per_unit=2: blocks of 6 chunks"),
        ({"method": "autoregressive", "chunks_per_unit": 2, "mode": "causal"}, r"window_chunks=1 noisy chunks; use 1$"),
        ({"mode": "causal", "chunks_per_unit": 7}, r"chunks_per_unit=7: .*window_chunks=6 noisy chunks; use 1 to 6"),
        ({"mode": "displaced", "chunks_per_unit": 0}, r"chunks_per_unit=0: .*use 1 to 6"),
    ],
)
def test_what_no_window_holds_is_refused(chosen: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        SamplingParams.resolve(Checkpoint.open("embedded"), **chosen)


def test_commands_know_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mode=causal", "num_stages=2", "chunks=6"]
    units = []
    for more in ([], ["chunks_per_unit=3"]):
        assert main(["simulate", "--json", *words, *more]) == 0
        units.append(json.loads(capsys.readouterr().out)["units"])
    assert units[1] < 0.5 * units[0]
    assert main(["simulate", *words, "chunks_per_unit=9"]) == 2
    assert "chunks_per_unit=9" in capsys.readouterr().err


def test_where_nobody_says_it_cpus_take_one_and_gpus_what_suits() -> None:
    checkpoint = Checkpoint.open("stdit3-xl")
    config = SampleConfig(model="stdit3-xl", mode="causal", allow_untrained_causal=True, device="cpu")
    assert sampling_params(config, checkpoint).chunks_per_unit == 1
    card = replace(config, device="cuda", num_stages=1)
    assert sampling_params(card, checkpoint).chunks_per_unit == checkpoint.defaults.window_chunks
    assert sampling_params(replace(card, num_stages=12), checkpoint).chunks_per_unit == 1
    assert sampling_params(replace(card, chunks_per_unit=2), checkpoint).chunks_per_unit == 2
    assert sampling_params(replace(card, mode="window"), checkpoint).chunks_per_unit == 1


def test_what_was_chosen_is_kept_for_whoever_goes_on() -> None:
    checkpoint = Checkpoint.open("embedded")
    config = SampleConfig(mode="causal", device="cuda", num_stages=1, prompt="a red three", output="a.mp4")
    params = sampling_params(config, checkpoint)
    kept = _own_settings(config, Video(0, VideoRequest("a red three", 0, 9), "a.mp4"), params)
    fewer = sampling_params(replace(kept, num_stages=8), checkpoint)
    assert kept.chunks_per_unit == fewer.chunks_per_unit == params.chunks_per_unit > 1
