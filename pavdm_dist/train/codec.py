"""Trains the embedded world's video codec: a small causal VAE in diffusers' ``AutoencoderKLWan`` layout.

diffusers runs that VAE chunk by chunk through a feature cache, which is what streaming needs and slow to train.
:func:`encode_clip` and :func:`decode_clip` run the same modules over a whole clip at once, with equal results.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pavdm_dist.errors import ConfigError
from pavdm_dist.train.world import WORLD_SETTINGS, Scene, Split, render_pair, sample_scene

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodecTraining:
    """Shape and training of the codec.

    Attributes:
        base_dim, dim_mult, z_dim: widths of the VAE; 64 px -> patches of 2 -> two halvings -> 8x8 latents.
        total_steps: length of the cosine schedule.
        batch_size, clip_frames: clips per step and frames per clip (4 k + 1).
        learning_rate, kl_weight: optimizer and regulariser.
        foreground_weight: extra loss on pixels of digits (dilated by 2): the plain background is most of the frame.
        ema_decay: of the exported weights.
        bf16: autocast of the forward pass.
    """

    base_dim: int = 32
    dim_mult: tuple[int, ...] = (1, 2, 2)
    z_dim: int = 12
    total_steps: int = 2600
    batch_size: int = 6
    clip_frames: int = 13
    learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    foreground_weight: float = 12.0
    ema_decay: float = 0.998
    bf16: bool = True
    seed: int = 0
    log_every: int = 20
    checkpoint_every_seconds: float = 120.0


def build_codec(config: CodecTraining) -> Any:
    """An untrained ``AutoencoderKLWan``: 8x smaller in space, 4x in time, first frame alone."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=1,
        temperal_downsample=[True] * (len(config.dim_mult) - 1),
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=2 ** len(config.dim_mult),
        scale_factor_temporal=4,
    )


def enable_whole_clips(vae: nn.Module) -> None:
    """Lets the VAE's resampling layers treat a whole clip when they are called without a feature cache."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = MethodType(_resample_clip, module)  # type: ignore[method-assign]


def encode_clip(vae: Any, frames: Tensor) -> Tensor:
    """Frames ``[b, 3, t, H, W]`` in [-1, 1], t = 4 k + 1 -> mean and log-variance ``[b, 2 z, k + 1, h, w]``."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    return vae.quant_conv(vae.encoder(patchify(frames, vae.config.patch_size)))


def decode_clip(vae: Any, latents: Tensor) -> Tensor:
    """Raw latents ``[b, z, k + 1, h, w]`` -> frames ``[b, 3, 4 k + 1, H, W]``, not clamped."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    return unpatchify(vae.decoder(vae.post_quant_conv(latents), first_chunk=True), vae.config.patch_size)


def train_codec(config: CodecTraining, run_dir: str | Path, max_seconds: float = math.inf) -> bool:
    """Trains, or goes on with, the codec in ``run_dir``.

    Args:
        config: must be the one the run was started with.
        run_dir: checkpoint, log and reconstruction sheet.
        max_seconds: length of this slice.

    Returns:
        True when all steps are done.

    Raises:
        ConfigError: the run was started with another world or configuration.
    """
    run = Path(run_dir)
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    vae = build_codec(config).train()
    enable_whole_clips(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    average = {key: value.clone() for key, value in vae.state_dict().items()}
    step = _restore(run, config, vae, optimizer, average)
    started = saved = time.monotonic()
    while step < config.total_steps and time.monotonic() - started < max_seconds:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _warm_cosine(step, config.total_steps)
        frames, weight = _batch(config, step)
        torch.manual_seed(config.seed * 1_000_003 + step)
        loss, parts = _loss(vae, frames, weight, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            for key, value in vae.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        if step % config.log_every == 0:
            with open(run / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": step, **parts}) + "\n")
        if time.monotonic() - saved > config.checkpoint_every_seconds or step == config.total_steps:
            _save(run, config, vae, optimizer, average, step)
            psnr = evaluate(run, config)
            logger.info("codec step %d: %s, held-out foreground PSNR %.2f dB", step, parts, psnr)
            saved = time.monotonic()
    _save(run, config, vae, optimizer, average, step)
    return step >= config.total_steps


def averaged_codec(run_dir: str | Path, config: CodecTraining) -> Any:
    """The codec with the run's averaged weights, ready for whole clips."""
    vae = build_codec(config).eval()
    vae.load_state_dict(torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)["average"])
    enable_whole_clips(vae)
    return vae.requires_grad_(False)


@torch.no_grad()
def evaluate(run_dir: str | Path, config: CodecTraining, clips: int = 16, split: Split = "heldout") -> float:
    """Foreground PSNR in dB on digits never trained on; writes ``reconstruction.png`` (input above output)."""
    from PIL import Image

    vae = averaged_codec(run_dir, config)
    scenes = [sample_scene(np.random.default_rng((1, i)), split) for i in range(clips)]
    frames, mask = _frames(scenes, [40] * clips, 17)
    mean, _ = encode_clip(vae, frames).chunk(2, dim=1)
    decoded = decode_clip(vae, mean).clamp(-1, 1)
    shown = torch.cat([frames[:8, :, [0, 8, 16]], decoded[:8, :, [0, 8, 16]]], dim=3)
    sheet = rearrange(((shown + 1) * 127.5).round().byte(), "b c t h w -> (t h) (b w) c")
    Image.fromarray(sheet.numpy()).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(
        Path(run_dir) / "reconstruction.png"
    )
    error = ((decoded - frames) / 2).square().mean(dim=1)
    return -10 * math.log10(error[mask].mean().item())


@torch.no_grad()
def export_codec(run_dir: str | Path, config: CodecTraining, folder: str | Path, clips: int = 96) -> None:
    """Writes the averaged codec (fp16) with the latents' mean and deviation, measured per channel, in its config."""
    vae = averaged_codec(run_dir, config)
    means = []
    for i in range(0, clips, 8):
        scenes = [sample_scene(np.random.default_rng((2, i + j))) for j in range(8)]
        means.append(encode_clip(vae, _frames(scenes, [0] * 8, 41)[0]).chunk(2, dim=1)[0])
    latents = rearrange(torch.cat(means), "b c t h w -> c (b t h w)")
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    vae.half().save_pretrained(folder)


def _loss(vae: Any, frames: Tensor, weight: Tensor, config: CodecTraining) -> tuple[Tensor, dict[str, float]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        mean, log_var = encode_clip(vae, frames).float().chunk(2, dim=1)
        log_var = log_var.clamp(-20, 10)
        latents = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        decoded = decode_clip(vae, latents)
    error = torch.sqrt((decoded.float() - frames).square() + 1e-6).mean(dim=1)
    reconstruction = (error * weight).sum() / weight.sum()
    divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    parts = {"reconstruction": round(reconstruction.item(), 5), "kl": round(divergence.item(), 4)}
    return reconstruction + config.kl_weight * divergence, parts


def _batch(config: CodecTraining, step: int) -> tuple[Tensor, Tensor]:
    """Clips and loss weights of a step; a function of (seed, step), so a resumed run sees the same data."""
    rng = np.random.default_rng((config.seed, step))
    scenes = [sample_scene(rng) for _ in range(config.batch_size)]
    frames, mask = _frames(scenes, rng.integers(0, 1000, config.batch_size).tolist(), config.clip_frames)
    grown = F.max_pool2d(mask.float(), kernel_size=5, stride=1, padding=2)
    return frames, 1 + config.foreground_weight * grown


def _frames(scenes: list[Scene], starts: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Frames ``[b, 3, t, H, W]`` in [-1, 1] and digit masks ``[b, t, H, W]``."""
    pairs = [render_pair(scene, start, count) for scene, start in zip(scenes, starts, strict=True)]
    frames, masks = (np.stack(part) for part in zip(*pairs, strict=True))
    pixels = rearrange(torch.from_numpy(frames), "b t h w c -> b c t h w").float()
    return pixels / 127.5 - 1, torch.from_numpy(masks)


def _resample_clip(self: Any, x: Tensor, feat_cache: Any = None, feat_idx: Any = (0,)) -> Tensor:
    """``WanResample`` over a whole clip: the first frame is never halved or doubled in time."""
    original = type(self).forward
    if feat_cache is not None:
        return original(self, x, feat_cache, feat_idx)
    if self.mode == "upsample3d" and x.shape[2] > 1:
        pairs = rearrange(self.time_conv(x[:, :, 1:]), "b (two c) t h w -> b c (t two) h w", two=2)
        x = torch.cat([x[:, :, :1], pairs], dim=2)
    x = original(self, x)
    if self.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


def _warm_cosine(step: int, total: int, warm_up: int = 100) -> float:
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))


def _identity(config: CodecTraining) -> str:
    return json.dumps({"world": WORLD_SETTINGS, "codec": asdict(config)}, sort_keys=True)


def _save(run: Path, config: CodecTraining, vae: nn.Module, optimizer: Any, average: dict, step: int) -> None:
    state = {
        "model": vae.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "step": step,
        "identity": _identity(config),
    }
    torch.save(state, run / "checkpoint.partial")
    os.replace(run / "checkpoint.partial", run / "checkpoint.pt")


def _restore(run: Path, config: CodecTraining, vae: nn.Module, optimizer: Any, average: dict) -> int:
    if not (run / "checkpoint.pt").exists():
        return 0
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for name, ours, theirs in _differences(_identity(config), state["identity"]):
        raise ConfigError(f"{run} was trained with {name}={theirs}, this run asks for {ours}: use another run_dir")
    vae.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    average.update(state["average"])
    return state["step"]


def _differences(ours: str, theirs: str) -> Iterator[tuple[str, Any, Any]]:
    mine, other = json.loads(ours), json.loads(theirs)
    for part in mine:
        for name in mine[part]:
            if mine[part][name] != other.get(part, {}).get(name):
                yield f"{part}.{name}", mine[part][name], other.get(part, {}).get(name)
