"""Tiny models of the Wan family: this package's, and diffusers' with the same weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.models.base import Activation, BlockContext, FrameInfo
from pavdm_dist.models.skyreels_v2 import SkyReelsV2, SkyReelsV2Config
from pavdm_dist.models.text_cache import TextRun
from pavdm_dist.models.wan import Wan, WanConfig

SHAPE: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "text_dim": 12, "freq_dim": 32,
    "ffn_dim": 40, "num_layers": 3, "text_len": 6,
}  # fmt: skip
WAN = WanConfig(**SHAPE)
SKYREELS = SkyReelsV2Config(**SHAPE, inject_sample_info=True)
INFO = FrameInfo(32, 48, 24.0)


def tiny_wan(seed: int = 0, config: WanConfig = WAN, std: float = 0.15) -> Wan:
    """With all weights random, so that every branch is active."""
    kind = SkyReelsV2 if isinstance(config, SkyReelsV2Config) else Wan
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).eval()
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, float("norm" in name and name.endswith("weight")), std=std)
    return model.requires_grad_(False)


def as_diffusers(model: Wan, dtype: torch.dtype = torch.float32) -> Any:
    """Diffusers' own model with the same weights, in the types that loading it as ``dtype`` gives."""
    made = model.of_diffusers().eval().requires_grad_(False)
    state = {
        name: value.to(torch.float32 if model.keeps_float32(name) else dtype)
        for name, value in model.state_dict().items()
    }
    made.load_state_dict(state, assign=True)
    return made


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def staircase(frames: int, rows: int = 1) -> Tensor:
    """Whole thousandths, as diffusers' samplers give them."""
    return (torch.arange(frames) * 997 // frames / 1000).float().expand(rows, frames).clone()


def run_cut(
    stages: Sequence[tuple[Wan, tuple[int, int]]], x: Tensor, levels: Tensor, text: Tensor, causal: int | None = None
) -> Tensor:
    """One forward through models that each run a range of blocks, what crosses a link being copied."""
    activation, grid = None, stages[0][0].grid(*x.shape[2:])
    for model, blocks in stages:
        context = BlockContext(grid, [TextRun(0, grid.frames, model.project_text(text))], causal)
        if activation is None:
            activation = model.embed(x, levels, INFO)
        for index in range(*blocks):
            activation = model.block(index, activation, context)
        parts = (activation.hidden, activation.modulation, activation.time)
        assert tuple(tuple(part.shape) for part in parts) == model.activation_shapes(grid)
        activation = Activation(*(part.contiguous().clone() for part in parts))
    assert activation is not None
    return model.head(activation, grid)


def cuts(blocks: int) -> list[list[tuple[int, int]]]:
    """Every contiguous split."""
    marks = range(1, blocks)
    return [
        list(pairwise([0, *(mark for mark in marks if chosen >> mark & 1), blocks]))
        for chosen in range(0, 1 << blocks, 2)
    ]


def trainable_folder(folder: Path, config: WanConfig = WAN) -> Path:
    """A whole model of moving digits' latents in diffusers' layout, with a text encoder that needs no package."""
    from training import tiny_codec

    from pavdm_dist.codecs.text import WordTextEncoder
    from pavdm_dist.digits.settings import VOCABULARY

    model = tiny_wan(config=config)
    model.save_pretrained(folder / "transformer")
    tiny_codec(folder / "vae")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        WordTextEncoder(VOCABULARY, config.text_dim, 1, 2, config.text_len).save_pretrained(folder / "text_encoder")
    sky = isinstance(config, SkyReelsV2Config)
    index = {
        "_class_name": "SkyReelsV2Pipeline" if sky else "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", model.class_name],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["pavdm_dist", "WordTextEncoder"],
        "sampling": {"guidance_scale": 5.0, "height": 16, "width": 16, "fps": 24},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    return folder
