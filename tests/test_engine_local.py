"""Stages in one process equal the reference sampler bit for bit; the order and the partition are what they claim."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import combinations, pairwise, product
from typing import Any

import pytest
import torch
from helpers import TINY, reference_chunks, tiny_model, tiny_stream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.messages import ACTIVATION, Header, Layout, Message
from pavdm_dist.engine.order import ROWS_PER_EPOCH, Join, epoch_units, is_active
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError, EngineError
from pavdm_dist.method.microbatches import WHOLE
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.base import Costs
from pavdm_dist.planning.costs import measure_costs
from pavdm_dist.planning.partition import partition, with_codec

CUTS = {1: [(0, 4)], 2: [(0, 1), (1, 4)], 3: [(0, 2), (2, 3), (3, 4)], 4: [(0, 1), (1, 2), (2, 3), (3, 4)]}


@cache
def sampled_in(mode: Mode) -> tuple[list[Stream], list[list[CleanChunk]]]:
    """Streams of several kinds, and what the sampler makes of each."""
    streams = [
        tiny_stream(0, seed=1, mode=mode),
        tiny_stream(1, seed=2, guidance_scale=1.0, num_chunks=2, mode=mode),
        tiny_stream(2, seed=3, start="clip", end="cut", num_chunks=3, mode=mode),
        tiny_stream(3, seed=4, start="chunk", num_chunks=1, mode=mode),
        tiny_stream(4, seed=5, context_chunks=0, mode=mode),
    ]
    return streams, [reference_chunks(tiny_model(), stream) for stream in streams]


# Every number of stages and of streams in flight in each mode; with -m slow all pairs of them.
PAIRS = ((1, 2), (2, 1), (3, 2), (4, 1), (4, 3))


@pytest.mark.parametrize(
    ("num_stages", "in_flight"),
    [pytest.param(*pair, marks=() if pair in PAIRS else pytest.mark.slow) for pair in product(CUTS, (1, 2, 3))],
)
@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
def test_stages_equal_the_sampler(num_stages: int, in_flight: int, mode: Mode) -> None:
    streams, sampled = sampled_in(mode)
    engine = LocalEngine([Stage(tiny_model(), blocks) for blocks in CUTS[num_stages]])
    chunks: dict[int, list] = {stream.id: [] for stream in streams}
    for stream_id, clean in engine.run(streams, in_flight):
        chunks[stream_id].append(clean)
    for stream, expected in zip(streams, sampled, strict=True):
        assert (
            [c.index for c in chunks[stream.id]] == [c.index for c in expected] == list(range(stream.plan.num_chunks))
        )
        for clean, reference in zip(chunks[stream.id], expected, strict=True):
            assert torch.equal(clean.latents, reference.latents)


@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
def test_finished_streams_leave_nothing_behind(mode: Mode) -> None:
    stages = [Stage(tiny_model(), blocks) for blocks in CUTS[2]]
    list(LocalEngine(stages).run([tiny_stream(0, mode=mode), tiny_stream(1, seed=1, mode=mode)], 2))
    for stage in stages:
        tables = (stage._streams, stage._windows, stage._inputs, stage._velocities, stage._memories)
        assert not any([*tables, stage._levels])
        assert not stage._texts._raw and not stage._texts._tokens and not stage._texts.cache._pairs


@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
def test_a_row_s_levels_are_put_on_the_device_once(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, looked_up, held = [Stage(tiny_model(), blocks) for blocks in CUTS[3]], Counter[tuple[int, int, int]](), []
    row_levels, run = Stage._row_levels, Stage.run

    def counted(stage: Stage, stream: int, row: int) -> Tensor:
        looked_up[stages.index(stage), stream, row] += 1
        return row_levels(stage, stream, row)

    def watched(stage: Stage, *args: Any) -> Any:
        held.append(len(stage._levels))
        return run(stage, *args)

    monkeypatch.setattr(Stage, "_row_levels", counted)
    monkeypatch.setattr(Stage, "run", watched)
    streams = [tiny_stream(0, mode=mode, num_chunks=12), tiny_stream(1, seed=1, mode=mode)]
    list(LocalEngine(stages).run(streams, 2))
    rows = {(stream.id, row) for stream in streams for row in range(stream.plan.num_rows)}
    assert looked_up == Counter((stage, *row) for stage in (0, 2) for row in rows), "the middle stage reads none"
    assert max(held) <= 2 * ROWS_PER_EPOCH < len(rows), "rows that have ended are forgotten"


def test_a_prompt_is_forgotten_with_its_last_chunk() -> None:
    model, stream = tiny_model(), tiny_stream(0, num_chunks=8)
    stage = Stage(model, (0, 4))
    alive = [len(stage._texts._tokens) for _ in LocalEngine([stage]).run([stream])]
    assert max(alive) == 3 and alive[-2] == 2


joins = st.lists(
    st.builds(
        lambda epoch, first, rows, branches: (epoch, first, rows, branches),
        st.integers(0, 4), st.integers(0, 6), st.integers(1, 20), st.integers(1, 2),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@given(joins)
@settings(max_examples=60, deadline=None)
def test_order_runs_every_row_once_oldest_first(entries: list[tuple[int, int, int, int]]) -> None:
    log = [Join(i, epoch, first, first + rows, branches) for i, (epoch, first, rows, branches) in enumerate(entries)]
    units, epoch = [], 0
    while epoch <= 4 or any(is_active(join, epoch) for join in log):
        units += epoch_units(log, epoch, len(units))
        epoch += 1
    assert [unit.order for unit in units] == list(range(len(units)))
    for join in log:
        mine = [(unit.row, unit.branch) for unit in units if unit.stream == join.stream]
        assert mine == [(row, b) for row in range(join.first_row, join.end_row) for b in range(join.branches)]
        rows = join.end_row - join.first_row
        assert [u.fed for u in units if u.stream == join.stream and u.opens] == [()] + [(WHOLE,)] * (rows - 1)
        assert [u.feeds for u in units if u.stream == join.stream and u.closes] == [True] * (rows - 1) + [False]
        assert sum(u.ends_stream and u.closes for u in units if u.stream == join.stream) == 1
    # Branches of a row are adjacent, and a stream never runs two rows ahead of another one that joined with it.
    for first, second in pairwise(units):
        if not first.closes:
            assert (second.stream, second.row, second.branch) == (first.stream, first.row, first.branch + 1)


def test_a_join_does_not_change_earlier_epochs() -> None:
    early = [Join(0, 0, 0, 12, 2)]
    late = [*early, Join(1, 2, 0, 5, 1)]
    for epoch in (0, 1):
        assert epoch_units(early, epoch, 7) == epoch_units(late, epoch, 7)
    assert {u.stream for u in epoch_units(late, 2, 0)} == {0, 1}
    assert len(epoch_units(late, 2, 0)) == ROWS_PER_EPOCH * 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 9), st.integers(0, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_partition_is_the_best_contiguous_cut(blocks: list[int], embed: int, head: int, data: st.DataObject) -> None:
    costs = Costs(tuple(map(float, blocks)), embed, head)
    num_stages = data.draw(st.integers(1, len(blocks)))
    ranges = partition(costs, num_stages)
    assert ranges[0][0] == 0 and ranges[-1][1] == len(blocks)
    assert all(a[1] == b[0] and a[0] < a[1] for a, b in pairwise(ranges))
    best = min(
        max(costs.stage(a, b) for a, b in zip((0, *cut), (*cut, len(blocks)), strict=True))
        for cut in combinations(range(1, len(blocks)), num_stages - 1)
    )
    assert max(costs.stage(*r) for r in ranges) == best


def test_codec_on_the_last_stage_moves_blocks_forward() -> None:
    costs = Costs((1.0,) * 8)
    assert partition(costs, 2) == [(0, 4), (4, 8)]
    assert partition(with_codec(costs, 2.0), 2) == [(0, 5), (5, 8)]
    # A stage that is slowest whatever is done leaves the others even.
    assert partition(with_codec(costs, 20.0), 3) == [(0, 3), (3, 7), (7, 8)]


def test_partition_refuses() -> None:
    costs = Costs((1.0,) * 4)
    with pytest.raises(ConfigError, match=r"num_stages=5.*4 blocks"):
        partition(costs, 5)
    with pytest.raises(ConfigError, match=r"layers_per_stage=\[1, 2\].*add up to 4"):
        partition(costs, 2, [1, 2])
    assert partition(costs, 2, [1, 3]) == [(0, 1), (1, 4)]


def test_costs_measured_and_estimated() -> None:
    model = tiny_model()
    grid = model.grid(8, 4, 6)
    estimated = model.costs(grid, text_len=5)
    measured = measure_costs(model, tiny_stream(), repeats=2)
    for costs in (estimated, measured):
        assert len(costs.blocks) == model.spec.num_blocks == 2 * TINY.depth
        assert min(costs.blocks) > 0 and costs.embed > 0 and costs.head > 0
    dim, tokens = 32, 8 * 6
    assert estimated.blocks[0] == tokens * dim * (28 * dim + 4 * 5 + 4 * 6)
    assert estimated.blocks[1] == tokens * dim * (28 * dim + 4 * 5 + 4 * 8)


def test_messages_carry_a_checked_header() -> None:
    layout = Layout(((2, 3), (4,)), torch.bfloat16)
    header = Header(3, ACTIVATION, 17, 1, 5, -1, 1, layout.numel)
    tensors = [torch.randn(2, 3).bfloat16(), torch.randn(4).bfloat16()]
    message = Message(layout)
    message.fill(header, tensors)
    assert message.data.numel() == layout.num_bytes == 64 + 2 * 10
    received_elsewhere = Message(layout, message.data.clone())
    received_elsewhere.check(header)
    for sent, received in zip(tensors, received_elsewhere.tensors, strict=True):
        assert torch.equal(sent, received)
    wrong = Header(3, ACTIVATION, 18, 1, 5, -1, 1, layout.numel)
    with pytest.raises(EngineError, match=r"order=18.*order=17"):
        message.check(wrong)
    with pytest.raises(EngineError, match=r"planned"):
        message.fill(header, [tensors[0].float(), tensors[1]])
