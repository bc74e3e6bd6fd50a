"""One slice of a training run: its data from the provider given, then steps, a checkpoint and the exported model.

Launcher-neutral: the same function runs in one process, under torchrun, DeepSpeed's launcher, Slurm and Ray Train.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from pavdm_dist.errors import EngineError, PAVDMError
from pavdm_dist.io.storage import disk_errors
from pavdm_dist.models.devices import tell_of_slow_bfloat16
from pavdm_dist.train.batch import Batches
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.export import Parts, check_target
from pavdm_dist.train.ranks import World, join_world
from pavdm_dist.train.run_folder import Guard, check_shared, owned_together, target_of
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Report, Trainer

# Makes a run's batches, and what its model needs besides the trained modules, until a moment of the monotonic clock;
# None where that came first, and the next slice goes on. Every process calls it.
Provider = Callable[[TrainConfig, World, float], tuple[Batches, Parts] | None]

logger = logging.getLogger(__name__)


def train_slice(
    config: TrainConfig,
    provider: Provider,
    report: Report | None = None,
    guard: Guard | None = None,
    asked: Callable[[], bool] = lambda: False,
) -> None:
    """Runs one slice of ``config.max_seconds``; call again until it says that all steps are done.

    SIGTERM (a preempted job) and SIGHUP (a terminal that closes) end the slice early, with a checkpoint and the
    exported model; so does Ctrl-C, which a second Ctrl-C cuts short.

    Args:
        config: settings.
        provider: of the data.
        report: called on every process with the metrics of each logged step.
        guard: of who owns the run's folder already (:func:`~pavdm_dist.train.run_folder.owned`); None = the first
            process makes it its own.
        asked: says before every step whether to end as at a signal, for who gets none; called by the first process.

    Raises:
        ConfigError: impossible settings, an export that would replace what it must not, a run folder that was made
            with others (named), that another run is writing or that not all processes see, or missing extras.
        EngineError: what must be written cannot be; the last checkpoint is kept.
        KeyboardInterrupt: after Ctrl-C, saying where the weights are.
    """
    target = target_of(config)
    check_target(config, target)
    torch.set_num_threads(config.threads)
    end = time.monotonic() + config.max_seconds
    world = join_world(config.launch.timeout_seconds)
    check_settings(config, world.size)
    if world.first and config.zero.precision != "float32":
        tell_of_slow_bfloat16(f"zero.precision={config.zero.precision}", world.device)
    with nullcontext(guard) if guard is not None else owned_together(config.run_dir, world) as guard:
        check_shared(config, world)
        try:
            with disk_errors():
                found = provider(config, world, end)
        except OSError as error:
            raise EngineError(
                f"run_dir={config.run_dir}: the training data cannot be written or read: {error}; run again to go on"
            ) from error
        if found is None:
            return
        batches, parts = found
        try:
            trainer = Trainer(config, batches, parts, world, report, guard, asked)
            with _stopped_by_signals(trainer) as interrupted:
                finished = trainer.run(end)
                trainer.export(target)  # a signal that comes again, or now, leaves it whole
                if not trainer.stopping:
                    _say_quality(trainer, target)
        finally:
            batches.close()
    if interrupted:
        raise KeyboardInterrupt(f"saved at step {trainer.step}, weights in {target}; run again to go on")
    if world.first:
        logger.info("%s; weights in %s", "all steps done" if finished else "slice over, run again", target)


def _say_quality(trainer: Trainer, model: Path) -> None:
    """How good the exported model is, where its data can tell; in the log, too."""
    judge, world = trainer.parts.quality, trainer.world
    if judge is None or not world.first:
        return
    try:
        found = judge(model, world.device)
    except PAVDMError as error:
        logger.warning("step %d: it cannot be said how good the model is: %s", trainer.step, error)
        return
    except Exception:  # all is saved: a look at it is not worth a run
        logger.exception("step %d: it cannot be said how good the model is", trainer.step)
        return
    if trainer.records is not None:
        trainer.records.write(trainer.step, {"quality": found})
    for kind, values in found.items():
        shown = (
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        logger.info("step %d: quality, %s: %s", trainer.step, kind, ", ".join(shown))


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Stops the trainer after its step; gives a list that is empty until Ctrl-C."""
    interrupts: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # a Ray worker, which is asked
        yield interrupts
        return

    def interrupt(number: int, _: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)
        trainer.stop()

    def stop(*_: object) -> None:
        trainer.stop()

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, stop),
        signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
    }
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, stop)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
