"""Unit-cost makespans are the closed forms, the order is the engine's, and unequal parts cost what they must."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from plans import legal_plans, many

from pavdm_dist.cli import main
from pavdm_dist.commands import simulate as simulate_command
from pavdm_dist.engine.order import Join, epochs
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.microbatches import WHOLE, Displaced, MicroBatches
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.planning.simulator import Machine, simulate


def plan(chunks: int, window: int = 6, shift: int = 5, context: int = 0) -> WindowPlan:
    return WindowPlan(window * shift, window, 1, context, num_chunks=chunks)


def equal(num_stages: int) -> Machine:
    return Machine((1.0,) * num_stages, unit_cost=True)


def closed_form(stages: int, branches: int, chunks: int, window: int, shift: int) -> int:
    """Makespan of one causal video without context units, K >= W >= 2: every shift's rows wait for the longer of
    their own units and one unit's way through the stages; where a row is no longer than that, the chunk that moves
    to the front comes back one unit late at every shift."""
    held = [min(p + 1, window, chunks + window - 1 - p) for p in range(chunks + window - 1)]
    late = branches * window <= branches + stages - 1
    rows = shift * sum(max(branches * w, branches + stages - 1) for w in held)
    return rows + late * branches * (chunks - 1) + (0 if late else stages - 1)


@pytest.mark.parametrize(
    ("stages", "branches", "makespan"), [(8, 1, 3643), (12, 1, 5423), (4, 1, 2583), (8, 2, 5207), (12, 2, 5951)]
)
def test_causal_makespans_are_the_published_ones(stages: int, branches: int, makespan: int) -> None:
    found = simulate([plan(84)], "causal", branches, 1, equal(stages))
    assert found.makespan == makespan == closed_form(stages, branches, 84, 6, 5)


@pytest.mark.parametrize(("stages", "branches", "makespan"), [(4, 1, 2663), (8, 2, 5366), (8, 1, 3643)])
def test_context_units_take_idle_slots_where_there_are_any(stages: int, branches: int, makespan: int) -> None:
    assert simulate([plan(84, context=1)], "causal", branches, 1, equal(stages)).makespan == makespan


def test_where_the_closed_form_fails_the_simulation_counts() -> None:
    assert simulate([plan(22, shift=1)], "causal", 2, 1, equal(10)).makespan == 339


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("videos", [1, 2, 4])
def test_window_utilisation_is_the_closed_form(stages: int, branches: int, videos: int) -> None:
    found = simulate([plan(6)] * videos, "window", branches, videos, equal(stages))
    rows, units = plan(6).num_rows, branches * videos
    # Every row of all videos takes the longer of its own units and one video's way there and back.
    assert found.makespan == rows * max(units, branches + stages - 1) + (
        stages - 1 if units > branches + stages - 1 else units - branches
    )
    ideal = min(1, units / (branches + stages - 1))
    assert found.utilisation == pytest.approx(ideal, rel=2 * (stages + units) / found.makespan)
    assert found.speed_up == pytest.approx(found.utilisation * stages)


def test_first_chunk() -> None:
    assert simulate([plan(84)], "causal", 1, 1, equal(2)).first_chunk == 106
    assert simulate([plan(84)], "causal", 1, 1, equal(4)).first_chunk == 133
    assert simulate([plan(84)], "causal", 1, 1, equal(8)).first_chunk == 240
    assert simulate([plan(84)], "window", 2, 1, equal(4)).first_chunk == 30 * 5


def test_overlapping_the_drain_with_the_next_fill_repairs_short_videos() -> None:
    one = simulate([plan(3)], "causal", 2, 1, equal(4))
    four = simulate([plan(3)] * 4, "causal", 2, 4, equal(4))
    assert one.utilisation == pytest.approx(0.81, abs=0.01)
    assert four.utilisation >= 0.96


def test_an_unequal_stage_sets_the_pace() -> None:
    even = simulate([plan(20)], "causal", 2, 1, Machine((1.0, 1.0)))
    uneven = simulate([plan(20)], "causal", 2, 1, Machine((1.0, 1.43)))
    assert uneven.makespan / even.makespan == pytest.approx(1.43, rel=0.01)
    assert uneven.utilisation == pytest.approx(2.43 / 2.86, rel=0.01)


def test_links_cost_nothing_where_they_hide_and_their_time_where_not() -> None:
    videos = [plan(6)] * 2
    free = simulate(videos, "window", 2, 2, equal(2))
    hidden = simulate(videos, "window", 2, 2, Machine((1.0, 1.0), unit_cost=True, link_latency_s=0.2))
    assert hidden.makespan == pytest.approx(free.makespan, rel=0.002)
    exposed = simulate([plan(6)], "window", 2, 1, Machine((1.0, 1.0), unit_cost=True, link_latency_s=0.2))
    # One video: both ways of every row are waited for.
    assert exposed.utilisation == pytest.approx(2 / (3 + 2 * 0.2), rel=0.01)
    slow = simulate(videos, "window", 2, 2, Machine((1.0, 1.0), unit_cost=True, link_chunk_s=1.0))
    assert slow.makespan > 3 * free.makespan  # four chunks and more per unit over a link that takes 1 each


def test_a_bounded_queue_holds_the_sender_back() -> None:
    machine = Machine((1.0, 5.0), unit_cost=False, outstanding=2)
    ends = {stage: [] for stage in range(2)}
    for part in simulate([plan(10)], "causal", 1, 1, machine).busy:
        ends[part.stage].append(part)
    behind = 0
    for position, part in enumerate(ends[0]):
        finished = sum(other.start <= part.start for other in ends[1])
        behind = max(behind, position - finished)
    assert behind <= 3  # two under way and the one that is waiting


def test_a_decoder_is_one_more_station() -> None:
    """Chunks are decoded one after another as they become clean; what is sampled does not change."""
    videos, machine = [plan(10), plan(10)], Machine((1.0, 1.0))
    free = simulate(videos, "causal", 2, 2, machine)
    for seconds in (0.5, 10.0, 1000.0):
        found = simulate(videos, "causal", 2, 2, replace(machine, decode_seconds=seconds))
        assert found.busy == free.busy and found.first_chunk == free.first_chunk
        assert sorted((one.stream, one.chunk) for one in found.decoded) == [(v, k) for v in range(2) for k in range(10)]
        assert all(one.end - one.start == pytest.approx(seconds) for one in found.decoded)
        assert all(before.end <= after.start for before, after in pairwise(found.decoded))
        assert found.makespan == found.decoded[-1].end > free.makespan
        assert found.utilisation == pytest.approx(free.utilisation * free.makespan / found.makespan)
    # The slower one sets the pace.
    assert found.makespan == pytest.approx(found.first_chunk + 20 * 1000.0)
    assert not free.decoded


@given(legal_plans(max_chunks=6), st.integers(1, 2), st.integers(1, 4))
@many(40)
def test_every_stage_runs_the_engines_order(one: WindowPlan, branches: int, stages: int) -> None:
    if one.context_chunks > 1:
        with pytest.raises(ConfigError, match="mode causal has 0 or 1"):
            simulate([one], "causal", branches, 1, equal(stages))
        return
    found = simulate([one, one], "causal", branches, 2, equal(stages))
    waiting = iter(range(2))

    def enter(epoch: int) -> Join | None:
        number = next(waiting, None)
        return None if number is None else Join(number, epoch, 0, one.num_rows, branches, MicroBatches(one, "causal"))

    order = [unit for units in epochs(enter, 2) for unit in units]
    for stage in range(stages):
        assert [part.unit for part in found.busy if part.stage == stage] == order
        mine = [part for part in found.busy if part.stage == stage]
        assert all(a.end <= b.start for a, b in pairwise(mine))
    updates = [unit for unit in order if not unit.context and unit.stream == 0 and unit.branch == 0]
    assert len(updates) == sum(len(row.chunks) for row in one.rows())
    # A chunk's context unit comes once, after its last update, before the first chunk that attends to it.
    for unit in (unit for unit in order if unit.context and unit.branch == 0 and unit.stream == 0):
        row = one.row(unit.row)
        assert row.context == (unit.chunk,)
        assert [u.chunk for u in order if u.stream == 0 and u.row == unit.row and u.branch == 0] == list(row.window)


def test_displaced_without_exact_rows_costs_what_causal_does() -> None:
    one, never = plan(40, context=1), Displaced(None, exact_growing=False)
    causal = simulate([one], "causal", 2, 1, equal(4))
    displaced = simulate([one], "displaced", 2, 1, equal(4), never)
    assert displaced.makespan == pytest.approx(causal.makespan, rel=0.01)
    # With even costs per chunk, an exact row empties the pipeline as a row of mode window does.
    machine = Machine((1.0,) * 4)
    by_resync = [
        simulate([one], "displaced", 2, 1, machine, Displaced(every, exact_growing=False)).makespan
        for every in (None, 25, 5, 1)
    ]
    assert by_resync == sorted(by_resync)
    assert by_resync[-1] == simulate([one], "window", 2, 1, machine).makespan


def traced(span: str, more: str = "") -> str:
    return '{"version": 1, "stages": [[' + span + "]" + more + "]}"


SPAN = (
    '{"unit": {"order": 0, "stream": 0, "row": 3, "branch": 0, "opens": true, "closes": true, "fed": [],'
    ' "feeds": false, "ends_stream": true}, "ready": 0, "start": 1, "end": 2}'
)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file or directory"),
        ("{", "is no JSON"),
        ("[]", "is no trace; pavdm sample"),
        ('{"version": "1"}', "is no trace; pavdm sample"),
        ('{"version": 7, "stages": []}', "is of version 7, this package reads version 1"),
        ('{"version": 1, "stages": [[{"unit": {}}]]}', "is damaged"),
        (traced(SPAN.replace('"end": 2', '"end": 0.5')), "is damaged (times 0, 1, 0.5)"),
        (traced(SPAN.replace('"end": 2', '"end": "2"')), "is damaged"),
        (traced(SPAN.replace('"end": 2', '"end": NaN')), "is damaged"),
        (traced(SPAN.replace('"row": 3', '"row": "x"')), "is damaged (row='x' of a unit)"),
        (traced(SPAN.replace('"fed": []', '"fed": ["x"]')), "is damaged"),
        (traced(SPAN.replace('"end": 2', '"end": 1')), "is damaged (stages of"),
        (traced(SPAN, ", []"), "is damaged (stages of"),
        ('{"version": 1, "stages": 3}', "is damaged"),
        ('{"version": 1, "stages": [[]]}', "holds no units"),
    ],
)
def test_a_trace_that_cannot_be_read_is_one_sentence(
    content: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.json"
    if content is not None:
        file.write_text(content)
    assert main(["simulate", f"trace={file}"]) == 2
    assert f"trace={file}: {sentence}" in capsys.readouterr().err


def test_whole_windows_are_one_unit() -> None:
    found = simulate([plan(2, window=2, shift=1)], "window", 1, 1, equal(1))
    assert {part.unit.chunk for part in found.busy} == {WHOLE}
    assert found.makespan == plan(2, window=2, shift=1).num_rows


def test_the_command_prints_one_object_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mode=causal", "num_stages=8", "num_inference_steps=30", "window_chunks=6", "chunks=84", "branches=1"]
    assert main(["simulate", "--json", *words, "streams=1", "unit_cost=true", "context=false"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["makespan"] == 3643 and found["unit_cost"] and not found["context"]
    assert found["utilisation"] == pytest.approx(84 * 30 / 3643)
    chart = tmp_path / "chart.png"
    assert main(["simulate", "mode=causal", "num_stages=3", "chunks=4", f"chart={chart}"]) == 0
    pixels = Image.open(chart).convert("RGB")
    assert len(pixels.getcolors() or ()) > 10
    assert math.isclose(pixels.height, 8 + 3 * 42 + 30)
    capsys.readouterr()
    words = ["mode=causal", "num_stages=3", "chunks=4", f"chart={chart}", "decode_seconds=2"]
    assert main(["simulate", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["decoder_busy"] == pytest.approx(8)
    assert Image.open(chart).height == 8 + 4 * 42 + 30


@pytest.mark.parametrize(
    "words",
    [
        ["mode=window"],
        ["mode=causal", "chunks_per_unit=3"],
        ["mode=causal", "context=false", "videos=3"],
        ["mode=displaced", "displaced.context_refresh=step"],
        ["method=fifo"],
        ["method=replacement"],
    ],
)
def test_the_most_that_is_named_is_simulated(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate_command, "MAX_UNITS", 20_000)
    assert main(["simulate", *words, "chunks=500000"]) == 2
    said = capsys.readouterr().err
    most = int(said.split("use chunks=")[1].split(" ")[0])
    assert main(["simulate", *words, f"chunks={most + 1}"]) == 2
    capsys.readouterr()
    assert main(["simulate", "--json", *words, f"chunks={most}"]) == 0
    units = json.loads(capsys.readouterr().out)["units"] * 2
    assert units <= 20_000
    if "mode=displaced" not in words:  # whose exact rows have fewer
        assert units > 20_000 * 0.9


def test_where_one_chunk_is_too_much_videos_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate_command, "MAX_UNITS", 2_000)
    assert main(["simulate", "videos=100", "chunks=3"]) == 2
    assert "use videos=16 or less with chunks=1" in capsys.readouterr().err
    assert main(["simulate", "videos=16", "chunks=1"]) == 0
    assert main(["simulate", "videos=17", "chunks=1"]) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mode=circular"], "mode=circular: must be window, causal or displaced"),
        (["num_stages=65"], "num_stages=65: must be 1 to 64"),
        (["num_stages=0"], "num_stages=0: must be 1 to 64"),
        (["stage_seconds=[1,2,3]"], "needs num_stages=2 entries"),
        (["stage_seconds=[5,1]", "unit_cost=true"], "unit_cost=true: every unit costs 1, and stage_seconds=[5.0, 1.0]"),
        (["num_stages=10000000000"], "num_stages=10000000000: must be 1 to 64"),
        (["stage_seconds=[1,0]"], "stage_seconds[1]=0.0: must be above 0"),
        (["stage_seconds=[1e308,1e308]"], "stage_seconds[0]=1e+308: must be above 0 and at most 1,000,000"),
        (["trace=/nope.json"], "trace=/nope.json: No such file or directory"),
        (["link_latency_s=-1"], "link_latency_s=-1"),
        (["outstanding=0"], "outstanding=0: must be 1 or more"),
        (["decode_seconds=-1"], "decode_seconds=-1.0: must be 0 to 1,000,000"),
        (["streams=0"], "streams=0"),
        (["chart=picture.jpg"], "chart=picture.jpg: must end in .png"),
        (["window_chunks=7"], "window_chunks=7 does not divide"),
        (["mode=causal", "displaced.exact_steps=3"], "displaced.exact_steps=3: mode=causal does not read it"),
        (["mode=displaced", "displaced.adaptive=0.1"], "displaced.adaptive=0.1: depends on what the model computes"),
        (["trace=a.json", "chunks=3"], "chunks=3: a trace says what was"),
    ],
)
def test_bad_settings_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *words]) == 2
    assert sentence in capsys.readouterr().err
