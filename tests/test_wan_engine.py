"""The Wan family in the modes: stages equal the loop in one process, and the modes are what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers import reference_chunks, tiny_stream
from wan_models import SKYREELS, WAN, tiny_wan

from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.ray_engine import RayEngine
from pavdm_dist.engine.stage import Stage
from pavdm_dist.method.denoiser import ModelDenoiser, StreamDenoiser
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.sampler import guide
from pavdm_dist.method.schedule import Mode
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.wan import WanConfig

CONFIGS = {"wan": replace(WAN, num_layers=4), "skyreels": replace(SKYREELS, num_layers=4)}
CUTS = {1: [(0, 4)], 2: [(0, 1), (1, 4)], 3: [(0, 2), (2, 3), (3, 4)], 4: [(0, 1), (1, 2), (2, 3), (3, 4)]}
MODES = pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
FAMILY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.mark.parametrize(
    ("name", "mode"), [("skyreels", "window"), ("skyreels", "causal"), ("skyreels", "displaced"), ("wan", "causal")]
)
def test_stages_equal_the_sampler(name: str, mode: Mode) -> None:
    """One to four stages."""
    whole = tiny_wan(config=CONFIGS[name])
    streams = [
        tiny_stream(0, seed=1, mode=mode),
        tiny_stream(1, seed=2, guidance_scale=1.0, num_chunks=2, mode=mode),
        tiny_stream(2, seed=3, start="clip", end="cut", num_chunks=3, mode=mode),
    ]
    expected = {stream.id: reference_chunks(whole, stream) for stream in streams}
    for blocks in CUTS.values():
        chunks: dict[int, list] = {stream.id: [] for stream in streams}
        for number, clean in LocalEngine([Stage(whole, part) for part in blocks]).run(streams, 2):
            chunks[number].append(clean)
        for number, found in chunks.items():
            assert len(found) == len(expected[number])
            for clean, reference in zip(found, expected[number], strict=True):
                assert torch.equal(clean.latents, reference.latents)


@MODES
def test_stages_in_half_precision_equal_the_sampler(mode: Mode, tmp_path: Path) -> None:
    """Each loaded from the folder, with the tensors that stay float32."""
    tiny_wan(config=CONFIGS["skyreels"]).save_pretrained(tmp_path)
    stream = tiny_stream(mode=mode)
    expected = reference_chunks(load_backbone(tmp_path, dtype=torch.bfloat16), stream)
    stages = [
        Stage(load_backbone(tmp_path, blocks, torch.bfloat16), blocks, dtype=torch.bfloat16) for blocks in CUTS[3]
    ]
    for (_, clean), reference in zip(LocalEngine(stages).run([stream]), expected, strict=True):
        assert torch.equal(clean.latents, reference.latents)


@pytest.mark.slow  # with LocalEngine above it is the same stages
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_actors_equal_the_sampler(ray_cluster: None, num_stages: int, tmp_path: Path) -> None:
    """Which load their blocks themselves, in all modes, one video beside another."""
    whole = tiny_wan(config=CONFIGS["skyreels"])
    whole.save_pretrained(tmp_path)
    streams = [tiny_stream(number, seed=number, mode=mode) for number, mode in enumerate(get_args(Mode))]
    chunks: dict[int, list] = {stream.id: [] for stream in streams}
    with RayEngine(str(tmp_path), CUTS[num_stages], EngineOptions(num_stages, cpus_per_stage=0)) as engine:
        for finished in engine.run(streams, 2):
            chunks[finished.stream].append(finished.clean)
    for stream in streams:
        for clean, reference in zip(chunks[stream.id], reference_chunks(whole, stream), strict=True):
            assert torch.equal(clean.latents, reference.latents)


@FAMILY
def test_the_modes_are_what_they_say(config: WanConfig) -> None:
    """Causal chunk by chunk is one forward with the mask; displaced with every step exact is window."""
    whole, stream = tiny_wan(config=config), tiny_stream(mode="causal")
    window = stream.window()
    cached, masked = StreamDenoiser(whole, stream), ModelDenoiser(whole, stream, causal=True)
    for row in stream.plan.rows():
        x, levels = window.inputs(row)
        found, expected = ([denoise(x, levels, row, branch) for branch in range(2)] for denoise in (cached, masked))
        noisy = slice(len(row.context) * stream.plan.latent_chunk_size, None)
        for one, other in zip(found, expected, strict=True):
            assert (one - other)[:, :, noisy].norm() < 1e-6 * other[:, :, noisy].norm()
        window.update(row, guide(found, stream.guidance_scale))
    exact, plain = (
        reference_chunks(whole, tiny_stream(num_chunks=6, mode=mode, displaced=Displaced(1)))
        for mode in ("displaced", "window")
    )
    stale = reference_chunks(whole, tiny_stream(num_chunks=6, mode="displaced"))
    for one, two, other in zip(exact, plain, stale, strict=True):
        assert torch.equal(one.latents, two.latents) and not torch.equal(one.latents, other.latents)
