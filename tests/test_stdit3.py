"""STDiT3: equal levels are the published model, frames and rows mix only where they should."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from helpers import TINY, tiny_model
from scalar_stdit3 import ScalarTimeSTDiT3
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pavdm_dist.codecs.costs import Allocated
from pavdm_dist.errors import CheckpointError
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.models.base import Activation, BlockContext, FrameInfo
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.models.stdit3_init import init_weights
from pavdm_dist.models.text_cache import TextCache, TextRun

INFO = FrameInfo(48, 64, 24.0)
BLOCKS = range(2 * TINY.depth)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def staircase(frames: int, rows: int = 1) -> Tensor:
    return (torch.arange(frames) / frames).expand(rows, frames).clone()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def run_blocks(model: STDiT3, blocks: range, activation: Activation, context: BlockContext) -> Activation:
    for index in blocks:
        activation = model.block(index, activation, context)
    return activation


@pytest.mark.parametrize("chunk_causal", [None, 2])
def test_attention_runs_in_fused_kernels(chunk_causal: int | None) -> None:
    """Which hold no scores; torch has none for more than one axis before the heads and would multiply plainly."""
    model, x, text = tiny_model(), random(2, 4, 6, 6, 8), random(2, 5, TINY.caption_channels, seed=1)
    levels = staircase(6, 2)
    plain = model(x, levels, text, INFO, chunk_causal=chunk_causal)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it cannot serve
        assert relative(model(x, levels, text, INFO, chunk_causal=chunk_causal), plain) < 1e-6
    with sdpa_kernel(SDPBackend.MATH):
        assert relative(model(x, levels, text, INFO, chunk_causal=chunk_causal), plain) < 1e-5


# --- levels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.113, 0.5, 1.0])
def test_equal_levels_are_the_scalar_time_model(t: float) -> None:
    """Against a float64 derivation; what remains is the float32 sinusoid of up to 1000 radians."""
    model, x, text = tiny_model(), random(2, 4, 7, 6, 8), random(2, 5, TINY.caption_channels, seed=1)
    out = model(x, torch.full((2, 7), t), text, INFO)
    scalar = ScalarTimeSTDiT3(model)
    for row in range(2):
        assert relative(out[row], scalar(x[row], t, text[row], INFO)) < 5e-6


@pytest.mark.parametrize("info", [FrameInfo(48, 64, 8.0), FrameInfo(512, 512, 24.0)])
def test_picture_size_and_rate_reach_the_model(info: FrameInfo) -> None:
    model, x, text = tiny_model(), random(1, 4, 3, 6, 8), random(1, 5, TINY.caption_channels, seed=1)
    out = model(x, torch.full((1, 3), 0.3), text, info)
    assert relative(out[0], ScalarTimeSTDiT3(model)(x[0], 0.3, text[0], info)) < 5e-6
    assert relative(out, model(x, torch.full((1, 3), 0.3), text, INFO)) > 1e-3


def test_every_frame_has_its_own_level() -> None:
    """Before temporal attention mixes frames, a frame is that of a clip which has its level everywhere."""
    model, x, text = tiny_model(), random(1, 4, 5, 4, 6), random(1, 5, TINY.caption_channels, seed=1)
    grid = model.grid(5, 4, 6)
    context = BlockContext(grid, [TextRun(0, 5, model.project_text(text))])
    levels = staircase(5)
    mixed = model.head(model.block(0, model.embed(x, levels, INFO), context), grid)
    for frame in range(5):
        equal = levels[:, frame : frame + 1].expand(1, 5)
        alone = model.head(model.block(0, model.embed(x, equal, INFO), context), grid)
        torch.testing.assert_close(mixed[:, :, frame], alone[:, :, frame], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(mixed[:, :, 0], alone[:, :, 0], atol=1e-3)


def test_close_levels_stay_distinct() -> None:
    """The published time shift at T = 200 gives 200 different times; rounded to bfloat16 they merge to 152."""
    levels = torch.tensor([NoiseSchedule(200, 3.6947).levels[1:]])
    assert len(set((levels * 1000).bfloat16().flatten().tolist())) < 160
    time = tiny_model().embed(torch.zeros(1, 4, 200, 2, 2), levels, INFO).time[0]
    assert len(torch.unique(time, dim=0)) == 200


# --- what may influence what -----------------------------------------------------------------------------


def test_batch_rows_are_independent() -> None:
    model, x, text = tiny_model(), random(3, 4, 6, 4, 6), random(3, 5, TINY.caption_channels, seed=1)
    levels = staircase(6, rows=3)
    before = model(x, levels, text, INFO)
    x[1], levels[1], text[1] = random(4, 6, 4, 6, seed=9), 0.7, random(5, TINY.caption_channels, seed=9)
    after = model(x, levels, text, INFO)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])
    for row in range(3):
        one = slice(row, row + 1)
        assert relative(model(x[one], levels[one], text[one], INFO), after[one]) < 1e-6


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_chunk_causal_shields_cleaner_chunks_from_noisier_ones(chunk: int) -> None:
    """The masked whole-window forward: bitwise against any change, 1e-6 against leaving the noisier chunks out."""
    model, frames = tiny_model(), 15 if chunk != 2 else 14
    x, text = random(2, 4, frames, 6, 8), random(2, 5, TINY.caption_channels, seed=1)
    levels = staircase(frames, rows=2)
    before = model(x, levels, text, INFO, chunk_causal=chunk)
    for cut in range(chunk, frames, chunk):
        noisier, other_levels = x.clone(), levels.clone()
        noisier[:, :, cut:] = 10 * random(2, 4, frames - cut, 6, 8, seed=cut)
        other_levels[:, cut:] = 0.9
        after = model(noisier, other_levels, text, INFO, chunk_causal=chunk)
        assert torch.equal(after[:, :, :cut], before[:, :, :cut])
        # The chunk behind the cut does change, and a chunk sees all of itself and of what is cleaner.
        assert relative(after[:, :, cut:], before[:, :, cut:]) > 0.1
        left_out = model(x[:, :, :cut], levels[:, :cut], text, INFO, chunk_causal=chunk)
        assert relative(left_out, before[:, :, :cut]) < 1e-6
    first, last = x.clone(), x.clone()
    first[:, :, 0] += 1
    last[:, :, chunk - 1] += 1
    assert not torch.equal(model(first, levels, text, INFO, chunk_causal=chunk)[:, :, -1], before[:, :, -1])
    assert not torch.equal(model(last, levels, text, INFO, chunk_causal=chunk)[:, :, 0], before[:, :, 0])


def test_full_attention_is_the_mask_with_one_chunk() -> None:
    model, x, text = tiny_model(), random(1, 4, 6, 4, 6), random(1, 5, TINY.caption_channels, seed=1)
    full = model(x, staircase(6), text, INFO)
    assert relative(model(x, staircase(6), text, INFO, chunk_causal=6), full) < 1e-6
    assert relative(model(x, staircase(6), text, INFO, chunk_causal=3), full) > 1e-3


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(5, 6), (6, 5), (5, 7), (1, 1), (30, 53)])
def test_odd_latent_sizes_are_padded_and_cropped(height: int, width: int) -> None:
    model, x, text = tiny_model(), random(1, 4, 3, height, width), random(1, 5, TINY.caption_channels, seed=1)
    out = model(x, staircase(3), text, INFO)
    assert out.shape == (1, 8, 3, height, width)
    padded = torch.zeros(1, 4, 3, height + height % 2, width + width % 2)
    padded[..., :height, :width] = x
    assert torch.equal(out, model(padded, staircase(3), text, INFO)[..., :height, :width])


def test_the_published_size_has_405_patches() -> None:
    grid = tiny_model().grid(35, 30, 53)
    assert (grid.height, grid.width, grid.tokens_per_frame, grid.frames) == (15, 27, 405, 35)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30 must be an even multiple of num_heads=4"),
        ({"hidden_size": 36}, "hidden_size=36 must be an even multiple of num_heads=4"),
        ({"hidden_size": 6, "num_heads": 3}, "hidden_size=6 must be a multiple of 4"),
        ({"patch_size": (2, 2, 2)}, r"patch_size=\[2, 2, 2\]"),
    ],
)
def test_impossible_shapes_name_the_field(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("ratio", [0.5, 2.5, 8.0])
def test_the_mlps_width_counts_in_costs_and_memory(ratio: float) -> None:
    """Differences to the public ratio, as torch counts them in running blocks."""

    def ran(ratio: float) -> tuple[float, float, float, float]:
        model = tiny_model(config=replace(TINY, hidden_size=64, mlp_ratio=ratio))
        grid = model.grid(12, 16, 16)
        activation = Activation(*map(torch.zeros, model.activation_shapes(grid)))
        context = BlockContext(grid, [TextRun(0, 12, model.project_text(random(1, 5, 12)), None)], None)
        with FlopCounterMode(display=False) as flop, Allocated() as allocated:
            model.block(0, activation, context)
        copies = allocated.peak / activation.hidden.nbytes
        return model.costs(grid, 5).blocks[0], flop.get_total_flops(), model.spec.activation_copies, copies

    (cost, flop, predicted, copies), public = ran(ratio), ran(4.0)
    assert public[2] == 14
    assert cost - public[0] == flop - public[1] == 4 * 12 * 64 * 64 * 64 * (ratio - 4)
    assert predicted - copies >= public[2] - public[3]
    assert ratio < 4 or predicted - 14 == pytest.approx(copies - public[3])


# --- text ------------------------------------------------------------------------------------------------


def text_runs(model: STDiT3, *runs: tuple[int, int, str]) -> list[TextRun]:
    """Runs ``(start, stop, key)``; equal keys are equal texts, of different lengths."""
    texts = {"a": random(1, 3, TINY.caption_channels, seed=1), "b": random(1, 5, TINY.caption_channels, seed=2)}
    return [TextRun(start, stop, model.project_text(texts[key]), key=key) for start, stop, key in runs]


def test_text_cache_hit_equals_miss_and_no_cache() -> None:
    model, cache = tiny_model(), TextCache()
    activation, grid = model.embed(random(1, 4, 6, 4, 6), staircase(6), INFO), model.grid(6, 4, 6)
    runs = text_runs(model, (0, 4, "a"), (4, 6, "b"))

    def hidden(cache: TextCache | None) -> Tensor:
        return run_blocks(model, BLOCKS, activation, BlockContext(grid, runs, text_cache=cache)).hidden

    without, miss = hidden(None), hidden(cache)
    hit = hidden(cache)
    assert torch.equal(miss, without) and torch.equal(hit, without)
    # What is kept is never computed again; what was dropped is.
    cache.drop("a")
    cache.drop("unknown")
    made: list[tuple[str, int]] = []

    def make(key: str, index: int) -> tuple[Tensor, Tensor]:
        made.append((key, index))
        return torch.zeros(1), torch.zeros(1)

    for key, index in product("ab", BLOCKS):
        cache.pair(key, index, partial(make, key, index))
    assert made == [("a", index) for index in BLOCKS]


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("switch", [1, 3, 5])
def test_two_texts_are_each_text_on_its_own_frames(block: int, switch: int) -> None:
    """In one half-block only a frame's own text counts: stitched from two computations with one text each."""
    model = tiny_model()
    activation, grid = model.embed(random(1, 4, 6, 4, 6), staircase(6), INFO), model.grid(6, 4, 6)

    def hidden(*runs: tuple[int, int, str]) -> Tensor:
        return model.block(block, activation, BlockContext(grid, text_runs(model, *runs))).hidden

    both, a, b = hidden((0, switch, "a"), (switch, 6, "b")), hidden((0, 6, "a")), hidden((0, 6, "b"))
    torch.testing.assert_close(both, torch.cat([a[:, :switch], b[:, switch:]], dim=1), atol=1e-6, rtol=1e-6)
    assert relative(a, b) > 1e-3
    assert torch.equal(hidden((0, switch, "a"), (switch, 6, "a"))[:, :switch], both[:, :switch])


def test_masked_text_tokens_do_not_count() -> None:
    model, x = tiny_model(), random(2, 4, 4, 4, 6)
    text = random(2, 5, TINY.caption_channels, seed=1)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    before = model(x, staircase(4, rows=2), text, INFO, text_mask=mask)
    text[0, 3:] = 100.0
    assert torch.equal(model(x, staircase(4, rows=2), text, INFO, text_mask=mask), before)
    short = model(x[:1], staircase(4), text[:1, :3], INFO)
    assert relative(before[:1], short) < 1e-6


# --- training from scratch -------------------------------------------------------------------------------


def test_initial_weights_predict_zero_and_learn() -> None:
    torch.manual_seed(0)
    model = STDiT3(TINY)
    init_weights(model)
    x, text = random(1, 4, 4, 4, 6), random(1, 5, TINY.caption_channels, seed=1)
    assert not model(x, staircase(4), text, INFO).any()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = (model.to_velocity(model(x, staircase(4), text, INFO), x, staircase(4)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_velocity_is_the_first_half_of_the_channels() -> None:
    model, out, x = tiny_model(), random(1, 8, 3, 4, 6), random(1, 4, 3, 4, 6)
    velocity = model.to_velocity(out.half(), x, staircase(3))
    assert velocity.dtype == torch.float32 and torch.equal(velocity, out[:, :4].half().float())
    plain = tiny_model(config=replace(TINY, pred_sigma=False))
    text = random(1, 5, TINY.caption_channels)
    assert plain(x, staircase(3), text, INFO).shape == x.shape
    assert torch.equal(model.null_text(), model.state_dict()["y_embedder.y_embedding"])
