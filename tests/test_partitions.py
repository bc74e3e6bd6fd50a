"""Partitions and lookahead: which chunks each call sees, FIFO-Diffusion's queue by hand, stages equal one process."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from driving import CUTS, driven, equal, local_gang
from helpers import reference_chunks, tiny_model, tiny_stream
from hypothesis import given
from hypothesis import strategies as st
from plans import legal_plans, many
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.plan import plan_report
from pavdm_dist.commands.resolve import say_cost
from pavdm_dist.commands.simulate import SimulateConfig, simulate_report
from pavdm_dist.config import ClusterConfig, PlanConfig
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Event, Finished, Grown, Left, Shift
from pavdm_dist.engine.feed import EpochFeed
from pavdm_dist.engine.loop import Links, StageLoop
from pavdm_dist.engine.messages import Header, Layout, Message
from pavdm_dist.engine.order import Join, LogEntry, epoch_units, join_of
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.calls import Call
from pavdm_dist.method.microbatches import WHOLE, MicroBatches
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.sampler import guide
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.base import BlockContext
from pavdm_dist.models.text_cache import TextRun
from pavdm_dist.planning.costs import measure_costs
from pavdm_dist.planning.forecast import UnitTime, makespan, rows_of, work
from pavdm_dist.planning.simulator import Machine, simulate
from pavdm_dist.request.sampling import SamplingParams

SIX = {"num_inference_steps": 6, "window_chunks": 6}
KINDS = {
    "two partitions": {"partitions": 2},
    "three with lookahead": {"partitions": 3, "lookahead": True, "context_chunks": 1},
    "one with lookahead": {"lookahead": True, "context_chunks": 3},
}


@st.composite
def partitioned_plans(draw: st.DrawFn, max_chunks: int = 12) -> WindowPlan:
    """Any legal plan whose rows are cut into calls."""
    plan = draw(legal_plans(max_chunks=max_chunks).filter(lambda plan: plan.window_chunks > 1))
    cuts = [
        (n, ahead)
        for n in range(1, plan.window_chunks + 1)
        for ahead in (False, True)
        if plan.window_chunks % (n * (1 + ahead)) == 0 and (n > 1 or ahead)
    ]
    partitions, lookahead = draw(st.sampled_from(cuts))
    return replace(plan, partitions=partitions, lookahead=lookahead)


# --- which chunks a call sees ----------------------------------------------------------------------------


def test_the_calls_of_a_full_window() -> None:
    plan = WindowPlan(12, 6, 5, num_chunks=9, partitions=3)
    row = plan.row(12)
    assert row.window == (0, 1, 2, 3, 4, 5, 6)
    assert plan.calls(row) == (Call(slice(5, 7), 2), Call(slice(3, 5), 2), Call(slice(0, 3), 2))
    ahead = replace(plan, lookahead=True)
    assert [(call.sees.start, call.sees.stop, call.moves) for call in ahead.calls(row)] == [
        (5, 7, 1), (4, 6, 1), (3, 5, 1), (2, 4, 1), (1, 3, 1), (0, 2, 1)
    ]  # fmt: skip
    one = replace(plan, partitions=1, lookahead=True, context_chunks=3)
    assert one.calls(one.row(16)) == (Call(slice(3, 9), 3), Call(slice(0, 6), 3))


@pytest.mark.parametrize(("partitions", "length"), [(1, 4), (2, 4), (4, 2), (3, 6)])
def test_a_full_window_is_fifo_diffusions_queue(partitions: int, length: int) -> None:
    """Its queue of n f latents, f / 2 that have left in front: call r sees f from r f / 2 on, moves the later half."""
    plan = WindowPlan(
        partitions * length, partitions * length, 1, length // 2, num_chunks=99, partitions=partitions, lookahead=True
    )
    row = plan.row(partitions * length + length)
    by_hand = [(r * length // 2, r * length // 2 + length) for r in reversed(range(2 * partitions))]
    assert [(call.sees.start, call.sees.stop) for call in plan.calls(row)] == by_hand
    assert {call.moves for call in plan.calls(row)} == {length // 2}


@given(partitioned_plans())
@many(150)
def test_every_call_sees_its_levels_and_every_chunk_moves_once(plan: WindowPlan) -> None:
    """By levels alone: partition p is where (p T / n, (p + 1) T / n] updates are left, whatever is in flight."""
    parts = plan.partitions * (2 if plan.lookahead else 1)
    span = plan.num_inference_steps // parts
    batches, calls, seen = MicroBatches(plan, "window"), 0, 0
    for row in plan.rows():
        of_part = {k: (left - 1) // span for k, left in zip(row.chunks, row.steps_left, strict=True)}
        expected = []
        for part in sorted(set(of_part.values()), reverse=True):
            moves = tuple(k for k in row.chunks if of_part[k] == part)
            looks = tuple(k for k in row.chunks if plan.lookahead and of_part[k] == part - 1)
            if part == min(of_part.values()):
                looks = row.context
            expected.append((looks + moves, moves))
        keys = [chunk for chunk, _ in batches.parts(row.index)]
        found = [(batches.held(row, key), batches.moved(row, key)) for key in keys]
        assert found == expected
        assert [k for _, moves in reversed(found) for k in moves] == list(row.chunks)
        for sees, _ in found:
            left = [row.steps_left[row.chunks.index(k)] for k in sees if k in row.chunks]
            assert max(left) - min(left) < plan.num_inference_steps // plan.partitions
        calls, seen = calls + len(found), seen + sum(len(sees) for sees, _ in found)
        if 0 in row.emits:
            assert plan.first_chunk_after_calls == calls
    assert (plan.num_calls, plan.latent_evaluations) == (calls, seen * plan.latent_chunk_size)


def test_lookahead_costs_twice_the_latents() -> None:
    plan = WindowPlan(48, 24, 5, 3, num_chunks=400)
    ahead = replace(plan, partitions=4, lookahead=True)
    assert ahead.num_calls / plan.num_calls == pytest.approx(8, rel=0.05)
    full = 400 - 24  # shifts of full windows
    assert ahead.latent_evaluations == pytest.approx(full * 2 * 24 * 2 * 5, rel=0.08)
    without = replace(ahead, lookahead=False)
    assert without.latent_evaluations == plan.latent_evaluations


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"partitions": 0}, "partitions=0: at least 1 is needed"),
        ({"partitions": 4}, "partitions=4 does not cut window_chunks=6 into equal parts: use partitions 3 or 6"),
        ({"partitions": 7}, "use partitions 6$"),
        ({"partitions": 2, "lookahead": True}, r"an even number of chunks \(lookahead=true\): use partitions 1 or 3"),
        ({"window_chunks": 3, "lookahead": True}, "window_chunks=3 has no halves; use window_chunks 2 or 4"),
        ({"window_chunks": 1, "num_inference_steps": 1, "lookahead": True}, "no halves; use window_chunks 2$"),
        ({"lookahead": "yes"}, "lookahead='yes': must be true or false"),
        ({"partitions": 2, "context": "cached", "context_chunks": 6}, "partitions=2: with context=cached a row is one"),
    ],
)
def test_what_is_no_partition_is_refused(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        WindowPlan(**{"num_inference_steps": 6, "window_chunks": 6, "latent_chunk_size": 1, **chosen})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("mode", ["causal", "displaced"])
def test_other_modes_are_refused(mode: Any) -> None:
    with pytest.raises(ConfigError, match=f"mode={mode}: lookahead=true cuts rows of mode=window into calls; use mode"):
        MicroBatches(WindowPlan(6, 6, 1, lookahead=True), mode)


# --- what is computed ------------------------------------------------------------------------------------


def video(kind: str, stream_id: int = 0, **chosen: Any) -> Stream:
    return tiny_stream(stream_id, **{"seed": stream_id, "num_chunks": 8, **SIX, **KINDS[kind], **chosen})


@torch.inference_mode()
def by_hand(stream: Stream) -> dict[int, Tensor]:
    """FIFO-Diffusion as its authors' program goes: one queue, changed in place, the noisiest call first."""
    plan, model, levels = stream.plan, tiny_model(), stream.schedule.levels
    size, clean = plan.latent_chunk_size, dict(stream.given)
    queue, steps, done = dict[int, Tensor](), plan.num_inference_steps, dict[int, Tensor]()
    shift, calls = steps // plan.window_chunks, plan.partitions * (2 if plan.lookahead else 1)
    left: dict[int, int] = {}
    row = 0
    while len(done) < (plan.num_chunks or 0):
        if row % shift == 0 and row // shift < (plan.num_chunks or 0):
            queue[row // shift], left[row // shift] = stream.noise(row // shift), steps
        part = {k: (left[k] - 1) * calls // steps for k in queue}
        for number in sorted(set(part.values()), reverse=True):
            moves = [k for k in queue if part[k] == number]
            looks = [k for k in queue if plan.lookahead and part[k] == number - 1]
            if number == min(part.values()):
                looks = sorted(clean)[max(0, len(clean) - plan.context_chunks) :]
            sees = [*looks, *moves]
            x = torch.cat([queue[k] if k in queue else clean[k] for k in sees], dim=1)[None]
            times = torch.tensor([levels[left[k]] if k in queue else 0.0 for k in sees]).repeat_interleave(size)[None]
            grid, found = model.grid(*x.shape[2:]), []
            for branch in range(stream.branches):
                texts = [stream.conditioning.texts[stream.conditioning.key(k, branch)] for k in sees]
                runs: list[TextRun] = []
                for place, text in enumerate(texts):
                    same = bool(runs) and texts[place - 1] is text
                    first = runs.pop().start if same else place * size
                    runs.append(TextRun(first, (place + 1) * size, model.project_text(text[None])))
                activation = model.embed(x, times, stream.info)
                for index in range(model.spec.num_blocks):
                    activation = model.block(index, activation, BlockContext(grid, runs))
                found.append(model.to_velocity(model.head(activation, grid), x, times))
            velocity = guide(found, stream.guidance_scale)[0, :, -len(moves) * size :]
            for k, v in zip(moves, velocity.split(size, dim=1), strict=True):
                queue[k] = queue[k] + v * (levels[left[k]] - levels[left[k] - 1])
        left = {k: count - 1 for k, count in left.items()}
        for k in [k for k in queue if left[k] == 0]:
            done[k] = clean[k] = queue.pop(k)
            del left[k]
        row += 1
    return done


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["noise", "chunk"])
def test_latents_are_those_of_the_queue_by_hand(kind: str, start: Any) -> None:
    stream = video(kind, start=start, guidance_scale=3.0 if start == "noise" else 1.0)
    expected = by_hand(stream)
    for clean in reference_chunks(tiny_model(), stream):
        assert (clean.latents - expected[clean.index]).abs().max() < 1e-5


def test_one_partition_is_mode_window() -> None:
    plain = tiny_stream(num_chunks=9, **SIX)
    one = tiny_stream(num_chunks=9, partitions=1, lookahead=False, **SIX)
    assert {chunk for row in one.plan.rows() for chunk, _ in one.batches.parts(row.index)} == {WHOLE}
    pairs = zip(reference_chunks(tiny_model(), plain), reference_chunks(tiny_model(), one), strict=True)
    assert all(torch.equal(a.latents, b.latents) for a, b in pairs)
    cut = reference_chunks(tiny_model(), video("two partitions"))
    assert not torch.equal(cut[3].latents, reference_chunks(tiny_model(), plain)[3].latents)


def both(kind: str) -> list[Stream]:
    """Every start and end, guided and not, of one kind."""
    return [
        video(kind, 0),
        video(kind, 1, guidance_scale=1.0, num_chunks=2),
        video(kind, 2, guidance_scale=1.0, start="clip", end="cut", num_chunks=3),
        video(kind, 3, guidance_scale=1.0, start="chunk", num_inference_steps=12, num_chunks=3),
        video(kind, 4, guidance_scale=1.0, context_chunks=0, num_chunks=2),
        replace(video(kind, 5, guidance_scale=1.0, num_chunks=3), image=torch.ones(4, 1, 4, 6), context_noise=0.1),
    ]


@pytest.mark.parametrize(
    ("kind", "num_stages"),
    [("two partitions", 3), ("three with lookahead", 2), ("three with lookahead", 4), ("one with lookahead", 1)],
)
def test_stages_equal_one_process(kind: str, num_stages: int) -> None:
    cut = {1: CUTS[0], 2: [(0, 1), (1, 4)], 3: CUTS[1], 4: [(i, i + 1) for i in range(4)]}[num_stages]
    driver, waiting, chunks = Driver(local_gang(cut), 2 if num_stages % 2 else 3), both(kind), dict[int, list[Tensor]]()
    for stream in waiting:
        driver.submit(stream)
    while not driver.idle:
        for output in driver.step(0.0):
            assert isinstance(output, Finished | Grown)
            if isinstance(output, Finished):
                chunks.setdefault(output.stream, []).append(output.clean.latents)
    for stream in waiting:
        expected = reference_chunks(tiny_model(), stream)
        assert len(chunks[stream.id]) == len(expected) == stream.plan.num_chunks
        assert all(torch.equal(a, b.latents) for a, b in zip(chunks[stream.id], expected, strict=True))


class Wire:
    """A link between two threads of this process."""

    bytes_sent, posts_late = 0, False

    def __init__(self) -> None:
        self._messages: queue.Queue[Message] = queue.Queue()

    def announce(self, headers: Sequence[Header]) -> None: ...

    def post(self, layout: Layout) -> None: ...

    def verdict(self) -> None: ...

    def receive(self, expected: Header, layout: Layout) -> list[Tensor]:
        message = self._messages.get(timeout=60)
        message.check(expected)
        return message.tensors

    def send(self, header: Header, tensors: Any, layout: Layout) -> None:
        message = Message(layout)
        message.fill(header, tensors)
        self._messages.put(message)

    def close(self) -> None: ...


@pytest.mark.parametrize("kind", ["two partitions", "one with lookahead"])
def test_loops_that_run_ahead_of_each_other_equal_one_process(kind: str) -> None:
    """The stages' own loops, each in a thread: latents come back late, and only when they are asked for."""
    cut, streams, told = CUTS[1], both(kind), list[Event | Left]()
    back, wires, feeds = Wire(), [Wire() for _ in cut[1:]], [EpochFeed() for _ in cut]
    threads = []
    for rank, blocks in enumerate(cut):
        stage = Stage(tiny_model(), blocks)
        for stream in streams:
            stage.prepare(stream)
        ends = Links(
            wires[rank - 1] if rank else None,
            wires[rank] if rank + 1 < len(cut) else None,
            back if rank in (0, len(cut) - 1) else None,
        )
        loop = StageLoop(stage, ends, feeds[rank], 0, told.append if stage.last else lambda event: None)
        threads.append(threading.Thread(target=loop.run, daemon=True))
    epochs = max(stream.plan.num_rows for stream in streams) // 4 + 1
    for feed in feeds:
        feed.seal(0, LogEntry(tuple(join_of(stream, 0) for stream in streams)))
        for epoch in range(1, epochs):
            feed.seal(epoch, LogEntry())
        feed.stop(epochs)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for stream in streams:
        shifts = [event for event in told if isinstance(event, Shift) and event.stream == stream.id]
        found = [clean.latents for shift in shifts for clean in shift.clean]
        expected = reference_chunks(tiny_model(), stream)
        assert all(torch.equal(a, b.latents) for a, b in zip(found, expected, strict=True))


@given(partitioned_plans(max_chunks=8), st.integers(1, 2))
@many(60)
def test_nothing_is_begun_before_its_latents_are_back(plan: WindowPlan, branches: int) -> None:
    """By following every message: a call has all it sees, and takes what comes back in the order of its sending."""
    batches = MicroBatches(plan, "window")
    join = Join(0, 0, 0, plan.num_rows, branches, batches)
    units = [unit for epoch in range(plan.num_rows // 4 + 1) for unit in epoch_units([join], epoch, 0)]
    held = dict.fromkeys(plan.row(0).window, 0)  # by chunk, the row that its latents are for
    under_way: list[tuple[int, tuple[int, ...]]] = []
    for unit in units:
        row = plan.row(unit.row)
        for key in unit.fed:
            sender, moved = under_way.pop(0)
            assert sender == key
            held |= {chunk: unit.row for chunk in moved if chunk in row.window}
        for chunk in batches.held(row, unit.chunk):
            assert chunk in row.born or held[chunk] == unit.row or (chunk in row.context and chunk in held)
        if unit.feeds:
            under_way.append((unit.chunk, batches.moved(row, unit.chunk)))
    assert not under_way and units[-1].ends_stream


def test_a_run_goes_on_from_every_shift() -> None:
    stream = video("three with lookahead", start="chunk", guidance_scale=1.0)
    points: list[ResumePoint] = []
    found = driven(stream, CUTS[1], lambda driver, finished: points.append(finished.resume))  # type: ignore[arg-type]
    assert equal(found, reference_chunks(tiny_model(), stream)) and None not in points
    for number, point in enumerate(points[:-1]):
        rest = driven(replace(stream, resume=point), CUTS[number % 2])
        assert equal(rest, [one.clean for one in found[number + 1 :]])


def test_an_endless_video_is_stopped_alike() -> None:
    stream = video("three with lookahead", num_chunks=None, guidance_scale=1.0)

    def stop(driver: Driver, finished: Finished) -> None:
        if finished.clean.index == 3:
            driver.stop(stream.id)

    found = driven(stream, CUTS[1], stop)
    whole = replace(stream, plan=replace(stream.plan, num_chunks=len(found)))
    assert len(found) > 6 and equal(found, reference_chunks(tiny_model(), whole))


# --- what it costs ---------------------------------------------------------------------------------------


def test_partitions_fill_the_stages_of_one_video() -> None:
    """Six calls a row on four stages leave none idle but at the ends; whole windows keep one of four busy."""
    plan, machine = WindowPlan(24, 12, 1, 0, num_chunks=60), Machine((1.0,) * 4)
    plain = simulate([plan], "window", 1, 1, machine)
    cut = simulate([replace(plan, partitions=6)], "window", 1, 1, machine)
    assert plain.utilisation == pytest.approx(1 / 4, abs=0.01)
    assert cut.utilisation > 0.85 and cut.makespan < plain.makespan / 3
    assert len(cut.busy) == 4 * replace(plan, partitions=6).num_calls


@pytest.mark.parametrize("stages", [1, 2, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_is_what_the_simulator_finds(kind: str, stages: int) -> None:
    for chunks, branches, streams, videos in ((2, 2, 1, 2), (12, 1, 1, 1), (7, 2, 2, 2)):
        sizes = {"latent_chunk_size": 1, "num_chunks": chunks, **SIX, "num_inference_steps": 12}
        plan = WindowPlan(**{**sizes, **KINDS[kind]})
        rows = rows_of(plan, "window")
        found = simulate([plan] * videos, "window", branches, streams, Machine((1.0,) * stages))

        def unit(held: int) -> UnitTime:
            return UnitTime((float(held),) * stages)

        assert work(rows, branches, videos, unit) == pytest.approx(sum(part.end - part.start for part in found.busy))
        assert makespan(rows, branches, streams, videos, unit) == pytest.approx(found.makespan, rel=0.08)


def test_costs_are_those_of_a_call() -> None:
    costs = measure_costs(tiny_model(), video("three with lookahead", num_chunks=12), repeats=1)
    assert min(costs.blocks) > 0


def test_simulate_knows_them() -> None:
    report = simulate_report(SimulateConfig(num_inference_steps=12, chunks=4, partitions=3, lookahead=True, branches=1))
    assert report["partitions"] == 3 and report["lookahead"]
    assert report["units"] == WindowPlan(12, 6, 1, 1, num_chunks=4, partitions=3, lookahead=True).num_calls
    with pytest.raises(ConfigError, match="mode=causal: partitions=3 cuts rows of mode=window"):
        simulate_report(SimulateConfig(num_inference_steps=12, chunks=4, partitions=3, mode="causal"))


# --- settings --------------------------------------------------------------------------------------------


def test_settings_become_the_plan() -> None:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, partitions=3, lookahead=True)
    assert (params.context_chunks, params.span, params.calls_per_row) == (1, 2, 6)
    one = SamplingParams.resolve(checkpoint, lookahead=True)
    assert (one.context_chunks, one.span, one.calls_per_row) == (3, 6, 2), "the half that the front call looks at"
    own = SamplingParams.resolve(checkpoint, lookahead=True, context_chunks=0)
    assert (own.context_chunks, own.span) == (0, 6)
    plain = SamplingParams.resolve(checkpoint)
    assert (plain.partitions, plain.lookahead, plain.calls_per_row, plain.span) == (1, False, 1, 7)
    with pytest.raises(ConfigError, match="partitions=4 does not cut window_chunks=6"):
        SamplingParams.resolve(checkpoint, partitions=4)
    with pytest.raises(ConfigError, match="mode=displaced: partitions=2 cuts rows"):
        SamplingParams.resolve(checkpoint, partitions=2, mode="displaced")


def test_the_time_shift_is_that_of_what_a_call_sees() -> None:
    checkpoint = Checkpoint.open("stdit3-xl")
    whole, part = (SamplingParams.resolve(checkpoint, partitions=n) for n in (1, 3))
    assert part.time_shift / whole.time_shift == pytest.approx((3 / 7) ** 0.5)


def test_the_plan_prints_the_cost_beside_the_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    chosen = {"partitions": 3, "lookahead": True, "cluster": ClusterConfig(devices=2)}
    report = plan_report(PlanConfig(**chosen, num_stages=2), chunks=10)  # type: ignore[arg-type]
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, partitions=3, lookahead=True)
    plan = params.plan(10)
    whole = replace(plan, partitions=1, lookahead=False)
    calls = {"model_calls": 15 * 5, "latent_evaluations": whole.latent_evaluations}
    assert (report["model_calls"], report["latent_evaluations"]) == (plan.num_calls, plan.latent_evaluations)
    assert report["plain_plan"] == calls and report["calls_per_chunk"] == 6 * 5
    assert report["window_latents"] == 2 * plan.latent_chunk_size and report["useful_stages"] == 2 * 5
    assert report["cluster"]["choice"]["mode"] == "window"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        say_cost(params, plan, checkpoint)
        say_cost(replace(params, partitions=1, lookahead=False), whole, checkpoint)
    assert [record.getMessage() for record in caplog.records] == [
        f"method=pavdm, partitions=3, lookahead=true: {plan.num_calls} model calls and {plan.latent_evaluations} latent"
        " evaluations a video and guidance branch; method=pavdm in whole windows"
        f" 75 and {whole.latent_evaluations}"
    ]
