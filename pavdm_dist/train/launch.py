"""Starts the processes of a training run: on this machine with torchrun, or on a Ray cluster with Ray Train.

Under torchrun, DeepSpeed's launcher or Slurm the processes are there already, and nothing of this is used. The loop is
the same everywhere: it looks only at RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pavdm_dist.errors import ConfigError, EngineError
from pavdm_dist.train.config import TrainConfig
from pavdm_dist.train.processes import launched_size
from pavdm_dist.train.zero import check_settings

logger = logging.getLogger(__name__)


def launch(config: TrainConfig, words: Sequence[str]) -> None:
    """Runs training in as many processes as ``config.launch`` asks for, or here where a launcher started this one.

    Args:
        config: settings.
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
    if "WORLD_SIZE" in os.environ:
        from pavdm_dist.train.loop import train_command

        check_settings(config, launched_size())
        train_command(config)
    elif wanted.ray_workers:
        check_settings(config, wanted.ray_workers)
        _launch_ray(config)
    elif wanted.processes > 1:
        check_settings(config, wanted.processes)
        _launch_here(wanted.processes, words)
    else:
        from pavdm_dist.train.loop import train_command

        check_settings(config, 1)
        train_command(config)


def _launch_here(processes: int, words: Sequence[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, "-m", "pavdm_dist", "train", *words]
    child = subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", **os.environ})
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the terminal told the processes too; they save and end
        code = child.wait()
        raise
    if code:
        raise EngineError(f"a training process failed (exit status {code}); its message is above")


def _launch_ray(config: TrainConfig) -> None:
    import ray

    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise ConfigError(
            f"launch.ray_workers={config.launch.ray_workers} needs Ray Train: pip install 'pavdm-dist[cluster]'"
        ) from error

    from pavdm_dist.train import checkpoint

    wanted, run = config.launch, Path(config.run_dir).absolute()
    checkpoint.check_resume(run / "checkpoints", config.resume)
    if not ray.is_initialized():
        ray.init(address=wanted.ray_address, log_to_driver=True)
    gpus = wanted.gpus_per_worker > 0
    resources = {"CPU": wanted.cpus_per_worker, **({"GPU": wanted.gpus_per_worker} if gpus else {})}
    # A restarted worker goes on with what the run itself left, whatever the first start was to do.
    settings = replace(config, run_dir=str(run), resume="auto")
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"config": settings, "deadline": time.time() + config.max_seconds},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=int(wanted.timeout_seconds)),
        scaling_config=ScalingConfig(num_workers=wanted.ray_workers, use_gpu=gpus, resources_per_worker=resources),
        run_config=RunConfig(
            name="ray", storage_path=str(run), failure_config=FailureConfig(max_failures=wanted.max_failures)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        reasons = str(error).strip().splitlines() or [type(error).__name__]
        raise EngineError(f"training on Ray failed after {wanted.max_failures} restarts: {reasons[-1]}") from error


def _ray_worker(settings: dict[str, Any]) -> None:
    """One process of the group; Ray Train has set the five variables and joined the processes."""
    import ray.train

    from pavdm_dist.train.loop import train_command

    config: TrainConfig = settings["config"]
    left = max(settings["deadline"] - time.time(), 0)
    train_command(replace(config, max_seconds=left), ray.train.report)
