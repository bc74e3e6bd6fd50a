"""The settings of ``pavdm sample`` and ``pavdm plan``, with all checks that need no tensor, checkpoint or file.

What depends on the checkpoint's defaults (T and W, sizes the codec can divide, the layer split) is checked where
those are known; the checks here let a typing mistake end a command in milliseconds. How files and overrides become
these dataclasses: :mod:`pavdm_dist.values.merging`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pavdm_dist.errors import ConfigError
from pavdm_dist.io.folders import VIDEO_SUFFIXES
from pavdm_dist.io.remote import check_store, is_remote
from pavdm_dist.method.baselines import block_chunks
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.values.fields import (
    ChunkLatents,
    ContextChunks,
    ContextNoise,
    FrameCount,
    FrameRate,
    Guidance,
    Side,
    StageCount,
    Steps,
    TextDevice,
    TextDtype,
    Threads,
    TileSide,
    TimeShift,
    UnitChunks,
    WindowChunks,
    Within,
    check_fields,
)
from pavdm_dist.values.timed import first_prompt, timed

DEFAULT_SECONDS = 5.0
# Endings of files that somebody may want, and that are none of a folder.
_OTHER_FILES = (*(suffix for suffix in VIDEO_SUFFIXES if suffix != ".mp4"), ".gif", ".png", ".webp", ".y4m")

# A cluster or a wait beyond these is a slip of the finger.
_Count = Annotated[int, Within(0, 1024, above=True)]
_Share = Annotated[float, Within(0, 1024)]
_Positive = Annotated[float, Within(0, above=True)]
_Wait = Annotated[float, Within(0, 1_000_000, above=True)]
_Rate = Annotated[float, Within(0, 1_000_000, above=True)]
_Seconds = Annotated[float, Within(0, 10**9, above=True)]


@dataclass
class PromptChange:
    """From chunk ``from_chunk`` (0-based, new chunks) on, newborn chunks follow ``prompt``."""

    from_chunk: Annotated[int, Within(0, above=True)]
    prompt: str


@dataclass
class DisplacedConfig:
    """When mode displaced is exact; see ``method.microbatches.Displaced``."""

    resync_every_steps: Annotated[int, Within(1)] | None = 25  # exact every so many steps; 1 = always, null = never
    exact_steps: Annotated[int, Within(0)] = 0  # exact steps at the start
    exact_growing: bool = True  # exact while the window grows
    exact_draining: bool = False  # and while it drains
    adaptive: Annotated[float, Within(0, above=True)] | None = (
        None  # exact when keys change by more than this from step to step
    )
    context_refresh: Literal["shift", "step"] = "shift"  # when the clean chunk is run again


@dataclass
class LoraConfig:
    """A low-rank change of the model's weights, added as they are loaded."""

    model: str  # a folder or hub id
    scale: Annotated[float, Within(-100, 100)] = 1.0
    revision: str | None = None  # of a hub id: branch, tag or commit


@dataclass
class SampleConfig:
    """Everything ``pavdm sample`` knows, and ``pavdm plan`` of a run. ``None`` means the checkpoint's own default."""

    # what to render
    prompt: str | None = None  # what the video shows
    negative_prompt: str | None = None  # what it shall not show; null = the model's learned null text
    prompt_schedule: list[PromptChange] = field(default_factory=list)  # prompts of later chunks, by number
    timed_prompts: dict[str, str] = field(
        default_factory=dict
    )  # the same by time: {0s: a red three, 20s: a blue seven}
    prompt_suffix: str | None = None  # said behind every prompt but the negative one
    prompts: str | None = None  # file, one prompt a line; line i gets seed + i
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0  # of the noise; the same seed makes the same video
    num_frames: FrameCount | None = None  # new frames; or seconds
    seconds: _Seconds | None = None  # the same in seconds; 5 when neither is given
    height: Side | None = None  # px
    width: Side | None = None  # px
    fps: FrameRate | None = None  # frames per second
    video: str | None = None  # conditioning clip of start=chunk and start=clip
    image: str | None = None  # picture that the video begins with
    include_input: bool = False  # the clip in front of the new frames in the output
    # the method
    model: str = "embedded"  # embedded, a checkpoint folder or a hub id
    revision: str | None = None  # of a hub id: branch, tag or commit
    lora: list[LoraConfig] = field(default_factory=list)  # changes of the weights: [{model: FOLDER, scale: 0.8}]
    num_inference_steps: Steps | None = None  # T, steps that take a chunk from noise to clean
    window_chunks: WindowChunks | None = None  # W, noisy chunks of a full window
    latent_chunk_size: ChunkLatents | None = None  # c, latent frames of a chunk
    context_chunks: ContextChunks | None = None  # clean chunks that stay in sight in front of the window
    context: Literal["joint", "cached"] | None = None  # clean chunks are in the window, or left keys and values
    anchor_chunks: ContextChunks | None = None  # of context=cached: first chunks that stay visible for ever
    step: Literal["euler", "renoise"] | None = None  # renoise: fresh noise after every step (students of few levels)
    # pavdm: a staircase of levels; the others are what it is compared with (docs/modes.md)
    method: Literal["pavdm", "replacement", "replacement-noise", "fifo", "autoregressive"] = "pavdm"
    partitions: WindowChunks | None = None  # model calls a row of the window is cut into, of neighbouring levels each
    lookahead: bool | None = None  # a call moves the noisier half of its chunks and looks at the cleaner one
    context_noise: ContextNoise | None = None  # level to which clean context is noised again; 0 = it stays clean
    guidance_scale: Guidance | None = None  # 1 = no guidance
    time_shift: TimeShift | None = None  # moves levels towards noise; 1 = evenly spaced
    # clip: the first W-1 chunks render the end of the clip again, and count as new frames (docs/films.md)
    start: Literal["noise", "chunk", "clip"] = "noise"
    end: Literal["drain", "cut"] = "drain"  # drain: the window empties; cut: it stays full, noisy chunks are dropped
    # where it runs
    mode: Literal["window", "causal", "displaced"] = "window"  # which chunks see each other; see README
    allow_untrained_causal: bool = False  # mode=causal although the weights never met its mask
    displaced: DisplacedConfig = field(default_factory=DisplacedConfig)  # of mode=displaced
    num_stages: StageCount = 0  # 0 = in this process, without Ray
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: this process' GPU if there is one; stages: gpus_per_stage
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of weights; auto: as stored, float32 on CPUs
    threads_per_stage: Threads = 1  # of torch, on CPUs
    streams: _Count = 1  # videos in flight
    layers_per_stage: list[Annotated[int, Within(1)]] | None = None  # blocks of each stage; None = balanced by cost
    balance: Literal["estimated", "measured"] = "estimated"  # cost by FLOP, or timed once here and kept
    backend: Literal["auto", "gloo", "nccl"] = "auto"  # between stages; auto: nccl where each has a GPU of its own
    compile: Literal["auto", "true", "false"] = (
        "auto"  # blocks of stages (torch.compile); auto: on GPUs; other last bits
    )
    # of mode=causal, displaced: noisy chunks that are computed together; null = 1, on GPUs what suits; other last bits
    chunks_per_unit: UnitChunks | None = None
    cpus_per_stage: _Share = 1.0  # Ray's logical CPUs
    gpus_per_stage: _Share = 0.0  # 1, or with backend=gloo a share; device=cuda means 1
    decoder: Literal["auto", "cpu", "cuda", "shared"] = "auto"  # auto: cpu beside stages, else what samples; see README
    decoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # what the codec computes in
    decoder_tile: TileSide | None = None  # pixels a side: large frames in blended tiles
    preview_decoder: str | None = None  # instead of the codec: rgb, or the file of a tiny decoder (TAEHV)
    text_device: TextDevice = "auto"  # of a pretrained text encoder, in a process of its own
    text_dtype: TextDtype = "bfloat16"  # what that text encoder computes in
    text_cache: str | None = None  # folder of what it has encoded; null = this user's
    threads_per_decoder: Threads | None = None  # None = threads_per_stage
    cpus_per_decoder: _Share = 0.0  # 0 = it shares the last stage's
    gpus_per_decoder: Annotated[float, Within(0, 1, above=True)] = 1.0  # of decoder=cuda
    ray_address: str | None = None  # None = RAY_ADDRESS, or a Ray of this process' own
    link_timeout_s: _Wait = 300.0  # silence after which a stage or a link is lost; must exceed its slowest model call
    placement_timeout_s: _Wait = 60.0  # how long resources that others hold are waited for
    start_timeout_s: _Wait = 900.0  # how long an actor may take to come up: process, weights, compiling, links
    # restarts after losses in a row that nothing was finished between; 0 = the first one ends the run
    max_restarts: Annotated[int, Within(0)] = 3
    # wait before the first of these restarts, doubled at each one after it, up to a minute
    restart_backoff_s: Annotated[float, Within(0, 1_000_000)] = 1.0
    # of context=cached, what is kept to go on from after a loss or an end: keys and values (gigabytes), clean latents,
    # whose calls are run again (megabytes), or nothing, so that a video begins anew; the bits are the same
    recovery: Literal["keys", "replay", "none"] = "keys"
    # how long a restart waits for lost machines before it makes do with fewer stages
    node_wait_s: Annotated[float, Within(0, 1_000_000)] = 30.0
    # times its usual time per chunk after which a video that gives none is reported
    stall_factor: Annotated[float, Within(0, 1_000_000, above=True)] = 10.0
    stall_limit_s: _Wait = 3600.0  # and after which it is ended, so that the others go on
    # what is told and written
    progress: Literal["auto", "openjd", "deadline"] = "auto"  # a bar or log lines; or with lines that a farm reads
    trace: str | None = None  # .json of what every stage did when, for `pavdm simulate trace=FILE chart=FILE.png`
    output: str = "outputs"  # a .mp4 file, or a folder that gets NNNN-words-sSEED.mp4
    chunks_per_segment: Annotated[int, Within(0, 1_000_000, above=True)] = 6  # an unfinished video grows by so many
    save_latents: bool = False  # keep the clean latents beside the video


@dataclass
class ClusterConfig:
    """Devices and a job mix, for the planner."""

    devices: Annotated[int, Within(1, 100_000)] | None = None  # GPUs at hand; the planner speaks up when it is set
    memory_gib: _Rate = 80.0  # of one device
    tflops: _Rate = 100.0  # what one sustains on this model
    decoder_tflops: _Rate | None = None  # what a decoder on CPUs sustains; null leaves it out of the plan
    link_gib_per_s: _Rate = 20.0  # between two of them
    link_latency_ms: Annotated[float, Within(0, 1_000_000)] = 0.1  # of one message between two of them
    # of a block and micro-batch beyond its FLOP; above 0 the planner chooses chunks_per_unit, too
    block_overhead_ms: Annotated[float, Within(0, 1_000_000)] = 0.0
    videos: Annotated[int, Within(1, 1_000_000)] = 1  # of the given length, all at hand from the start
    price_per_device_hour: Annotated[float, Within(0, 1_000_000)] = 0.0  # in any currency; 0 = costs are not told
    chart: str | None = None  # .png of what the chosen stages do when


@dataclass
class PlanConfig(SampleConfig):
    """Everything ``pavdm plan`` knows: a run's settings and what it may run on."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)


# What a run without stages would not read.
_OF_STAGES = (
    "cpus_per_stage",
    "gpus_per_stage",
    "threads_per_decoder",
    "cpus_per_decoder",
    "gpus_per_decoder",
    "backend",
    "ray_address",
    "link_timeout_s",
    "placement_timeout_s",
    "start_timeout_s",
    "max_restarts",
    "restart_backoff_s",
    "node_wait_s",
    "stall_factor",
    "stall_limit_s",
)


def validate_sample(config: SampleConfig, *, needs_prompt: bool = True) -> None:
    """Refuse settings that contradict one another or can never be legal.

    Args:
        needs_prompt: False for ``pavdm plan``, which renders nothing.

    Raises:
        ConfigError: with the field, its value and what is legal.
    """
    check_fields(config)
    _check_output(config.output)
    if needs_prompt and config.streams > 1 and not config.num_stages:
        raise ConfigError(f"streams={config.streams}: without stages videos are made one after another; set num_stages")
    if config.num_frames is not None and config.seconds is not None:
        raise ConfigError(f"num_frames={config.num_frames} and seconds={config.seconds:g}: give one of them")
    if isinstance(config, PlanConfig) and config.cluster.devices is None:
        for setting in dataclasses.fields(ClusterConfig):
            value = getattr(config.cluster, setting.name)
            if value != setting.default:
                raise ConfigError(f"cluster.{setting.name}={value}: is for a cluster; set cluster.devices=N, too")
    _check_plan(config)
    _check_prompts(config, needs_prompt)
    _check_start(config, needs_clip=needs_prompt)
    _check_stages(config)


def _check_output(output: str) -> None:
    """Refuses what would become a folder though a file was meant."""
    if not output:
        raise ConfigError("output: name an .mp4 file or a folder")
    if is_remote(output):  # before the store is asked what is there
        check_store(output, "output")
    name, suffix = os.path.splitext(output)
    if suffix.lower() in _OTHER_FILES and not os.path.isdir(output):
        raise ConfigError(f"output={output}: videos are written as .mp4; use output={name}.mp4, or name a folder")


def frames_wanted(config: SampleConfig, fps: float) -> int:
    """New frames to render at ``fps`` (the resolved rate): ``num_frames``, or ``seconds``, or 5 seconds."""
    if config.num_frames is not None:
        return config.num_frames
    seconds = DEFAULT_SECONDS if config.seconds is None else config.seconds
    return max(1, round(seconds * fps))


def _check_plan(config: SampleConfig) -> None:
    steps, width = config.num_inference_steps, config.window_chunks
    if steps is not None and width is not None and config.context != "cached":  # the model may know of more context
        context = 1 if config.context_chunks is None else config.context_chunks
        size, partitions, lookahead = config.latent_chunk_size or 1, config.partitions or 1, bool(config.lookahead)
        block, kind = block_chunks(config.method, width), (config.start, config.end)
        WindowPlan(steps, width, size, context, *kind, partitions=partitions, lookahead=lookahead, block_chunks=block)


def _check_prompts(config: SampleConfig, needs_prompt: bool) -> None:
    if config.prompt is not None and config.prompts is not None:
        raise ConfigError(f"prompt={config.prompt!r} and prompts={config.prompts}: give one of them")
    first = first_prompt(config.timed_prompts)
    if needs_prompt and config.prompts is None and not (config.prompt or first or "").strip():
        raise ConfigError('nothing to render: give a prompt, pavdm sample "a red three drifting up", or prompts=FILE')
    if config.prompts is not None:
        if not os.path.isfile(config.prompts):
            what = "is no regular file" if os.path.lexists(config.prompts) else "no such file"
            raise ConfigError(f"prompts={config.prompts}: {what}")
        if config.output.lower().endswith(".mp4"):
            raise ConfigError(f"output={config.output}: prompts=FILE renders several videos, output must be a folder")
    check_changes(config.prompt_schedule, config.timed_prompts)
    check_first(config.prompt, first)
    if first is not None and config.prompts is not None:
        raise ConfigError(f"prompts={config.prompts} and timed_prompts[0s]={first!r}: give one of them")


def check_first(prompt: str | None, at_zero: str | None) -> None:
    """Refuses two prompts that a video would begin with.

    Args:
        prompt: of the video; None = none.
        at_zero: that of second 0 among its prompts by time (:func:`~pavdm_dist.values.timed.first_prompt`).

    Raises:
        ConfigError: both are given, and not the same.
    """
    if at_zero is not None and prompt not in (None, at_zero):
        raise ConfigError(f"prompt={prompt!r} and timed_prompts[0s]={at_zero!r}: give one of them")


def check_changes(prompt_schedule: Sequence[PromptChange], timed_prompts: Mapping[str, str]) -> None:
    """Refuses later prompts that are given twice, or out of order.

    Raises:
        ConfigError: with the field, its value and what is legal.
    """
    if timed_prompts and prompt_schedule:
        raise ConfigError("prompt_schedule and timed_prompts: give one of them")
    timed(timed_prompts)
    previous = 0
    for change in prompt_schedule:
        if not change.prompt.strip():
            raise ConfigError(f"prompt_schedule: from_chunk={change.from_chunk} has an empty prompt")
        if change.from_chunk <= previous:
            raise ConfigError(
                f"prompt_schedule: from_chunk={change.from_chunk} must be above {previous}, "
                "the chunk where the prompt before it starts"
            )
        previous = change.from_chunk


def _check_start(config: SampleConfig, needs_clip: bool) -> None:
    if config.start == "noise" and config.video is not None:
        raise ConfigError(f"video={config.video}: start=noise uses no clip; set start=clip or start=chunk")
    if needs_clip and config.start != "noise" and config.video is None:
        raise ConfigError(f"start={config.start}: needs a conditioning clip, video=FILE")
    if config.video is not None and not os.path.isfile(config.video):
        raise ConfigError(f"video={config.video}: no such file")
    if config.image is not None and config.start != "noise":
        raise ConfigError(
            f"image={config.image}: start={config.start} begins with a clip; set start=noise, or drop the image"
        )
    if config.image is not None and not os.path.isfile(config.image):
        raise ConfigError(f"image={config.image}: no such file")
    if config.include_input and config.video is None:
        raise ConfigError("include_input=true: there is no input, video=FILE is not set")


def _check_stages(config: SampleConfig) -> None:
    split = config.layers_per_stage
    if config.trace is not None and not config.num_stages:
        raise ConfigError(f"trace={config.trace}: there are no stages to trace with num_stages=0")
    if config.trace is not None and not config.trace.endswith(".json"):
        raise ConfigError(f"trace={config.trace}: must end in .json")
    if config.balance == "measured" and not config.num_stages:
        raise ConfigError("balance=measured: there is nothing to balance with num_stages=0")
    if config.compile == "true" and not config.num_stages:
        raise ConfigError(
            "compile=true: there are no stages to compile for with num_stages=0; set num_stages=1 or more"
        )
    for name in () if config.num_stages else _OF_STAGES:
        value = getattr(config, name)
        if value != getattr(SampleConfig, name):
            instead = "; device=cuda samples on this process' GPU" if name == "gpus_per_stage" else ""
            raise ConfigError(f"{name}={value}: is for stages, there are none with num_stages=0{instead}")
    if config.device == "cpu" and config.gpus_per_stage:
        raise ConfigError(f"device=cpu: gpus_per_stage={config.gpus_per_stage:g} gives every stage a GPU; drop one")
    if split is None:
        return
    if config.balance != "estimated":
        raise ConfigError(f"balance={config.balance}: layers_per_stage={split} leaves nothing to balance; drop one")
    if config.num_stages and len(split) != config.num_stages:
        raise ConfigError(f"layers_per_stage={split}: has {len(split)} entries for num_stages={config.num_stages}")
    if not config.num_stages:
        raise ConfigError(f"layers_per_stage={split}: has no meaning with num_stages=0, set num_stages={len(split)}")
