"""The Wan codec in its two published layouts, and large pictures in tiles, against diffusers' own decoding."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pavdm_dist.codecs.catalog import FrameMaker, codec_spec, load_codec
from pavdm_dist.codecs.costs import Allocated, decode_memory
from pavdm_dist.codecs.pixels import to_uint8
from pavdm_dist.codecs.tiles import Tiles
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.errors import ConfigError
from pavdm_dist.models.source import Source

PUBLISHED = {name: Path(__file__).parent / "data" / "wan_vae" / f"{name}.json" for name in ("2.1", "2.2")}
NARROW = {"2.1": {"base_dim": 4}, "2.2": {"base_dim": 5, "decoder_base_dim": 8}}


@pytest.fixture(scope="module", params=list(PUBLISHED))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a published layout: its config.json, narrower, and random weights as diffusers writes them."""
    from diffusers import AutoencoderKLWan

    path = tmp_path_factory.mktemp(request.param)
    config = {**json.loads(PUBLISHED[request.param].read_text()), **NARROW[request.param]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan.from_config({name: value for name, value in config.items() if name != "clip_output"})
    vae.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config))
    return path


def noise(codec: WanCodec, count: int, height: int = 2, width: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(codec.spec.latent_channels, count, height, width, generator=generator)


def whole(codec: WanCodec, latents: Tensor) -> Tensor:
    return codec.decoder().decode(latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_partition_snapshot_and_interleaving_give_the_same_bits(folder: Path, dtype: torch.dtype) -> None:
    codec = WanCodec.from_pretrained(folder, dtype=dtype)
    count = codec.receptive_latents()
    assert count == 39
    first, second = noise(codec, count + 5, 1, 2), noise(codec, 6, 1, 2, seed=1)
    expected, other = whole(codec, first), whole(codec, second)
    one, two = codec.decoder(), codec.decoder()
    parts = [one.decode(first[:, :1]), one.decode(first[:, 1:4])]
    interleaved = [two.decode(second[:, :5])]
    parts += [one.decode(first[:, 4:6]), one.decode(first[:, 6:])]
    interleaved += [two.decode(second[:, 5:])]
    assert torch.equal(torch.cat(parts), expected)
    assert torch.equal(torch.cat(interleaved), other)
    resumed = codec.decoder()
    resumed.warm(first[:, 3 : 3 + count])
    assert torch.equal(resumed.decode(first[:, 3 + count :]), expected[-8:])


def test_statistics_and_strides_are_the_published_ones(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        codec = load_codec(folder)
    assert not caplog.records  # a name that the class does not know (clip_output) is nobody's concern
    assert isinstance(codec, WanCodec)
    config = json.loads((folder / "config.json").read_text())
    patch = config.get("patch_size") or 1
    assert (codec.spec.spatial_stride, codec.spec.latent_channels) == (8 * patch, config["z_dim"])
    assert codec_spec(folder) == codec.spec
    raw = codec.denormalise(torch.ones(1, config["z_dim"], 1, 1, 1)).flatten()
    expected = [mean + std for mean, std in zip(config["latents_mean"], config["latents_std"], strict=True)]
    assert raw.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_picture_is_one_latent_and_the_beginning_of_its_video(folder: Path) -> None:
    codec = load_codec(folder)
    side = 2 * codec.spec.spatial_stride
    frames = torch.randint(0, 256, (5, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(codec.encode(frames[:1]), codec.encode(frames)[:, :1])


def test_tiles_are_diffusers_tiles_streamed(folder: Path) -> None:
    plain = WanCodec.from_pretrained(folder)
    tile = 4 * plain.spec.spatial_stride
    codec = WanCodec.from_pretrained(folder, tile=tile)
    latents = noise(codec, 4, 6, 7)
    frames = whole(codec, latents)
    decoder = codec.decoder()
    parts = [decoder.decode(part) for part in latents.split([1, 1, 2], dim=1)]
    assert torch.equal(torch.cat(parts), frames)
    vae = plain.vae
    if (spatial := plain.spec.spatial_stride) != vae.spatial_compression_ratio:
        vae.spatial_compression_ratio = spatial
    vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
    with torch.no_grad():
        theirs = vae.decode(plain.denormalise(latents[None])).sample[0]
    vae.use_tiling = False
    expected = (theirs + 1) * 127.5
    assert (frames.permute(3, 0, 1, 2).float() - expected).abs().max() < 0.51
    # Not what decoding whole gives, but near it; and what fits into one tile is left alone.
    assert 0 < (frames.float() - whole(plain, latents).float()).abs().mean() < 30
    small = latents[..., :4, :4].contiguous()
    assert torch.equal(whole(codec, small), whole(plain, small))


def test_tiles_bound_what_is_at_work(folder: Path) -> None:
    codec = WanCodec.on_meta(folder)
    pixels = 8 * codec.spec.spatial_stride
    counted = decode_memory(folder, 13, 8, tile=pixels)
    codec.tiles = Tiles.of(pixels, codec.spec.spatial_stride)
    decoder, latent = codec.decoder(), torch.empty(1, codec.spec.latent_channels, 1, 13, 8, device="meta")
    with torch.no_grad(), Allocated() as allocated:
        for _ in range(3):
            to_uint8(decoder.step(latent).clamp(-1, 1))
    assert counted.cache == decoder.cache_bytes
    assert counted.working == pytest.approx(allocated.peak - decoder.cache_bytes, rel=0.05)
    # A larger picture: what is remembered grows with it, and waits in main memory where the codec is on a GPU; what is
    # at work is a tile, and pixels.
    plain, large = decode_memory(folder, 90, 160), decode_memory(folder, 90, 160, tile=2 * pixels, in_main_memory=True)
    assert large.cache == 0 and large.working < plain.working / 2


def test_tiles_of_an_impossible_size_are_refused(folder: Path) -> None:
    stride = codec_spec(folder).spatial_stride
    with pytest.raises(ConfigError, match=rf"decoder_tile=100: .* multiple of {4 * stride}, .*nearest legal: "):
        FrameMaker(Source.of(folder), tile=100).check()
    FrameMaker(Source.of(folder), tile=8 * stride).check()
