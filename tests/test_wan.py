"""The Wan family: diffusers' results, block by block, on any cut; frames and texts mix only where they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Timesteps
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from wan_models import INFO, SHAPE, SKYREELS, WAN, as_diffusers, cuts, random, run_cut, staircase, tiny_wan

from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.models.base import BlockContext, FrameInfo
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.skyreels_v2 import SkyReelsV2
from pavdm_dist.models.text_cache import TextCache, TextRun
from pavdm_dist.models.wan import Wan, WanConfig

FAMILY = pytest.mark.parametrize(
    "config", [WAN, SKYREELS, replace(SKYREELS, inject_sample_info=False)], ids=["wan", "skyreels", "untold"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def inputs(frames: int = 6, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return random(rows, 4, frames, 4, 6), staircase(frames, rows), random(rows, 5, 12, seed=1)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- cut into stages -------------------------------------------------------------------------------------


@FAMILY
@DTYPES
@pytest.mark.parametrize("causal", [None, 2])
def test_every_cut_gives_the_bits_of_the_whole(
    config: WanConfig, dtype: torch.dtype, causal: int | None, tmp_path: Path
) -> None:
    """Each stage loaded from the folder on its own, what crosses a link copied."""
    tiny_wan(config=config).save_pretrained(tmp_path)
    x, levels, text = inputs()
    whole = load_backbone(tmp_path, None, dtype)
    assert isinstance(whole, Wan)
    expected = whole(x, levels, text, INFO, chunk_causal=causal)
    assert expected.dtype == dtype and expected.isfinite().all()
    for cut in cuts(3):
        stages = [(load_backbone(tmp_path, blocks, dtype), blocks) for blocks in cut]
        assert torch.equal(run_cut(stages, x, levels, text, causal), expected)


# --- diffusers' results ----------------------------------------------------------------------------------


def padded(text: Tensor, dtype: torch.dtype) -> Tensor:
    """As diffusers' pipelines give it: zero behind the text's end."""
    return torch.nn.functional.pad(text, (0, 0, 0, WAN.text_len - text.shape[1])).to(dtype)


@DTYPES
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("fps", [16, 24])
def test_skyreels_is_diffusers_bit_for_bit(dtype: torch.dtype, told: bool, fps: int) -> None:
    model = tiny_wan(config=replace(SKYREELS, inject_sample_info=told))
    peer = as_diffusers(model, dtype)
    model.load_state_dict(peer.state_dict(), assign=True)
    x, levels, text = inputs()
    found = model(x, levels, text, FrameInfo(32, 48, fps))
    with torch.no_grad():
        expected = peer(
            x.to(dtype), levels * 1000, padded(text, dtype), enable_diffusion_forcing=True, fps=[int(fps != 16)]
        ).sample
    assert found.dtype == dtype and torch.equal(found, expected)
    assert torch.equal(model.to_velocity(found, x, levels), -expected.float())


@pytest.mark.parametrize("chunk", [2, 3])
def test_skyreels_chunk_causal_is_diffusers_mask(chunk: int) -> None:
    """Which holds a number for every pair of tokens; here every chunk reads a slice."""
    model = tiny_wan(config=SKYREELS)
    peer = as_diffusers(model)
    peer._set_ar_attention(chunk)
    x, levels, text = inputs()
    expected = peer(x, levels * 1000, padded(text, x.dtype), enable_diffusion_forcing=True, fps=[1]).sample
    full = model(x, levels, text, INFO)
    assert relative(model(x, levels, text, INFO, chunk_causal=chunk), full if chunk == 1 else expected) < (
        10 if chunk == 1 else 1e-6
    )
    assert chunk == 1 or relative(full, expected) > 1e-3


@DTYPES
def test_wan_is_diffusers_with_a_time_for_every_token(dtype: torch.dtype) -> None:
    """Diffusers rounds the sinusoid's argument to float32, Wan's own program does not: 1e-5. Without that what is left
    is the time MLP's product of as many rows as there are tokens, or frames."""
    model = tiny_wan()
    peer = as_diffusers(model, dtype)
    model.load_state_dict(peer.state_dict(), assign=True)
    x, levels, text = inputs()
    found = model(x, levels, text, INFO)

    def diffusers() -> Tensor:
        return peer(x.to(dtype), (levels * 1000).repeat_interleave(6, 1), padded(text, dtype)).sample

    exact = dtype == torch.float32
    assert relative(found, diffusers()) < (1e-5 if exact else 1e-2)
    peer.condition_embedder.timesteps_proj = SkyReelsV2Timesteps(WAN.freq_dim, flip_sin_to_cos=True)
    assert relative(found, diffusers()) < (3e-7 if exact else 1e-2)


@DTYPES
def test_a_block_with_modulation_by_frame_is_diffusers_by_token(dtype: torch.dtype) -> None:
    model = tiny_wan()
    peer = as_diffusers(model, dtype)
    model.load_state_dict(peer.state_dict(), assign=True)
    x, levels, text = inputs(rows=2)
    activation, grid = model.embed(x, levels, INFO), model.grid(6, 4, 6)
    run = TextRun(0, 6, model.project_text(text))
    found = model.block(1, activation, BlockContext(grid, [run]))
    by_token = activation.modulation.unflatten(-1, (6, -1)).repeat_interleave(6, dim=1)
    expected = peer.blocks[1](activation.hidden.flatten(1, 2), run.tokens, by_token, peer.rope(x))
    assert torch.equal(found.hidden.flatten(1, 2), expected)


@FAMILY
@pytest.mark.parametrize("t", [0, 113, 500, 1000])
def test_equal_levels_are_one_time_for_all(config: WanConfig, t: int) -> None:
    """Up to how one row of a product is summed, and several; weights of a published model's scale."""
    model = tiny_wan(config=config, std=0.05)
    peer = as_diffusers(model)
    peer.condition_embedder.timesteps_proj = SkyReelsV2Timesteps(WAN.freq_dim, flip_sin_to_cos=True)
    x, _, text = inputs()
    found = model(x, torch.full((1, 6), t / 1000), text, INFO)
    fps = {"fps": [1]} if config is SKYREELS else {}
    assert relative(found, peer(x, torch.tensor([t]), padded(text, x.dtype), **fps).sample) < 2e-7


def test_tensors_that_stay_float32(tmp_path: Path) -> None:
    """Norms with weights, modulation tables and the time embedding, as diffusers' class says: 77 of 24 blocks' 663."""
    tiny_wan().save_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = load_backbone(tmp_path, dtype=torch.bfloat16).state_dict()
    kept = {name for name, value in loaded.items() if value.dtype == torch.float32}
    tables = {f"blocks.{i}.{name}" for i in range(3) for name in ("scale_shift_table", "norm2.weight", "norm2.bias")}
    linear = {f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert kept == tables | {"scale_shift_table"} | {f"condition_embedder.time_embedder.{name}" for name in linear}
    assert {value.dtype for name, value in loaded.items() if name not in kept} == {torch.bfloat16}
    public = Wan.of_shape({"num_attention_heads": 2, "num_layers": 24})
    assert len(public.state_dict()) == 663 and sum(map(public.keeps_float32, public.state_dict())) == 77


# --- what may influence what -----------------------------------------------------------------------------


def test_attention_runs_in_fused_kernels() -> None:
    model, (x, levels, text) = tiny_wan(), inputs()
    plain = model(x, levels, text, INFO)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it cannot serve
        assert torch.equal(model(x, levels, text, INFO), plain)
        model(x, levels, text, INFO, chunk_causal=2)


@FAMILY
def test_batch_rows_are_independent(config: WanConfig) -> None:
    """Also where diffusers fails: several videos that are told their frame rate."""
    model, (x, levels, text) = tiny_wan(config=config), inputs(rows=3)
    before = model(x, levels, text, INFO)
    x[1], levels[1], text[1] = random(4, 6, 4, 6, seed=9), 0.7, random(5, 12, seed=9)
    after = model(x, levels, text, INFO)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])
    for row in range(3):
        one = slice(row, row + 1)
        assert relative(model(x[one], levels[one], text[one], INFO), after[one]) < 1e-6


@FAMILY
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunk_causal_shields_cleaner_chunks_from_noisier_ones(config: WanConfig, chunk: int) -> None:
    model, (x, levels, text) = tiny_wan(config=config), inputs()
    before = model(x, levels, text, INFO, chunk_causal=chunk)
    for cut in range(chunk, 6, chunk):
        noisier, other = x.clone(), levels.clone()
        noisier[:, :, cut:], other[:, cut:] = 10 * random(1, 4, 6 - cut, 4, 6, seed=cut), 0.9
        after = model(noisier, other, text, INFO, chunk_causal=chunk)
        assert torch.equal(after[:, :, :cut], before[:, :, :cut])
        assert relative(after[:, :, cut:], before[:, :, cut:]) > 0.1
        shorter = model(x[:, :, :cut], levels[:, :cut], text, INFO, chunk_causal=chunk)
        assert relative(shorter, before[:, :, :cut]) < 1e-6
    first = x.clone()
    first[:, :, 0] += 1
    assert not torch.equal(model(first, levels, text, INFO, chunk_causal=chunk)[:, :, -1], before[:, :, -1])


def test_only_differences_of_places_count() -> None:
    """A chunk's place in the window, or in the video: what attention sees of the others is the same."""
    model, (x, levels, text) = tiny_wan(), inputs()
    grid = model.grid(6, 4, 6)
    run = TextRun(0, 6, model.project_text(text))

    def at(first: int) -> Tensor:
        activation = model.embed(x, levels, INFO)
        for index in range(3):
            activation = model.block(index, activation, BlockContext(grid, [run], first_frame=first))
        return model.head(activation, grid)

    assert torch.equal(at(0), model(x, levels, text, INFO))
    assert 0 < relative(at(200), at(0)) < 1e-6


def test_the_rotary_tables_are_diffusers() -> None:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    cos, sin = tiny_wan().rope._table(tiny_wan().grid(6, 4, 6), 6, torch.device("cpu"))
    expected = WanRotaryPosEmbed(12, (1, 2, 2), 1024)(torch.zeros(1, 4, len(cos) // 6, 4, 6))
    for found, table in zip((cos, sin), expected, strict=True):
        assert torch.equal(found, table[0, :, 0, ::2])


# --- text ------------------------------------------------------------------------------------------------


def test_texts_are_padded_and_the_padding_is_read() -> None:
    model, (x, levels, text) = tiny_wan(), inputs()
    whole = padded(text, x.dtype)
    assert torch.equal(model(x, levels, text, INFO), model(x, levels, whole, INFO))
    whole[:, -1] = 1.0
    assert relative(model(x, levels, whole, INFO), model(x, levels, text, INFO)) > 1e-2
    with pytest.raises(ConfigError, match="a text of 7 tokens: the model reads 6"):
        model.project_text(random(1, 7, 12))


def test_a_text_is_projected_once_a_block_and_switches_with_the_frames() -> None:
    model, cache = tiny_wan(), TextCache()
    activation, grid = model.embed(*inputs()[:2], INFO), model.grid(6, 4, 6)
    texts = {key: model.project_text(random(1, length, 12, seed=length)) for key, length in (("a", 3), ("b", 5))}

    def hidden(cache: TextCache | None, *runs: tuple[int, int, str]) -> Tensor:
        found = [TextRun(start, stop, texts[key], key=key) for start, stop, key in runs]
        return model.block(0, activation, BlockContext(grid, found, text_cache=cache)).hidden

    both = ((0, 4, "a"), (4, 6, "b"))
    without, miss, hit = (hidden(cache, *both) for cache in (None, cache, cache))
    assert torch.equal(miss, without) and torch.equal(hit, without)
    assert len(cache._pairs["a"]) == 1
    a, b = hidden(None, (0, 6, "a")), hidden(None, (0, 6, "b"))
    torch.testing.assert_close(without, torch.cat([a[:, :4], b[:, 4:]], dim=1), atol=1e-6, rtol=1e-6)
    assert relative(a, b) > 1e-3


# --- shapes ----------------------------------------------------------------------------------------------


def test_a_size_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"5x6 latent cells .* multiples of 2x2"):
        tiny_wan().grid(6, 5, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": (2, 2, 2)}, r"patch_size=\[2, 2, 2\]: the time patch must be 1"),
        ({"image_dim": 1280}, "these weights want an image beside the text"),
        ({"in_channels": 36, "out_channels": 16}, "in_channels=36, out_channels=16"),
        ({"attention_head_dim": 7}, "attention_head_dim=7"),
        ({"qk_norm": "layer_norm"}, "qk_norm=layer_norm"),
    ],
)
def test_impossible_shapes_name_the_field(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(WAN, **change)


@pytest.mark.parametrize("kind", [Wan, SkyReelsV2])
@pytest.mark.parametrize(
    ("name", "value"), [("num_attention_heads", 0), ("num_attention_heads", -1), ("ffn_dim", -1), ("num_layers", 0)]
)
def test_numbers_that_make_no_model_are_refused(kind: type[Wan], name: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=f"{name}={value}: must be"):
        kind.of_shape({**SHAPE, name: value})


def test_the_public_shapes_have_the_published_sizes() -> None:
    """Parameters, tensors and how levels were met."""
    small = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    wan = Wan.of_shape(small)
    state = wan.state_dict()
    assert len(state) == 825 and sum(value.numel() for value in state.values()) == 1_418_996_800
    assert wan.spec.level_support == "accepts" and not wan.spec.causal_trained
    ti2v = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
    assert Wan.of_shape(ti2v).spec.level_support == "mixed-trained"
    sky = type(tiny_wan(config=SKYREELS)).of_shape({**small, "inject_sample_info": True})
    assert round(sum(value.numel() for value in sky.state_dict().values()) / 1e6) == 1436
    assert sky.spec.level_support == "staircase-trained" and sky.spec.causal_trained
