"""Contact sheets of what a model samples, drawn during training."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.denoiser import ModelDenoiser
from pavdm_dist.sampler import sample
from pavdm_dist.schedule import WindowPlan
from pavdm_dist.stream import Conditioning, Stream
from pavdm_dist.train.config import TrainConfig
from pavdm_dist.train.export import Parts
from pavdm_dist.train.model import filled

FRAMES_SHOWN = 8


def draw_sheet(
    config: TrainConfig,
    weights: dict[str, Tensor],
    channels: int,
    parts: Parts,
    path: Path,
    chunks: int = 6,
    guidance: float = 2.0,
) -> None:
    """Samples one video per prompt and writes evenly spaced frames, a row each, with the prompts beside it.

    Args:
        config: of the run; its objective gives the plan.
        weights: to look at.
        channels: of the latents.
        parts: codec, text encoder, size and prompts.
        path: PNG to write.
        chunks: length of the videos.
        guidance: guidance scale.
    """
    from PIL import Image

    codec, model, info = WanCodec.from_pretrained(parts.vae), filled(config, channels, weights), parts.info
    encoder = model.text_encoder or WordTextEncoder.from_pretrained(str(parts.text_encoder))
    o = config.objective.kinds()[0][1].at_size(info.height, info.width)
    plan = WindowPlan(o.num_inference_steps, o.window_chunks, o.latent_chunk_size, o.context_chunks, num_chunks=chunks)
    height, width = codec.latent_size(info.height, info.width)
    rows = []
    for number, prompt in enumerate(parts.prompts):
        text = Conditioning.build([(0, encoder.encode(prompt))], model.transformer.null_text())
        shape = (channels, height, width)
        stream = Stream(number, plan, o.schedule, number, shape, text, info, guidance)
        decoder = codec.decoder()
        chunks_of = sample(stream.window(), ModelDenoiser(model.transformer, stream), guidance)
        frames = torch.cat([decoder.decode(clean.latents) for clean in chunks_of])
        shown = torch.linspace(0, len(frames) - 1, FRAMES_SHOWN).long()
        rows.append(rearrange(frames[shown], "t h w c -> h (t w) c"))
    sheet = torch.cat(rows).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(path)
    path.with_suffix(".txt").write_text("\n".join(parts.prompts) + "\n")
