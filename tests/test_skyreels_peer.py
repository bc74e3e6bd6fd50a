"""Against diffusers' own long-video sampler of SkyReels-V2, with the same weights: its velocities, and its work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from wan_models import SKYREELS, as_diffusers, random, tiny_wan

from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.wan import Wan

pytest.importorskip("transformers")  # which diffusers' pipelines import


def calls_of(model: Wan, **settings: Any) -> list[tuple[dict, torch.Tensor]]:
    """What diffusers' pipeline asks of the transformer, and what it gets."""
    from diffusers import AutoencoderKLWan, SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler

    peer, calls = as_diffusers(model), []
    forward = peer.forward

    def recording(**inputs: Any) -> Any:
        found = forward(**inputs)
        calls.append((inputs, found[0].clone()))
        return found

    peer.forward = recording
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(flow_shift=8, use_flow_sigmas=True, prediction_type="flow_prediction")
    pipeline = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, transformer=peer, vae=vae, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    text = torch.nn.functional.pad(random(1, 4, 12), (0, 0, 0, SKYREELS.text_len - 4))
    pipeline(
        prompt=None, prompt_embeds=text, negative_prompt_embeds=text, guidance_scale=1.0, height=32, width=32,
        num_inference_steps=30, output_type="latent", generator=torch.Generator().manual_seed(0), **settings,
    )  # fmt: skip
    return calls


@pytest.mark.parametrize(("block", "bound"), [(1, 0.0), (5, 1e-6)])
def test_its_async_sampler_gets_the_same_velocities(block: int, bound: float) -> None:
    """Without the mask bit for bit; with it up to the order of sums, because here no chunk multiplies masked pairs."""
    model = tiny_wan(config=replace(SKYREELS, inject_sample_info=True))
    calls = calls_of(model, num_frames=97, base_num_frames=97, ar_step=5 if block > 1 else 1, causal_block_size=block)
    levels = set()
    for inputs, expected in calls[:: max(1, len(calls) // 12)]:
        x, timestep = inputs["hidden_states"], inputs["timestep"].float()
        levels.add(len(timestep.unique()))
        text, mask = inputs["encoder_hidden_states"], block if block > 1 else None
        found = model(x, timestep / 1000, text, FrameInfo(32, 32, 24), chunk_causal=mask)
        difference = ((found - expected).norm() / expected.norm()).item()
        assert difference <= bound
    assert max(levels) > 3


def test_a_longer_video_takes_less_work() -> None:
    """257 frames, 65 latents, 30 steps, chunks of 5: the window moves on instead of filling and draining anew."""
    model = tiny_wan(config=SKYREELS)
    calls = calls_of(
        model, num_frames=257, base_num_frames=97, overlap_history=17, ar_step=5, causal_block_size=5,
        addnoise_condition=20,
    )  # fmt: skip
    latents = sum(inputs["hidden_states"].shape[2] for inputs, _ in calls)
    assert (len(calls), latents) == (140, 3500)
    plan = WindowPlan(30, 5, 5, context_chunks=1, num_chunks=13)
    assert plan.num_rows == 102 and plan.latent_evaluations <= 2460
