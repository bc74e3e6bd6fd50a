"""What the user may choose about the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pavdm_dist.errors import ConfigError


@dataclass(frozen=True)
class EngineOptions:
    """Resources and limits of one renderer.

    Attributes:
        num_stages: P, pipeline stages; each is one actor.
        layers_per_stage: half-blocks per stage; None balances by cost.
        balance: cost by ``estimated`` FLOP, or ``measured`` once on this machine and kept.
        dtype: of weights and of what travels between stages: ``auto`` is what the checkpoint holds on GPUs, and
            float32 on CPUs. Latents, levels and the Euler step are float32 always.
        threads_per_stage: intra-op threads of a stage; part of what makes bits reproducible on a CPU.
        cpus_per_stage, gpus_per_stage: logical Ray resources one stage takes; fractions share a CPU.
        cpus_per_decoder: logical CPUs of the decode actor; 0 lets it share a stage's.
        backend: ``gloo``, ``nccl`` or ``auto`` (NCCL when stages have GPUs).
        link_timeout_s: longest silence on a link; must exceed the slowest unit.
        placement_timeout_s: longest wait for resources that the cluster has but are busy.
        ray_address: cluster to join; None = the one this process is in, else a local one is started.
        compile: stages run compiled blocks (``STDiT3.compile_repeated_blocks``): the same bits on any number of
            stages, but not those of uncompiled ones. Must be done within ``link_timeout_s``.
        trace: keep start and end of every unit.
        trace_file: where a finished run writes them; sets ``trace``.
    """

    num_stages: int
    layers_per_stage: Sequence[int] | None = None
    balance: str = "estimated"
    dtype: str = "auto"
    threads_per_stage: int = 1
    cpus_per_stage: float = 1
    gpus_per_stage: float = 0
    cpus_per_decoder: float = 0
    backend: str = "auto"
    link_timeout_s: float = 300
    placement_timeout_s: float = 60
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
