"""Training on the workers of a Ray cluster, by Ray Train."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pavdm_dist.cluster.environment import choose_interface, handed_on, take_on
from pavdm_dist.cluster.joining import connect
from pavdm_dist.cluster.room import Demand, Room
from pavdm_dist.errors import ConfigError, EngineError
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.train.endings import heard
from pavdm_dist.train.run_folder import (
    CHECKPOINTS,
    ask_to_stop,
    asked_to_stop,
    check_free,
    guard_for,
    owned,
    target_of,
)
from pavdm_dist.train.train_settings import TrainConfig

if TYPE_CHECKING:
    from pavdm_dist.train.train_run import Provider

# How long Ray Train itself waits for a group of workers, before it counts a failure and tries again.
GROUP_S = 60.0
# An actor of Ray's that finds no address of its own where several clusters run on a machine, and says so in tracebacks.
_NOISY = "PlacementGroupCleaner"

logger = logging.getLogger(__name__)


def launch_ray(config: TrainConfig, provider: Provider) -> None:
    """Runs training in ``config.launch.ray_workers`` processes of a cluster, once it has room for them.

    At a signal the workers are asked to end after their step, and waited for; an interrupt of one who has waited does
    not wait, and they write nothing more.

    Raises:
        ConfigError: Ray Train is not installed, or a GPU share that no worker can train on.
        EngineError: no cluster, no room for the workers, a process failed more often than is allowed, or a signal
            other than Ctrl-C ended the run.
        KeyboardInterrupt: after Ctrl-C, saying where the weights are.
    """
    wanted, run = config.launch, Path(config.run_dir).absolute()
    try:
        import ray
        import ray.train.torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"launch.ray_workers={wanted.ray_workers} needs Ray Train: pip install 'pavdm-dist[cluster]'"
        ) from error

    from pavdm_dist.train import save_reading

    if wanted.gpus_per_worker not in (0, 1):
        raise ConfigError(
            f"launch.gpus_per_worker={wanted.gpus_per_worker:g}: a worker computes on one GPU, which NCCL lets nobody"
            " share; use 1, or 0 for CPUs"
        )
    save_reading.check_resume(run / CHECKPOINTS, config.resume)
    check_free(run)
    membership = connect(wanted.ray_address, log_to_driver=True)
    try:
        _wait_for_room(config)
        with owned(run) as mine:  # by this process, which outlives its workers
            try:
                with _without_noise():
                    told = _heeding(lambda: _fit(config, provider, run, mine.token), run, mine.token)
            finally:
                membership.leave()
    finally:
        membership.leave()
    if told is not None:
        there = save_reading.any_there(run / CHECKPOINTS)
        where = f"saved in {run / CHECKPOINTS}, weights in {target_of(config)}" if there else "before the first step"
        if told == signal.SIGINT:
            raise KeyboardInterrupt(f"{where}; run again to go on")
        raise EngineError(f"stopped by {told.name}, {where}; run again to go on")


def _heeding(work: Callable[[], None], run: Path, owner: str) -> signal.Signals | None:
    """Does the work in another thread, while this one hears signals and asks those who train for an owner to end.

    In the main thread Ray Train would take Ctrl-C for itself, and end its workers in the middle of a step.

    Returns:
        The first signal.

    Raises:
        KeyboardInterrupt: one who has waited interrupted again; the work may go on.
    """
    done: Future[None] = Future()

    def do() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:  # it is raised where the result is waited for
            done.set_exception(error)

    def tell(_: int) -> None:
        if len(told) > 1:
            raise KeyboardInterrupt("not waited for what was to be saved; run again to go on from the last checkpoint")
        logger.info("stopping: the workers end after their step, save and export")
        try:
            ask_to_stop(run, owner)
        except OSError as error:
            raise EngineError(
                f"run_dir={run}: the workers cannot be asked to stop: {error}; run again to go on"
            ) from error

    with heard(tell) as told:
        threading.Thread(target=do, name="pavdm-ray-train", daemon=True).start()
        done.result()
    return told[0] if told else None


def _resources(config: TrainConfig) -> dict[str, float]:
    wanted = config.launch
    return {"CPU": wanted.cpus_per_worker, **({"GPU": wanted.gpus_per_worker} if wanted.gpus_per_worker else {})}


def _wait_for_room(config: TrainConfig) -> None:
    """Ray Train would ask for workers again and again, for ever, whether or not the cluster can ever hold them."""
    from ray.util.placement_group import remove_placement_group

    wanted = config.launch
    needs = {name: amount for name, amount in _resources(config).items() if amount} or {"CPU": 0.001}
    demand = Demand(
        f"launch.ray_workers={wanted.ray_workers}",
        [needs] * wanted.ray_workers,
        wanted.placement_timeout_s,
        "launch.placement_timeout_s",
        "fewer workers, smaller launch.cpus_per_worker or launch.gpus_per_worker",
    )
    room = Room(demand, wanted.ray_address)
    group = room.group("PACK", wanted.placement_timeout_s)
    if group is None:
        raise room.refusal()
    remove_placement_group(group)  # Ray Train takes its own


def _fit(config: TrainConfig, provider: Provider, run: Path, owner: str) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):
        """The workers get the driver's environment before they are connected, and before anything reads it."""

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            # In a list, for what a reference stands for would be there before the call.
            worker_group.execute(_prepare_worker, [backend_config.told])
            super().on_start(worker_group, backend_config)

    @dataclass
    class Config(TorchConfig):
        told: Any = (
            None  # a reference: what is in a configuration may be shown in Ray's dashboard, and tokens are in it
        )

        @property
        def backend_cls(self) -> type:
            return Backend

    wanted, gpus = config.launch, config.launch.gpus_per_worker > 0
    failures = FailureConfig(
        max_failures=wanted.max_failures,
        # Groups that did not come up, although there was room for one.
        controller_failure_limit=math.ceil(wanted.placement_timeout_s / GROUP_S),
    )
    backend = "nccl" if gpus else "gloo"
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={
            "config": _anywhere(config, run),
            "provider": provider,
            "deadline": time.time() + config.max_seconds,
            "owner": owner,
        },
        torch_config=Config(backend=backend, timeout_s=int(wanted.timeout_seconds), told=ray.put(handed_on())),
        scaling_config=ScalingConfig(
            num_workers=wanted.ray_workers, use_gpu=gpus, resources_per_worker=_resources(config)
        ),
        run_config=RunConfig(name="ray", storage_path=str(run), failure_config=failures),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        reasons = str(error).strip().splitlines() or [type(error).__name__]
        raise EngineError(f"training on Ray failed after {wanted.max_failures} restarts: {reasons[-1]}") from error


def _prepare_worker(told: list[Any]) -> None:
    import ray

    take_on(ray.get(told[0]))
    choose_interface(ray.util.get_node_ip_address())  # beside NCCL, too, there are groups of gloo's


@contextmanager
def _without_noise() -> Iterator[None]:
    """What workers print comes out of this process, but for one actor of Ray's own."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    printing = [pair for pair in dispatcher.handlers if pair[0] == "ray_print_logs"]
    dispatcher.remove_handler("ray_print_logs")
    for name, handler in printing:
        dispatcher.add_handler(name, partial(_print_others, handler))
    try:
        yield
    finally:
        if printing and any(name == "ray_print_logs" for name, _ in dispatcher.handlers):
            dispatcher.remove_handler("ray_print_logs")
            for name, handler in printing:
                dispatcher.add_handler(name, handler)


def _print_others(handler: Callable[[dict[str, Any]], None], data: dict[str, Any]) -> None:
    if data.get("actor_name") != _NOISY:
        handler(data)


def _anywhere(config: TrainConfig, run: Path) -> TrainConfig:
    """The settings for workers, which start in folders of their own: with whole paths.

    A restarted worker goes on with what the run itself left; one that does not see what is there must not start afresh.
    """

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).absolute())

    def whole(path: str | None) -> str | None:
        # Neither a hub id nor a model that comes with the package is a path, whatever lies in this folder.
        is_path = path is not None and path not in shipped_models() and Path(path).exists()
        return absolute(path) if is_path else path

    from pavdm_dist.train import save_reading

    return replace(
        config,
        run_dir=str(run),
        export=absolute(config.export),
        resume="must" if save_reading.any_there(run / CHECKPOINTS) else "auto",
        deepspeed_config=whole(config.deepspeed_config),
        data=replace(
            config.data,
            folder=[str(Path(folder).absolute()) for folder in config.data.folder],
            model=whole(config.data.model),
            text_cache=absolute(config.data.text_cache),
        ),
        model=replace(config.model, pretrained=whole(config.model.pretrained)),
        codec=replace(config.codec, folder=whole(config.codec.folder)),
    )


def _ray_worker(settings: dict[str, Any]) -> None:
    """One process of the group; Ray Train has set the five variables and joined the processes."""
    import ray.train

    from pavdm_dist.train.train_run import train_slice

    config: TrainConfig = settings["config"]
    left = max(settings["deadline"] - time.time(), 0)
    guard = guard_for(config.run_dir, settings["owner"])
    if (fault := guard()) is not None:  # now, and not when the first checkpoint is to be written
        raise ConfigError(f"{fault}; the machine that started the run and all workers must share this folder")
    asked = partial(asked_to_stop, config.run_dir, settings["owner"])
    train_slice(replace(config, max_seconds=left), settings["provider"], ray.train.report, guard, asked)
