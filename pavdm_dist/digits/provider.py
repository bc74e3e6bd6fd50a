"""The digit world as training data: codec and cached clips, made in the run's folder where they are missing."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.digits.batches import DigitBatches, info_of
from pavdm_dist.digits.cache import SHARD_CLIPS, LatentClips, cache_clips
from pavdm_dist.digits.codec_run import export_codec, train_codec
from pavdm_dist.digits.codec_training import CodecTraining
from pavdm_dist.digits.settings import SHIPPED, DigitWorld
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.train.batch import Batches
from pavdm_dist.train.export import Parts
from pavdm_dist.train.ranks import World
from pavdm_dist.train.train_settings import TrainConfig

WORLD_PROMPTS = (
    "a red three drifting up and to the left, a blue seven bouncing fast",
    "a green five drifting to the right",
    "a yellow zero bouncing slowly",
    "a white four drifting down, a cyan two drifting up and to the right",
)

logger = logging.getLogger(__name__)


def world_of(config: TrainConfig) -> DigitWorld:
    """The world that a run on digits draws.

    Raises:
        ConfigError: there is no such world, or the model does not read its longest prompts.
    """
    world, reads = DigitWorld.of(config.world), config.model.model_max_length
    if config.model.pretrained is not None:
        _check_words(config.model.pretrained, world)
    elif reads < world.longest_prompt:
        raise ConfigError(
            f"model.model_max_length={reads}: prompts of world.most_digits={world.most_digits} have up to"
            f" {world.longest_prompt} words and commas; use {world.longest_prompt}"
        )
    return world


def codec_training(config: TrainConfig) -> CodecTraining:
    """How the codec of a run on digits is trained, where it has none yet.

    Raises:
        ConfigError: no such codec.
    """
    settings = {name: value for name, value in asdict(config.codec).items() if name != "folder"}
    return CodecTraining(seed=config.seed, **{**settings, "dim_mult": tuple(config.codec.dim_mult)})


def _check_words(pretrained: str, world: DigitWorld) -> None:
    """Refuses a model that reads no words, does not know the world's, or reads fewer than its prompts have."""
    encoder = Checkpoint.open(pretrained).text_encoder
    if not isinstance(encoder, WordTextEncoder):
        raise ConfigError(
            f"model.pretrained={pretrained}: reads texts that a frozen encoder makes, which the digit world has none"
            " of; name data.folder"
        )
    if encoder.max_length < world.longest_prompt:
        raise ConfigError(
            f"world.most_digits={world.most_digits}: prompts have up to {world.longest_prompt} words and commas,"
            f" model.pretrained={pretrained} reads {encoder.max_length}; use fewer digits"
        )
    if unknown := sorted(set(world.vocabulary) - set(encoder.vocabulary)):
        raise ConfigError(f"model.pretrained={pretrained} does not know the world's words {', '.join(unknown)}")


def digit_data(config: TrainConfig, world: World, end: float) -> tuple[Batches, Parts] | None:
    """The moving digits, made where they are missing; None when the slice was over before.

    Every process must call it; the first one makes them while the others wait.

    Args:
        config: settings; ``data.folder`` plays no part.
        world: all processes.
        end: of the slice, on the monotonic clock.

    Raises:
        ConfigError: see :func:`world_of`; ``codec.folder`` holds no codec, the run's folder has clips of another world,
            length or codec, or scikit-learn is missing.
        CheckpointError: the run's folder holds a codec in training of another shape or world.
    """
    run, digits = Path(config.run_dir), world_of(config)
    if world.size > 1:  # the others wait, and must not take the first process for lost
        end = min(end, time.monotonic() + 0.8 * config.launch.timeout_seconds)
    if not world.of_first(lambda: _prepare(config, digits, run, end, world.device)):
        return None
    # In whole shards, as always: so many are cached for a run that asks for fewer.
    wanted = -(-config.data.clips // SHARD_CLIPS) * SHARD_CLIPS
    clips = LatentClips(run / "clips", world.device, wanted)
    batches = DigitBatches(clips, config.objective, config.data, config.seed, digits)
    looked_at = (config.quality.prompts or config.quality.stills) and not config.model.lora.rank
    judged = partial(_judged, config, digits) if looked_at else None
    about = (info_of(digits), _sheet_prompts(digits), digits.vocabulary, digits.settings, judged)
    return batches, Parts(_codec_folder(config, run), None, *about)


def _judged(config: TrainConfig, digits: DigitWorld, model: Path, device: torch.device) -> dict[str, Any]:
    from pavdm_dist.digits.quality import quality  # with the sampler, which training itself has no need of

    return quality(model, digits, config.quality, device)


def _sheet_prompts(digits: DigitWorld) -> tuple[str, ...]:
    if digits == SHIPPED:
        return WORLD_PROMPTS
    from pavdm_dist.digits.quality import heldout_prompts

    return tuple(heldout_prompts(1, count, digits)[0] for count in range(1, digits.most_digits + 1))


def _prepare(config: TrainConfig, digits: DigitWorld, run: Path, end: float, device: torch.device) -> bool:
    """Trains the codec and caches the clips where they are missing; False when the slice was over before."""
    run.mkdir(parents=True, exist_ok=True)
    codec, data = _codec_folder(config, run), config.data
    if not _train_codec(config, digits, run, end, device):
        logger.info("slice over while training the codec; run again to go on")
    elif not cache_clips(codec, run / "clips", data.clips, data.num_latents, end - time.monotonic(), digits, device):
        logger.info("slice over while caching clips; run again to go on")
    else:
        return True
    return False


def _train_codec(config: TrainConfig, digits: DigitWorld, run: Path, end: float, device: torch.device) -> bool:
    """Trains a codec for the rest of the slice when there is none; whether there is one now."""
    folder = _codec_folder(config, run)
    if (folder / "config.json").exists():
        return True
    if folder != run / "vae":
        raise ConfigError(f"codec.folder={folder}: holds no codec (no config.json)")
    if train_codec(codec_training(config), run / "codec", end - time.monotonic(), digits, device) is None:
        return False
    export_codec(run / "codec", folder, world=digits)
    return True


def _codec_folder(config: TrainConfig, run: Path) -> Path:
    """The given codec, else that of the model to start from, else the run's own."""
    if config.codec.folder is not None:
        shipped = shipped_models().get(config.codec.folder)
        return Path(config.codec.folder) if shipped is None else shipped / "vae"
    return run / "vae" if config.model.pretrained is None else Checkpoint.open(config.model.pretrained).vae.folder()
