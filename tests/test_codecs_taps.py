"""Convolutions that look at the current frame only: the same function and files, less work, a shorter memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pavdm_dist.codecs.receptive import encoder_receptive_latents
from pavdm_dist.codecs.taps import CurrentFrameConv
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.digits.clip_vae import build_vae, public_vae
from pavdm_dist.io.shipped import shipped_models


@pytest.fixture(scope="module")
def plain() -> WanCodec:
    """Has all taps, those of earlier frames zero but in one convolution."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = public_vae(build_vae(4, 8, (1, 2, 2)))
        vae.decoder.up_blocks[0].resnets[0].conv1.weight[:, :, :2].normal_(std=0.05)
    return WanCodec(vae)


@pytest.fixture(scope="module")
def folder(plain: WanCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    plain.save_pretrained(path)
    return path


def current(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, CurrentFrameConv)]


def raw(codec: WanCodec, latents: Tensor) -> Tensor:
    decoder = codec.decoder()
    return torch.cat([decoder.step(latent) for latent in latents[None].split(1, dim=2)], dim=2)


def test_pixels_and_latents_are_those_of_all_taps(plain: WanCodec, folder: Path) -> None:
    codec = WanCodec.from_pretrained(folder)
    convolutions = [name for name, child in plain.vae.named_modules() if getattr(child, "kernel_size", ()) == (3, 3, 3)]
    kept = "decoder.up_blocks.0.resnets.0.conv1"
    assert set(convolutions) - set(current(codec.vae)) == {kept}
    assert not current(plain.vae), "a codec that was handed over is not changed"
    latents = torch.randn(4, 7, 3, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = raw(plain, latents)
        torch.testing.assert_close(raw(codec, latents), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05
    frames = torch.randint(0, 256, (13, 24, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(codec.encode(frames), plain.encode(frames), rtol=1e-4, atol=1e-5)


def test_it_is_saved_as_it_was_loaded(folder: Path, tmp_path: Path) -> None:
    WanCodec.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_half_precision_and_a_move_take_the_shortened_kernels_along(folder: Path) -> None:
    codec = WanCodec.from_pretrained(folder, dtype=torch.bfloat16)
    codec.vae.float()
    for module in codec.vae.modules():
        if isinstance(module, CurrentFrameConv):
            assert module.current.dtype == torch.float32
            assert torch.equal(module.current, module.weight[:, :, -1])


def test_the_shipped_codec_does_less_and_remembers_less() -> None:
    codec = WanCodec.from_pretrained(shipped_models()["embedded"] / "vae")
    assert len(current(codec.vae.decoder)) == 18
    assert len(current(codec.vae.encoder)) == 12
    assert codec.receptive_latents() == 4  # 29 with the taps of zero
    assert encoder_receptive_latents(codec) == 3
    decoder, latent = codec.decoder(), torch.zeros(1, 16, 1, 8, 8)
    decoder.warm(latent[0])
    decoder.step(latent)
    with FlopCounterMode(display=False) as counter:
        decoder.step(latent)
    assert counter.get_total_flops() < 1.7e9  # 3.1e9 with them
