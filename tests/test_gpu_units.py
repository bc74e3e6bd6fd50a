"""On the device under test: compiled units, several chunks together, and a host that never waits for its device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices_under_test import ONE_QUICK, built, nobody_waits
from helpers import tiny_checkpoint, tiny_model, tiny_stream
from linked import alone, linked, sampled, staged
from wan_models import tiny_wan

from pavdm_dist.engine.events import Shift
from pavdm_dist.engine.loop import Links
from pavdm_dist.engine.rehearsal import rehearsal, rehearse
from pavdm_dist.engine.stage import Stage
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream
from pavdm_dist.models import stdit3_block
from pavdm_dist.models.base import Backbone
from pavdm_dist.models.compiling import Compiler
from pavdm_dist.models.kernels import CHOICES
from pavdm_dist.models.layers import RotaryTable
from pavdm_dist.models.stdit3_block import STDiT3Block
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.request.video_request import VideoRequest

pytestmark = pytest.mark.gpu
MODES = ["window", "causal", "displaced"]


def chunks_of(stages: list[Stage], links: list[Links], stream: Stream) -> list[torch.Tensor]:
    told, _ = sampled(stages, links, [stream])
    return [chunk.latents for event in told if isinstance(event, Shift) for chunk in event.clean]


def long_stream(mode: Mode, together: int = 1) -> Stream:
    return replace(tiny_stream(mode=mode, num_chunks=6), chunks_per_unit=1 if mode == "window" else together)


@pytest.mark.parametrize("mode", ONE_QUICK)
def test_no_unit_waits_for_the_device(mode: Mode, device: torch.device) -> None:
    model, stream = built(tiny_model, torch.bfloat16, device), long_stream(mode, 2)
    stage = Stage(model, (0, 4), device, torch.bfloat16)
    sampled([stage], [alone()], [stream])  # texts, tables and buffers are there
    with nobody_waits(device):
        told, _ = sampled([stage], [alone()], [stream])
    assert any(isinstance(event, Shift) for event in told)


@pytest.mark.parametrize("mode", ONE_QUICK)
def test_two_stages_on_one_card_give_the_bits_of_one(mode: Mode, device: torch.device) -> None:
    model, stream = built(tiny_model, torch.bfloat16, device), long_stream(mode, 2)
    expected = chunks_of([Stage(model, (0, 4), device, torch.bfloat16)], [alone()], stream)
    stages = [Stage(model, blocks, device, torch.bfloat16) for blocks in ((0, 2), (2, 4))]
    found = chunks_of(stages, linked(2, staged(device)), stream)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert all(latents.device.type == "cpu" and not latents.is_pinned() for latents in found)


@pytest.mark.slow  # torch makes its kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [tiny_model, tiny_wan])
def test_compiled_units_on_any_cut(build: Callable[[], Backbone], mode: Mode, device: torch.device) -> None:
    model, stream = built(build, torch.bfloat16, device), long_stream(mode, 2)
    uncompiled = chunks_of([Stage(model, (0, model.spec.num_blocks), device, torch.bfloat16)], [alone()], stream)
    compiler = Compiler()
    model.compile_repeated_blocks(compiler)
    prepared = rehearsal(
        model, stream.plan, stream.latent_shape, stream.info,
        mode=mode, displaced=stream.displaced, chunks_per_unit=stream.chunks_per_unit,
    )  # fmt: skip
    results = []
    for cuts in ([(0, model.spec.num_blocks)], [(0, 1), (1, model.spec.num_blocks)]):
        stages = [Stage(model, blocks, device, torch.bfloat16) for blocks in cuts]
        for stage in stages:
            found = rehearse(stage, prepared, compiled=True)
            assert found.relative_error is not None and found.relative_error < 0.1
        versions = compiler.num_versions
        links = linked(len(cuts), staged(device)) if len(cuts) > 1 else [alone()]
        results.append(chunks_of(stages, links, stream))
        assert compiler.num_versions == versions
    assert all(map(torch.equal, *results))
    assert CHOICES.chosen or device.type == "cpu", "a kernel of attention was measured for every shape"
    for one, other in zip(results[0], uncompiled, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.2


@pytest.mark.slow  # torch makes its kernels
@pytest.mark.parametrize("frames", [5, 30, 35])
def test_queries_and_keys_of_large_windows(frames: int, device: torch.device) -> None:
    """By themselves: attention to random keys is a mean of nearly all values, whichever they are."""
    torch.manual_seed(0)
    block = STDiT3Block(1152, 16, 4.0, True, temporal=True).to(device, torch.bfloat16).eval()
    rotation = RotaryTable(72).to(device)(frames)
    x, modulation = (torch.randn(1, frames, *more, 1152).to(device, torch.bfloat16) for more in ((64,), (6,)))
    with torch.inference_mode():
        expected = stdit3_block._enter(block, x, modulation, rotation)
        found = Compiler().of(stdit3_block._enter, "temporal", frames)(block, x, modulation, rotation)
    for one, other in zip(found, expected, strict=True):
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 0.01


@pytest.mark.slow  # tests/test_beside.py has it on the CPU
def test_decoding_goes_on_beside_sampling_and_changes_nothing(tmp_path: Path, device: torch.device) -> None:
    model = tiny_checkpoint(tmp_path)
    request = VideoRequest("a red three", 3, 29)
    frames = []
    for overlaps in (True, False):
        with PAVDMPipeline.from_pretrained(model, device=device) as pipeline:
            pipeline._engines.inline(pipeline._load)._overlaps = overlaps
            frames.append([chunk.frames for chunk in pipeline.iter_chunks([request], pipeline.params())])
    assert len(frames[0]) == len(frames[1]) and all(map(torch.equal, *frames))
