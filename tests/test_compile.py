"""Compiled blocks compute what plain ones do; one compilation serves all blocks of a kind and all stages."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from functools import cache, partial
from typing import get_args

import pytest
import torch
from helpers import TINY, reference_chunks, tiny_model, tiny_stream
from torch._dynamo.utils import counters
from wan_models import SKYREELS, tiny_wan

from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError
from pavdm_dist.merging import load_config
from pavdm_dist.method.schedule import Mode
from pavdm_dist.models import layers
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.recompute import Recompute, recompute_blocks
from pavdm_dist.train.settings import TrainConfig

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on CPUs")


@pytest.fixture(scope="module")
def plain() -> STDiT3:
    return tiny_model(config=replace(TINY, depth=3))


@pytest.fixture(scope="module")
def compiled(plain: STDiT3) -> STDiT3:
    model = copy.deepcopy(plain)
    model.compile_repeated_blocks()
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@needs_compiler
@pytest.mark.parametrize(
    "mode", ["causal", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("window", "displaced"))]
)
def test_stages_with_compiled_blocks_agree(plain: STDiT3, compiled: STDiT3, mode: Mode) -> None:
    stream = tiny_stream(mode=mode, num_chunks=4)
    found = {}
    for cuts in ([(0, 6)], [(0, 1), (1, 4), (4, 6)]):
        before = counters["stats"]["unique_graphs"]
        engine = LocalEngine([Stage(compiled, blocks) for blocks in cuts])
        found[len(cuts)] = [clean.latents for _, clean in engine.run([stream])]
        made = counters["stats"]["unique_graphs"] - before
        # Three parts of two kinds of block, and turning; each for one size and then for all. Far from one a block.
        assert made <= (16 if len(cuts) == 1 else 0)
    for one, three, expected in zip(found[1], found[3], reference_chunks(plain, stream), strict=True):
        assert torch.equal(one, three)
        assert relative(one, expected.latents) < 1e-5


@needs_compiler
@pytest.mark.slow
def test_compiled_blocks_of_the_wan_family_agree() -> None:
    plain = tiny_wan(config=SKYREELS)
    compiled = copy.deepcopy(plain)
    compiled.compile_repeated_blocks()
    before = counters["stats"]["unique_graphs"]
    for mode in get_args(Mode):
        stream = tiny_stream(mode=mode, num_chunks=4)
        found = [
            [clean.latents for _, clean in LocalEngine([Stage(compiled, blocks) for blocks in cuts]).run([stream])]
            for cuts in ([(0, 3)], [(0, 1), (1, 3)])
        ]
        for one, two, expected in zip(*found, reference_chunks(plain, stream), strict=True):
            assert torch.equal(one, two)
            assert relative(one, expected.latents) < 1e-5
    assert counters["stats"]["unique_graphs"] - before <= 6, "three parts of a block, for one size and then for all"


@pytest.mark.parametrize(
    # What is captured and differentiated is the same for both; kernels for the backward pass take long to build.
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])],
)
def test_gradients_are_those_of_plain_blocks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_compiled", cache(partial(torch.compile, backend=backend)))
    plain = tiny_model(config=replace(TINY, depth=3))
    compiled = copy.deepcopy(plain)
    compiled.compile_repeated_blocks()
    again = copy.deepcopy(compiled)
    recompute_blocks(again, Recompute(every=1))
    found = []
    for model in (plain, compiled, again):
        model.requires_grad_(True).zero_grad()
        x, text = (
            torch.randn(shape, generator=torch.Generator().manual_seed(0))
            for shape in ((2, 4, 6, 4, 6), (2, 5, TINY.caption_channels))
        )
        out = model(x, torch.linspace(0, 1, 6).expand(2, -1), text, FrameInfo(32, 48, 24), chunk_causal=2)
        out.square().mean().backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in other.items():
            assert relative(gradient, found[0][name]) < 1e-4, name


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compile=true: .*num_stages=0"):
        validate_sample(load_config(SampleConfig, None, ["prompt=x", "compile=true"]))
    settings = ["compile=true", "zero.stage=3", "optimizer.name=adamw"]
    with pytest.raises(ConfigError, match=r"compile=true with zero\.stage=3"):
        check_settings(load_config(TrainConfig, None, settings), 2)
