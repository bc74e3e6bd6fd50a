"""The closed form of a pipeline's time is what the simulator finds, whatever the mode, length, stages and links."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import many

from pavdm_dist.engine.transport import OUTSTANDING
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.planning.forecast import UnitTime, makespan, rows_of, work
from pavdm_dist.planning.simulator import Machine, simulate

NEVER = Displaced(None, exact_growing=False)


def both(
    mode: Mode, chunks: int, branches: int, streams: int, videos: int, machine: Machine, displaced: Displaced | None
) -> tuple[float, float, float]:
    return of_plan(WindowPlan(30, 6, 1, 1, num_chunks=chunks), mode, branches, streams, videos, machine, displaced)


def of_plan(
    plan: WindowPlan,
    mode: Mode,
    branches: int,
    streams: int,
    videos: int,
    machine: Machine,
    displaced: Displaced | None = None,
) -> tuple[float, float, float]:
    """Makespan of the simulator, and makespan and utilisation of the closed form."""
    found = simulate([plan] * videos, mode, branches, streams, machine, displaced)

    def unit(held: int) -> UnitTime:
        stages = tuple(seconds * held for seconds in machine.stage_seconds)
        return UnitTime(stages, machine.link_chunk_s * held, machine.link_latency_s, machine.outstanding)

    rows = rows_of(plan, mode, displaced)
    seconds = makespan(rows, branches, streams, videos, unit, machine.decode_seconds)
    busy = work(rows, branches, videos, unit)
    assert busy == pytest.approx(sum(part.end - part.start for part in found.busy))
    return found.makespan, seconds, busy / (len(machine.stage_seconds) * seconds)


# Chunks and stages: the ends of both and what is between, every pair of them with ``-m slow``.
LENGTHS, STAGES = (1, 3, 6, 18), (1, 2, 4, 8)
PAIRS = ((1, 1), (1, 8), (3, 4), (6, 2), (18, 8))


@pytest.mark.parametrize(
    ("chunks", "stages"),
    [pytest.param(*pair, marks=() if pair in PAIRS else pytest.mark.slow) for pair in product(LENGTHS, STAGES)],
)
@pytest.mark.parametrize(
    ("mode", "displaced"),
    [("window", None), ("causal", None), ("displaced", Displaced(1)), ("displaced", Displaced()), ("displaced", NEVER)],
)
def test_equal_stages(chunks: int, stages: int, mode: Mode, displaced: Displaced | None) -> None:
    machine = Machine((1.0,) * stages)
    for branches, streams, videos in ((1, 1, 1), (2, 1, 2), (2, 2, 3), (1, 4, 4)):
        found, predicted, utilisation = both(mode, chunks, branches, streams, videos, machine, displaced)
        assert predicted == pytest.approx(found, rel=0.04)
        assert 0 < utilisation <= 1


# (steps, window, kept, anchors) of Rolling Forcing, of Causal-Forcing, of Self-Forcing, and two rows a shift.
CACHED = {"rolling": (5, 5, 6, 1), "causal": (4, 4, 6, 1), "self": (4, 1, 6, 0), "two rows": (8, 4, 6, 1)}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", CACHED)
def test_clean_chunks_calls_are_ahead_of_their_windows(name: str, stages: int) -> None:
    """On every stage a window's call begins while the clean chunk's own one is on the next; both are one row's."""
    steps, window, kept, anchors = CACHED[name]
    plan = WindowPlan(steps, window, 3, kept, num_chunks=40, context="cached", anchor_chunks=anchors)
    machine = Machine((1.0,) * stages)
    for branches, streams, videos in ((1, 1, 1), (2, 1, 1), (1, 2, 3)):
        found, predicted, _ = of_plan(plan, "window", branches, streams, videos, machine)
        assert predicted == pytest.approx(found, rel=1e-9 if streams == 1 else 0.02)
    decoding = Machine((1.0,) * stages, decode_seconds=1.2 * steps * stages)
    found, predicted, _ = of_plan(plan, "window", 1, 1, 1, decoding)
    assert predicted == pytest.approx(found, rel=0.02)
    linked = Machine((1.0, 1.4, 0.8)[:stages], link_latency_s=0.3, link_chunk_s=0.1, outstanding=8)
    found, predicted, _ = of_plan(plan, "window", 1, 2, 2, linked)
    assert predicted == pytest.approx(found, rel=0.04)


@given(
    st.sampled_from(["window", "causal", "displaced"]),
    st.integers(1, 12),
    st.lists(st.floats(0.5, 2.0), min_size=1, max_size=5),
    st.integers(1, 2),
    st.integers(1, 3),
    st.floats(0.0, 0.5),
    st.floats(0.0, 0.3),
)
@many(60)
def test_unequal_stages_and_links(
    mode: Mode, chunks: int, stages: list[float], branches: int, streams: int, latency: float, link: float
) -> None:
    machine = Machine(tuple(stages), link_latency_s=latency, link_chunk_s=link, outstanding=8)
    found, predicted, _ = both(mode, chunks, branches, streams, streams, machine, Displaced(10))
    assert predicted == pytest.approx(found, rel=0.12)


@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
@pytest.mark.parametrize(("latency", "outstanding"), [(3.0, 1), (3.0, 4), (30.0, 4), (100.0, 8)])
def test_links_whose_sends_are_waited_for(mode: Mode, latency: float, outstanding: int) -> None:
    """So many are under way at a time, however many more are there; bursts, which the closed form does not know, gain a
    little."""
    machine = Machine((1.0, 1.5), link_latency_s=latency, link_chunk_s=0.1, outstanding=outstanding)
    for chunks, streams in ((3, 3), (20, 1)):
        found, predicted, _ = both(mode, chunks, 2, streams, streams, machine, Displaced(10))
        assert predicted == pytest.approx(found, rel=0.1)


def test_what_is_simulated_and_planned_sends_as_the_engine_does() -> None:
    assert Machine((1.0,)).outstanding == UnitTime((1.0,)).outstanding == OUTSTANDING


@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
@pytest.mark.parametrize(
    ("streams", "videos", "chunks"),
    [
        *((1, 1, 1), (1, 1, 30), (1, 3, 4), (2, 5, 1), (2, 5, 30)),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1, 1, 4), (1, 3, 1), (1, 3, 30), (2, 5, 4))),
    ],
)
def test_a_decoder_beside_the_stages(mode: Mode, chunks: int, streams: int, videos: int) -> None:
    """As slow as nothing, as sampling, and slower: the later of both ends, and what is left to decode then."""
    per_chunk = 5 * 2 * 6 / 2  # of each stage, where chunks are units and the window is full
    for share in (0.1, 0.8, 1.0, 1.3, 4.0):
        machine = Machine((1.0, 1.0), decode_seconds=share * per_chunk)
        found, predicted, _ = both(mode, chunks, 2, streams, videos, machine, Displaced(10))
        assert predicted == pytest.approx(found, rel=0.05)


def test_one_device_is_never_idle() -> None:
    for mode in ("window", "causal", "displaced"):
        found, predicted, utilisation = both(mode, 5, 2, 1, 3, Machine((0.3,)), NEVER)  # type: ignore[arg-type]
        assert predicted == pytest.approx(found)
        assert utilisation == pytest.approx(1)
