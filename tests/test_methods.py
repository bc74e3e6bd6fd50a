"""What PA-VDM is compared with, in the same loop: blocks at one level, noised context, single chunks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from driving import CUTS, driven, equal, local_gang
from helpers import reference_chunks, tiny_model, tiny_stream
from hypothesis import given
from hypothesis import strategies as st
from plans import CountedNoise, given_latents, many
from torch import Tensor

from pavdm_dist.commands.simulate import SimulateConfig, simulate_report
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Finished, Grown, Shift
from pavdm_dist.engine.inline import InlineEngine
from pavdm_dist.engine.watchdog import Patience, Watchdog
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.denoiser import ModelDenoiser
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.microbatches import WHOLE, MicroBatches
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CONTEXT, CleanChunk, Held, Window, WindowSnapshot, chunk_noise
from pavdm_dist.planning.forecast import UnitTime, makespan, rows_of
from pavdm_dist.planning.simulator import Machine, simulate

BLOCKS = {"window_chunks": 3, "block_chunks": 3, "num_inference_steps": 4}


@st.composite
def block_plans(draw: st.DrawFn) -> WindowPlan:
    """Any legal plan whose chunks go in blocks, also two and more blocks in a window."""
    block, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    start = draw(st.sampled_from(["noise", "chunk", "clip"]))
    return WindowPlan(
        num_inference_steps=blocks * draw(st.integers(1, 4)),
        window_chunks=block * blocks,
        latent_chunk_size=draw(st.integers(1, 2)),
        context_chunks=draw(st.integers(1 if start == "chunk" else 0, 3)),
        start=start,
        end=draw(st.sampled_from(["drain", "cut"])),
        num_chunks=draw(st.integers(1, 11)),
        block_chunks=block,
    )


# --- the plan --------------------------------------------------------------------------------------------


def test_replacement_goes_block_by_block() -> None:
    plan = WindowPlan(2, 3, 5, 2, start="chunk", num_chunks=7, block_chunks=3)
    assert [(row.context, row.chunks, row.steps_left, row.born, row.emits) for row in plan.rows()] == [
        ((-1,), (0, 1, 2), (2, 2, 2), (0, 1, 2), ()),
        ((-1,), (0, 1, 2), (1, 1, 1), (), (0, 1, 2)),
        ((1, 2), (3, 4, 5), (2, 2, 2), (3, 4, 5), ()),
        ((1, 2), (3, 4, 5), (1, 1, 1), (), (3, 4, 5)),
        ((4, 5), (6,), (2,), (6,), ()),
        ((4, 5), (6,), (1,), (), (6,)),
    ]
    assert (plan.num_rows, plan.num_born, plan.first_chunk_after_calls, plan.steps_per_shift) == (6, 7, 2, 2)
    cut = replace(plan, end="cut")
    assert cut.num_born == 9 and cut.row(5).chunks == (6, 7, 8) and cut.row(5).emits == (6,)
    assert [cut.chunk(k).role for k in range(9)] == ["emit"] * 7 + ["discard"] * 2


def test_the_papers_replacement_baseline_costs_what_it_does() -> None:
    """42 loops of 30 steps over 15 latents, 5 of them clean, for 425 latents with the given chunk."""
    plan = WindowPlan(30, 2, 5, 1, start="chunk", num_chunks=84, block_chunks=2)
    assert (plan.num_calls, plan.latent_evaluations) == (42 * 30, 18_900)
    assert plan.latent_evaluations / 425 == pytest.approx(44.47, abs=0.005)


def of_queue(plan: WindowPlan) -> list[PlanRow]:
    """Blocks in a queue that is pushed and popped: no formula for any row."""
    block, steps, chunks = plan.block_chunks, plan.num_inference_steps, plan.num_chunks or 0
    shift = steps * block // plan.window_chunks
    clean = {"noise": [], "chunk": [-1], "clip": list(range(-plan.context_chunks, 0))}[plan.start]
    blocks, waiting = list[list[int]](), list(range(0, chunks + plan.window_chunks, block))  # [first chunk, left]
    if plan.start == "clip":
        blocks = [[k, (k // block + 1) * shift] for k in range(0, plan.window_chunks - block, block)]
        waiting = waiting[len(blocks) :]
    rows = list[PlanRow]()
    while len([k for k in clean if 0 <= k < chunks]) < chunks:
        n, born = len(rows), tuple[int, ...]()
        here = lambda first: [k for k in range(first, first + block) if plan.end == "cut" or k < chunks]  # noqa: E731
        blocks = [entry for entry in blocks if here(entry[0])]
        if n % shift == 0 and here(waiting[0]):
            blocks.append([waiting.pop(0), steps])
            born = tuple(here(blocks[-1][0]))
        context = tuple(clean[max(0, len(clean) - plan.context_chunks) :])
        flying = [(k, left) for first, left in blocks for k in here(first)]
        emits = tuple(k for k, left in flying if left == 1 and k < chunks)
        clean += [k for k, left in flying if left == 1]
        rows.append(PlanRow(n, context, *map(tuple, zip(*flying, strict=True)), born, emits))  # type: ignore[arg-type]
        blocks = [[first, left - 1] for first, left in blocks if left > 1]
    return rows


@given(block_plans())
@many(150)
def test_any_plan_of_blocks_is_the_queue(plan: WindowPlan) -> None:
    rows = of_queue(plan)
    assert list(plan.rows()) == rows
    assert plan.latent_evaluations == sum(len(row.window) for row in rows) * plan.latent_chunk_size
    assert plan.first_chunk_after_calls == next(row.index for row in rows if row.emits) + 1
    endless = replace(plan, num_chunks=None)
    for n in {0, len(rows) // 2, len(rows) - 1}:
        stopped = endless.stopped(n)
        assert [stopped.row(m).window for m in range(n + 1)] == [endless.row(m).window for m in range(n + 1)]
        assert stopped.num_rows > n


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"block_chunks": 2}, "block_chunks=2: must divide window_chunks=3"),
        ({"block_chunks": 0}, "block_chunks=0: must divide"),
        ({"partitions": 3}, "partitions=3: chunks of a block have one level"),
        ({"context": "cached", "context_chunks": 4}, "context=cached: blocks of 3 chunks read clean ones"),
        (
            {"window_chunks": 12, "num_inference_steps": 6},
            r"window_chunks=12 does not divide num_inference_steps=6: use window_chunks 9 or 18, or",
        ),
    ],
)
def test_what_is_no_block_is_refused(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        WindowPlan(**{"latent_chunk_size": 1, **BLOCKS, **chosen})


# --- the loop --------------------------------------------------------------------------------------------


@given(block_plans(), st.floats(0.3, 4))
@many(60)
def test_constant_velocity_adds_one_to_the_birth_noise(plan: WindowPlan, shift: float) -> None:
    noise, given_chunks = CountedNoise(plan), given_latents(plan)
    window = Window(plan, NoiseSchedule(plan.num_inference_steps, shift), noise, given_chunks)
    found = list(sample(window, lambda x, levels, row, branch: torch.ones_like(x)))
    assert [clean.index for clean in found] == list(range(plan.num_chunks or 0))
    for clean in found:
        if plan.chunk(clean.index).init == "noise":
            assert (clean.latents - (noise(clean.index) + 1)).abs().max() < 2e-6


@pytest.mark.parametrize("follows", [False, True])
def test_what_the_model_sees_of_clean_chunks(follows: bool) -> None:
    """Themselves at level 0, or the same noise at every step, at the block's own level; what is kept is clean."""
    plan = WindowPlan(4, 2, 1, 2, start="clip", num_chunks=6, block_chunks=2)
    levels, given_chunks, done = NoiseSchedule(4, 1.7).levels, given_latents(plan), dict[int, Tensor]()

    def again(index: int, use: str) -> Tensor:
        assert use == CONTEXT
        return chunk_noise(5, index, (2, 1, 2, 3), use)

    def model(x: Tensor, told: Tensor, row: PlanRow, branch: int) -> Tensor:
        level = levels[row.steps_left[0]]
        assert torch.equal(told[0], torch.tensor([level if follows else 0.0] * len(row.context) + [level] * 2))
        for place, k in enumerate(row.context):
            clean = given_chunks[k] if k < 0 else done[k]
            expected = (1 - level) * clean + level * again(k, CONTEXT) if follows else clean
            assert torch.equal(x[0, :, place : place + 1], expected)
        return torch.tanh(x)

    window = Window(plan, NoiseSchedule(4, 1.7), CountedNoise(plan), given_chunks, Held(follows=follows), again)
    for clean in sample(window, model):
        done[clean.index] = clean.latents
    assert sorted(done) == list(range(6))


def test_a_first_block_from_text_is_the_ordinary_sampler() -> None:
    stream = tiny_stream(guidance_scale=1.0, **{**BLOCKS, "num_chunks": 3})
    x = torch.cat([stream.noise(k) for k in range(3)], dim=1)[None]
    levels, denoise = stream.schedule.levels, ModelDenoiser(tiny_model(), stream)
    for n in range(4):
        told = torch.full((1, x.shape[2]), levels[4 - n])
        x = x + denoise(x, told, stream.plan.row(n), 0) * (levels[4 - n] - levels[3 - n])
    found = torch.cat([clean.latents for clean in reference_chunks(tiny_model(), stream)], dim=1)
    assert torch.equal(found, x[0])


def test_blocks_of_one_chunk_are_a_window_of_one() -> None:
    one = tiny_stream(window_chunks=1, block_chunks=1)
    assert list(one.plan.rows()) == list(WindowPlan(6, 1, 2, 1, num_chunks=4).rows())


def videos() -> list[Stream]:
    """Blocks, with clean and noised context, beside the published method; every start."""
    return [
        tiny_stream(0, 1, **BLOCKS, num_chunks=7),
        tiny_stream(1, 2, guidance_scale=1.0, **BLOCKS, num_chunks=5, start="clip", context_chunks=2, end="cut"),
        replace(tiny_stream(2, 3, **BLOCKS, num_chunks=6, start="chunk"), context_follows=True),
        tiny_stream(3, 4, num_chunks=3),
        tiny_stream(4, 5, guidance_scale=1.0, window_chunks=1, num_chunks=3),
        replace(
            tiny_stream(5, 6, guidance_scale=1.0, window_chunks=4, block_chunks=2, num_inference_steps=4, num_chunks=5),
            image=torch.ones(4, 1, 4, 6),
        ),
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_stages_equal_one_process(num_stages: int) -> None:
    cut = {1: CUTS[0], 2: [(0, 1), (1, 4)], 3: CUTS[1], 4: [(i, i + 1) for i in range(4)]}[num_stages]
    driver, chunks = Driver(local_gang(cut), 2 if num_stages % 2 else 3), dict[int, list[CleanChunk]]()
    for stream in videos():
        driver.submit(stream)
    while not driver.idle:
        for output in driver.step(0.0):
            assert isinstance(output, Finished | Grown)
            if isinstance(output, Finished):
                chunks.setdefault(output.stream, []).append(output.clean)
    for stream in videos():
        expected = reference_chunks(tiny_model(), stream)
        assert [clean.index for clean in chunks[stream.id]] == list(range(stream.plan.num_chunks or 0))
        pairs = zip(chunks[stream.id], expected, strict=True)
        assert all(torch.equal(one.latents, other.latents) for one, other in pairs)


@pytest.mark.parametrize("number", [0, 2])
def test_a_run_goes_on_behind_every_block(number: int) -> None:
    stream = videos()[number]
    found = driven(stream, CUTS[1])
    assert equal(found, reference_chunks(tiny_model(), stream))
    whole = [one.clean.index for one in found if one.resume is not None]
    assert whole == [k for k in range(len(found)) if k % 3 == 2 or k == len(found) - 1]
    for index in whole[:-1]:
        rest = driven(replace(stream, resume=found[index].resume), CUTS[0])
        assert equal(rest, [one.clean for one in found[index + 1 :]])


def test_another_gang_repeats_no_chunk_of_a_block() -> None:
    """The first one is lost after each of its chunks."""
    stream = videos()[0]
    expected = reference_chunks(tiny_model(), stream)
    for after in range(1, 7):
        driver, outputs = Driver(local_gang(CUTS[1])), list[Finished]()

        def run(enough: Callable[[], bool], driver: Driver = driver, outputs: list[Finished] = outputs) -> None:
            while not (driver.idle or enough()):
                outputs += [output for output in driver.step(0.0) if isinstance(output, Finished)]

        driver.submit(stream)
        run(lambda outputs=outputs, after=after: len(outputs) >= after)  # type: ignore[misc]
        driver.adopt(local_gang(CUTS[0]))
        run(lambda: False)
        assert equal(outputs, expected)


class Frames:
    """A codec whose frames are nobody's concern."""

    def receptive_latents(self) -> int:
        return 2

    def decoder(self) -> Frames:
        return self

    def warm(self, latents: Tensor) -> None: ...

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(1)


@pytest.mark.parametrize("number", [0, 2, 5])
def test_the_engine_of_one_process_gives_the_same_points(number: int) -> None:
    stream = videos()[number]
    inline = list(InlineEngine(tiny_model(), Frames()).run([stream]))  # type: ignore[arg-type]
    staged = driven(stream, CUTS[1])
    assert equal(inline, [one.clean for one in staged])
    for one, other in zip(inline, staged, strict=True):
        assert (one.resume is None) == (other.resume is None) and one.last == other.last
        if one.resume is not None and other.resume is not None:
            mine, theirs = one.resume.snapshot, other.resume.snapshot
            assert mine.row == theirs.row and mine.latents.keys() == theirs.latents.keys()
            assert all(torch.equal(value, theirs.latents[k]) for k, value in mine.latents.items())


def test_an_endless_video_ends_with_a_whole_block() -> None:
    stream = tiny_stream(**BLOCKS, num_chunks=None)
    found = driven(stream, CUTS[1], lambda driver, one: driver.stop(0) if one.clean.index == 2 else None)
    assert len(found) % 3 == 0 and len(found) > 3
    whole = replace(stream, plan=replace(stream.plan, num_chunks=len(found)))
    assert equal(found, reference_chunks(tiny_model(), whole))


def test_several_chunks_travel_with_one_shift() -> None:
    chunks = (CleanChunk(3, torch.randn(2, 1, 2, 2)), CleanChunk(4, torch.randn(2, 1, 2, 2)))
    read = pickle.loads(pickle.dumps(Shift(1, WindowSnapshot(8, {4: torch.ones(2, 1, 2, 2)}), chunks)))
    assert [clean.index for clean in read.clean] == [3, 4] and read.snapshot.row == 8
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(read.clean, chunks, strict=True))


@pytest.mark.parametrize("mode", ["causal", "displaced"])
def test_other_modes_are_refused(mode: Any) -> None:
    with pytest.raises(ConfigError, match=f"mode={mode}: blocks of 3 chunks at one level see each other; use mode"):
        MicroBatches(WindowPlan(latent_chunk_size=1, **BLOCKS), mode)


def test_chunks_that_come_together_make_no_pause_suspicious() -> None:
    """A block takes 60 s and its chunks come in a moment: 60 s of silence are usual, 700 s are not."""
    now = [0.0]
    watchdog = Watchdog(Patience(10.0, 30.0), lambda: now[0])
    watchdog.starts(4, together=3)
    for _ in range(4):
        for pause in (60.0, 0.1, 0.1):
            now[0] += pause
            watchdog.gave(4)
    now[0] += 500.0
    assert not watchdog.late([4])
    now[0] += 200.0
    (late,) = watchdog.late([4])
    assert late.usually == ", usually 60.2 s for 3 chunks" and not late.over


def test_time_is_forecast_as_simulated() -> None:
    plan = WindowPlan(6, 3, 1, 1, num_chunks=12, block_chunks=3)
    rows = rows_of(plan, "window")
    for decode in (0.0, 3.0, 30.0):
        machine = Machine((1.0, 1.0), decode_seconds=decode)
        found = simulate([plan] * 2, "window", 1, 2, machine)
        assert {part.unit.chunk for part in found.busy} == {WHOLE} and len(found.decoded) == (24 if decode else 0)
        seconds = makespan(rows, 1, 2, 2, lambda held: UnitTime((float(held),) * 2), decode)
        assert seconds == pytest.approx(found.makespan, rel=0.05)


@pytest.mark.parametrize(
    ("method", "plan"),
    [
        ("replacement", WindowPlan(30, 6, 1, 1, num_chunks=12, block_chunks=6)),
        ("replacement-noise", WindowPlan(30, 6, 1, 1, num_chunks=12, block_chunks=6)),
        ("fifo", WindowPlan(30, 6, 1, 1, num_chunks=12, partitions=3, lookahead=True)),
        ("autoregressive", WindowPlan(30, 1, 1, 1, num_chunks=12)),
    ],
)
def test_the_command_simulates_methods(method: Any, plan: WindowPlan) -> None:
    config = SimulateConfig(method=method, chunks=12, branches=1, num_stages=1, unit_cost=True)
    found = simulate_report(config)
    assert found["makespan"] == found["units"] == plan.num_calls and found["method"] == method
    latents = simulate([plan], "window", 1, 1, Machine((1.0,))).makespan
    assert simulate_report(replace(config, unit_cost=False))["makespan"] == latents == plan.latent_evaluations


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"method": "replacement", "context": False}, "context=false: method=replacement goes on from clean chunks"),
        ({"method": "autoregressive", "window_chunks": 6}, "window_chunks=6: method=autoregressive makes one chunk"),
        ({"method": "replacement", "mode": "causal"}, "mode=causal: blocks of 6 chunks"),
        ({"method": "fifo", "window_chunks": 5}, "window_chunks=5: method=fifo looks at halves"),
    ],
)
def test_what_cannot_be_simulated_is_refused(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate_report(SimulateConfig(**chosen))
