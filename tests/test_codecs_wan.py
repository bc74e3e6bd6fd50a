"""The Wan codec: exact streaming, frame arithmetic, encoding, loading and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.codecs.wan_config import read_spec
from pavdm_dist.errors import CheckpointError, ConfigError, VideoError

LAYOUTS = {
    "2.1": {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]},
    "2.2": {
        "base_dim": 8,
        "dim_mult": [1, 1, 1, 1],
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
    "small": {"base_dim": 4, "dim_mult": [1, 1, 1], "temperal_downsample": [True, True], "num_res_blocks": 0},
}


def make(layout: str) -> WanCodec:
    from diffusers import AutoencoderKLWan

    config = {
        "z_dim": 4,
        "num_res_blocks": 1,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 1.0, 2.0],
        **LAYOUTS[layout],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanCodec(AutoencoderKLWan(**config))


@pytest.fixture(scope="module", params=list(LAYOUTS))
def codec(request: pytest.FixtureRequest) -> WanCodec:
    return make(request.param)


@pytest.fixture(scope="module")
def plain() -> WanCodec:
    return make("2.1")


def noise(count: int, seed: int = 0, height: int = 2, width: int = 3) -> Tensor:
    return torch.randn(4, count, height, width, generator=torch.Generator().manual_seed(seed))


def whole(codec: WanCodec, latents: Tensor) -> Tensor:
    return codec.decoder().decode(latents)


@pytest.mark.parametrize("parts", [[5, 4], [3, 3, 3], [1] * 9, [1, 8], [8, 1]])
def test_any_partition_decodes_to_the_same_bits(codec: WanCodec, parts: list[int]) -> None:
    latents = noise(9)
    decoder = codec.decoder()
    frames = [decoder.decode(part) for part in latents.split(parts, dim=1)]
    assert [len(part) for part in frames] == [codec.frames_in_chunk(n, i == 0) for i, n in enumerate(parts)]
    assert torch.equal(torch.cat(frames), whole(codec, latents))


def test_agrees_with_the_autoencoders_own_decode(codec: WanCodec) -> None:
    latents = noise(6)
    with torch.no_grad():
        raw = codec.vae.decode(codec.denormalise(latents[None])).sample[0]
    expected = (raw + 1) * 127.5
    ours = whole(codec, latents).permute(3, 0, 1, 2).float()
    # Its 1x1x1 convolution over all latents at once rounds differently from ours over one.
    assert (ours - expected).abs().max() < 0.51
    assert ours.std() > 10


def test_interleaved_streams_do_not_touch(codec: WanCodec) -> None:
    streams = [noise(6, seed) for seed in (1, 2, 3)]
    decoders = [codec.decoder() for _ in streams]
    frames: list[list[Tensor]] = [[], [], []]
    for turn in (0, 1, 1, 2, 0, 2, 2, 1, 0):
        position = sum(len(part) for part in frames[turn])
        start = 0 if position == 0 else (position + 3) // 4
        frames[turn].append(decoders[turn].decode(streams[turn][:, start : start + 2]))
    for done, latents in zip(frames, streams, strict=True):
        assert torch.equal(torch.cat(done), whole(codec, latents))


def test_warm_then_decode_equals_dropping_frames(codec: WanCodec) -> None:
    latents = noise(8)
    decoder, one_by_one = codec.decoder(), codec.decoder()
    decoder.warm(latents[:, :3])
    frames = decoder.decode(latents[:, 3:])
    for latent in latents[:, :3].split(1, dim=1):  # as a decode actor does
        one_by_one.warm(latent)
    assert torch.equal(one_by_one.decode(latents[:, 3:]), frames)
    assert len(frames) == codec.frames_in_chunk(5, first=False) == 20
    assert torch.equal(frames, whole(codec, latents)[9:])


def test_receptive_latents_restore_a_stream_exactly(codec: WanCodec) -> None:
    count = codec.receptive_latents()
    latents = noise(count + 9, height=1, width=2)
    expected = whole(codec, latents)[-8:]

    def restored(warmed: int) -> Tensor:
        decoder = codec.decoder()
        decoder.warm(latents[:, -2 - warmed : -2])
        return decoder.decode(latents[:, -2:])

    assert torch.equal(restored(count), expected)
    assert torch.equal(restored(count + 3), expected)
    assert not torch.equal(restored(count // 2), expected)


def test_receptive_latents_of_known_shapes() -> None:
    # Counted by hand for num_res_blocks=0: per latent conv_in 2, two middle blocks 8, one block 4, up-sampling 2,
    # at twice the rate 4 + 2 frames, at four times 4 + 2 frames: 16 + 3 + 1.5 = 20.5, so 21 later latents feel one.
    assert make("small").receptive_latents() == 22
    assert make("2.1").receptive_latents() == make("2.2").receptive_latents() == 31


def test_encode_is_causal_normalised_and_repeatable(codec: WanCodec) -> None:
    side = codec.spec.spatial_stride * 2
    frames = torch.randint(0, 256, (17, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    latents = codec.encode(frames)
    assert latents.shape == (4, 5, 2, 2)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, codec.encode(frames))
    assert torch.equal(latents[:, :2], codec.encode(frames[:5]))
    with torch.no_grad():
        raw = codec.vae.encode(frames.permute(3, 0, 1, 2)[None] / 127.5 - 1).latent_dist.mean
    assert torch.allclose(codec.denormalise(latents[None]), raw, atol=1e-6)
    assert whole(codec, latents).shape == frames.shape


def test_encode_refuses_what_does_not_fit(plain: WanCodec) -> None:
    frames = torch.zeros(17, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"clip of 16 frames .* 4n \+ 1; nearest legal: 13 or 17"):
        plain.encode(frames[:16])
    with pytest.raises(ConfigError, match=r"width=12 cannot be divided by 8.*nearest legal: 8 or 16"):
        plain.encode(frames[:, :, :12])
    with pytest.raises(ConfigError, match=r"uint8 \[t, H, W, 3\], got torch\.float32"):
        plain.encode(frames.float())
    with pytest.raises(ValueError, match=r"latents must be \[4, n >= 1, h, w\]"):
        plain.decoder().decode(noise(5)[:3])


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_encoder_that_gives_no_numbers_is_told(plain: WanCodec, tmp_path: Path, value: str) -> None:
    plain.save_pretrained(tmp_path)
    codec = WanCodec.from_pretrained(tmp_path)
    codec.vae.encoder.conv_out.bias.fill_(float(value))
    with pytest.raises(VideoError, match="the codec gave latents that are not finite: its encoder is damaged"):
        codec.encode(torch.zeros(5, 16, 16, 3, dtype=torch.uint8))


def test_frame_arithmetic() -> None:
    spec = CodecSpec(latent_channels=16, spatial_stride=8)
    assert [spec.frames_in_chunk(5, first) for first in (True, False)] == [17, 20]
    assert spec.chunks_for_frames(1440, 5, warm=False) == 73
    assert spec.chunks_for_frames(1440, 5, warm=True) == 72
    assert spec.latent_size(64, 96) == (8, 12)
    for chunk in (1, 2, 5, 7):
        for warm in (False, True):
            for frames in range(1, 90):
                chunks = spec.chunks_for_frames(frames, chunk, warm)
                given = [spec.frames_in_chunk(chunk, first=not warm and k == 0) for k in range(chunks)]
                assert sum(given) >= frames > sum(given[:-1])
    with pytest.raises(ConfigError, match="num_frames=0"):
        spec.chunks_for_frames(0, 5, warm=False)
    with pytest.raises(ConfigError, match=r"height=4 .*nearest legal: 8$"):
        spec.latent_size(4, 8)


def test_layouts_have_their_stride() -> None:
    assert {name: make(name).spec.spatial_stride for name in LAYOUTS} == {"2.1": 8, "2.2": 16, "small": 4}


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_save_and_load(codec: WanCodec, tmp_path: Path, dtype: torch.dtype | None) -> None:
    from diffusers import AutoencoderKLWan

    codec.save_pretrained(tmp_path, dtype)
    assert read_spec(tmp_path) == codec.spec
    loaded = WanCodec.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.vae.state_dict().values()} == {torch.float32}
    latents = noise(3)
    # diffusers reads the same folder; in full precision nothing has changed.
    theirs = WanCodec(AutoencoderKLWan.from_pretrained(tmp_path, torch_dtype=torch.float32))
    assert torch.equal(whole(loaded, latents), whole(theirs, latents))
    if dtype is None:
        assert torch.equal(whole(loaded, latents), whole(codec, latents))


def test_broken_checkpoints_name_the_tensor(plain: WanCodec, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    shape = list(tensors["decoder.conv_in.weight"].shape)
    save_file({**tensors, "decoder.conv_in.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(
        CheckpointError, match=rf"tensor decoder\.conv_in\.weight is \[2, 2\], .*{shape[0]}, {shape[1]}"
    ):
        WanCodec.from_pretrained(tmp_path)
    save_file({key: value for key, value in tensors.items() if key != "decoder.conv_in.weight"}, file)
    with pytest.raises(CheckpointError, match=r"lacks tensor decoder\.conv_in\.weight"):
        WanCodec.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        WanCodec.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        WanCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "holds a AutoencoderKL, an AutoencoderKLWan is needed"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 entries, z_dim=4 needs as many"),
        ({"temperal_downsample": [False, False, True]}, "makes 2 frames a latent"),
        ({"base_dim": "wide"}, r"config.json: base_dim=wide: must be a whole number"),
        ({"base_dim": 3}, "describes no working AutoencoderKLWan|tensor"),
    ],
)
def test_configurations_that_cannot_work(plain: WanCodec, tmp_path: Path, change: dict, message: str) -> None:
    plain.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        WanCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "shape", [([1, 2, 2], [True, True], True, 2), ([1, 2, 4, 4], [False, True, True], False, None)]
)
def test_decode_cost_is_what_the_convolutions_count(tmp_path: Path, shape: tuple) -> None:
    from diffusers import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    from pavdm_dist.codecs.costs import decode_flop

    mult, temporal, residual, patch = shape
    channels = 3 * (patch or 1) ** 2
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=mult, num_res_blocks=1, temperal_downsample=temporal, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, is_residual=residual, patch_size=patch, in_channels=channels, out_channels=channels,
        scale_factor_spatial=8,
    )  # fmt: skip
    WanCodec(vae).save_pretrained(tmp_path)
    decoder = WanCodec(vae).decoder()
    latents = torch.randn(4, 3, 4, 4)
    decoder.warm(latents[:, :2])
    with FlopCounterMode(display=False) as counter:
        decoder.decode(latents[:, 2:])
    assert decode_flop(tmp_path, 4, 4) == pytest.approx(counter.get_total_flops(), rel=0.25)
