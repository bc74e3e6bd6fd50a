"""Tiny real objects that several test files share."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.base import Backbone, FrameInfo
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config

TINY = STDiT3Config(
    depth=2, hidden_size=32, num_heads=4, in_channels=4, caption_channels=12, model_max_length=5, patch_size=(1, 2, 2)
)


def reference_cases() -> list[Path]:
    """Folders of ``golden.json`` and ``golden.safetensors``: this repository's (``data/reference/README.md`` says what
    they are), then those under the parents that ``PAVDM_GOLDEN_DIRS`` names (colon-separated)."""
    named = [Path(name) for name in os.environ.get("PAVDM_GOLDEN_DIRS", "").split(":") if name]
    parents = [Path(__file__).parent / "data" / "reference", *named]
    return [file.parent for parent in parents for file in sorted(parent.glob("**/golden.json"))]


def tiny_model(seed: int = 0, config: STDiT3Config = TINY) -> STDiT3:
    """An untrained STDiT3 whose every branch is active (all weights random)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = STDiT3(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def tiny_stream(
    stream_id: int = 0,
    seed: int = 0,
    guidance_scale: float = 3.0,
    mode: Mode = "window",
    displaced: Displaced = Displaced(7, exact_growing=False, context_refresh="shift"),  # noqa: B008
    **plan: object,
) -> Stream:
    """A short stream with two prompts (the second from chunk 2 on); plan fields can be overridden."""
    fields: dict = {
        "num_inference_steps": 6, "window_chunks": 3, "latent_chunk_size": 2, "context_chunks": 1, "num_chunks": 4,
    }  # fmt: skip
    window_plan = WindowPlan(**{**fields, **plan})
    generator = torch.Generator().manual_seed(100 + seed)
    texts = [torch.randn(length, TINY.caption_channels, generator=generator) for length in (3, 5, 4)]
    shape = (TINY.in_channels, 4, 6)
    given = {
        index: torch.randn(shape[0], window_plan.latent_chunk_size, *shape[1:], generator=generator)
        for index in range(-window_plan.given_context, window_plan.given_clip)
    }
    return Stream(
        id=stream_id,
        plan=window_plan,
        schedule=NoiseSchedule(window_plan.num_inference_steps, 1.7),
        seed=seed,
        latent_shape=shape,
        conditioning=Conditioning.build([(0, texts[0]), (2, texts[1])], texts[2]),
        info=FrameInfo(32, 48, 24),
        guidance_scale=guidance_scale,
        given=given,
        mode=mode,
        displaced=displaced,
    )


def until_gone(processes: Sequence[psutil.Process]) -> None:
    """Waits until all have ended, whoever has to ask for their status: what they had open is closed then."""
    end = time.monotonic() + 60
    while left := [process for process in processes if not _is_gone(process)]:
        assert time.monotonic() < end, left
        time.sleep(0.02)


def _is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def hear_signals() -> None:
    """For ``preexec_fn``: a child hears the signals it is to be ended with, also where this process was told to ignore
    them (``nohup``, a job in the background)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def reference_chunks(model: Backbone, stream: Stream) -> list[CleanChunk]:
    """The stream's chunks from the in-process sampler."""
    return list(sample(stream.window(), StreamDenoiser(model, stream), stream.guidance_scale))


def tiny_checkpoint(folder: Path) -> Path:
    """A whole untrained model folder (transformer, codec, text encoder) of the embedded model's layout."""
    from diffusers import AutoencoderKLWan

    from pavdm_dist.codecs.text import WordTextEncoder
    from pavdm_dist.codecs.wan import WanCodec

    tiny_model().save_pretrained(folder / "transformer")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = WordTextEncoder(["a", "red", "blue", "three", "seven", "drifting", "up"], TINY.caption_channels, 1, 2)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.0, 2.0, 0.5, 1.5],
            is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8,
        )  # fmt: skip
    encoder.save_pretrained(folder / "text_encoder")
    WanCodec(vae).save_pretrained(folder / "vae")
    sampling = {
        "num_inference_steps": 6, "window_chunks": 3, "latent_chunk_size": 2, "context_chunks": 1,
        "guidance_scale": 3.0, "height": 32, "width": 48, "fps": 24, "time_shift": 1.0,
    }  # fmt: skip
    index = {
        "_class_name": "PAVDMPipeline",
        "transformer": ["pavdm_dist", "STDiT3"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["pavdm_dist", "WordTextEncoder"],
        "sampling": sampling,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
