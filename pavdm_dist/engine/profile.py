"""Seconds of half-blocks, embedding and head on this machine, measured once per (model, shape, device) and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pavdm_dist.engine.partition import Costs, measure_costs
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config
from pavdm_dist.observe import cpu_model

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where measurements are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, in ``pavdm_dist/costs``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pavdm_dist" / "costs"


def profiled_costs(
    config: STDiT3Config, frames: int, cells: tuple[int, int], info: FrameInfo, threads: int, device: str = "cpu"
) -> Costs:
    """Costs of a micro-batch in seconds, from the cache or measured now (some seconds).

    All spatial half-blocks are alike, and all temporal ones: one of each is built, with random weights.

    Args:
        config: shape of the model.
        frames, cells: latent frames and latent height and width of a micro-batch.
        info: picture size and rate.
        threads: intra-op threads of a stage.
        device: ``cpu`` or ``cuda``.
    """
    where = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}, {threads} threads"
    facts = {"model": asdict(config), "frames": frames, "cells": cells, "device": where, "torch": torch.__version__}

    def measure() -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.random.fork_rng():
                model = STDiT3(replace(config, depth=1)).eval().requires_grad_(False).to(device)
            costs = measure_costs(model, model.grid(frames, *cells), model.spec.text_len, info)
        finally:
            torch.set_num_threads(before)
        return {"spatial": costs.blocks[0], "temporal": costs.blocks[1], "embed": costs.embed, "head": costs.head}

    found = kept("blocks", facts, measure)
    return Costs((found["spatial"], found["temporal"]) * config.depth, found["embed"], found["head"])


def kept(kind: str, facts: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement under its ``facts``; taken now where none is kept, or what is kept cannot be read."""
    key = hashlib.sha256(json.dumps([kind, facts], sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder() / f"{key}.json"
    try:
        content = json.loads(file.read_text())
        if content["facts"] == json.loads(json.dumps(facts)):
            return content["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = measure()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed, because several runs may measure at once.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as aside:
            json.dump({"facts": facts, "found": found}, aside)
        os.replace(aside.name, file)
    except OSError as error:
        logger.warning("%s: the measured costs cannot be kept (%s)", file.parent, error.strerror)
    return found
