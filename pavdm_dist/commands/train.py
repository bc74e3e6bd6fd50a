"""``pavdm train``: the data that a run's settings name, and the processes that they ask for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pavdm_dist.checkpoint import Checkpoint, SamplingDefaults
from pavdm_dist.codecs.pretrained_text import TextOptions
from pavdm_dist.data.shards import read_index
from pavdm_dist.digits.provider import codec_training, digit_data, world_of
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.train.batch import Batches
from pavdm_dist.train.checks import check_values
from pavdm_dist.train.export import Parts, sampled_as, sampling_defaults
from pavdm_dist.train.launch import launch
from pavdm_dist.train.model import shape_of
from pavdm_dist.train.prepared import data_model, video_data
from pavdm_dist.train.ranks import World, launched_size
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.validation import Validation
from pavdm_dist.values.fields import made

logger = logging.getLogger(__name__)


def train_command(config: TrainConfig, words: Sequence[str]) -> None:
    """Trains for one slice; see :func:`~pavdm_dist.train.launch.launch`.

    Args:
        config: settings.
        words: those of the command line that made them.

    Raises:
        ConfigError: impossible settings; nothing was started.
    """
    _check_data(config)
    launch(config, training_data, words)


def dry_run_command(config: TrainConfig) -> dict[str, Any]:
    """What a run with these settings would take; nothing is started or written.

    Raises:
        ConfigError: impossible settings.
    """
    from pavdm_dist.train.dry_run import forecast

    _check_data(config)
    return forecast(config, max(config.launch.processes, config.launch.ray_workers, launched_size()))


def training_data(config: TrainConfig, world: World, end: float) -> tuple[Batches, Parts] | None:
    """The prepared videos of ``data.folder``, or the digit world where there is none.

    A :data:`~pavdm_dist.train.train_run.Provider`.
    """
    if world.first:
        logger.info("data: %s", config.data.described)
    return digit_data(config, world, end) if not config.data.folder else video_data(config, world)


def _check_data(config: TrainConfig) -> None:
    """What would be refused only when data are there and the model is built, or when it is exported, which may be hours
    later, is refused before a process is started."""
    check_values(config)
    # Before a model is asked for, which may have to come from a hub. Workers on Ray may have data that this machine has
    # not; they look for themselves.
    for folder in () if config.launch.ray_workers else config.data.folder:
        read_index(folder)
    kinds = config.objective.kinds()
    _check_sampling(config)
    if config.model.pretrained is None:
        try:
            shape_of(config, config.codec.z_dim)
        except CheckpointError as error:
            raise ConfigError(f"model: {error}") from error
    if not config.data.folder:
        world_of(config)
        if config.codec.folder is None and config.model.pretrained is None:
            codec_training(config)
        for _, kind in kinds:
            kind.check_clips("digits (data.num_latents)", config.data.num_latents)
        Validation.check(config.validation, held_out=False)
    if TextOptions.of(config.data).given:
        data_model(config)


def _check_sampling(config: TrainConfig) -> None:
    """Refuses defaults that the exported model could not be sampled with."""
    made(SamplingDefaults, config.sampling, "sampling", prefix="sampling.", error=ConfigError)
    if not config.sampling or config.model.lora.rank:  # a LoRA keeps none
        return
    kind, source = config.objective.most(), data_model(config)
    model = source if config.model.pretrained is None else Checkpoint.open(config.model.pretrained)
    _, high, wide = model.shape.spec.patch
    side = source.codec_spec.spatial_stride * high * wide  # of what is not given: the data's, which fits
    given = sampling_defaults(config, {"height": side, "width": side})
    every = made(SamplingDefaults, given, "sampling", prefix="sampling.", error=ConfigError)
    try:
        params = SamplingParams.resolve(replace(source, defaults=every), method=kind.method)
        if config.model.pretrained is not None:
            model.check_size(params.height, params.width)
    except ConfigError as error:
        trained = str(error).partition("=")[0] in sampled_as(kind).keys() - config.sampling.keys()
        raise ConfigError(f"{'objective' if trained else 'sampling'}.{error}") from error
