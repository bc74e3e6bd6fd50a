"""Training clips as latents on disk: rendered and encoded once, in shards that an interrupted run goes on with."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pavdm_dist.codecs.catalog import encoder_identity
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.digits.world import WORLD_SETTINGS, render, sample_scene, scene_prompt
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.storage import atomic_path

logger = logging.getLogger(__name__)

Encoder = Callable[[np.ndarray], Tensor]

SHARD_CLIPS = 32


class LatentClips:
    """All cached clips in memory.

    Attributes:
        latents: normalised, fp16, ``[clips, C, n, h, w]``; every clip is the start of a video.
        prompts: one per clip.
    """

    def __init__(self, folder: str | Path) -> None:
        parts, self.prompts = [], list[str]()
        for shard in sorted(Path(folder).glob("clips-*.safetensors")):
            with safe_open(shard, framework="pt") as reader:
                parts.append(reader.get_tensor("latents"))
                self.prompts += json.loads(reader.metadata()["prompts"])
        if not parts:
            raise ConfigError(f"{folder} holds no cached clips")
        self.latents: Tensor = torch.cat(parts)

    def batch(self, rng: np.random.Generator, size: int, first: int, count: int) -> tuple[Tensor, list[str]]:
        """``size`` random clips' latents ``first .. first + count - 1``, float32, and their prompts."""
        chosen = rng.choice(len(self.prompts), size, replace=size > len(self.prompts))
        latents = self.latents[torch.from_numpy(chosen), :, first : first + count].float()
        return latents, [self.prompts[i] for i in chosen]

    def stills(self, rng: np.random.Generator, size: int) -> tuple[Tensor, list[str]]:
        """``size`` random single latents ``[size, C, 1, h, w]`` of random clips, float32, and their prompts."""
        chosen = rng.integers(len(self.prompts), size=size)
        frames = rng.integers(self.latents.shape[2], size=size)
        latents = self.latents[torch.from_numpy(chosen), :, torch.from_numpy(frames)].float()
        return latents[:, :, None], [self.prompts[i] for i in chosen]


def cache_clips(codec_folder: str | Path, folder: str | Path, clips: int, num_latents: int, max_seconds: float) -> bool:
    """Renders and encodes clips until ``clips`` are there.

    Clip i of the cache is a function of i alone, so the cache can be made in any number of slices.

    Args:
        codec_folder: the trained codec.
        folder: where the shards go; it remembers the world and the codec they were made with.
        clips: how many in all.
        num_latents: latents per clip.
        max_seconds: stop (resumably) after about this long.

    Returns:
        Whether all are there.

    Raises:
        ConfigError: the folder holds clips of another world, length or codec.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _check_identity(path, codec_folder, num_latents)
    encode = _whole_clip_encoder(codec_folder)
    started = time.monotonic()
    for shard in range(-(-clips // SHARD_CLIPS)):
        target = path / f"clips-{shard:05d}.safetensors"
        if target.exists():
            continue
        if time.monotonic() - started > max_seconds:
            return False
        cache_shard(encode, target, shard, num_latents)
        logger.info("cached %d of %d clips", (shard + 1) * SHARD_CLIPS, clips)
    return True


def cache_shard(encode: Encoder, target: Path, shard: int, num_latents: int) -> None:
    """Renders, encodes and writes ``SHARD_CLIPS`` training clips; the file appears whole or not at all."""
    scenes = [sample_scene(np.random.default_rng((3, shard * SHARD_CLIPS + i))) for i in range(SHARD_CLIPS)]
    frames = 4 * (num_latents - 1) + 1
    latents = torch.cat([encode(render(scene, 0, frames)) for scene in scenes])
    prompts = json.dumps([scene_prompt(scene) for scene in scenes])
    with atomic_path(target) as staged:
        save_file({"latents": latents.half()}, staged, metadata={"prompts": prompts})


def _whole_clip_encoder(codec_folder: str | Path) -> Encoder:
    """Frames uint8 ``[t, H, W, 3]`` -> normalised latents ``[1, C, n, h, w]``, the whole clip in one pass."""
    from pavdm_dist.digits.clip_vae import encode_clip

    codec = WanCodec.from_pretrained(codec_folder)
    mean, std = (torch.tensor(codec.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    _drop_empty_taps(codec.vae)

    @torch.no_grad()
    def encode(frames: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        raw = encode_clip(codec.vae, pixels).chunk(2, dim=1)[0]
        return (raw - mean) / std

    return encode


def _drop_empty_taps(vae: nn.Module) -> None:
    """Replaces 3x3x3 convolutions that only look at the current frame by 3x3 ones: a third of the work."""
    from pavdm_dist.digits.clip_vae import FrameConv

    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv3d) and child.kernel_size == (3, 3, 3) and not child.weight[:, :, :2].any():
                conv = FrameConv(child.in_channels, child.out_channels)
                conv.load_state_dict({"weight": child.weight[:, :, 2], "bias": child.bias})
                setattr(module, name, conv)


def _check_identity(path: Path, codec_folder: str | Path, num_latents: int) -> None:
    identity = {"world": WORLD_SETTINGS, "num_latents": num_latents, "encoder": encoder_identity(codec_folder)}
    file = path / "identity.json"
    if not file.exists():
        file.write_text(json.dumps(identity))
        return
    found = json.loads(file.read_text())
    for name, value in json.loads(json.dumps(identity)).items():
        if found.get(name) != value:
            raise ConfigError(f"{path} was made with another {name}: use another run_dir, or delete that folder")
