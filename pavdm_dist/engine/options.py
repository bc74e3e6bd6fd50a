"""What the user may choose about the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pavdm_dist.errors import ConfigError
from pavdm_dist.values.fields import Threads, Within, checked_arguments, fault

# How much of the last stage's GPU Ray books for a decoder that shares it; what each really takes is its own affair.
SHARED_GPU = 0.25
_TYPES = ("float32", "bfloat16", "float16")
_WORDS = {
    "dtype": ("auto", *_TYPES),
    "balance": ("estimated", "measured"),
    "decoder": ("cpu", "cuda", "shared"),
    "decoder_dtype": _TYPES,
}

_SHARE = Annotated[float, Within(0, 1024)]
_WAIT = Annotated[float, Within(0, 1_000_000, above=True)]
_DELAY = Annotated[float, Within(0, 1_000_000)]
# As the settings of commands have them, where they do.
_KINDS = {
    "num_stages": Annotated[int, Within(1, 1024)],
    "layers_per_stage": list[Annotated[int, Within(1)]],
    "threads_per_stage": Threads,
    "threads_per_decoder": Threads,
    "cpus_per_stage": _SHARE,
    "gpus_per_stage": _SHARE,
    "cpus_per_decoder": _SHARE,
    "gpus_per_decoder": Annotated[float, Within(0, 1, above=True)],
    "link_timeout_s": _WAIT,
    "start_timeout_s": _WAIT,
    "placement_timeout_s": _WAIT,
    "max_restarts": Annotated[int, Within(0)],
    "restart_backoff_s": _DELAY,
    "node_wait_s": _DELAY,
    "stall_factor": _WAIT,
    "stall_floor_s": _DELAY,
    "stall_limit_s": _WAIT,
    "backlog_bytes": Annotated[int, Within(0, above=True)],
    "ray_address": str,
    "compile": bool,
    "trace": bool,
}
_MAY_BE_NONE = ("layers_per_stage", "threads_per_decoder", "ray_address", "compile")


@dataclass(frozen=True)
class EngineOptions:
    """Resources and limits of an engine.

    Attributes:
        num_stages: P, pipeline stages; each is one actor.
        layers_per_stage: blocks per stage; None balances by cost.
        balance: cost by ``estimated`` FLOP, or ``measured`` once on this machine and kept.
        dtype: of weights and of what travels between stages: ``auto`` is what the checkpoint holds on GPUs, and
            float32 on CPUs. Latents, levels and the Euler step are float32 always.
        threads_per_stage: intra-op threads of a stage; part of what makes bits reproducible on a CPU.
        cpus_per_stage, gpus_per_stage: logical Ray resources one stage takes; fractions share a CPU, or a GPU.
        decoder: where finished chunks are decoded: ``cpu``, ``cuda`` (a GPU of its own) or ``shared`` (the last stage's
            device).
        threads_per_decoder: intra-op threads of a decoder on CPUs; None = those of a stage.
        cpus_per_decoder: logical CPUs of the decode actor; 0 lets it share the last stage's.
        gpus_per_decoder: of ``decoder=cuda``, how much of a GPU it takes.
        decoder_dtype: what the codec computes in.
        backend: ``gloo``, ``nccl`` or ``auto`` (NCCL where each stage has a GPU of its own). Over gloo, what GPUs send
            each other passes through host memory.
        link_timeout_s: longest silence of a stage, of a link, or of the decoder over one latent; must exceed the
            slowest unit.
        start_timeout_s: longest wait for an actor to come up: its process, its part of the weights, its links.
        placement_timeout_s: longest wait for resources that the cluster has but are busy.
        max_restarts: gangs that may be lost one after the other with no shift finished between, before the run ends; 0
            ends it at the first loss. Of faults inside a stage so many in all.
        restart_backoff_s: wait before the first of these restarts; doubled at each one after it, up to a minute.
        node_wait_s: how long a restart waits for resources that were lost to come back, before it makes do with fewer
            stages; the video does not depend on their number.
        stall_factor: a video that gives no chunk for so many times the median of its own earlier ones is reported,
        stall_floor_s: but not before so many seconds.
        stall_limit_s: after so many it is ended by name, and the others go on; must exceed the time to its first shift.
            Time in which the consumer takes nothing, or a gang is made anew, does not count. This wait, as all others,
            is a finite number of seconds, 1,000,000 (11 days) at most.
        backlog_bytes: of frames and resume points that wait for the decoder or the consumer, before the stages get no
            more work. Keys and values are counted once, with the point that they came with.
        ray_address: cluster to join; None = the one this process is in, else a local one is started.
        compile: stages run compiled blocks (``Backbone.compile_repeated_blocks``): the same bits on any number of
            stages, but not those of uncompiled ones. None = on GPUs. Must be done within ``start_timeout_s``.
        trace: keep start and end of every unit.
        trace_file: where a finished run writes them; sets ``trace``.

    Raises:
        ConfigError: a value that is none of its field, or fields that contradict one another.
    """

    num_stages: int
    layers_per_stage: Sequence[int] | None = None
    balance: str = "estimated"
    dtype: str = "auto"
    threads_per_stage: int = 1
    cpus_per_stage: float = 1
    gpus_per_stage: float = 0
    decoder: str = "cpu"
    threads_per_decoder: int | None = None
    cpus_per_decoder: float = 0
    gpus_per_decoder: float = 1
    decoder_dtype: str = "float32"
    backend: str = "auto"
    link_timeout_s: float = 300
    start_timeout_s: float = 900
    placement_timeout_s: float = 60
    max_restarts: int = 3
    restart_backoff_s: float = 1
    node_wait_s: float = 30
    stall_factor: float = 10
    stall_floor_s: float = 60
    stall_limit_s: float = 3600
    backlog_bytes: int = 256 * 2**20
    ray_address: str | None = None
    compile: bool | None = None
    trace: bool = False
    trace_file: str | None = None

    def __post_init__(self) -> None:
        if self.trace_file is not None:
            object.__setattr__(self, "trace", True)
        if self.num_stages == 0:
            raise ConfigError("num_stages=0: must be 1 to 1,024; 0 runs in this process, without this engine")
        for name, value in checked_arguments(_KINDS, {name: getattr(self, name) for name in _KINDS}).items():
            if value is None and name not in _MAY_BE_NONE:
                raise ConfigError(fault(_KINDS[name], name, value))
            object.__setattr__(self, name, value)
        if self.backend not in ("auto", "gloo", "nccl"):
            raise ConfigError(f"backend={self.backend!r}: must be auto, gloo or nccl")
        for name, legal in _WORDS.items():
            if getattr(self, name) not in legal:
                raise ConfigError(f"{name}={getattr(self, name)}: must be {', '.join(legal[:-1])} or {legal[-1]}")
        self._check_gpus()
        for name, device in (("dtype", self.device), ("decoder_dtype", self.decoder_device)):
            if getattr(self, name) == "float16" and device == "cpu":
                raise ConfigError(f"{name}=float16: a CPU computes in float32 or bfloat16; use one of them, or a GPU")

    def on(self, device: str, dtype: str) -> EngineOptions:
        """These options where a pipeline is told, as diffusers' are, where and in which type to compute.

        Args:
            device: ``auto`` leaves what the options say; ``cuda`` gives every stage a GPU where they give it none.
            dtype: ``auto`` leaves what the options say.

        Raises:
            ConfigError: a device that is not a kind of device, or not that of the options.
        """
        kind, _, index = device.partition(":")
        if index:
            raise ConfigError(f"device={device}: Ray chooses every stage's GPU; give device={kind}")
        if kind not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device={device}: must be auto, cpu or cuda")
        if kind == "cpu" and self.gpus_per_stage:
            raise ConfigError(f"device=cpu: gpus_per_stage={self.gpus_per_stage:g} gives every stage a GPU; drop one")
        gpus = self.gpus_per_stage or float(kind == "cuda")
        return replace(self, gpus_per_stage=gpus, dtype=self.dtype if dtype == "auto" else dtype)

    @property
    def transport(self) -> str:
        """``nccl`` or ``gloo``."""
        if self.backend != "auto":
            return self.backend
        return "nccl" if self.gpus_per_stage == 1 else "gloo"

    @property
    def device(self) -> str:
        """Device type of a stage."""
        return "cuda" if self.gpus_per_stage else "cpu"

    @property
    def compiled(self) -> bool:
        """Whether stages compile their blocks."""
        return self.device == "cuda" if self.compile is None else self.compile

    @property
    def rehearses(self) -> bool:
        """Whether stages run a run's sizes before they are linked: what takes long at first, or must not wait for a
        link, is loaded and compiled then."""
        return self.compiled or self.device == "cuda"

    @property
    def decoder_device(self) -> str:
        """Device type of the decoder."""
        return self.device if self.decoder == "shared" else self.decoder

    @property
    def decoder_threads(self) -> int:
        """Intra-op threads of the decoder."""
        return self.threads_per_decoder or self.threads_per_stage

    @property
    def computed_on(self) -> dict[str, str | int]:
        """As :func:`bits_depend_on`; the number of stages is none of it."""
        return bits_depend_on(self.device, self.decoder_device, self.decoder_threads)

    @property
    def decoder_slows_last_stage(self) -> bool:
        """Whether decoding takes the last stage's time: it computes on the same GPU, or has no CPUs of its own beside a
        stage on CPUs."""
        return self.decoder_device == self.device and not self._decoder_alone

    @property
    def decoder_gpus(self) -> float:
        """What the decode actor asks for: of a GPU of its own, or of the last stage's."""
        own = {"cpu": 0.0, "cuda": self.gpus_per_decoder, "shared": SHARED_GPU * self.gpus_per_stage}
        return own[self.decoder]

    def stage_gpus(self, stage: int) -> float:
        """What a stage's actor asks for; the last one leaves a share of its GPU to a decoder there."""
        shares = self.decoder == "shared" and stage == self.num_stages - 1
        return self.gpus_per_stage - (self.decoder_gpus if shares else 0)

    def bundles(self) -> list[dict[str, float]]:
        """Resources of every actor, stages first; the decoder's last, unless it shares the last stage's."""
        stage = {"CPU": float(self.cpus_per_stage), "GPU": float(self.gpus_per_stage)}
        # Ray places nothing for an empty bundle: a stage that asks for nothing takes next to nothing.
        needs = {name: amount for name, amount in stage.items() if amount} or {"CPU": 0.001}
        bundles = [dict(needs) for _ in range(self.num_stages)]
        alone = {"CPU": float(self.cpus_per_decoder), "GPU": float(self.decoder_gpus)}
        return bundles + ([{name: amount for name, amount in alone.items() if amount}] if self._decoder_alone else [])

    @property
    def _decoder_alone(self) -> bool:
        return self.decoder == "cuda" or (self.decoder == "cpu" and self.cpus_per_decoder > 0)

    def _check_gpus(self) -> None:
        gpus, own = self.gpus_per_stage, self.gpus_per_decoder
        if gpus > 1:
            raise ConfigError(f"gpus_per_stage={gpus:g}: a stage computes on one GPU; use 1, or more stages")
        if self.backend == "nccl" and gpus != 1:
            raise ConfigError(
                f"backend=nccl needs gpus_per_stage of 1, a GPU of its own for every stage, not {gpus:g}; use"
                " backend=gloo for CPUs and for shares of a GPU"
            )
        if own != 1 and self.decoder != "cuda":
            raise ConfigError(f"gpus_per_decoder={own:g}: is of decoder=cuda, not of decoder={self.decoder}")
        if self.cpus_per_decoder and self.decoder == "shared":
            raise ConfigError(f"cpus_per_decoder={self.cpus_per_decoder:g}: decoder=shared has none of its own")


def options_of(
    engine: EngineOptions | None, num_stages: int, threads: int | None, decoder: str, decoder_dtype: str
) -> tuple[EngineOptions | None, int]:
    """What a pipeline's own arguments and its engine's options say together: how stages run, None where there are none,
    and intra-op threads.

    Args:
        engine: of the pipeline; its one thread, the default, is as good as nothing said.
        num_stages: 0 = what the engine says, or none.
        threads: intra-op; None = what the engine says, or 1.
        decoder, decoder_dtype: of a process without stages.

    Raises:
        ConfigError: they contradict one another, or a decoder beside stages is not said in the engine.
    """
    own = 1 if engine is None else engine.threads_per_stage
    if engine is not None and num_stages not in (0, engine.num_stages):
        raise ConfigError(
            f"num_stages={num_stages}: engine has num_stages={engine.num_stages}; give one of them, or the same twice"
        )
    if threads is not None and own not in (1, threads):
        raise ConfigError(
            f"threads_per_stage={threads}: engine has threads_per_stage={own}; give one of them, or the same twice"
        )
    stages, threads = num_stages or (0 if engine is None else engine.num_stages), threads or own
    if not stages:
        return None, threads
    for name, value, default in (("decoder", decoder, "auto"), ("decoder_dtype", decoder_dtype, "float32")):
        if value != default:
            raise ConfigError(
                f"{name}={value}: with num_stages={stages} the engine decodes; say it there,"
                f" engine=EngineOptions({stages}, {name}={value!r})"
            )
    return replace(engine or EngineOptions(stages), threads_per_stage=threads), threads


def bits_depend_on(device: str, decoder_device: str, decoder_threads: int) -> dict[str, str | int]:
    """What bits depend on of where they are computed: the types of devices that sample and decode, and of a decoder on
    CPUs its intra-op threads."""
    found: dict[str, str | int] = {"device": device, "decoder_device": decoder_device}
    return found | ({"decoder_threads": decoder_threads} if decoder_device == "cpu" else {})
