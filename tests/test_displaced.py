"""Mode displaced: exact steps are mode window bit for bit, and what is stale is what the rules say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import TINY, reference_chunks, tiny_model, tiny_stream
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import legal_plans, many
from torch import Tensor

from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.order import Join, epochs, join_of, undecided
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.denoiser import ModelDenoiser, StreamDenoiser, memories_of, unit_context
from pavdm_dist.method.microbatches import WHOLE, Displaced, MicroBatches
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.kv_cache import Memory
from pavdm_dist.models.stdit3 import STDiT3

NEVER = Displaced(None, exact_growing=False)


def test_every_step_exact_is_mode_window() -> None:
    model = tiny_model()
    window = reference_chunks(model, tiny_stream(num_chunks=6))
    exact = reference_chunks(model, tiny_stream(num_chunks=6, mode="displaced", displaced=Displaced(1)))
    stale = reference_chunks(model, tiny_stream(num_chunks=6, mode="displaced", displaced=NEVER))
    for a, b, c in zip(window, exact, stale, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert not torch.equal(a.latents, c.latents)


@pytest.mark.parametrize("displaced", [NEVER, Displaced(1), Displaced()])
def test_a_single_chunk_without_context_sees_itself_alone(displaced: Displaced) -> None:
    """No window has a chunk in common with the one before."""
    model = tiny_model()
    alone = tiny_stream(num_chunks=3, window_chunks=1, context_chunks=0)
    found = reference_chunks(model, replace(alone, mode="displaced", displaced=displaced))
    for one, other in zip(reference_chunks(model, alone), found, strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=1e-5, rtol=1e-5)


def run_parts(
    model: STDiT3, stream: Stream, row: PlanRow, parts: list[int], memory: Memory | None, x: Tensor
) -> Tensor:
    """Velocity of the branch's micro-batches on frozen latents."""
    denoiser = StreamDenoiser(model, stream)
    levels = stream.window().levels(row)[None]
    velocity = torch.zeros_like(x)
    for chunk in parts:
        context = unit_context(model, stream, row, chunk, 0, denoiser._texts, memory)
        frames = slice(context.first_frame, context.first_frame + context.grid.frames)
        activation = model.embed(x[:, :, frames].contiguous(), levels[:, frames], stream.info)
        for index in range(model.spec.num_blocks):
            activation = model.block(index, activation, context)
        velocity[:, :, frames] = model.head(activation, context.grid)[:, : x.shape[1]]
    return velocity


def frozen() -> tuple[Stream, PlanRow, Tensor]:
    stream = tiny_stream(mode="displaced", displaced=NEVER, num_chunks=8, guidance_scale=1.0)
    row = stream.plan.row(9)
    assert len(row.context) == 1 and len(row.chunks) == 3
    x = torch.randn(1, 4, 2 * len(row.window), 4, 6, generator=torch.Generator().manual_seed(0))
    return stream, row, x


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def test_after_an_exact_pass_a_displaced_one_is_exact() -> None:
    (stream, row, x), model = frozen(), tiny_model()
    (memory,) = memories_of(stream, model)
    exact = run_parts(model, stream, row, [WHOLE], memory, x)
    assert torch.equal(exact, run_parts(model, stream, row, [WHOLE], None, x))
    assert distance(run_parts(model, stream, row, list(row.window), memory, x), exact) < 1e-5


@torch.inference_mode()
def test_frozen_latents_converge_in_as_many_sweeps_as_layers_mix_frames() -> None:
    (stream, row, x), model = frozen(), tiny_model()
    (memory,) = memories_of(stream, model)
    exact = run_parts(model, stream, row, [WHOLE], None, x)
    # The bank starts from other latents, so that every block's keys are stale.
    run_parts(model, stream, row, [WHOLE], memory, x + 1)
    errors = [distance(run_parts(model, stream, row, list(row.window), memory, x), exact) for _ in range(3)]
    assert errors[0] > 1e-3
    assert errors[model.config.depth] < 1e-5


@torch.inference_mode()
def test_a_newborn_chunk_is_unseen_by_cleaner_ones_for_one_row() -> None:
    model, stream = tiny_model(), tiny_stream(mode="displaced", displaced=NEVER, num_chunks=8, guidance_scale=1.0)
    row = next(row for row in stream.plan.rows(4) if row.born and len(row.chunks) == 3)
    size, denoiser = stream.plan.latent_chunk_size, StreamDenoiser(model, stream)
    window = stream.window()
    for earlier in stream.plan.rows():
        if earlier.index == row.index:
            break
        x, levels = window.inputs(earlier)
        window.update(earlier, denoiser(x, levels, earlier, 0))
    x, levels = window.inputs(row)
    changed = x.clone()
    changed[:, :, -size:] += 1
    from copy import deepcopy

    memories = deepcopy(denoiser._memories)
    before = denoiser(x, levels, row, 0)
    denoiser._memories = memories
    after = denoiser(changed, levels, row, 0)
    cleaner = slice(0, -size)
    assert torch.equal(before[:, :, cleaner], after[:, :, cleaner])
    # At the next row it is seen.
    following = stream.plan.row(row.index + 1)
    assert not torch.equal(denoiser(x, levels, following, 0)[:, :, cleaner], before[:, :, cleaner])


def test_a_chunk_that_sees_no_stale_one_is_exact() -> None:
    """The noisiest chunk reads fresh keys of all others: with one block that mixes frames it is exact."""
    (stream, row, x), model = frozen(), tiny_model(config=replace(TINY, depth=1))
    with torch.inference_mode():
        (memory,) = memories_of(stream, model)
        run_parts(model, stream, row, [WHOLE], memory, x + 1)
        reference = ModelDenoiser(model, stream)(x, stream.window().levels(row)[None], row, 0)
        stale = run_parts(model, stream, row, list(row.window), memory, x)
    size = stream.plan.latent_chunk_size
    per_chunk = [distance(stale[:, :, i : i + size], reference[:, :, i : i + size]) for i in range(0, x.shape[2], size)]
    assert per_chunk[-1] < 1e-5
    assert min(per_chunk[:-1]) > 1e-3


ADAPTIVE = Displaced(None, exact_growing=False, adaptive=0.2)


def adaptive_streams() -> list[Stream]:
    plan = {"num_inference_steps": 9, "mode": "displaced", "displaced": ADAPTIVE}
    return [tiny_stream(i, seed=i, num_chunks=8 + i, guidance_scale=3.0 - 2 * (i == 1), **plan) for i in range(3)]


def in_process(stream: Stream) -> tuple[list[CleanChunk], frozenset[int]]:
    denoiser = StreamDenoiser(tiny_model(), stream)
    chunks = list(sample(stream.window(), denoiser, stream.guidance_scale))
    return chunks, denoiser.batches.exact_rows


@cache
def adaptive_in_process() -> list[list[CleanChunk]]:
    return [in_process(stream)[0] for stream in adaptive_streams()]


def test_adaptive_resync_follows_the_change_of_keys() -> None:
    stream = adaptive_streams()[0]
    _, rows = in_process(stream)
    shifts = {row // 3 for row in rows}
    assert rows and all(row % 3 == 0 for row in rows)
    assert len(shifts) < stream.plan.num_rows // 3 - 3, "no threshold at all"
    none = in_process(replace(stream, displaced=replace(ADAPTIVE, adaptive=1e9)))[1]
    every = in_process(replace(stream, displaced=replace(ADAPTIVE, adaptive=1e-9)))[1]
    assert not none
    # From the second row on keys change; the first shift decides about the third.
    assert min(every) == 6 and len(every) == stream.plan.num_rows // 3 - 2
    assert rows < every


@pytest.mark.parametrize(
    "cuts", [pytest.param([(0, 4)], marks=pytest.mark.slow), [(0, 1), (1, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]]
)
@pytest.mark.parametrize("in_flight", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_adaptive_resync_is_the_same_on_any_number_of_stages(cuts: list[tuple[int, int]], in_flight: int) -> None:
    model, chunks = tiny_model(), dict[int, list[CleanChunk]]()
    engine = LocalEngine([Stage(model, blocks) for blocks in cuts])
    for number, clean in engine.run(adaptive_streams(), in_flight):
        chunks.setdefault(number, []).append(clean)
    for number, sampled in enumerate(adaptive_in_process()):
        for clean, expected in zip(chunks[number], sampled, strict=True):
            assert torch.equal(clean.latents, expected.latents)


def test_an_epoch_waits_for_what_decides_it() -> None:
    stream = adaptive_streams()[0]
    join = join_of(stream, 2)
    # Rows 4 to 7 hold row 6, which row 2 decides; rows 8 to 11 hold row 9, which row 5 decides.
    assert not undecided([join], 2, {})
    assert undecided([join], 3, {})
    assert not undecided([join], 3, {0: 2})
    assert undecided([join], 4, {0: 2})
    assert not undecided([join], 4, {0: 5})
    assert not undecided([join_of(replace(stream, displaced=NEVER), 2)], 3, {})


settings_of_displaced = st.builds(
    Displaced,
    st.none() | st.integers(1, 12),
    st.integers(0, 9),
    st.booleans(),
    st.booleans(),
    context_refresh=st.sampled_from(["shift", "step"]),
)


@given(legal_plans(max_chunks=8), settings_of_displaced, st.sampled_from(["window", "causal", "displaced"]))
@many(80)
def test_every_latent_that_is_sent_back_is_awaited_once(plan: WindowPlan, displaced: Displaced, mode: str) -> None:
    if mode == "causal" and plan.context_chunks > 1:
        return
    batches = MicroBatches(plan, mode, 0, displaced)  # type: ignore[arg-type]
    join = Join(0, 0, 0, plan.num_rows, 2, batches)
    units = [unit for part in epochs(lambda epoch: join if epoch == 0 else None, 1) for unit in part]
    on_the_way: list[tuple[int, int]] = []
    for unit in units:
        for chunk in unit.fed:
            assert on_the_way.pop(0) == (unit.row - 1, chunk)  # in the order in which they were sent
        if unit.feeds:
            assert unit.closes and not unit.context
            on_the_way.append((unit.row, unit.chunk))
    assert not on_the_way
    for row in plan.rows():
        mine = [unit.chunk for unit in units if unit.row == row.index and unit.opens and not unit.context]
        assert mine == ([WHOLE] if WHOLE in mine else list(row.chunks))
    assert units[-1].ends_stream and sum(unit.ends_stream and unit.closes for unit in units) == 1


@settings(deadline=None)
@given(settings_of_displaced, st.sampled_from([2, 6]))
def test_exact_rows_are_those_asked_for(displaced: Displaced, chunks: int) -> None:
    plan = WindowPlan(6, 3, 2, 1, num_chunks=chunks)
    for row in plan.rows():
        # A chunk is born every two rows; a video of two chunks drains without ever filling its window.
        growing = row.index < 2 * min(chunks - 1, 2)
        draining = not growing and len(row.chunks) < 3
        resync = displaced.resync_every_steps is not None and row.index % displaced.resync_every_steps == 0
        expected = row.index == 0 or row.index < displaced.exact_steps or resync
        expected |= (growing and displaced.exact_growing) or (draining and displaced.exact_draining)
        assert displaced.is_exact(plan, row.index) == expected


def test_the_context_is_refreshed_as_asked() -> None:
    plan = WindowPlan(6, 3, 2, 1, num_chunks=6)
    for refresh, per_shift in (("shift", 1), ("step", 2)):
        batches = MicroBatches(plan, "displaced", 0, replace(NEVER, context_refresh=refresh))
        rows = [batches.parts(row.index) for row in plan.rows() if row.context]
        assert sum(is_context for parts in rows for _, is_context in parts) == per_shift * len(rows) // 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resync_every_steps": 0}, r"displaced.resync_every_steps=0: 1 \(every step\) or more"),
        ({"exact_steps": -1}, "displaced.exact_steps=-1: 0 or more"),
        ({"adaptive": 0.0}, "displaced.adaptive=0.0: must be above 0"),
        ({"context_refresh": "never"}, "displaced.context_refresh=never: must be shift or step"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Displaced(**wrong)
