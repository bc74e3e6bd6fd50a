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
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pavdm_dist.cluster import connect
from pavdm_dist.errors import ConfigError, EngineError
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.processes import launched_size
from pavdm_dist.train.settings import TrainConfig

if TYPE_CHECKING:
    from pavdm_dist.train.run import Provider

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
    if "WORLD_SIZE" in os.environ:
        from pavdm_dist.train.run import train_slice

        check_settings(config, launched_size())
        train_slice(config, provider)
    elif wanted.ray_workers:
        check_settings(config, wanted.ray_workers)
        _launch_ray(config, provider)
    elif wanted.processes > 1:
        check_settings(config, wanted.processes)
        _launch_here(wanted.processes, words)
    else:
        from pavdm_dist.train.run import train_slice

        check_settings(config, 1)
        train_slice(config, provider)


def _launch_here(processes: int, words: Sequence[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, "-m", "pavdm_dist", "train", *words]
    # torchrun kills processes that take longer to save and export.
    given = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1800"}
    child = subprocess.Popen(command, env={**given, **os.environ})
    told: list[int] = []

    def forward(number: int, _: object) -> None:
        told.append(number)
        child.terminate()

    before = signal.signal(signal.SIGTERM, forward)
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the terminal told the processes too; they save and end
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if told:  # torchrun's own status is 1 then, however well its processes ended
        raise EngineError("stopped by SIGTERM; the lines above say where the processes saved; run again to go on")
    if code:
        raise EngineError(f"a training process failed (exit status {code}); its message is above")


def _launch_ray(config: TrainConfig, provider: Provider) -> None:
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise ConfigError(
            f"launch.ray_workers={config.launch.ray_workers} needs Ray Train: pip install 'pavdm-dist[cluster]'"
        ) from error

    from pavdm_dist.train import saves

    wanted, run = config.launch, Path(config.run_dir).absolute()
    saves.check_resume(run / "checkpoints", config.resume)
    started = connect(wanted.ray_address, log_to_driver=True)
    gpus = wanted.gpus_per_worker > 0
    resources = {"CPU": wanted.cpus_per_worker, **({"GPU": wanted.gpus_per_worker} if gpus else {})}
    settings = _anywhere(config, run)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={
            "config": settings,
            "provider": provider,
            "deadline": time.time() + config.max_seconds,
        },
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
    finally:
        if started:
            ray.shutdown()


def _anywhere(config: TrainConfig, run: Path) -> TrainConfig:
    """The settings for workers, which start in folders of their own: with whole paths.

    A restarted worker goes on with what the run itself left; one that does not see what is there must not start afresh.
    """

    def whole(path: str | None) -> str | None:
        # A hub id or "embedded" is no path here.
        return str(Path(path).absolute()) if path is not None and Path(path).exists() else path

    from pavdm_dist.train import saves

    export = None if config.export is None else str(Path(config.export).absolute())
    return replace(
        config,
        run_dir=str(run),
        export=export,
        resume="must" if saves.any_there(run / "checkpoints") else "auto",
        deepspeed_config=whole(config.deepspeed_config),
        data=replace(
            config.data,
            folder=[str(Path(folder).absolute()) for folder in config.data.folder],
            model=whole(config.data.model),
        ),
        model=replace(config.model, pretrained=whole(config.model.pretrained)),
        codec=replace(config.codec, folder=whole(config.codec.folder)),
    )


def _ray_worker(settings: dict[str, Any]) -> None:
    """One process of the group; Ray Train has set the five variables and joined the processes."""
    import ray.train

    from pavdm_dist.train.run import train_slice

    config: TrainConfig = settings["config"]
    left = max(settings["deadline"] - time.time(), 0)
    train_slice(replace(config, max_seconds=left), settings["provider"], ray.train.report)
