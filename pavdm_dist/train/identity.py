"""What a run must not change on the way, and how one that goes on is compared with what its checkpoint says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from pavdm_dist.codecs.pretrained_text import TextOptions
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.batch import Batches
from pavdm_dist.train.lora_training import ends_outside
from pavdm_dist.train.model import described, shape_of
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.zero_settings import deepspeed_json
from pavdm_dist.values.merging import to_dict


def identity_of(config: TrainConfig, batches: Batches) -> dict[str, Any]:
    """The data and its order, the model and the objective, by part and name.

    No paths: folders may move, and are written differently by launchers.
    """
    found = {**batches.identity, **_of_settings(config)}
    found["data"] |= batches.identity.get("data", {})
    # The optimizer's own copy of the weights differs, and DeepSpeed's files with it.
    found["zero"] = {"precision": "bfloat16" if config.zero.precision == "bfloat16" else "float32 or autocast"}
    shape: Any = shape_of(config, batches.channels)
    found["model"] |= {"shape": asdict(shape.config)}
    plain = {one.name: one.default for one in fields(shape.config) if one.default is not MISSING}
    found["older"] = {**found.get("older", {}), "shape": plain}
    lora = config.model.lora
    if lora.rank and ends_outside(shape, lora):
        # Older runs changed those maps, too.
        found["model"]["lora"] = {**found["model"]["lora"], "maps": "inside blocks"}
    return found


def check_same(root: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuses to go on with a checkpoint of other data, another model or another objective.

    What a checkpoint does not know, since it is older than the setting, was as the default is; a part that it lacks
    altogether, such as the data set of a run on digits, is none.

    Args:
        root: folder of checkpoints.
        theirs: identity that a checkpoint holds.
        ours: of this run; its part ``older`` says what checkpoints were made with that do not name it.

    Raises:
        ConfigError: naming what differs first.
    """
    older = json.loads(json.dumps(_of_older()))
    for part, values in ours.get("older", {}).items():
        older[part] = {**older.get(part, {}), **values}
    ours = {part: values for part, values in json.loads(json.dumps(ours)).items() if part != "older"}
    _check_start(root, theirs.get("model", {}), ours["model"])
    if "pretrained" in theirs.get("model", {}) and "from" not in theirs["model"]:
        # The oldest checkpoints say where the model lay, and not which it was.
        theirs = {**theirs, "model": {**theirs["model"], "from": ours["model"]["from"]}}
    if "shape" in theirs.get("model", {}):  # which may have come to have more names
        whole = {**older.get("shape", {}), **theirs["model"]["shape"]}
        theirs = {**theirs, "model": {**theirs["model"], "shape": whole}}
    for part, values in ours.items():
        known = theirs.get(part, {} if part == "zero" else None)
        for name, value in values.items():
            if known is None:
                found = older.get(part, {}).get(name)
            else:
                found = known[name] if name in known else older.get(part, {}).get(name, value)
            for where, before, now in _differences(f"{part}.{name}", found, value):
                raise ConfigError(f"{root} was trained with {where}={before}, this run has {now}")


def _of_settings(config: TrainConfig) -> dict[str, Any]:
    settings = to_dict(config)
    model = settings["model"]
    if config.model.pretrained is not None:
        model = {"lora": model["lora"], "from": described(config)}
    else:
        del model["pretrained"]
        model["from"] = None
    return {
        "run": {"seed": config.seed},
        "data": {name: settings["data"][name] for name in ("pixels", "batch_size", "batch_sizes")},
        "model": model,
        "objective": settings["objective"],
        "optimizer": {"name": config.optimizer.name, **_of_deepspeed(config)},
    }


def _of_deepspeed(config: TrainConfig) -> dict[str, str]:
    """Which of DeepSpeed's optimizers, if one of them; what it is called in capitals is the same to DeepSpeed."""
    if config.optimizer.name != "deepspeed":
        return {}
    return {"type": deepspeed_json(config)["optimizer"]["type"].lower()}


def _of_older() -> dict[str, Any]:
    """Of what checkpoints do not say that are older than the setting."""
    return {
        **_of_settings(TrainConfig()),
        "data_set": {"held_out": 0, "split": "clips", "text_dtype": TextOptions.dtype},
        "world": {"most_digits": 2, "digit_weights": []},
    }


def _check_start(root: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Whether both began with a model; which one is compared like all else."""
    before = theirs.get("from") is not None or theirs.get("pretrained") is not None
    if before and ours.get("from") is None:
        raise ConfigError(
            f"{root} was trained from a model, this run has model.pretrained=null: name that model, or another run_dir"
        )
    if not before and ours.get("from") is not None:
        raise ConfigError(
            f"{root} was trained from nothing (model.pretrained=null), this run has model.pretrained set: leave it out,"
            " or name another run_dir"
        )


def _differences(name: str, theirs: Any, ours: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of a setting differ, down to what holds no more names."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for inner in [*ours, *(inner for inner in theirs if inner not in ours)]:
            yield from _differences(f"{name}.{inner}", theirs.get(inner), ours.get(inner))
    elif theirs != ours:
        yield name, theirs, ours
