"""Codec training: whole clips equal the streaming path, and a run stopped and continued equals one that was not."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needs import needs
from safetensors.torch import load_file

from pavdm_dist.commands.signals import Signals, signal_of
from pavdm_dist.digits import clip_vae, codec_run, codec_training
from pavdm_dist.digits.codec_training import CodecTrainer, CodecTraining
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.train import endings

needs("draws handwritten digits", "sklearn")

TINY = CodecTraining(
    z_dim=4,
    base_dim=4,
    decoder_base_dim=6,
    dim_mult=(1, 2, 2),
    crop=16,
    batch_size=2,
    num_frames=5,
    budget_seconds=1e9,
    bfloat16=False,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    return clip_vae.sample_clips(np.random.default_rng(0), "train", 2, 17, 32)[0]


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(3)
    return clip_vae.build_vae(6, 8, (1, 2, 2), num_res_blocks=2).eval()


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encoding_a_whole_clip_equals_the_cached_path(vae: Any, clip: torch.Tensor, frames: int) -> None:
    expected = clip_vae.public_vae(vae).encode(clip[:, :, :frames]).latent_dist.parameters
    moments = clip_vae.encode_clip(vae, clip[:, :, :frames])
    assert moments.shape == (2, 12, (frames + 3) // 4, 4, 4)
    torch.testing.assert_close(moments, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("latents", [1, 2, 5])
def test_decoding_a_whole_clip_equals_the_cached_path(vae: Any, latents: int) -> None:
    z = torch.randn(2, 6, latents, 4, 6, generator=torch.Generator().manual_seed(1))
    expected = clip_vae.public_vae(vae).decode(z).sample
    frames = clip_vae.decode_clip(vae, z)
    assert frames.shape == (2, 3, 4 * latents - 3, 32, 48)
    assert frames.std() > 0.01
    torch.testing.assert_close(frames.clamp(-1, 1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_latents_are_forgotten_soon() -> None:
    vae = clip_vae.build_vae(6, 8, (1, 2, 2)).eval()
    z = torch.randn(1, 6, 9, 2, 2, generator=torch.Generator().manual_seed(1))
    other = torch.cat([-z[:, :, :4], z[:, :, 4:]], dim=2)
    frames, changed = clip_vae.decode_clip(vae, z), clip_vae.decode_clip(vae, other)
    assert not torch.equal(frames[:, :, 13:21], changed[:, :, 13:21])
    assert torch.equal(frames[:, :, 25:], changed[:, :, 25:]), "colours would depend on how long a stream has run"


def test_crops_lie_on_digits_and_follow_the_generator() -> None:
    x, mask = clip_vae.sample_clips(np.random.default_rng(4), "train", 6, 9, 32)
    again, _ = clip_vae.sample_clips(np.random.default_rng(4), "train", 6, 9, 32)
    assert x.shape == (6, 3, 9, 32, 32)
    assert mask.shape == (6, 1, 9, 32, 32)
    assert torch.equal(x, again)
    assert x.min() >= -1
    assert x.max() <= 1
    assert (mask[:, 0, 4].mean(dim=(1, 2)) > 0.02).all()


def test_errors_on_digits_cost_more_than_errors_elsewhere() -> None:
    x = torch.zeros(1, 3, 5, 16, 16)
    mask = torch.zeros(1, 1, 5, 16, 16)
    mask[..., :4, :4] = 1
    on, off = x.clone(), x.clone()
    on[..., 1, 1] = off[..., 12, 12] = 0.5
    on_loss, off_loss = (float(codec_training.reconstruction_loss(TINY, out, x, mask)) for out in (on, off))
    assert on_loss == pytest.approx((1 + TINY.foreground_weight) * off_loss, rel=1e-5)
    assert codec_training.reconstruction_loss(TINY, x, x, mask) == 0


def test_foreground_psnr_looks_at_the_foreground_only() -> None:
    x = torch.zeros(1, 3, 1, 8, 8)
    mask = torch.zeros(1, 1, 1, 8, 8)
    mask[..., :4, :] = 1
    out = x.clone()
    out[..., :4, :] = 0.2
    out[..., 4:, :] = 0.9
    assert clip_vae.foreground_psnr(out, x, mask) == pytest.approx(20.0, abs=1e-4)


def test_training_lowers_the_loss() -> None:
    trainer = CodecTrainer(CodecTraining(**{**TINY.__dict__, "learning_rate": 1e-2}))
    passes = []
    for _ in range(6):
        trainer.steps = 0  # the same batches again: they differ among themselves by more than is learned here
        passes.append(np.mean([trainer.step()["reconstruction"] for _ in range(12)]))
    assert passes[5] < 0.85 * passes[0]


def test_a_continued_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = CodecTrainer(TINY)
    for _ in range(4):
        whole.step()
    first = CodecTrainer(TINY)
    first.step()
    first.step()
    first.save(tmp_path)
    second = CodecTrainer(TINY)
    second.load(tmp_path)
    second.step()
    second.step()
    assert second.steps == 4
    for name, value in whole.vae.state_dict().items():
        assert torch.equal(value, second.vae.state_dict()[name]), name
        assert torch.equal(whole.average[name], second.average[name]), name


def test_the_second_phase_moves_the_decoder_only() -> None:
    trainer = CodecTrainer(CodecTraining(**{**TINY.__dict__, "decoder_seconds": 100.0, "budget_seconds": 10.0}))
    trainer.step()
    average = {name: value.clone() for name, value in trainer.average.items()}
    trainer.elapsed = 10.0
    trainer.step()
    trainer.step()
    for name, value in trainer.vae.state_dict().items():
        encoder = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(value, average[name]) == encoder, name
        if encoder:
            torch.testing.assert_close(trainer.average[name], value, rtol=0, atol=1e-6)


def test_a_slice_leaves_state_losses_and_a_sheet_and_the_next_one_goes_on(tmp_path: Path) -> None:
    from PIL import Image

    assert codec_run.train_codec(TINY, tmp_path, max_seconds=0.5) is None
    first = torch.load(tmp_path / codec_training.STATE, weights_only=True)
    assert first["steps"] > 0
    assert Image.open(tmp_path / codec_run.SHEET).size == (6 * 64 * 2, 12 * 64 * 2)
    short = CodecTraining(**{**TINY.__dict__, "budget_seconds": first["elapsed"] + 0.5, "decoder_seconds": 0.5})
    psnr = codec_run.train_codec(short, tmp_path)
    assert psnr is not None
    assert 0 < psnr < 60
    second = torch.load(tmp_path / codec_training.STATE, weights_only=True)
    assert second["steps"] > first["steps"]
    assert second["elapsed"] >= short.budget_seconds + short.decoder_seconds


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_with_what_was_learned(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CodecTrainer.step

    def told(trainer: CodecTrainer) -> dict[str, float]:
        if trainer.steps == 2:
            os.kill(os.getpid(), number)
        return step(trainer)

    monkeypatch.setattr(CodecTrainer, "step", told)
    where = re.escape(f"codec saved at step 3 in {tmp_path / codec_training.STATE}; run again to go on")
    with Signals(), pytest.raises(KeyboardInterrupt, match=where) as interrupt:
        codec_run.train_codec(TINY, tmp_path)
    assert signal_of(interrupt.value) == number
    saved = torch.load(tmp_path / codec_training.STATE, weights_only=True)
    assert saved["steps"] == 3 and saved["elapsed"] > 0
    again = CodecTrainer(TINY)
    again.load(tmp_path)
    assert again.step() and again.steps == 4


def test_who_interrupts_again_does_not_wait_for_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(_: CodecTrainer) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(endings, "AT_ONCE_S", 0.0)
    monkeypatch.setattr(CodecTrainer, "step", told)
    with Signals(), pytest.raises(KeyboardInterrupt):
        codec_run.train_codec(TINY, tmp_path)
    assert not (tmp_path / codec_training.STATE).exists()


def test_another_network_or_world_cannot_be_continued(tmp_path: Path) -> None:
    trainer = CodecTrainer(TINY)
    trainer.save(tmp_path)
    with pytest.raises(CheckpointError, match="z_dim=4, base_dim=4"):
        CodecTrainer(CodecTraining(**{**TINY.__dict__, "z_dim": 5})).load(tmp_path)
    state = torch.load(tmp_path / codec_training.STATE, weights_only=True)
    state["world"]["fps"] = 25
    torch.save(state, tmp_path / codec_training.STATE)
    with pytest.raises(CheckpointError, match="other world settings"):
        CodecTrainer(TINY).load(tmp_path)


def test_the_export_is_a_diffusers_vae_with_measured_statistics(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    CodecTrainer(TINY).save(tmp_path)
    codec_run.export_codec(tmp_path, tmp_path / "vae", clips=8)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    tensors = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    x, _ = clip_vae.sample_clips(np.random.default_rng(9), "train", 16, 17)
    with torch.no_grad():
        means = clip_vae.encode_clip(vae, x).chunk(2, dim=1)[0]
    mean = torch.tensor(config["latents_mean"]).view(-1, 1, 1, 1)
    std = torch.tensor(config["latents_std"]).view(-1, 1, 1, 1)
    normalised = (means - mean) / std
    assert normalised.mean(dim=(0, 2, 3, 4)).abs().max() < 0.3
    assert ((normalised.std(dim=(0, 2, 3, 4)) - 1).abs() < 0.3).all()


def test_a_full_disk_leaves_no_half_codec_and_no_half_state(tmp_path: Path) -> None:
    """Really full, of files of a megabyte."""
    trainer = CodecTrainer(TINY)
    trainer.save(tmp_path)
    kept = (tmp_path / codec_training.STATE).read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            trainer.save(tmp_path)
        with pytest.raises(Exception, match=r"File too large|I/?O error|os error 27"):
            codec_run.export_codec(tmp_path, tmp_path / "vae", clips=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert (tmp_path / codec_training.STATE).read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == [codec_training.STATE]


def test_exporting_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state.pt does not exist: train the codec first"):
        codec_run.export_codec(tmp_path, tmp_path / "vae")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_frames", 8, "num_frames=8 is not 4n \\+ 1: use 9"),
        ("crop", 20, "crop=20 is not a multiple of 8"),
        ("dim_mult", (1, 2), r"dim_mult=\[1, 2\]: must be three"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodecTraining(**{field: value})


def test_a_gradient_that_is_no_number_reaches_no_weight() -> None:
    trainer = CodecTrainer(TINY)
    trainer.step()
    before = {name: value.clone() for name, value in trainer.vae.state_dict().items()}
    average = {name: value.clone() for name, value in trainer.average.items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codec_training, "reconstruction_loss", lambda config, out, x, mask: out.mean() * torch.nan)
        with pytest.raises(ConfigError, match=r"gradient is not finite in step 1: lower codec.learning_rate"):
            trainer.step()
    assert all(torch.equal(value, trainer.vae.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, trainer.average[name]) for name, value in average.items())
