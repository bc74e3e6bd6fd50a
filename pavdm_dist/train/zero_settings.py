"""DeepSpeed's settings from ours, with contradictions refused by name before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pavdm_dist.errors import ConfigError
from pavdm_dist.train.train_settings import OptimizerConfig, TrainConfig
from pavdm_dist.values.fields import json_value

# DeepSpeed's name of what our settings already say -> our name.
OURS = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size / (processes x optimizer.accumulation)",
    "gradient_accumulation_steps": "optimizer.accumulation",
    "gradient_clipping": "optimizer.grad_clip",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.reduce_bucket_size": "zero.bucket_elements",
    "bf16.enabled": "zero.precision",
    "fp16.enabled": "zero.precision",
    "zero_optimization.offload_optimizer.device": "zero.offload",
    "zero_optimization.offload_param.device": "zero.offload",
    "torch_autocast.enabled": "zero.precision",
    "sequence_parallel_size": "sequence_parallel",
}
# Sections of DeepSpeed's that nothing here asks it to act on -> what does as much, or that nothing does.
_UNUSED = {
    "activation_checkpointing": "zero.recompute says what is computed again",
    "data_efficiency": "batches and their order are this package's",
    "pipeline": "layers are not cut into stages to train",
    "weight_quantization": "zero.precision is the type of weights",
}


def deepspeed_json(config: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed settings a user gave, the file's below those in the config.

    Raises:
        ConfigError: the file is missing or no JSON object.
    """
    found: dict[str, Any] = {}
    if config.deepspeed_config is not None:
        path = Path(config.deepspeed_config)
        try:
            found = json_value(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"deepspeed_config={path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ConfigError(f"deepspeed_config={path}: not valid JSON ({error})") from error
        if not isinstance(found, dict):
            raise ConfigError(f"deepspeed_config={path}: must hold a JSON object")
    return _merged(found, config.deepspeed)


def engine_settings(config: TrainConfig, size: int) -> dict[str, Any]:
    """DeepSpeed's settings: ours, and what the user added.

    Raises:
        ConfigError: the two contradict each other.
    """
    z, o = config.zero, config.optimizer
    data_parallel = size // config.sequence_parallel
    zero: dict[str, Any] = {"stage": z.stage}
    if z.stage:
        zero["reduce_bucket_size"] = z.bucket_elements
    if z.stage == 3:
        zero["stage3_prefetch_bucket_size"] = z.bucket_elements
    if z.offload != "none":
        # torch's own AdamW in one pass, which is as fast: DeepSpeed's would be compiled at start-up, for minutes.
        zero["offload_optimizer"] = {"device": "cpu"}
    if z.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    batch = config.data.batch_size
    ours: dict[str, Any] = {
        # With sequence parallelism every process counts as data-parallel here: ZeRO then shards over all of them.
        "train_micro_batch_size_per_gpu": max(batch // (data_parallel * o.accumulation), 1),
        "gradient_accumulation_steps": o.accumulation,
        "gradient_clipping": o.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "bf16": {"enabled": z.precision == "bfloat16"},
    }
    if z.gradients == "float32":
        ours |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    theirs = deepspeed_json(config)
    _check_forms(theirs, flat(ours))
    for name, instead in _UNUSED.items():
        value = theirs.get(name)
        is_on = value not in (None, "auto")
        if isinstance(value, dict):  # files list what they leave off
            is_on = value.get("enabled") is not False and any(flat(value).values())
        if is_on:
            raise ConfigError(f"deepspeed.{name}={value}: has no effect here, {instead}; leave it out")
    if "scheduler" in theirs:
        raise ConfigError('deepspeed: "scheduler" is not used; optimizer.lr and warmup_steps give the rate')
    if "optimizer" in theirs and o.name != "deepspeed":
        raise ConfigError(f'deepspeed: "optimizer" contradicts optimizer.name={o.name}; use optimizer.name=deepspeed')
    said = {
        **flat(ours),
        "train_batch_size": batch,
        "fp16.enabled": False,
        "torch_autocast.enabled": False,
        "sequence_parallel_size": config.sequence_parallel,
        # What the loop counts on: losses and gradients are means, and a step is taken after the last part.
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
    }
    for name, value in flat(theirs).items():
        if (name in OURS or name in said) and value != "auto" and value != said.get(name, "none"):
            which = OURS.get(name, "this package")
            raise ConfigError(
                f"deepspeed: {name}={value} contradicts {which}, which makes it {said.get(name, 'none')}; give one"
            )
    if o.name == "deepspeed":
        _check_their_optimizer(theirs.get("optimizer"), o)
    merged = _merged(_merged(_defaults(config, size), _without_auto(theirs)), ours)
    merged.pop("train_batch_size", None)  # follows from the other two
    merged.pop("sequence_parallel_size", None)  # every process counts as data-parallel, as above
    return merged


def _check_forms(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> None:
    """Refuses values where a section belongs, and sections where a value does: one of both would be dropped."""
    leaves = {*OURS, *ours}
    sections = {"optimizer", "optimizer.params"}
    sections |= {parent for name in leaves if (parent := name.rpartition(".")[0])}
    for own, value in theirs.items():
        name = f"{prefix}{own}"
        absent = value is None and not any(inner.startswith(f"{name}.") for inner in ours)
        if name in sections and value != "auto" and not absent and not isinstance(value, dict):
            within = next((inner for inner in sorted(leaves) if inner.startswith(f"{name}.")), "optimizer.type")
            raise ConfigError(f"deepspeed.{name}={value}: must be an object, of values such as deepspeed.{within}")
        if name in leaves and isinstance(value, dict):
            raise ConfigError(f"deepspeed.{name}={value}: must be a value, or left out for {OURS.get(name, 'ours')}")
        if isinstance(value, dict):
            _check_forms(value, ours, f"{name}.")


def pinning(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under which offloaded parts lie in memory that a GPU reads by itself, unless they say otherwise."""
    moved = {
        name: {"pin_memory": True, **value}
        for name, value in settings["zero_optimization"].items()
        if name in ("offload_optimizer", "offload_param")
    }
    return {**settings, "zero_optimization": {**settings["zero_optimization"], **moved}}


def _defaults(config: TrainConfig, size: int) -> dict[str, Any]:
    """What DeepSpeed would decide otherwise, and a user may."""
    found: dict[str, Any] = {}
    if config.zero.precision == "bfloat16":
        # It would look through every gradient at every step; one that is no number shows in their norm, too.
        found["bf16"] = {"check_grad_overflow": False}
    if config.zero.stage in (1, 2):
        # Gradients are sent while the backward pass goes on; at stage 3 that is its own default. One process alone need
        # not copy them, one by one, to where they would be sent from: a quarter of what its backward pass costs a host.
        alone = {"contiguous_gradients": False} if config.zero.offload == "none" else {}
        found["zero_optimization"] = {"overlap_comm": True} if size > 1 else alone
    return found


def _check_their_optimizer(given: Any, ours: OptimizerConfig) -> None:
    """The rate is set at every step from ours; the rest of DeepSpeed's optimizer is what its own block says."""
    block = given if isinstance(given, dict) else {}
    kind, params = block.get("type"), block.get("params")
    if not isinstance(kind, str) or kind == "auto":
        raise ConfigError(f"deepspeed.optimizer.type={kind}: must name one of DeepSpeed's optimizers, such as AdamW")
    rate = params.get("lr", "auto") if isinstance(params, dict) else "auto"
    if rate not in ("auto", ours.lr):
        raise ConfigError(f"deepspeed: optimizer.params.lr={rate} contradicts optimizer.lr={ours.lr}; give one")
    for name in ("betas", "weight_decay"):
        value = getattr(ours, name)
        if value != getattr(OptimizerConfig(), name):
            raise ConfigError(
                f"optimizer.{name}={value} with optimizer.name=deepspeed: is not read; put it into the optimizer block"
            )


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their whole names, ``section.name``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in kept.items() if value != "auto"}
