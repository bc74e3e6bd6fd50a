"""Refuses settings that cannot train, before any process does anything; and says what would free memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from pavdm_dist.data.buckets import Bucket
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.objective import Objective
from pavdm_dist.train.recompute import Recompute
from pavdm_dist.train.run_log import check_trackers
from pavdm_dist.train.save_reading import any_there
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.zero_settings import deepspeed_json, engine_settings

# What a file of settings has for a value that whoever uses it must give, as everywhere with OmegaConf.
_TO_GIVE = "???"
# No process is waited for longer; what torch is told may not be without end.
_YEAR_S = 365 * 24 * 3600
# Values from the first number on, up to the second; the third says whether the first is one of them.
_POSITIVE, _FROM_0, _FROM_1, _SHARE = (0, math.inf, False), (0, math.inf, True), (1, math.inf, True), (0, 1, True)
_LIMITS = {
    "seed": (0, 2**64 - 1, True), "threads": _FROM_1, "max_seconds": _FROM_0, "checkpoint_every_seconds": _FROM_0,
    "keep_last": _FROM_1, "keep_every_steps": _FROM_0, "sheet_every_seconds": _FROM_0, "log_every_steps": _FROM_1,
    "data.clips": _FROM_1, "data.num_latents": _FROM_1, "codec.batch_size": _FROM_1, "codec.budget_seconds": _FROM_0,
    "codec.decoder_seconds": _FROM_0, "codec.learning_rate": _FROM_0, "codec.z_dim": _FROM_1,
    "model.depth": _FROM_1, "model.text_depth": _FROM_1, "model.hidden_size": _FROM_1, "model.num_heads": _FROM_1,
    "model.caption_channels": _FROM_1, "model.model_max_length": _FROM_1,
    "data.prefetch": _FROM_0, "data.still_share": _SHARE, "data.still_steps": _FROM_0,
    "optimizer.lr": _FROM_0, "optimizer.matrix_ratio": _POSITIVE, "optimizer.weight_decay": _FROM_0,
    "optimizer.grad_clip": _FROM_0, "optimizer.total_steps": _FROM_0, "optimizer.warmup_steps": _FROM_0,
    "optimizer.final_ratio": _SHARE, "optimizer.ema_decay": _SHARE,
    "objective.prompt_dropout": _SHARE, "objective.full_share": _SHARE, "objective.growing_share": _SHARE,
    "objective.causal_share": _SHARE, "objective.text_share": _SHARE, "objective.shift_scale": _FROM_0,
    "objective.variance_scale": _FROM_0, "objective.context_noise": _FROM_0, "model.lora.rank": _FROM_0,
    "quality.prompts": _FROM_0, "quality.stills": _FROM_0, "quality.video_seconds": _POSITIVE,
    "quality.max_seconds": _FROM_0, "validation.every_steps": _FROM_0, "validation.batches": _FROM_1,
    "validation.clips": _FROM_0,
    "zero.bucket_elements": _FROM_1, "launch.timeout_seconds": (0, _YEAR_S, False),
    "launch.placement_timeout_s": _POSITIVE,
    "launch.gpus_per_worker": _FROM_0, "launch.cpus_per_worker": _FROM_0,
}  # fmt: skip


def check_values(config: TrainConfig) -> None:
    """Refuses values that no run can have, before anything is made of them.

    Raises:
        ConfigError: naming the field, its value and the legal ones; or those that the config file leaves to be given.
    """
    if names := list(_to_give(config)):
        raise ConfigError(f"{' and '.join(names)}: must be given ({' '.join(f'{name}=...' for name in names)})")
    for name, (low, high, inclusive) in _LIMITS.items():
        value: float = config  # type: ignore[assignment]
        for part in name.split("."):
            value = getattr(value, part)
        number = isinstance(value, int) or math.isfinite(value)
        fits = number and (low <= value if inclusive else low < value) and value <= high
        if not fits:
            legal = f"{low} or more" if inclusive else f"above {low}"
            if high < math.inf:
                legal = f"{low} to {high}" if inclusive else f"{legal}, at most {high}"
            raise ConfigError(f"{name}={value}: must be {legal}")
    for name, values, count in (
        ("optimizer.betas", config.optimizer.betas, 2),
        ("model.patch_size", config.model.patch_size, 3),
    ):
        if len(values) != count:
            raise ConfigError(f"{name}={values}: must have {count} entries")
    if min(config.model.patch_size) < 1:
        raise ConfigError(f"model.patch_size={config.model.patch_size}: must be 1 or more each, such as [1, 2, 2]")
    if config.profile_steps and (len(config.profile_steps) != 2 or min(config.profile_steps) < 0):
        raise ConfigError(f"profile_steps={config.profile_steps}: must be [first step, number of steps], or []")
    if config.peak_tflops is not None and not 0 < config.peak_tflops < math.inf:
        raise ConfigError(f"peak_tflops={config.peak_tflops}: must be above 0, or null")
    if any(not 0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas={config.optimizer.betas}: must be from 0 to below 1")
    both = config.objective.full_share + config.objective.growing_share
    if both > 1 + 1e-9:
        raise ConfigError(
            f"objective.full_share={config.objective.full_share} and growing_share={config.objective.growing_share}:"
            " together at most 1, the rest is draining windows"
        )


def _to_give(settings: Any, prefix: str = "") -> Iterator[str]:
    """Names of settings that are still to be given; what mappings hold is another library's, or a model's default."""
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from _to_give(value, f"{name}.")
        elif _TO_GIVE in (value if isinstance(value, list) else [value]):
            yield name


def check_settings(config: TrainConfig, size: int) -> None:
    """Refuses what cannot train, before any process does anything.

    Args:
        config: settings.
        size: how many processes there are.

    Raises:
        ConfigError: naming the field, its value and the nearest legal ones.
    """
    check_values(config)
    check_trackers(config.trackers)
    z, o, m = config.zero, config.optimizer, config.model
    if m.lora.rank and m.pretrained is None:
        raise ConfigError(
            f"model.lora.rank={m.lora.rank}: there is nothing to change; name the model in model.pretrained, or use 0"
        )
    if m.lora.alpha is not None and not 0 < m.lora.alpha < math.inf:
        raise ConfigError(f"model.lora.alpha={m.lora.alpha}: must be above 0")
    if z.stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero.stage={z.stage}: must be 0, 1, 2 or 3")
    if z.precision == "bfloat16" and z.stage == 0:
        raise ConfigError(
            "zero.precision=bfloat16 with zero.stage=0: DeepSpeed starts Adam one step late there and trains wrongly; "
            "use zero.stage=1, or zero.precision=autocast"
        )
    if o.name == "muon" and z.stage > 0:
        raise ConfigError(
            f"optimizer.name=muon with zero.stage={z.stage}: Muon needs whole matrices, which ZeRO cuts up; "
            "use optimizer.name=adamw, or zero.stage=0"
        )
    if o.name == "deepspeed" and "optimizer" not in deepspeed_json(config):
        raise ConfigError('optimizer.name=deepspeed: the DeepSpeed settings have no "optimizer" block')
    if z.offload != "none" and z.stage == 0:
        raise ConfigError(f"zero.offload={z.offload} with zero.stage=0: nothing is sharded; use zero.stage=1, 2 or 3")
    if z.offload == "all" and z.stage != 3:
        raise ConfigError(f"zero.offload=all with zero.stage={z.stage}: weights can leave the device at stage 3 only")
    if z.init and z.stage != 3:
        raise ConfigError(f"zero.init=true with zero.stage={z.stage}: weights are sharded at stage 3 only")
    if Recompute.parse(z.recompute).budget is not None and config.sequence_parallel > 1:
        raise ConfigError(
            f"zero.recompute={z.recompute} with sequence_parallel={config.sequence_parallel}: processes that share a"
            " window must compute the same blocks again; use every:N"
        )
    if Recompute.parse(z.recompute).budget is not None and z.stage == 3 and size > 1:
        raise ConfigError(
            f"zero.recompute={z.recompute} with zero.stage=3 on {size} processes: each would choose by its own"
            " texts' lengths, and wait for weights that the others do not ask for; use every:N, or zero.stage=2"
        )
    if z.gradients == "float32" and z.precision != "bfloat16":
        raise ConfigError(
            f"zero.gradients=float32 with zero.precision={z.precision}: gradients have that type already; use auto"
        )
    if config.compile and z.stage == 3:
        raise ConfigError(
            "compile=true with zero.stage=3: compiled functions would read weights that are sharded; use zero.stage=2, "
            "or compile=false"
        )
    if o.accumulation < 1:
        raise ConfigError(f"optimizer.accumulation={o.accumulation}: at least 1 is needed")
    if config.sequence_parallel < 1 or size % config.sequence_parallel:
        legal = " or ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ConfigError(
            f"sequence_parallel={config.sequence_parallel} does not divide the {size} processes: use {legal}"
        )
    _check_batches(config, size)
    engine_settings(config, size)


def _check_batches(config: TrainConfig, size: int) -> None:
    """Refuses batches that do not divide among the processes."""
    d, accumulation = config.data, config.optimizer.accumulation
    sizes = {f"data.batch_size={d.batch_size}": d.batch_size}
    sizes |= {bucket_size(name, value): value for name, value in d.batch_sizes.items()}
    groups = dict.fromkeys(sizes, size // config.sequence_parallel)
    stills = f"data.still_batch_size={d.still_batch_size}"
    if not d.folder and (d.still_steps or d.still_share):
        # Single frames cannot be cut, so that the processes of a window share them out.
        sizes[stills], groups[stills] = d.still_batch_size, size
    for given, value in sizes.items():
        unit = groups[given] * accumulation
        if value < 1 or value % unit:
            parts = f" x {accumulation} accumulated parts" if accumulation > 1 else ""
            among = f"{groups[given]} processes{parts}"
            if value > 0 and given != stills and (counts := _counts_of_old_run(config, sizes, stills, size)):
                raise ConfigError(
                    f"{given} does not divide among {among}, and a run that is gone on with keeps it: use {counts}"
                    " processes"
                )
            raise ConfigError(f"{given} does not divide among {among}: use {_nearest(value, unit)}")


def bucket_size(name: str, value: object) -> str:
    """The batch size of one bucket as it can be given: dots and other signs of names divide no keys in there."""
    return f"data.batch_sizes={{{name}: {value}}}"


def check_pictures(config: TrainConfig, size: int, buckets: Iterable[Bucket]) -> None:
    """Refuses batches of pictures, which the processes of a window share out, that do not divide among all.

    Args:
        config: settings that :func:`check_settings` has passed.
        size: how many processes there are.
        buckets: those with clips; one of a single latent frame holds pictures.

    Raises:
        ConfigError: naming the field, its value and the nearest legal ones.
    """
    unit = size * config.optimizer.accumulation
    parts = f" x {config.optimizer.accumulation} accumulated parts" if config.optimizer.accumulation > 1 else ""
    for name in (str(bucket) for bucket in buckets if bucket.num_latents == 1):
        value = config.data.batch_sizes.get(name, config.data.batch_size)
        if value % unit:
            raise ConfigError(
                f"{bucket_size(name, value)} with sequence_parallel={config.sequence_parallel}: pictures cannot"
                f" be cut in frames, and so many do not divide among {size} processes{parts}: use"
                f" {_nearest(value, unit)}"
            )


def check_lengths(objective: Objective, buckets: Iterable[Bucket]) -> None:
    """Refuses clips that some kind of the objective's windows cannot be drawn from; pictures have no windows.

    Args:
        objective: with its mixture.
        buckets: those with clips.

    Raises:
        ConfigError: naming the field, its value and the nearest legal ones.
    """
    kinds = objective.kinds()
    for bucket in buckets:
        for _, kind in kinds if bucket.num_latents > 1 else ():
            kind.check_clips(f"bucket {bucket}", bucket.num_latents)


def _nearest(value: int, unit: int) -> str:
    """The multiples of ``unit`` next to a value, those that are above 0."""
    below = max(value - value % unit, 0)
    return " or ".join(str(number) for number in (below, below + unit) if number > 0)


def _counts_of_old_run(config: TrainConfig, sizes: dict[str, int], stills: str, size: int) -> str:
    """Numbers of processes next to ``size`` that can go on with what is in ``run_dir``; empty where nothing is."""
    if config.resume == "never" or not any_there(Path(config.run_dir) / "checkpoints"):
        return ""

    def fits(count: int) -> bool:
        groups = {given: count if given == stills else count // config.sequence_parallel for given in sizes}
        return all(value % (groups[given] * config.optimizer.accumulation) == 0 for given, value in sizes.items())

    step, most = config.sequence_parallel, max(sizes.values()) * config.sequence_parallel
    below = [count for count in range(step, size, step) if fits(count)][-1:]
    above = [count for count in range(size - size % step + step, most + 1, step) if fits(count)][:1]
    return " or ".join(map(str, below + above))


def memory_advice(config: TrainConfig, step: int, size: int) -> str:
    """What frees memory, of what ``size`` processes may be told to do."""
    z, o = config.zero, config.optimizer
    freed = {0: "the optimizer's state", 1: "gradients", 2: "weights", 3: "nothing"}[z.stage]
    ideas = {
        "zero.recompute=every:1 frees the insides of the blocks": replace(config, zero=replace(z, recompute="every:1")),
        f"optimizer.accumulation={2 * o.accumulation} halves the activations": replace(
            config, optimizer=replace(o, accumulation=2 * o.accumulation)
        ),
        f"zero.stage={z.stage + 1} shards {freed} too": replace(config, zero=replace(z, stage=z.stage + 1)),
        "zero.offload=optimizer keeps the optimizer's state in main memory": replace(
            config, zero=replace(z, offload="optimizer")
        ),
    }
    if o.name == "muon":
        sharded = replace(config, optimizer=replace(o, name="adamw"), zero=replace(z, stage=1))
        ideas["optimizer.name=adamw zero.stage=1 (a new run) shards the optimizer's state"] = sharded
    found = []
    for words, changed in ideas.items():
        with suppress(ConfigError):
            check_settings(changed, size)
            found += [words] if changed != config else []
    return f"the device's memory is full at step {step}; the last checkpoint is kept: {'; '.join(found)}"
