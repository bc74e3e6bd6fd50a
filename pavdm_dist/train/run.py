"""``pavdm train``: data and codec where they are missing, then the model, in slices that resume.

Launcher-neutral: the same function runs in one process, under torchrun, DeepSpeed's launcher, Slurm and Ray Train.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.digits.cache import LatentClips, cache_clips
from pavdm_dist.digits.codec_training import CodecTraining, export_codec, train_codec
from pavdm_dist.digits.world import FPS, SIZE
from pavdm_dist.errors import ConfigError
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.train.batches import Batches, WorldBatches
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.export import Parts, check_target
from pavdm_dist.train.processes import World, join_world
from pavdm_dist.train.settings import TrainConfig
from pavdm_dist.train.trainer import Report, Trainer
from pavdm_dist.train.video import video_data

INFO = FrameInfo(SIZE, SIZE, FPS)

logger = logging.getLogger(__name__)

WORLD_PROMPTS = (
    "a red three drifting up and to the left, a blue seven bouncing fast",
    "a green five drifting to the right",
    "a yellow zero bouncing slowly",
    "a white four drifting down, a cyan two drifting up and to the right",
)


def train_command(config: TrainConfig, report: Report | None = None) -> None:
    """Runs one slice of ``config.max_seconds``; call again until it says that all steps are done.

    SIGTERM (a preempted job) ends the slice early, with a checkpoint and the exported model; so does Ctrl-C, which a
    second Ctrl-C cuts short.

    Args:
        config: settings.
        report: called on every process with the metrics of each logged step.

    Raises:
        ConfigError: impossible settings, a run folder that was made with others (named), or missing extras.
        KeyboardInterrupt: after Ctrl-C, saying where the weights are.
    """
    target = Path(config.export or Path(config.run_dir) / "model")
    check_target(target)
    torch.set_num_threads(config.threads)
    end = time.monotonic() + config.max_seconds
    world = join_world(config.launch.timeout_seconds)
    check_settings(config, world.size)
    found = _world_data(config, world, end) if config.data.folder is None else video_data(config)
    if found is None:
        return
    batches, parts = found
    try:
        trainer = Trainer(config, batches, parts, world, report)
        with _stopped_by_signals(trainer) as interrupted:
            finished = trainer.run(end)
    finally:
        batches.close()
    trainer.export(target)
    if interrupted:
        raise KeyboardInterrupt(f"saved at step {trainer.step}, weights in {target}; run again to go on")
    if world.first:
        logger.info("%s; weights in %s", "all steps done" if finished else "slice over, run again", target)


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Stops the trainer after its step; gives a list that is empty until Ctrl-C."""
    interrupts: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # a Ray worker: Ray tells it otherwise
        yield interrupts
        return

    def interrupt(number: int, _: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)
        trainer.stop()

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: trainer.stop()),
        signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
    }
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _world_data(config: TrainConfig, world: World, end: float) -> tuple[Batches, Parts] | None:
    """The moving digits, made where they are missing; None when the slice was over before."""
    run = Path(config.run_dir)
    if world.size > 1:  # the others wait, and must not take the first process for lost
        end = min(end, time.monotonic() + 0.8 * config.launch.timeout_seconds)
    if not world.agree(world.first and _prepare(config, run, end)):
        return None
    batches = WorldBatches(LatentClips(run / "clips"), config.objective, config.data, config.seed)
    return batches, Parts(_codec_folder(config, run), None, INFO, WORLD_PROMPTS)


def _prepare(config: TrainConfig, run: Path, end: float) -> bool:
    """Trains the codec and caches the clips where they are missing; False when the slice was over before."""
    run.mkdir(parents=True, exist_ok=True)
    codec, data = _codec_folder(config, run), config.data
    if not _train_codec(config, run, end):
        logger.info("slice over while training the codec; run again to go on")
    elif not cache_clips(codec, run / "clips", data.clips, data.num_latents, end - time.monotonic()):
        logger.info("slice over while caching clips; run again to go on")
    else:
        return True
    return False


def _train_codec(config: TrainConfig, run: Path, end: float) -> bool:
    """Trains a codec for the rest of the slice when there is none; whether there is one now."""
    folder = _codec_folder(config, run)
    if (folder / "config.json").exists():
        return True
    if folder != run / "vae":
        raise ConfigError(f"codec.folder={folder}: holds no codec (no config.json)")
    settings = {name: value for name, value in asdict(config.codec).items() if name != "folder"}
    settings["dim_mult"] = tuple(settings["dim_mult"])
    training = CodecTraining(seed=config.seed, **settings)
    if train_codec(training, run / "codec", end - time.monotonic()) is None:
        return False
    export_codec(run / "codec", folder)
    return True


def _codec_folder(config: TrainConfig, run: Path) -> Path:
    """The given codec, else that of the model to start from, else the run's own."""
    if config.codec.folder is not None:
        return Path(config.codec.folder)
    return run / "vae" if config.model.pretrained is None else Checkpoint.open(config.model.pretrained).vae.folder()
