"""Contact sheets of what a model samples, drawn during training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange

from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.denoiser import ModelDenoiser
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.sampler import sample
from pavdm_dist.schedule import NoiseSchedule, WindowPlan
from pavdm_dist.stream import Conditioning, Stream
from pavdm_dist.train.loss import Objective
from pavdm_dist.train.world import FPS, SIZE

if TYPE_CHECKING:
    from pavdm_dist.train.loop import TextToVideo

PROMPTS = (
    "a red three drifting up and to the left, a blue seven bouncing fast",
    "a green five drifting to the right",
    "a yellow zero bouncing slowly",
    "a white four drifting down, a cyan two drifting up and to the right",
)
FRAMES_SHOWN = 8


def draw_sheet(
    model: TextToVideo, codec_folder: Path, objective: Objective, path: Path, chunks: int = 6, guidance: float = 2.0
) -> None:
    """Samples one video per prompt and writes evenly spaced frames, a row each, with the prompts beside it.

    Args:
        model: with the weights to look at.
        codec_folder: the codec.
        objective: gives the plan.
        path: PNG to write.
        chunks: length of the videos.
        guidance: guidance scale.
    """
    from PIL import Image

    codec = WanCodec.from_pretrained(codec_folder)
    o = objective
    plan = WindowPlan(o.num_inference_steps, o.window_chunks, o.latent_chunk_size, o.context_chunks, num_chunks=chunks)
    height, width = codec.latent_size(SIZE, SIZE)
    rows = []
    for number, prompt in enumerate(PROMPTS):
        text = Conditioning.build([(0, model.text_encoder.encode(prompt))], model.transformer.null_text())
        stream = Stream(
            number,
            plan,
            NoiseSchedule(o.num_inference_steps, o.time_shift),
            number,
            (codec.spec.latent_channels, height, width),
            text,
            FrameInfo(SIZE, SIZE, FPS),
            guidance,
        )
        decoder = codec.decoder()
        chunks_of = sample(stream.window(), ModelDenoiser(model.transformer, stream), guidance)
        frames = torch.cat([decoder.decode(clean.latents) for clean in chunks_of])
        shown = torch.linspace(0, len(frames) - 1, FRAMES_SHOWN).long()
        rows.append(rearrange(frames[shown], "t h w c -> h (t w) c"))
    sheet = torch.cat(rows).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(path)
    path.with_suffix(".txt").write_text("\n".join(PROMPTS) + "\n")
