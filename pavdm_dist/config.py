"""Settings: dataclass defaults <- YAML file <- ``key=value`` overrides.

OmegaConf stays in this file; what comes out are plain dataclasses. Every mistake is a
:class:`~pavdm_dist.errors.ConfigError` that names the field, its value and what is legal.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError, safe_dump, safe_load

from pavdm_dist.errors import ConfigError

T = TypeVar("T")

DEFAULT_SECONDS = 5.0


@dataclass
class PromptChange:
    """From chunk ``from_chunk`` (0-based, new chunks) on, newborn chunks follow ``prompt``."""

    from_chunk: int
    prompt: str


@dataclass
class DisplacedConfig:
    """When mode displaced is exact; see ``method.microbatches.Displaced``."""

    resync_every_steps: int | None = 25  # exact every so many steps; 1 = always, null = never
    exact_steps: int = 0  # exact steps at the start
    exact_growing: bool = True  # exact while the window grows
    exact_draining: bool = False  # and while it drains
    adaptive: float | None = None  # exact when keys change by more than this from step to step
    context_refresh: Literal["shift", "step"] = "shift"  # when the clean chunk is run again


@dataclass
class SampleConfig:
    """Everything ``pavdm sample`` knows, and ``pavdm plan`` of a run. ``None`` means the checkpoint's own default."""

    # what to render
    prompt: str | None = None
    negative_prompt: str | None = None
    prompt_schedule: list[PromptChange] = field(default_factory=list)
    prompts: str | None = None  # file, one prompt a line; line i gets seed + i
    seed: int = 0
    num_frames: int | None = None  # new frames; or
    seconds: float | None = None  # the same in seconds; 5 when neither is given
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    video: str | None = None  # conditioning clip of start=chunk and start=clip
    include_input: bool = False  # the clip in front of the new frames in the output
    # the method
    model: str = "embedded"  # embedded, a checkpoint folder or a hub id
    revision: str | None = None  # of a hub id: branch, tag or commit
    num_inference_steps: int | None = None  # T
    window_chunks: int | None = None  # W
    latent_chunk_size: int | None = None  # c
    context_chunks: int | None = None
    guidance_scale: float | None = None  # 1 = no guidance
    time_shift: float | None = None
    start: Literal["noise", "chunk", "clip"] = "noise"
    end: Literal["drain", "cut"] = "drain"
    # where it runs
    mode: Literal["window", "causal", "displaced"] = "window"  # which chunks see each other; see README
    allow_untrained_causal: bool = False  # mode=causal although the weights never met its mask
    displaced: DisplacedConfig = field(default_factory=DisplacedConfig)  # of mode=displaced
    num_stages: int = 0  # 0 = in this process, without Ray
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: this process' GPU if there is one; stages: gpus_per_stage
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of weights; auto: as stored, float32 on CPUs
    threads_per_stage: int = 1
    streams: int = 1  # videos in flight
    layers_per_stage: list[int] | None = None  # blocks of each stage; None = balanced by cost
    balance: Literal["estimated", "measured"] = "estimated"  # cost by FLOP, or timed once here and kept
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    compile: bool = False  # stages compile their blocks first (torch.compile; GPUs, long videos); other last bits
    cpus_per_stage: float = 1.0  # Ray's logical CPUs
    gpus_per_stage: float = 0.0  # 1, or with backend=gloo a share; device=cuda means 1
    decoder: Literal["auto", "cpu", "cuda", "shared"] = "auto"  # auto: cpu beside stages, else what samples; see README
    decoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads_per_decoder: int | None = None  # None = threads_per_stage
    cpus_per_decoder: float = 0.0  # 0 = it shares the last stage's
    gpus_per_decoder: float = 1.0  # of decoder=cuda
    ray_address: str | None = None  # None = RAY_ADDRESS, or a Ray of this process' own
    link_timeout_s: float = 300.0  # must exceed the slowest model call of a stage
    # what is written
    trace: str | None = None  # .json of what every stage did when, for `pavdm simulate trace=FILE chart=FILE.png`
    output: str = "outputs"  # a .mp4 file, or a folder that gets NNNN-words-sSEED.mp4
    chunks_per_segment: int = 6
    save_latents: bool = False


@dataclass
class ClusterConfig:
    """Devices and a job mix, for the planner."""

    devices: int | None = None  # GPUs at hand; the planner speaks up when it is set
    memory_gib: float = 80.0  # of one
    tflops: float = 100.0  # what one sustains on this model
    decoder_tflops: float | None = None  # what a decoder on CPUs sustains; null leaves it out of the plan
    link_gib_per_s: float = 20.0  # between two of them
    link_latency_ms: float = 0.1
    videos: int = 1  # of the given length, all at hand from the start
    price_per_device_hour: float = 0.0
    chart: str | None = None  # .png of what the chosen stages do when


@dataclass
class PlanConfig(SampleConfig):
    """Everything ``pavdm plan`` knows: a run's settings and what it may run on."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def load_config(cls: type[T], yaml_path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Merge ``cls``'s defaults, a YAML file and ``key=value`` overrides, later ones winning.

    Text fields take an override literally (``prompt=a: b``); other values are read as YAML; ``null`` is None.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest one is named) or a value of the wrong type.
    """
    config = OmegaConf.structured(cls)
    if yaml_path is not None:
        for key, value in _read_yaml(Path(yaml_path)).items():
            _set(config, cls, [str(key)], value, origin=f"{yaml_path}: ")
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item!r} is not an override: write key=value")
        _set(config, cls, key.split("."), text, parse=True)
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    assert isinstance(result, cls)
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain lists, dicts and scalars, for the sidecar JSON."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The settings as YAML that :func:`load_config` reads back to an equal object."""
    return safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file (`pavdm configs ls` lists the shipped ones)")
    try:
        content = safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({_first_line(error)})") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path}: must hold `key: value` lines, not {_show(content)}")
    return content or {}


def _set(config: DictConfig, cls: type, path: list[str], value: Any, *, parse: bool = False, origin: str = "") -> None:
    """Set one field, or every field of one section, descending through ``cls``'s annotations."""
    name, annotation = "", cls
    for depth, key in enumerate(path):
        known = typing.get_type_hints(annotation)
        if key not in known:
            section = f"{name}: " if name else ""
            raise ConfigError(f"{origin}{section}{_no_such_key(key, known)}")
        annotation, name = known[key], ".".join(path[: depth + 1])
        if not dataclasses.is_dataclass(annotation):
            break
    rest = path[len(name.split(".")) :]
    if rest and typing.get_origin(annotation) is not dict:
        raise ConfigError(f"{origin}{'.'.join(path)}: {name} has no keys of its own")
    if parse:
        value = _parse(annotation, name, value)
    for key in reversed(rest):
        value = {key: value}
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, dict):
            raise ConfigError(f"{origin}{name}={_show(value)}: is a section, set its keys ({name}.KEY=VALUE)")
        for key, entry in value.items():
            _set(config, cls, [*path, str(key)], entry, origin=origin)
        return
    try:
        nested = _escape(value)
        for key in reversed(name.split(".")):
            nested = {key: nested}
        config.merge_with(nested)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(origin + _explain(error, name, annotation, value)) from error


def _parse(annotation: Any, name: str, text: str) -> Any:
    """The value an override's text stands for."""
    optional = _members(annotation)
    if text == "null" and type(None) in optional:
        return None
    if str in optional or typing.get_origin(annotation) is Literal:
        return text
    try:
        return safe_load(text)
    except YAMLError as error:
        raise ConfigError(f"{name}={text}: must be {_expected(annotation)}") from error


def _explain(error: Exception, name: str, annotation: Any, value: Any) -> str:
    (inner, *_) = _members(annotation)
    item = typing.get_args(inner)[0] if typing.get_origin(inner) is list else None
    key = getattr(error, "key", None)
    if dataclasses.is_dataclass(item) and isinstance(key, str):
        known = typing.get_type_hints(item)
        if key in known:
            return f"{name}: {key}={_show(getattr(error, 'value', None))}: must be {_expected(known[key])}"
        if isinstance(error, ConfigKeyError):
            return f"{name}: {_no_such_key(key, known)}"
    where = getattr(error, "full_key", None) or name
    if item is not None and where.startswith(f"{name}["):
        return f"{where}={_show(getattr(error, 'value', None))}: must be {_expected(item)}"
    return f"{name}={_show(value)}: must be {_expected(annotation)}"


def _no_such_key(key: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), list(known), n=1, cutoff=0.5)
    hint = f"the keys are {', '.join(known)}" if len(known) <= 12 else "--print-config lists the keys"
    return f"no such key {key!r}" + (f", did you mean {near[0]}?" if near else f"; {hint}")


def _members(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _expected(annotation: Any) -> str:
    def word(kind: Any) -> str:
        if typing.get_origin(kind) is Literal:
            return ", ".join(typing.get_args(kind)[:-1]) + " or " + typing.get_args(kind)[-1]
        if typing.get_origin(kind) is list:
            (item,) = typing.get_args(kind)
            return f"a list, each entry {word(item)}"
        if dataclasses.is_dataclass(kind):
            return "{" + ", ".join(f.name for f in dataclasses.fields(kind)) + "}"
        return _WORDS.get(kind, "a mapping")

    return " or ".join(word(kind) for kind in _members(annotation))


def _show(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _escape(value: Any) -> Any:
    """Keep OmegaConf from taking ``${`` in a prompt as an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _escape(entry) for key, entry in value.items()}
    return [_escape(entry) for entry in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
