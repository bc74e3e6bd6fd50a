"""Settings that were given and that this run would not read: refused where they say who trains, told of elsewhere."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

from pavdm_dist.errors import ConfigError
from pavdm_dist.train.train_settings import TrainConfig

logger = logging.getLogger(__name__)

_OF_RAY = ("ray_address", "gpus_per_worker", "cpus_per_worker", "max_failures", "placement_timeout_s")
_OF_DIGITS = ("clips", "num_latents", "still_steps", "still_share", "still_batch_size")
_OF_FOLDERS = ("model", "text_device", "text_dtype", "text_cache", "pixels", "batch_sizes", "prefetch")


def check_effect(config: TrainConfig, size: int) -> None:
    """Refuses settings of launchers that are not used, and warns of others that have no effect.

    Args:
        config: settings.
        size: how many processes a launcher started; 1 without one.

    Raises:
        ConfigError: naming the setting, its value, and what it is for.
    """
    wanted = config.launch
    if size > 1:
        if wanted.processes == size:  # as one of these was started
            return
        if os.environ.get("RANK", "0").strip() == "0":
            _tell(_unused(config))
            _tell_held_out(config)
            for name in ("processes", "ray_workers"):
                if value := dict(_given(wanted, (name,))):
                    logger.warning(
                        "launch.%s=%s has no effect: a launcher started %d processes", name, value[name], size
                    )
        return
    if not wanted.ray_workers:
        for name, value in _given(wanted, _OF_RAY):
            raise ConfigError(f"launch.{name}={value}: is for workers on Ray, there are none with launch.ray_workers=0")
    _tell(_unused(config))
    _tell_held_out(config)


def _unused(config: TrainConfig) -> Iterator[tuple[str, Any, str]]:
    """Name, value and why of every setting outside ``launch`` that was given and is not read."""
    d, m, o = config.data, config.model, config.optimizer
    codec, quality = _names(config.codec), _names(config.quality)
    groups: list[tuple[str, Any, Iterable[str], str]] = []
    if d.folder:
        why = f"data.folder={', '.join(d.folder)} is trained on, not the digit world"
        groups += [
            ("data", d, _OF_DIGITS, why),
            ("codec", config.codec, codec, why),
            ("world", config.world, _names(config.world), why),
            ("quality", config.quality, quality, why),
            ("model", m, ("text_depth",), why),
        ]
    else:
        groups.append(("data", d, _OF_FOLDERS, "it is of data.folder"))
        if not d.still_steps and not d.still_share:
            groups.append(("data", d, ("still_batch_size",), "it is of data.still_steps and data.still_share"))
        if config.codec.folder is not None:
            groups.append(("codec", config.codec, codec[1:], f"codec.folder={config.codec.folder} is trained already"))
        elif m.pretrained is not None:
            groups.append(("codec", config.codec, codec[1:], f"the codec of model.pretrained={m.pretrained} is used"))
    if m.pretrained is not None:
        sizes = tuple(name for name in _names(m) if name not in ("pretrained", "lora"))
        groups.append(("model", m, sizes, f"the sizes of model.pretrained={m.pretrained} count"))
    if not d.folder:
        groups.append(("validation", config.validation, ("clips",), "it is of data.folder"))
    if not config.validation.every_steps:
        groups.append(("validation", config.validation, ("batches",), "it is of validation.every_steps"))
    if not m.lora.rank:
        groups.append(("model.lora", m.lora, ("alpha", "targets"), "it is of model.lora.rank"))
    else:
        why = f"it is kept with whole models, model.lora.rank={m.lora.rank} makes a LoRA"
        groups.append(("", config, ("sampling",), why))
        if not d.folder:  # else it is told above
            why = f"whole models are looked at, model.lora.rank={m.lora.rank} makes a LoRA"
            groups.append(("quality", config.quality, quality, why))
    if o.name != "muon":
        groups.append(("optimizer", o, ("matrix_ratio",), "it is of optimizer.name=muon"))
    if config.zero.stage == 0:
        groups.append(("zero", config.zero, ("bucket_elements",), "it is of zero.stage=1, 2 and 3"))
    common = config.objective.pattern
    patterns = {kind.pattern or common for kind in config.objective.mixture} or {common}
    if not any("variance" in pattern for pattern in patterns):
        why = "it is of objective.pattern=linear-variance and linear-variance-shift"
        groups.append(("objective", config.objective, ("variance_scale",), why))
    if not any("shift" in pattern for pattern in patterns):
        why = "it is of objective.pattern=linear-shift and linear-variance-shift"
        groups.append(("objective", config.objective, ("shift_scale",), why))
    if not config.objective.context_chunks:
        why = "there is no clean context with objective.context_chunks=0"
        groups.append(("objective", config.objective, ("context_noise",), why))
    methods = {config.objective.method, *(kind.method or config.objective.method for kind in config.objective.mixture)}
    if methods == {"replacement-noise"}:
        why = "objective.method=replacement-noise noises context to the level of the chunks behind it"
        groups.append(("objective", config.objective, ("context_noise",), why))
    for section, values, names, why in groups:
        yield from ((f"{section}.{name}".removeprefix("."), value, why) for name, value in _given(values, names))


def _names(settings: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(settings))


def _tell_held_out(config: TrainConfig) -> None:
    """Clips that are left out of training and never looked at: that has an effect, and hardly the one wished for."""
    v = config.validation
    if config.data.folder and v.clips and not v.every_steps:
        logger.warning(
            "validation.clips=%d leaves clips out of training that are never looked at: validation.every_steps=0",
            v.clips,
        )


def _given(values: Any, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Fields that are not what they are by default."""
    default = type(values)()
    return ((name, getattr(values, name)) for name in names if getattr(values, name) != getattr(default, name))


def _tell(unused: Iterable[tuple[str, Any, str]]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, value, why in unused:
        by_reason.setdefault(why, []).append(f"{name}={value}")
    for why, settings in by_reason.items():
        logger.warning("no effect: %s; %s", ", ".join(dict.fromkeys(settings)), why)
