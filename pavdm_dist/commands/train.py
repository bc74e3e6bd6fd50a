"""``pavdm train``: the data that a run's settings name, and the processes that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pavdm_dist.codecs.pretrained_text import TextOptions
from pavdm_dist.digits.provider import digit_data, world_of
from pavdm_dist.train.batch import Batches
from pavdm_dist.train.export import Parts
from pavdm_dist.train.launch import launch
from pavdm_dist.train.prepared import data_model, video_data
from pavdm_dist.train.ranks import World, launched_size
from pavdm_dist.train.train_settings import TrainConfig


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
    return digit_data(config, world, end) if not config.data.folder else video_data(config, world)


def _check_data(config: TrainConfig) -> None:
    """What a run on digits could not draw, or no text encoder would read, is refused before a process is started."""
    if not config.data.folder:
        world_of(config)
    if TextOptions.of(config.data).given:
        data_model(config)
