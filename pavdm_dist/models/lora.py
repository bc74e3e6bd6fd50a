"""Low-rank changes of a model's weights (LoRA), added to them as they are loaded.

Files may have the names of diffusers, of peft, or of the programs that Wan models are trained with (diffusers' own
converters read those). What a stage does not load is not changed, so that any cut has the same weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from safetensors import safe_open
from torch import Tensor

from pavdm_dist.errors import CheckpointError
from pavdm_dist.models.source import Source
from pavdm_dist.values.fields import Within, json_value, made, read_object

logger = logging.getLogger(__name__)

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"
# Where diffusers keeps a file's settings, in the file's own header.
METADATA = "lora_adapter_metadata"
_PREFIXES = ("base_model.model.", "transformer.", "pipe.dit.", "diffusion_model.")
# What files hold of tensors that are changed whole, by a difference.
_WHOLE = (".diff", ".diff_b")
# How the programs that Wan models are trained with name a block's maps. STDiT3 has a cross_attn of its own, in
# blocks of other names.
_TRAINERS = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn\.\d+)\.")

_Rank = Annotated[int, Within(1, 65_536)]
_Alpha = Annotated[float, Within(0, 1e6)]


@dataclass(frozen=True)
class _Settings:
    """What ``adapter_config.json``, or a file's header, says."""

    r: _Rank | None = None
    lora_alpha: _Alpha | None = None
    alpha_pattern: dict[str, _Alpha] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    def strength(self, modules: Iterable[str], rank: int) -> float:
        """What the product of a module's two matrices is multiplied by; ``modules``: its names, the file's first."""
        # As peft reads them: expressions that a module's name, or its end, matches.
        named = (
            alpha
            for module in modules
            for name, alpha in self.alpha_pattern.items()
            if re.match(rf"(.*\.)?({name})$", module)
        )
        alpha = next(named, self.lora_alpha)
        return 1.0 if alpha is None else alpha / (rank**0.5 if self.use_rslora else rank)


class Changes:
    """Of one file: what is added to which tensor.

    Args:
        source: folder or hub id with one of ``FILES``.
        scale: how strong; 1 is as trained.

    Raises:
        CheckpointError: no such file, or one of another kind of change.
    """

    def __init__(self, source: Source, scale: float = 1.0) -> None:
        self._source, self._scale = source, scale
        self._tensors, self._stored, self._settings = _read(source)
        tensors = self._tensors
        self._modules = {name.rpartition(".lora_A.weight")[0] for name in tensors if name.endswith(".lora_A.weight")}
        needed = {f"{module}.lora_{part}.weight" for module in self._modules for part in "AB"}
        strange = sorted(set(tensors) - needed - {f"{module}.lora_B.bias" for module in self._modules})
        missing = sorted(needed - set(tensors)) if tensors else ["of a LoRA"]
        if strange or missing:
            what = f"tensor {strange[0]} is no part of a LoRA" if strange else f"lacks tensor {missing[0]}"
            raise CheckpointError(f"lora={source}: {what}")
        for name in sorted(needed):
            if tensors[name].ndim != 2:
                raise CheckpointError(f"lora={source}: {name} has the shape {list(tensors[name].shape)}, no matrix")
        try:
            for name in self._settings.alpha_pattern:
                re.compile(name)
        except re.error as error:
            raise CheckpointError(f"lora={source}: alpha_pattern {name!r} is no expression: {error}") from error

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Refuses what does not fit a model's tensors, of the whole model, by name and shape.

        Raises:
            CheckpointError: naming the first tensor.
        """
        for module in sorted(self._modules):
            down, up = (self._tensors[f"{module}.lora_{part}.weight"] for part in "AB")
            target = expected.get(f"{module}.weight")
            if target is None:
                raise CheckpointError(f"lora={self._source}: the model has no {module}.weight, which it would change")
            if [up.shape[0], down.shape[1]] != list(target.shape) or up.shape[1] != down.shape[0]:
                raise CheckpointError(
                    f"lora={self._source}: changes {module}.weight by {list(up.shape)} times {list(down.shape)},"
                    f" it is {list(target.shape)}"
                )
            added, bias = self._tensors.get(f"{module}.lora_B.bias"), expected.get(f"{module}.bias")
            if added is not None and (bias is None or added.shape != bias.shape):
                has = "which the model has not" if bias is None else f"which is {list(bias.shape)}"
                raise CheckpointError(f"lora={self._source}: adds {list(added.shape)} to {module}.bias, {has}")

    def added(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with its change, float32; itself where it has none."""
        module, _, kind = name.rpartition(".")
        if module not in self._modules:
            return tensor
        down = self._tensors[f"{module}.lora_A.weight"]
        names = (self._stored.get(module, module), module)
        strength = self._scale * self._settings.strength(names, down.shape[0])
        if kind == "bias":
            bias = self._tensors.get(f"{module}.lora_B.bias")
            return tensor if bias is None else tensor.float() + strength * bias.to(tensor.device, torch.float32)
        up, down = (self._tensors[f"{module}.lora_{part}.weight"].to(tensor.device, torch.float32) for part in "BA")
        return tensor.float() + strength * (up @ down)


def changes_of(source: Source, expected: Mapping[str, Tensor]) -> list[Changes]:
    """The changes that a component's source names, checked against the model's tensors."""
    found = [Changes(adapter.source, adapter.scale) for adapter in source.adapters]
    for changes in found:
        changes.check(expected)
    return found


def settings_beside(source: Source) -> dict[str, Any] | None:
    """What of the settings beside a file of weights decides how it is merged; None where there are none.

    Raises:
        CheckpointError: they cannot be read.
    """
    return asdict(_settings(source, {})) if source.has(PEFT_CONFIG) else None


def lora_file(source: Source) -> str:
    """Name of the file of weights.

    Raises:
        CheckpointError: there is none.
    """
    name = next((name for name in FILES if source.has(name)), None)
    if name is None:
        raise CheckpointError(f"lora={source}: has neither {' nor '.join(FILES)}")
    return name


def _read(source: Source) -> tuple[dict[str, Tensor], dict[str, str], _Settings]:
    """Tensors by the model's own names, the file's names of modules by these, and the settings."""
    file = source.file(lora_file(source))
    try:
        with safe_open(file, framework="pt") as reader:
            header = reader.metadata() or {}
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own Rust-side type for a broken header
        raise CheckpointError(f"lora={file}: is not a readable safetensors file: {error}") from error
    settings = _settings(source, header)
    if settings.use_dora or any("dora_scale" in key or "lora_magnitude" in key for key in tensors):
        raise CheckpointError(f"lora={source}: is a DoRA; only plain LoRA can be added to weights as they are loaded")
    tensors = {_without(name, _PREFIXES).replace(".default.", "."): value for name, value in tensors.items()}
    own = _own_names(source, tensors)
    # The same tensors, so that settings can go by the names that they were written for.
    before = {id(value): name.partition(".lora_")[0] for name, value in tensors.items() if ".lora_" in name}
    stored = {name.partition(".lora_")[0]: before[id(value)] for name, value in own.items() if id(value) in before}
    return own, stored, settings


def _settings(source: Source, header: Mapping[str, str]) -> _Settings:
    values: Mapping[str, Any] = {}
    if source.has(PEFT_CONFIG):
        values = read_object(source.file(PEFT_CONFIG), CheckpointError)
    elif METADATA in header:
        try:
            values = json_value(header[METADATA])
        except ValueError as error:
            raise CheckpointError(f"lora={source}: {METADATA} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"lora={source}: {METADATA} is no JSON object")
        values = {key.removeprefix("transformer."): value for key, value in values.items()}
    return made(_Settings, values, f"lora={source}", ignore_unknown=True, error=CheckpointError)


def _own_names(source: Source, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ``MODULE.lora_A.weight`` and so on; strengths that files hold as tensors are multiplied in."""
    is_musubi = _has(plain, "lora_unet_")
    if not is_musubi and not any(_TRAINERS.match(name) for name in plain):
        return plain
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    try:
        own = WanLoraLoaderMixin.lora_state_dict(
            dict(plain) if is_musubi else {f"diffusion_model.{name}": value for name, value in plain.items()}
        )
    except (KeyError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"lora={source}: its names are not those of a Wan LoRA: {error}") from error
    kept = {id(value) for value in own.values()}
    differences = {name: value for name, value in plain.items() if name.endswith(_WHOLE) and id(value) not in kept}
    left_out = [name for name, value in differences.items() if value.any()]
    if left_out:
        logger.warning(
            "lora=%s: %d changes of whole tensors are left out, as by diffusers; the first is %s",
            source, len(left_out), left_out[0],
        )  # fmt: skip
    return {_without(name, _PREFIXES): value for name, value in own.items()}


def _has(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _without(name: str, prefixes: Iterable[str]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name
