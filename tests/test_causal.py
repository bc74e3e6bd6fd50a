"""Mode causal: chunk by chunk is one masked forward, noisier chunks never reach cleaner ones, restarts are exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import reference_chunks, tiny_model, tiny_stream
from hypothesis import given
from plans import legal_plans, many
from torch import Tensor

from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.order import epochs, join_of
from pavdm_dist.engine.stage import Stage
from pavdm_dist.method.denoiser import ModelDenoiser, StreamDenoiser
from pavdm_dist.method.microbatches import MicroBatches
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.sampler import guide, sample
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import WindowSnapshot
from pavdm_dist.models.kv_cache import ChunkMemory, DisplacedMemory

STARTS = {
    "noise": {},
    "chunk": {"start": "chunk"},
    "clip": {"start": "clip", "end": "cut", "num_chunks": 3},
    "no context": {"context_chunks": 0},
    "short": {"num_chunks": 1},
}


def frames_of(chunk: int, row: PlanRow, size: int) -> slice:
    first = row.window.index(chunk) * size
    return slice(first, first + size)


def velocities(stream: Stream) -> Iterator[tuple[PlanRow, Tensor, Tensor]]:
    """Per row: cached chunk by chunk, and one masked forward, both on the cached path's latents."""
    model, window = tiny_model(), stream.window()
    cached, masked = StreamDenoiser(model, stream), ModelDenoiser(model, stream, causal=True)
    for row in stream.plan.rows():
        x, levels = window.inputs(row)
        found = [cached(x, levels, row, branch) for branch in range(stream.branches)]
        expected = [masked(x, levels, row, branch) for branch in range(stream.branches)]
        yield row, torch.cat(found), torch.cat(expected)
        window.update(row, guide(found, stream.guidance_scale))


@pytest.mark.parametrize("start", STARTS)
def test_the_cache_is_worth_one_masked_forward(start: str) -> None:
    stream = tiny_stream(mode="causal", **STARTS[start])
    size, rows = stream.plan.latent_chunk_size, 0
    for row, found, expected in velocities(stream):
        for chunk in row.chunks:
            part = frames_of(chunk, row, size)
            got, want = found[:, :, part], expected[:, :, part]
            assert (got - want).norm() < 1e-5 * want.norm(), (row.index, chunk)
        rows += 1
    assert rows == stream.plan.num_rows


def test_causal_and_window_are_different_models() -> None:
    causal, window = (reference_chunks(tiny_model(), tiny_stream(mode=mode)) for mode in ("causal", "window"))
    assert not torch.allclose(causal[0].latents, window[0].latents, atol=1e-2)


def test_a_noisier_chunk_never_reaches_a_cleaner_one() -> None:
    stream, model = tiny_stream(mode="causal"), tiny_model()
    size, row = stream.plan.latent_chunk_size, stream.plan.row(5)
    assert len(row.chunks) == 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, size * len(row.window), 4, 6, generator=generator)
    levels = stream.window().levels(row)[None]
    before = StreamDenoiser(model, stream)(x, levels, row, 0)
    for position, chunk in enumerate(row.chunks):
        changed = x.clone()
        changed[:, :, frames_of(chunk, row, size)] += 1
        after = StreamDenoiser(model, stream)(changed, levels, row, 0)
        for other, neighbour in enumerate(row.chunks):
            part = frames_of(neighbour, row, size)
            assert torch.equal(after[:, :, part], before[:, :, part]) == (other < position)


def test_the_context_is_run_once_per_shift() -> None:
    stream, model = tiny_stream(mode="causal", num_chunks=6), tiny_model()
    calls = 0
    embed = model.embed

    def counting(*arguments: Tensor) -> object:
        nonlocal calls
        calls += 1
        return embed(*arguments)

    model.embed = counting  # type: ignore[method-assign, assignment]
    list(sample(stream.window(), StreamDenoiser(model, stream), stream.guidance_scale))
    updates = sum(len(row.chunks) for row in stream.plan.rows())
    contexts = len({row.context for row in stream.plan.rows() if row.context})
    assert contexts == 5
    assert calls == 2 * (updates + contexts)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_run_restored_at_a_shift_goes_on_bit_for_bit(num_stages: int) -> None:
    model, stream = tiny_model(), tiny_stream(mode="causal", num_chunks=5)
    expected = reference_chunks(model, stream)
    stage = Stage(model, (0, 4))
    snapshots: list[WindowSnapshot] = []
    for units in epochs(lambda epoch: join_of(stream, epoch) if epoch == 0 else None, 1):
        for unit in units:
            if unit.row == 0 and unit.opens and unit.branch == 0:
                stage.prepare(stream)
            done = stage.run(unit, None)
            if getattr(done, "snapshot", None) is not None:
                snapshots.append(done.snapshot)  # type: ignore[union-attr]
            if getattr(done, "latents", None) is not None:
                stage.feed(unit.stream, unit.row + 1, unit.chunk, done.latents)  # type: ignore[union-attr]
    assert len(snapshots) == 7, "two shifts while the window grows, then one for every chunk"
    cuts = {1: [(0, 4)], 2: [(0, 3), (3, 4)]}[num_stages]
    for done_chunks, snapshot in zip((0, 0, 1, 2, 3, 4), snapshots[:-1], strict=True):
        rest = replace(stream, resume=ResumePoint(snapshot))
        engine = LocalEngine([Stage(model, blocks) for blocks in cuts])
        for clean, reference in zip(engine.run([rest]), expected[done_chunks:], strict=True):
            assert clean[1].index == reference.index
            assert torch.equal(clean[1].latents, reference.latents)


@given(legal_plans(max_chunks=8))
@many(60)
def test_parts_of_a_row_cover_it_once(plan: WindowPlan) -> None:
    met: set[int] = set()
    for row in plan.rows():
        parts = MicroBatches(plan, "causal").parts(row.index)
        assert [chunk for chunk, is_context in parts if not is_context] == list(row.chunks)
        for chunk in (chunk for chunk, is_context in parts if is_context):
            assert chunk in row.context and chunk not in met
            met.add(chunk)
        assert met >= set(row.context)
    middle = plan.num_rows // 2
    assert [part[0] for part in MicroBatches(plan, "causal", middle).parts(middle)] == list(plan.row(middle).window)


def test_a_stage_keeps_one_window_of_keys_and_values() -> None:
    turn, memory = lambda tensor, first: tensor + first, ChunkMemory(6)
    keys, values = torch.randn(2, 3, 1, 2, 4, 2, 8)
    for row in range(3):
        for place in range(row > 0, 3):  # the first chunk stays
            memory.begin((0, 1, 2), place)
            found = memory.attend(1, keys[place], values[place], 2 * place, turn)
            expected = torch.cat([turn(keys[i], 2 * i) for i in range(place + 1)], dim=-2)
            assert torch.equal(found[0], expected)
            assert torch.equal(found[1], torch.cat(list(values[: place + 1]), dim=-2))
    ((kept_keys, kept_values),) = memory._pairs.values()
    stored = sum(tensor.untyped_storage().nbytes() for tensor in (kept_keys, kept_values))
    assert stored == 4 * (keys.numel() + values.numel())
    # What was never left cannot be read unseen.
    assert ChunkMemory(6).attend(1, keys[0], values[0], 2, turn)[0].isnan().any()


def test_frames_of_many_tokens_are_many_places() -> None:
    """Three tokens a latent frame are what three times as many frames of one token are, also when the window moves."""
    keys, values = torch.randn(2, 5, 1, 4, 6, 8)  # five chunks of two frames

    def turn(tensor: Tensor, first: int) -> Tensor:
        return tensor + first

    for wide, plain in (
        (ChunkMemory(6), ChunkMemory(18)),
        (DisplacedMemory(6, 2), DisplacedMemory(18, 6)),
    ):
        windows = [(0,), (0, 1), (0, 1, 2)] + [(1, 2, 3), (2, 3, 4)] * isinstance(wide, DisplacedMemory)
        for window in windows:
            for place, chunk in enumerate(window):
                for memory in (wide, plain):
                    memory.begin(window, chunk)
                found = wide.attend(0, keys[chunk], values[chunk], 6 * place, turn, 3)
                expected = plain.attend(0, keys[chunk], values[chunk], 6 * place, turn)
                assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert found[0].shape[-2] == 18
