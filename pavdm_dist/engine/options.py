"""What the user may choose about the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pavdm_dist.errors import ConfigError


@dataclass(frozen=True)
class EngineOptions:
    """Resources and limits of an engine.

    Attributes:
        num_stages: P, pipeline stages; each is one actor.
        layers_per_stage: half-blocks per stage; None balances by cost.
        balance: cost by ``estimated`` FLOP, or ``measured`` once on this machine and kept.
        threads_per_stage: intra-op threads of a stage; part of what makes bits reproducible on a CPU.
        cpus_per_stage, gpus_per_stage: logical Ray resources one stage takes; fractions share a CPU.
        cpus_per_decoder: logical CPUs of the decode actor; 0 lets it share a stage's.
        backend: ``gloo``, ``nccl`` or ``auto`` (NCCL when stages have GPUs).
        link_timeout_s: longest silence of a stage, of a link, or of the decoder over one latent; must exceed the
            slowest unit.
        start_timeout_s: longest wait for an actor to come up: its process, its part of the weights, its links.
        placement_timeout_s: longest wait for resources that the cluster has but are busy.
        max_restarts: gangs that may be lost one after the other with no shift finished between, before the run ends; 0
            ends it at the first loss. Of faults inside a stage so many in all.
        restart_backoff_s: wait before the first of these restarts; doubled at each one after it, up to a minute.
        node_wait_s: how long a restart waits for resources that were lost to come back, before it makes do with fewer
            stages; the video does not depend on their number.
        backlog_bytes: of frames that wait for the decoder or the consumer, before the stages get no more work.
        ray_address: cluster to join; None = the one this process is in, else a local one is started.
        compile: stages run compiled blocks (``STDiT3.compile_repeated_blocks``): the same bits on any number of
            stages, but not those of uncompiled ones. Must be done within ``link_timeout_s``.
        trace: keep start and end of every unit.
        trace_file: where a finished run writes them; sets ``trace``.
    """

    num_stages: int
    layers_per_stage: Sequence[int] | None = None
    balance: str = "estimated"
    threads_per_stage: int = 1
    cpus_per_stage: float = 1
    gpus_per_stage: float = 0
    cpus_per_decoder: float = 0
    backend: str = "auto"
    link_timeout_s: float = 300
    start_timeout_s: float = 900
    placement_timeout_s: float = 60
    max_restarts: int = 3
    restart_backoff_s: float = 1
    node_wait_s: float = 30
    backlog_bytes: int = 256 * 2**20
    ray_address: str | None = None
    compile: bool = False
    trace: bool = False
    trace_file: str | None = None

    def __post_init__(self) -> None:
        if self.trace_file is not None:
            object.__setattr__(self, "trace", True)
        if self.num_stages < 1:
            raise ConfigError(f"num_stages={self.num_stages}: at least 1 (0 runs in this process, without this engine)")
        if self.threads_per_stage < 1:
            raise ConfigError(f"threads_per_stage={self.threads_per_stage}: at least 1")
        for name in ("link_timeout_s", "start_timeout_s", "placement_timeout_s", "backlog_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("max_restarts", "restart_backoff_s", "node_wait_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.backend not in ("auto", "gloo", "nccl"):
            raise ConfigError(f"backend={self.backend!r}: must be auto, gloo or nccl")
        if self.balance not in ("estimated", "measured"):
            raise ConfigError(f"balance={self.balance}: must be estimated or measured")
        if self.backend == "nccl" and not self.gpus_per_stage:
            raise ConfigError("backend=nccl needs gpus_per_stage of at least 1; use gloo on CPUs")

    @property
    def transport(self) -> str:
        """``nccl`` or ``gloo``."""
        if self.backend != "auto":
            return self.backend
        return "nccl" if self.gpus_per_stage else "gloo"

    @property
    def device(self) -> str:
        """Device type of a stage."""
        return "cuda" if self.gpus_per_stage else "cpu"

    def bundles(self) -> list[dict[str, float]]:
        """Resources of every actor, stages first."""
        stage = {"CPU": float(self.cpus_per_stage), "GPU": float(self.gpus_per_stage)}
        # Ray places nothing for an empty bundle: a stage that asks for nothing takes next to nothing.
        needs = {name: amount for name, amount in stage.items() if amount} or {"CPU": 0.001}
        bundles = [dict(needs) for _ in range(self.num_stages)]
        return bundles + ([{"CPU": float(self.cpus_per_decoder)}] if self.cpus_per_decoder else [])
