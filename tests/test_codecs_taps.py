"""Convolutions that look at the current frame only: the same function and files, less work, a shorter memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pavdm_dist.codecs.costs import decode_flop, decode_memory
from pavdm_dist.codecs.receptive import encoder_receptive_latents
from pavdm_dist.codecs.taps import CurrentFrameConv
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.digits.clip_vae import build_vae, public_vae
from pavdm_dist.errors import CheckpointError
from pavdm_dist.io.shipped import shipped_models


@pytest.fixture(scope="module")
def plain() -> WanCodec:
    """In diffusers' own modules, with zeros for earlier frames."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanCodec(public_vae(build_vae(4, 8, (1, 2, 2))))


@pytest.fixture(scope="module")
def folder(plain: WanCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    plain.save_pretrained(path)
    return path


def shortened(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, CurrentFrameConv)]


def raw(codec: WanCodec, latents: Tensor) -> Tensor:
    decoder = codec.decoder()
    return torch.cat([decoder.step(latent) for latent in latents[None].split(1, dim=2)], dim=2)


def counted_flop(codec: WanCodec, latent: Tensor) -> int:
    decoder = codec.decoder()
    for _ in range(2):
        decoder.step(latent)
    with FlopCounterMode(display=False) as counter:
        decoder.step(latent)
    return counter.get_total_flops()


def test_pixels_and_latents_are_those_of_all_taps(plain: WanCodec, folder: Path) -> None:
    codec = WanCodec.from_pretrained(folder)
    spatial = [name for name, child in plain.vae.named_modules() if getattr(child, "kernel_size", ()) == (3, 3, 3)]
    assert shortened(codec.vae) == spatial
    latents = torch.randn(4, 7, 3, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = raw(plain, latents)
        torch.testing.assert_close(raw(codec, latents), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05
    frames = torch.randint(0, 256, (13, 24, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(codec.encode(frames), plain.encode(frames), rtol=1e-4, atol=1e-5)


def test_it_is_saved_as_it_was_loaded(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    WanCodec.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert not shortened(AutoencoderKLWan.from_pretrained(tmp_path)), "anybody can read it"
    assert shortened(WanCodec.from_pretrained(tmp_path, dtype=torch.bfloat16).vae)


def test_what_the_files_say_of_it_must_be_true(plain: WanCodec, folder: Path, tmp_path: Path) -> None:
    unmarked = tmp_path / "unmarked"
    shutil.copytree(folder, unmarked)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("_current_frame_only") is True
    (unmarked / "config.json").write_text(json.dumps(config))
    assert not shortened(WanCodec.from_pretrained(unmarked).vae), "its bits stay what they were"
    with torch.random.fork_rng():
        vae = public_vae(build_vae(4, 8, (1, 2, 2)))
        vae.decoder.up_blocks[0].resnets[0].conv1.weight[0, 0, 1] = 0.1
    WanCodec(vae).save_pretrained(tmp_path / "wrong")
    told = (
        r"_current_frame_only=true, but decoder\.up_blocks\.0\.resnets\.0\.conv1 has weights for earlier frames; take"
    )
    with pytest.raises(CheckpointError, match=told):
        WanCodec.from_pretrained(tmp_path / "wrong")


def test_costs_are_those_of_what_is_computed(folder: Path) -> None:
    codec = WanCodec.from_pretrained(folder)
    assert decode_flop(folder, 4, 4) == pytest.approx(counted_flop(codec, torch.zeros(1, 4, 1, 4, 4)), rel=0.25)
    assert decode_memory(folder, 4, 4).weights == sum(value.nbytes for value in codec.vae.parameters())


def test_the_shipped_codec_does_less_and_is_warmed_on_less() -> None:
    codec = WanCodec.from_pretrained(shipped_models()["embedded"] / "vae")
    assert len(shortened(codec.vae.decoder)) == 18
    assert len(shortened(codec.vae.encoder)) == 12
    assert codec.receptive_latents() == 4  # 29 with the taps of zero
    assert encoder_receptive_latents(codec) == 3
    assert counted_flop(codec, torch.zeros(1, 16, 1, 8, 8)) < 1.7e9  # 3.1e9 with them
