"""Reference tensors of the few-step Wan family (``data/rolling/README.md``), from weights by their original names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rolling_cases import INFO, folders, opened, relative
from torch import Tensor

from pavdm_dist.models.base import BlockContext
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.kv_cache import Pair, Turn
from pavdm_dist.models.text_cache import TextRun
from pavdm_dist.models.wan import Wan

BOUND = 5e-6


@pytest.fixture(params=folders("forward*"), ids=lambda path: path.name)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A component folder that holds the weights as they were published, and the tensors."""
    return tmp_path, opened(request.param, tmp_path)


class Cache:
    """A pass reads cached chunks at the places it is told, and itself; what it leaves can be kept."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[int, Pair]] = {}
        self.left: dict[int, Pair] = {}
        self.reads: list[tuple[int, int]] = []

    def begin(self, window: tuple[int, ...], chunk: int | None) -> None:
        self.left = {}

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn, frame_tokens: int = 1) -> Pair:
        self.left[block] = keys, values
        pairs = [(*self.kept[chunk][block], place * frame_tokens) for chunk, place in self.reads]
        pairs.append((keys, values, first))
        turned = [turn(key, place) for key, _, place in pairs]
        return torch.cat(turned, dim=-2), torch.cat([value for _, value, _ in pairs], dim=-2)


def run(model: Wan, x: Tensor, t: Tensor, text: Tensor, first: int = 0, cache: Cache | None = None) -> Tensor:
    """The model's output for ``x [C, F, h, w]`` at timesteps ``[F]``."""
    grid = model.grid(*x.shape[1:])
    if cache is not None:
        cache.begin((), None)
    texts = [TextRun(0, grid.frames, model.project_text(text[None]))]
    context = BlockContext(grid, texts, first_frame=first, memory=cache)
    activation = model.embed(x[None], t[None] / 1000, INFO)
    for index in range(model.spec.num_blocks):
        activation = model.block(index, activation, context)
    return model.head(activation, grid)[0]


@torch.inference_mode()
def test_one_forward(case: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = case
    model = load_backbone(folder)
    assert isinstance(model, Wan)
    for name in ("fwd", "uniform"):
        t = tensors[f"{name}.t"].expand(tensors["fwd.x"].shape[1])
        flow = run(model, tensors["fwd.x"], t, tensors["text"])
        assert relative(flow, tensors[f"{name}.flow"]) < BOUND
        velocity = model.to_velocity(flow[None], tensors["fwd.x"][None], t[None])
        assert torch.equal(velocity[0], -flow)


@torch.inference_mode()
def test_kept_keys_read_at_other_places(case: tuple[Path, dict[str, Tensor]]) -> None:
    """Clean passes one after the other; then a window that reads an anchor and a recent chunk."""
    folder, tensors = case
    model, cache = load_backbone(folder), Cache()
    assert isinstance(model, Wan)
    chunks = tensors["context.latents"].split(3, dim=1)
    for number, latents in enumerate(chunks):
        cache.reads = [(chunk, 3 * chunk) for chunk in range(max(0, number - 6), number)]
        flow = run(model, latents, torch.zeros(3), tensors["text"], 3 * number, cache)
        cache.kept[number] = cache.left
        assert relative(flow, tensors[f"clean.{number:02}.flow"]) < BOUND
        for block, pair in cache.left.items():
            for kind, found in zip("kv", pair, strict=True):
                expected = tensors.get(f"cache.{number:02}.{block}.{kind}")
                assert expected is None or relative(found[0].transpose(0, 1).flatten(1), expected) < BOUND
    cache.reads = [(0, 21), (8, 24)]
    flow = run(model, tensors["context.x"], tensors["context.t"], tensors["text"], 27, cache)
    assert relative(flow, tensors["context.flow"]) < BOUND
