"""Reference tensors of the few-step Wan family (``data/rolling/README.md``), and streams that should give them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.models.base import FrameInfo

INFO = FrameInfo(64, 96, 16)


def folders(pattern: str) -> list[Path]:
    """This repository's, then those under the parents that ``PAVDM_ROLLING_DIRS`` names (colon-separated)."""
    named = [Path(name) for name in os.environ.get("PAVDM_ROLLING_DIRS", "").split(":") if name]
    parents = [Path(__file__).parent / "data" / "rolling", *named]
    return [file.parent for parent in parents for file in sorted(parent.glob(f"**/{pattern}/golden.json"))]


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "golden.json").read_text())


def opened(folder: Path, component: Path) -> dict[str, Tensor]:
    """Writes the weights as they were published into a component's folder; returns all tensors."""
    shape, tensors = facts_of(folder)["model"], load_file(folder / "golden.safetensors")
    weights = {key: value for key, value in tensors.items() if key.startswith("model.")}
    save_file(weights, component / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": shape["num_heads"],
        "attention_head_dim": shape["head_dim"], "in_channels": shape["in_dim"], "out_channels": shape["out_dim"],
        "text_dim": shape["text_dim"], "freq_dim": shape["freq_dim"], "ffn_dim": shape["ffn_dim"],
        "num_layers": shape["num_layers"], "eps": shape["eps"], "text_len": shape["text_len"],
    }  # fmt: skip
    (component / "config.json").write_text(json.dumps(config))
    return tensors


def plan_of(facts: dict[str, Any]) -> WindowPlan:
    """Of a run: rolling ones keep their first chunk in sight, where the window is one chunk wide none is kept."""
    latent, width = facts["latent"], facts["window_chunks"]
    span = facts["attend_latents"] // latent["chunk"]
    return WindowPlan(
        facts["num_steps"], width, latent["chunk"], span - 1, num_chunks=facts["num_chunks"], context="cached",
        anchor_chunks=int(width > 1),
    )  # fmt: skip


def stream_of(facts: dict[str, Any], tensors: dict[str, Tensor], **plan: Any) -> Stream:
    """The run; fields of its plan can be overridden."""
    latent = facts["latent"]
    return Stream(
        id=0,
        plan=replace(plan_of(facts), **plan),
        schedule=NoiseSchedule(facts["num_steps"], table=tuple(tensors["sigma"].tolist())),
        seed=facts["noise"]["seed"],
        latent_shape=(latent["channels"], latent["height"], latent["width"]),
        conditioning=Conditioning.build([(0, tensors["text"])], None),
        info=INFO,
        step="renoise",
    )


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
