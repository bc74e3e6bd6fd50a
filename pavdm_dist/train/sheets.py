"""Contact sheets of what a model samples, drawn during training."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.base import TextEncoder
from pavdm_dist.codecs.catalog import load_codec
from pavdm_dist.method.denoiser import ModelDenoiser
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.models.text_cache import TextBank
from pavdm_dist.train.export import Parts
from pavdm_dist.train.model import filled
from pavdm_dist.train.train_settings import TrainConfig

FRAMES_SHOWN = 8

logger = logging.getLogger(__name__)


def draw_sheet(
    config: TrainConfig,
    weights: dict[str, Tensor],
    channels: int,
    parts: Parts,
    path: Path,
    device: torch.device | str = "cpu",
    seconds: float = math.inf,
    chunks: int = 6,
    guidance: float = 2.0,
) -> None:
    """Samples one video per prompt and writes evenly spaced frames, a row each, with the prompts beside it.

    Prompts that there is no time for are left out, with a warning.

    Args:
        config: of the run; its objective gives the plan.
        weights: to look at.
        channels: of the latents.
        parts: codec, text encoder, size and prompts.
        path: PNG to write.
        device: where to sample; in bfloat16 on a GPU.
        seconds: how long that may take.
        chunks: length of the videos.
        guidance: guidance scale.
    """
    from PIL import Image

    device, end = torch.device(device), time.monotonic() + seconds
    codec, info = load_codec(parts.vae, device), parts.info
    model = filled(config, channels, parts.vocabulary, weights)
    encoder = model.text_encoder or _frozen_encoder(parts)
    o = config.objective.kinds()[0][1].at_size(info.height, info.width)
    plan = o.plan("noise", chunks)
    height, width = codec.spec.latent_size(info.height, info.width)
    null = model.transformer.null_text()
    if null is None:
        null = encoder.encode("")
    cast(nn.Module, model.transformer).to(device)
    rows = []
    for number, prompt in enumerate(parts.prompts):
        text = Conditioning.build([(0, encoder.encode(prompt))], null, model.transformer.spec.null_text_as_long)
        shape = (channels, height, width)
        stream = Stream(
            number, plan, o.schedule, number, shape, text, info, guidance, context_follows=o.context_follows
        )
        decoder, frames = codec.decoder(), list[Tensor]()
        denoise = ModelDenoiser(model.transformer, stream, TextBank(model.transformer.project_text, device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for clean in sample(stream.window(device), denoise, guidance):
                frames.append(decoder.decode(clean.latents).cpu())
                if time.monotonic() > end:
                    break
        if len(frames) < chunks:
            logger.warning("the contact sheet has %d of %d prompts: no time for more", number, len(parts.prompts))
            break
        video = torch.cat(frames)
        shown = torch.linspace(0, len(video) - 1, FRAMES_SHOWN).long()
        rows.append(rearrange(video[shown], "t h w c -> h (t w) c"))
    if not rows:
        return
    sheet = torch.cat(rows).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(path)
    path.with_suffix(".txt").write_text("\n".join(parts.prompts[: len(rows)]) + "\n")


def _frozen_encoder(parts: Parts) -> TextEncoder:
    assert parts.base is not None  # else one is trained
    encoder = replace(Checkpoint.open(parts.base), text=parts.text).text_encoder
    encoder.prepare([*parts.prompts, ""])  # a large one is loaded once for all of them
    return encoder
