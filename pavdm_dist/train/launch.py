"""Starts the processes of a training run: on this machine with torchrun, or on a Ray cluster with Ray Train.

Under torchrun, DeepSpeed's launcher or Slurm the processes are there already, and nothing of this is used. The loop is
the same everywhere: it looks only at RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pavdm_dist.cluster.starting import imports_from
from pavdm_dist.errors import ConfigError, EngineError
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.effect import check_effect
from pavdm_dist.train.endings import heard
from pavdm_dist.train.ranks import check_alone, launched_size
from pavdm_dist.train.ray_launch import launch_ray
from pavdm_dist.train.run_folder import check_free
from pavdm_dist.train.torchrun import FOLLOWED
from pavdm_dist.train.train_settings import TrainConfig

if TYPE_CHECKING:
    from pavdm_dist.train.train_run import Provider

logger = logging.getLogger(__name__)


def launch(config: TrainConfig, provider: Provider, words: Sequence[str]) -> None:
    """Runs training in as many processes as ``config.launch`` asks for, or here where a launcher started this one.

    Args:
        config: settings.
        provider: of the data; importable by name, for the workers of a Ray cluster.
        words: those of the command line that made them, for the processes that are started.

    Raises:
        ConfigError: impossible settings; nothing was started.
        EngineError: a process failed more often than is allowed.
    """
    wanted = config.launch
    if wanted.processes < 1 or wanted.ray_workers < 0:
        raise ConfigError(
            f"launch.processes={wanted.processes}, launch.ray_workers={wanted.ray_workers}: at least 1, and 0 or more"
        )
    if wanted.processes > 1 and wanted.ray_workers:
        raise ConfigError(
            f"launch.processes={wanted.processes} and launch.ray_workers={wanted.ray_workers}: choose one of the two"
        )
    size = launched_size()
    check_effect(config, size)
    if size > 1:
        check_settings(config, size)
        _train_here(config, provider)
    elif wanted.ray_workers:
        check_settings(config, wanted.ray_workers)
        launch_ray(config, provider)
    elif wanted.processes > 1:
        check_settings(config, wanted.processes)
        check_alone()
        check_gpus(wanted.processes)
        check_free(config.run_dir)
        _launch_here(wanted.processes, words)
    else:
        check_settings(config, 1)
        check_alone()
        _tell_of_idle_gpus()
        _train_here(config, provider)


def _train_here(config: TrainConfig, provider: Provider) -> None:
    from pavdm_dist.train.train_run import train_slice  # with torch and DeepSpeed, once all is known to be well

    train_slice(config, provider)


def check_gpus(processes: int) -> None:
    """Refuses more processes on this machine than it has GPUs, if it has any.

    Raises:
        ConfigError: naming both numbers.
    """
    import torch

    count = torch.cuda.device_count()
    if 0 < count < processes:
        raise ConfigError(
            f"launch.processes={processes}: there are {count} GPUs here, which NCCL lets no two processes share; use at"
            f" most {count}, or CUDA_VISIBLE_DEVICES= to train on CPUs"
        )


def _tell_of_idle_gpus() -> None:
    """One process computes on one GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1:
        logger.warning(
            "%d of %d GPUs of this machine stay idle: launch.processes=1 trains on one; launch.processes=%d trains on"
            " all (CUDA_VISIBLE_DEVICES=0 says that one is meant)",
            count - 1,
            count,
            count,
        )


def _launch_here(processes: int, words: Sequence[str]) -> None:
    torchrun = ["-m", "pavdm_dist.train.torchrun", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, "-m", "pavdm_dist", "train", *words]
    # torchrun kills processes that take longer to save and export.
    given = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1800"}
    if not imports_from(os.getcwd()):  # with -m Python would, though some script here is named like a library
        given["PYTHONSAFEPATH"] = "1"
    code, told = _watched(command, {**given, **os.environ})
    if told == signal.SIGINT:
        raise KeyboardInterrupt
    if told is not None:  # torchrun's own status is 1 then, however well its processes ended
        raise EngineError(f"stopped by {told.name}; the lines above say where the processes saved; run again to go on")
    if code > 128:  # nobody was there to say so
        name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else str(code - 128)
        memory = ", perhaps for lack of memory" if code - 128 == signal.SIGKILL else ""
        raise EngineError(f"a training process was ended by {name}{memory}; run again to go on")
    if code:
        raise EngineError(f"a training process failed (exit status {code}); its message is above")


def _watched(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, signal.Signals | None]:
    """Runs a command to its end, and tells it what this process is told.

    It has a group of its own: a terminal tells all of one, and what came twice would end it in the middle of what the
    first has begun. It holds one end of a pipe (:data:`~pavdm_dist.train.torchrun.FOLLOWED`) and this process alone
    the other, which closes however this process ends: one that is killed can tell nobody.

    Returns:
        Its status; the first signal that this process was sent.
    """
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int) -> None:
        if child is not None:
            _tell(child, number)

    theirs, ours = os.pipe()
    try:
        with heard(forward) as told:
            given = {**environment, FOLLOWED: str(theirs)}
            child = subprocess.Popen(command, env=given, start_new_session=True, pass_fds=(theirs,))
            if told:  # while it was being started
                _tell(child, told[0])
            code = child.wait()
    finally:
        os.close(theirs)
        os.close(ours)
    return code, told[0] if told else None


def _tell(child: subprocess.Popen[bytes], number: int) -> None:
    # A closed terminal is a reason to stop as any other; processes told of it might be told to ignore that.
    child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
