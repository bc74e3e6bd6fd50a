"""The reference implementation's tensors (paper's code, float32 on a CPU) against this package.

``data/reference/README.md`` says what they are, with which settings they were computed and why the bounds are these.
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers import reference_cases
from safetensors.torch import load_file

from pavdm_dist.method.levels import NoiseSchedule, time_shift_ratio
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.window import Window
from pavdm_dist.models.base import BlockContext, FrameInfo
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config
from pavdm_dist.models.text_cache import TextRun

# Relative L2 of one forward. float32 sums in an order that depends on the CPU: below 1e-6 on AMD, 1.3e-6 to 1.7e-6 on
# Intel; the mildest wrong constant that was tried moves it by 4e-3.
FORWARD_BOUND = 5e-6


@pytest.fixture(params=reference_cases(), ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> tuple[dict, dict[str, torch.Tensor], STDiT3]:
    spec = json.loads((request.param / "golden.json").read_text())
    tensors = load_file(request.param / "golden.safetensors")
    model = STDiT3(STDiT3Config.from_dict(spec["model"])).eval()
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights, strict=True)
    return spec, tensors, model


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _info(spec: dict) -> FrameInfo:
    return FrameInfo(spec["height"], spec["width"], spec["fps"])


@torch.no_grad()
def test_one_forward(case: tuple) -> None:
    spec, tensors, model = case
    out = model(tensors["fwd.x"], tensors["fwd.t"] / 1000, tensors["fwd.y"][:, 0], _info(spec))
    assert _relative(out, tensors["fwd.out"]) < FORWARD_BOUND


@torch.no_grad()
def test_sampling(case: tuple) -> None:
    spec, tensors, model = case
    chunk, window_latents = spec["chunk"], spec["window"]
    context = 1 if spec["keep_x0"] else 0
    plan = _plan(spec, tensors, context)
    ratio = time_shift_ratio(spec["height"], spec["width"], spec["num_frames"] // 17 * 5)
    schedule = NoiseSchedule(spec["sampling_steps"], ratio if spec["use_timestep_transform"] else 1.0)
    assert plan.num_rows == spec["model_calls"]
    assert plan.window_chunks * chunk + context * chunk == window_latents

    condition = tensors["sample.condition"][0]
    given = {
        index: condition[:, (index + plan.given_context) * chunk :][:, :chunk]
        for index in range(-plan.given_context, plan.given_clip)
    }
    window = Window(plan, schedule, _noise(plan, tensors), given)
    text = {0: tensors["sample.y"][:, 0], 1: tensors["sample.y_null"][:, 0]}
    seen: list[torch.Tensor] = []

    def denoise(x: torch.Tensor, levels: torch.Tensor, row: object, branch: int) -> torch.Tensor:
        if branch == 0:
            seen.append(levels[0])
        grid = model.grid(*x.shape[2:])
        block_context = BlockContext(grid, [TextRun(0, grid.frames, model.project_text(text[branch]))])
        activation = model.embed(x, levels, _info(spec))
        for index in range(model.spec.num_blocks):
            activation = model.block(index, activation, block_context)
        return model.to_velocity(model.head(activation, grid), x, levels)

    new = [clean.latents for clean in sample(window, denoise, spec["cfg_scale"])]
    kept = [given[-1]] if context else []
    out = torch.cat(kept + new, dim=1)

    for levels, expected in zip(seen, tensors["sample.timesteps"], strict=True):
        expected = expected[expected >= 0]
        assert levels.shape == expected.shape
        assert (levels * 1000 - expected).abs().max() < 1e-3
    assert out.shape == tensors["sample.out"][0].shape
    assert _relative(out, tensors["sample.out"][0]) < 1e-4


def _plan(spec: dict, tensors: dict[str, torch.Tensor], context: int) -> WindowPlan:
    chunk = spec["chunk"]
    chunks = tensors["sample.out"].shape[2] // chunk - context
    if not spec["variable_length"]:
        start, end = "clip", "cut"
    else:
        start, end = ("chunk" if context else "noise"), "drain"
    width = spec["window"] // chunk - context
    return WindowPlan(spec["sampling_steps"], width, chunk, context, start, end, chunks)


def _noise(plan: WindowPlan, tensors: dict[str, torch.Tensor]):
    """Birth noise by chunk index; a fixed start draws its whole first window as one tensor."""
    drawn = [tensors[key][0] for key in sorted(tensors) if key.startswith("sample.noise.")]
    per_chunk = [part for noise in drawn for part in noise.split(plan.latent_chunk_size, dim=1)]
    return per_chunk.__getitem__
