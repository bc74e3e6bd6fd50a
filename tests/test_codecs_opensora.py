"""Open-Sora's VAE v1.2: groups of 17 frames and 5 latents, the published names of tensors, arithmetic, streaming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.codecs.catalog import codec_spec, encoder_identity, load_codec
from pavdm_dist.codecs.costs import decode_flop, decode_memory
from pavdm_dist.codecs.opensora import OpenSoraCodec, OpenSoraConfig, OpenSoraModules
from pavdm_dist.codecs.opensora_temporal import TemporalConfig, TemporalVAE
from pavdm_dist.errors import CheckpointError, ConfigError

# The published file's config.json, and what makes it small.
PUBLISHED = {
    "architectures": ["VideoAutoencoderPipeline"],
    "cal_loss": False,
    "freeze_vae_2d": False,
    "from_pretrained": None,
    "micro_frame_size": 17,
    "model_type": "VideoAutoencoderPipeline",
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.1, 0.34, 0.27, 0.98],
    "torch_dtype": "float32",
}
PICTURES = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TIME = {"filters": 8, "num_res_blocks": 1, "num_groups": 4}


@pytest.fixture(scope="module")
def codec() -> OpenSoraCodec:
    config = OpenSoraConfig(vae_2d=PICTURES, vae_temporal=TIME)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OpenSoraCodec(OpenSoraModules(config), config)


@pytest.fixture(scope="module")
def folder(codec: OpenSoraCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    codec.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**PUBLISHED, **{k: config[k] for k in ("vae_2d", "vae_temporal")}}))
    return path


def frames(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 16, 24, 3), generator=generator, dtype=torch.uint8)


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(4, count, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_the_published_shape_and_names() -> None:
    assert OpenSoraConfig().spec == CodecSpec(4, 8, 4, group=5)
    with torch.device("meta"):
        names = {name: list(value.shape) for name, value in OpenSoraModules(OpenSoraConfig()).state_dict().items()}
    # Names as VAE_Temporal_SD, diffusers' AutoencoderKL and the pipeline round them give them.
    for name, shape in {
        "scale": [1, 4, 1, 1, 1],
        "spatial_vae.module.encoder.down_blocks.3.resnets.1.conv2.weight": [512, 512, 3, 3],
        "spatial_vae.module.decoder.mid_block.attentions.0.to_q.weight": [512, 512],
        "temporal_vae.encoder.conv_in.conv.weight": [128, 4, 3, 3, 3],
        "temporal_vae.encoder.block_res_blocks.1.0.conv3.conv.weight": [256, 128, 1, 1, 1],
        "temporal_vae.encoder.conv_blocks.1.conv.bias": [256],
        "temporal_vae.encoder.res_blocks.3.norm2.weight": [512],
        "temporal_vae.encoder.conv2.conv.weight": [8, 512, 1, 1, 1],
        "temporal_vae.quant_conv.conv.weight": [8, 8, 1, 1, 1],
        "temporal_vae.post_quant_conv.conv.weight": [4, 4, 1, 1, 1],
        "temporal_vae.decoder.conv1.conv.weight": [512, 4, 3, 3, 3],
        "temporal_vae.decoder.block_res_blocks.0.0.conv3.conv.weight": [128, 256, 1, 1, 1],
        "temporal_vae.decoder.conv_blocks.2.conv.weight": [1024, 512, 3, 3, 3],
        "temporal_vae.decoder.conv_out.conv.weight": [4, 128, 3, 3, 3],
    }.items():
        assert names[name] == shape, name
    # Where time is not halved nothing stands in the file.
    assert not any(name.startswith("temporal_vae.encoder.conv_blocks.0.") for name in names)
    assert not any(name.startswith("temporal_vae.decoder.conv_blocks.0.") for name in names)


def test_time_is_causal_and_padded_in_front() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = TemporalVAE(TemporalConfig(filters=8, num_res_blocks=1, num_groups=4)).eval()
    x = torch.randn(1, 4, 17, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = vae.encode(x)
        assert latents.shape == (1, 4, 5, 4, 4)
        # 17 -> 20 by three zeros in front.
        assert torch.equal(latents, vae.encode(F.pad(x, (0, 0, 0, 0, 3, 0))))
        assert vae.encode(x[:, :, :1]).shape[2] == 1 and vae.encode(x[:, :, :16]).shape[2] == 4
        decoded = vae.decode(latents, 17)
    assert decoded.shape == x.shape


def test_any_partition_of_groups_gives_the_same_bits(codec: OpenSoraCodec) -> None:
    latents = noise(10)
    expected = codec.decoder().decode(latents)
    assert expected.shape == (34, 16, 24, 3)
    for parts in ([5, 5], [1] * 10, [3, 4, 3]):
        decoder = codec.decoder()
        given = [decoder.decode(part) for part in latents.split(parts, dim=1)]
        assert torch.equal(torch.cat(given), expected)
    assert [len(part) for part in given] == [0, 17, 17]
    # Groups know nothing of each other: a fresh decoder goes on with any of them.
    assert codec.receptive_latents() == 0
    assert torch.equal(codec.decoder().decode(latents[:, 5:]), expected[17:])
    other, warm = codec.decoder(), codec.decoder()
    other.decode(noise(3, seed=1))
    for latent in latents[:, :5].split(1, dim=1):  # as a decode actor does
        warm.warm(latent)
    assert torch.equal(warm.decode(latents[:, 5:]), expected[17:])


def test_encode_by_groups_and_one_picture(codec: OpenSoraCodec) -> None:
    clip = frames(34)
    latents = codec.encode(clip)
    assert latents.shape == (4, 10, 2, 3) and latents.dtype == torch.float32
    assert torch.equal(latents, torch.cat([codec.encode(clip[:17]), codec.encode(clip[17:])], dim=1))
    assert codec.encode(clip[:1]).shape == (4, 1, 2, 3)
    # What normalising takes away, decoding puts back.
    modules = codec.modules
    with torch.no_grad():
        pixels = (clip[:17].permute(0, 3, 1, 2).float() / 127.5 - 1).split(4)
        pictures = torch.cat([modules.spatial_vae.module.encode(part).latent_dist.mean * 0.18215 for part in pixels])
        raw = modules.temporal_vae.encode(pictures.permute(1, 0, 2, 3)[None])
    assert torch.allclose(latents[:, :5] * modules.scale[0] + modules.shift[0], raw[0], atol=1e-5)


def test_arithmetic_of_groups() -> None:
    spec = CodecSpec(4, 8, 4, group=5)
    assert [spec.frames_in_chunk(5, first) for first in (True, False)] == [17, 17]
    assert spec.frames_in_chunk(10, first=False) == 34 and spec.frames_in_chunk(6, first=True) == 18
    assert [spec.chunks_for_frames(n, 5, warm=False) for n in (1, 17, 18, 34)] == [1, 1, 2, 2]
    assert [spec.latents_in_clip(n) for n in (1, 5, 17, 18, 34, 39)] == [1, 2, 5, 6, 10, 12]
    assert [spec.usable_frames(n) for n in (16, 17, 40)] == [0, 17, 34]
    with pytest.raises(ConfigError, match=r"clip of 20 frames .* 17m \+ 4n \+ 1; nearest legal: 18 or 22"):
        spec.latents_in_clip(20)
    spec.check_chunk(10)
    with pytest.raises(ConfigError, match=r"latent_chunk_size=4: .* groups of 5 latents; nearest legal: 5"):
        spec.check_chunk(4)


def test_save_and_load(codec: OpenSoraCodec, folder: Path) -> None:
    assert codec_spec(folder) == codec.spec
    loaded = load_codec(folder)
    assert isinstance(loaded, OpenSoraCodec)
    assert torch.equal(loaded.decoder().decode(noise(5)), codec.decoder().decode(noise(5)))
    assert torch.equal(loaded.encode(frames(17)), codec.encode(frames(17)))
    assert encoder_identity(folder) == encoder_identity(str(folder))
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {"scale", "shift"} < set(stored)
    low = load_codec(folder, dtype=torch.bfloat16)
    assert isinstance(low, OpenSoraCodec) and low.modules.scale.dtype == torch.float32
    assert (low.decoder().decode(noise(5)).float() - codec.decoder().decode(noise(5)).float()).abs().mean() < 4


def test_large_pictures_in_tiles(codec: OpenSoraCodec, folder: Path) -> None:
    tiled = load_codec(folder, tile=32)
    latents = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    one, other = tiled.decoder().decode(latents), codec.decoder().decode(latents)
    assert one.shape == other.shape and not torch.equal(one, other)
    assert torch.equal(tiled.decoder().decode(noise(5)), codec.decoder().decode(noise(5)))


def test_cost_and_memory_from_shapes(folder: Path) -> None:
    assert decode_flop(folder, 4, 4) > 0
    memory = decode_memory(folder, 4, 4)
    assert memory.cache == 0 and memory.working > 0
    assert memory.frames == 17 * 32 * 32 * 3 // 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": [0.0]}, "shift has 1 entries, 4 latent channels need as many"),
        ({"vae_temporal": {"filters": "wide"}}, "filters=wide: must be a whole number"),
        ({"vae_temporal": {**TIME, "temporal_downsample": [True]}}, "needs one entry less"),
        ({"vae_temporal": {**TIME, "filters": 16}}, r"tensor temporal_vae\.\S+ is \["),
        ({"vae_2d": {**PICTURES, "norm_num_groups": 3}}, "describes no working Open-Sora VAE"),
    ],
)
def test_configurations_that_cannot_work(folder: Path, tmp_path: Path, change: dict, message: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_codec(tmp_path)
