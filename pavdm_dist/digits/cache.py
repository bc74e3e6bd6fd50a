"""Training clips as latents on disk: rendered and encoded once, in shards that an interrupted run goes on with."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pavdm_dist.codecs.catalog import encoder_identity
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.digits.painting import Painter
from pavdm_dist.digits.settings import SHIPPED, SIZE, DigitWorld
from pavdm_dist.digits.world import Scene, render, sample_scene, scene_prompt
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.storage import atomic_path, atomic_write
from pavdm_dist.models.devices import to_device
from pavdm_dist.values.fields import json_value, read_object, show

logger = logging.getLogger(__name__)

# Scenes and how many frames of each -> normalised latents [n, C, t, h, w].
Encoder = Callable[[Sequence[Scene], int], Tensor]

SHARD_CLIPS = 32
# Pixels of a frame of the clips that a GPU draws and encodes at once: eight of the shipped world's size.
_AT_ONCE = 8 * SIZE**2


class LatentClips:
    """Cached clips in memory.

    Args:
        folder: of the shards.
        device: that holds the latents; on a GPU every batch is cut out there.
        clips: only the first so many; None = all.

    Attributes:
        there: how many the folder holds.
        latents: normalised, fp16, ``[clips, C, n, h, w]``; every clip is the start of a video.
        prompts: one per clip.

    Raises:
        ConfigError: there are no clips, or a shard of them is damaged.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", clips: int | None = None) -> None:
        parts, prompts = [], list[str]()
        for shard in sorted(Path(folder).glob("clips-*.safetensors")):
            more, latents = _read_shard(shard, latents=clips is None or len(prompts) < clips)
            prompts += more
            if latents is not None:
                parts.append(latents)
        if not parts:
            raise ConfigError(f"{folder} holds no cached clips")
        self.there, self.prompts = len(prompts), prompts[:clips]
        self.latents: Tensor = torch.cat(parts)[:clips].to(device)

    def batch(self, rng: np.random.Generator, size: int, first: int, count: int) -> tuple[Tensor, list[str]]:
        """``size`` random clips' latents ``first .. first + count - 1``, float32, and their prompts."""
        chosen = rng.choice(len(self.prompts), size, replace=size > len(self.prompts))
        latents = self.latents[self._put(chosen), :, first : first + count].float()
        return latents, [self.prompts[i] for i in chosen]

    def stills(self, rng: np.random.Generator, size: int) -> tuple[Tensor, list[str]]:
        """``size`` random single latents ``[size, C, 1, h, w]`` of random clips, float32, and their prompts."""
        chosen = rng.integers(len(self.prompts), size=size)
        frames = rng.integers(self.latents.shape[2], size=size)
        latents = self.latents[self._put(chosen), :, self._put(frames)].float()
        return latents[:, :, None], [self.prompts[i] for i in chosen]

    def _put(self, indices: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(indices), self.latents.device)


def cache_clips(
    codec_folder: str | Path,
    folder: str | Path,
    clips: int,
    num_latents: int,
    max_seconds: float,
    world: DigitWorld = SHIPPED,
    device: torch.device | str = "cpu",
) -> bool:
    """Renders and encodes clips until ``clips`` are there, in whole shards.

    Clip i of the cache is a function of i alone, so the cache can be made in any number of slices, and a shard that is
    damaged is made again.

    Args:
        codec_folder: the trained codec.
        folder: where the shards go; it remembers the world and the codec they were made with.
        clips: how many in all.
        num_latents: latents per clip.
        max_seconds: stop (resumably) after about this long.
        world: of the scenes.
        device: that encodes; a GPU draws, too.

    Returns:
        Whether all are there.

    Raises:
        ConfigError: the folder holds clips of another world, length or codec, or does not say of which.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _check_identity(path, codec_folder, num_latents, world)
    targets = [path / f"clips-{shard:05d}.safetensors" for shard in range(-(-clips // SHARD_CLIPS))]
    missing = [(shard, target) for shard, target in enumerate(targets) if not _is_whole(target)]
    if not missing:
        return True  # as in all slices of a run but its first: the codec, which takes seconds to load, is not needed
    encode = _whole_clip_encoder(codec_folder, world, torch.device(device))
    started = time.monotonic()
    for shard, target in missing:
        if time.monotonic() - started > max_seconds:
            return False
        cache_shard(encode, target, shard, num_latents, world)
        logger.info("cached %d of %d clips", min((shard + 1) * SHARD_CLIPS, clips), clips)
    return True


def cache_shard(encode: Encoder, target: Path, shard: int, num_latents: int, world: DigitWorld = SHIPPED) -> None:
    """Renders, encodes and writes ``SHARD_CLIPS`` training clips; the file appears whole or not at all."""
    numbers = range(shard * SHARD_CLIPS, (shard + 1) * SHARD_CLIPS)
    scenes = [sample_scene(np.random.default_rng((3, number)), world=world) for number in numbers]
    latents = encode(scenes, 4 * (num_latents - 1) + 1)
    prompts = json.dumps([scene_prompt(scene) for scene in scenes])
    with atomic_path(target) as staged:
        save_file({"latents": latents.half().cpu().contiguous()}, staged, metadata={"prompts": prompts})


def _read_shard(shard: Path, latents: bool) -> tuple[list[str], Tensor | None]:
    """Prompts of a shard and, where asked for, its latents.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        with safe_open(shard, framework="pt") as reader:
            prompts = json_value((reader.metadata() or {})["prompts"])
            stored = reader.get_slice("latents")
            return list(prompts), stored[:] if latents else None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{shard} is damaged ({error}): delete it; run again, and what is missing is made") from error


def _is_whole(shard: Path) -> bool:
    """Whether a shard is there and, by its header and its length, whole."""
    if not shard.exists():
        return False
    try:
        _read_shard(shard, latents=False)
    except ConfigError as error:
        logger.warning("%s is made again: it is damaged (%s)", shard, error.__cause__)
        return False
    return True


def _whole_clip_encoder(codec_folder: str | Path, world: DigitWorld, device: torch.device) -> Encoder:
    """Draws whole clips and encodes each in one pass: one by one on a CPU, several at once on a GPU."""
    from pavdm_dist.digits.clip_vae import encode_clip

    codec = WanCodec.from_pretrained(codec_folder, device)
    about = (codec.vae.config[name] for name in ("latents_mean", "latents_std"))
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in about)
    painter = None if device.type == "cpu" else Painter(world, device)

    @torch.no_grad()
    def encode(frames: Tensor) -> Tensor:
        """``[n, t, H, W, 3]``, uint8 -> normalised latents ``[n, C, t, h, w]``."""
        pixels = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        raw = encode_clip(codec.vae, pixels).chunk(2, dim=1)[0]
        return (raw - mean) / std

    def encode_scenes(scenes: Sequence[Scene], num_frames: int) -> Tensor:
        if painter is None:
            return torch.cat([encode(torch.from_numpy(render(scene, 0, num_frames))[None]) for scene in scenes])
        together = max(1, _AT_ONCE // world.size**2)
        groups = (scenes[first : first + together] for first in range(0, len(scenes), together))
        return torch.cat([encode(painter.paint(group, [0] * len(group), num_frames)[0]) for group in groups])

    return encode_scenes


def _check_identity(path: Path, codec_folder: str | Path, num_latents: int, world: DigitWorld) -> None:
    identity = {"world": world.settings, "num_latents": num_latents, "encoder": encoder_identity(codec_folder)}
    file = path / "identity.json"
    if not file.exists():
        with atomic_write(file, "w") as written:
            json.dump(identity, written)
        return
    try:
        found = read_object(file, ConfigError)
    except ConfigError as error:
        raise ConfigError(
            f"what clips are in {path} is not known: {error}; delete that folder and run again"
        ) from error
    for name, value in json.loads(json.dumps(identity)).items():
        if found.get(name) != value:
            raise ConfigError(
                f"{path} was made with another {name}: {_apart(found.get(name), value)}; use another run_dir, or delete"
                " that folder"
            )


def _apart(there: Any, here: Any) -> str:
    """Two values, or the entries in which they differ."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return f"{show(there)} there, {show(here)} in this run"
    names = [name for name in here | there if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {_apart(there.get(name), here.get(name))}" for name in names)
