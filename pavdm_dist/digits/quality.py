"""How good a model of moving digits is: held-out prompts drawn and read back from the pixels.

Pictures come first, single latents without motion: what a digit looks like, for little time. Then short videos, as
users get them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.base import VideoCodec
from pavdm_dist.codecs.catalog import load_codec
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.digits.judge import Judge
from pavdm_dist.digits.prompts import parse_prompt
from pavdm_dist.digits.scores import score_chunks, summarise
from pavdm_dist.digits.settings import FPS, DigitWorld
from pavdm_dist.digits.world import sample_scene, scene_prompt
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.sampler import guide, sample
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.models.text_cache import TextBank
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream
from pavdm_dist.request.video_request import VideoRequest
from pavdm_dist.train.train_settings import QualityConfig

# Pictures that are drawn at once.
_AT_ONCE = 64


def heldout_prompts(count: int, digits: int, world: DigitWorld) -> list[str]:
    """Prompts of scenes in handwriting that is not trained on; the same ones every time."""
    rng = np.random.default_rng((1234, digits))
    return [scene_prompt(sample_scene(rng, "heldout", digits, world)) for _ in range(count)]


def quality(
    folder: str | Path, world: DigitWorld, settings: QualityConfig, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Share of digits that are read as the prompted class, where none covers another.

    Args:
        folder: a whole model, trained on ``world``.
        world: of the prompts.
        settings: how many prompts, and how long sampling may take.
        device: where to sample; in bfloat16 on a GPU.

    Returns:
        By number of digits (``"1 digit"``, ``"2 digits"``): ``stills``; ``video``, the mean over prompts,
        ``first_second`` of it, ``colour``, and ``worst`` with its ``worst_prompt``, over ``videos`` many. What there
        was no time for is left out.

    Raises:
        ConfigError: the folder holds no model of moving digits, or scikit-learn is missing.
        CheckpointError: it holds no model at all.
    """
    sampler, judge = _Sampler(folder, torch.device(device)), Judge(world=world)
    end = time.monotonic() + settings.max_seconds
    numbers = range(1, world.most_digits + 1)
    found: dict[str, Any] = {_name(digits): {} for digits in numbers}
    for digits in numbers:
        prompts = heldout_prompts(settings.stills, digits, world)
        if prompts and time.monotonic() < end:
            found[_name(digits)]["stills"] = _share_of_stills(sampler.stills(prompts), prompts, judge)
    # In turns, so that little time shows something of every number.
    prompts_of = {digits: heldout_prompts(settings.prompts, digits, world) for digits in numbers}
    scores: dict[int, list[_VideoScore]] = {digits: [] for digits in numbers}
    for place in range(settings.prompts):
        for digits in numbers:
            if time.monotonic() < end:
                scores[digits].append(_video_score(sampler, judge, prompts_of[digits][place], place, settings))
    for digits in numbers:
        found[_name(digits)] |= _summary(scores[digits])
    return found


def _name(digits: int) -> str:
    return f"{digits} digit" if digits == 1 else f"{digits} digits"


@dataclass(frozen=True)
class _VideoScore:
    prompt: str
    digit: float
    first_second: float
    colour: float


def _video_score(sampler: _Sampler, judge: Judge, prompt: str, seed: int, settings: QualityConfig) -> _VideoScore:
    frames = sampler.video(prompt, seed, max(round(settings.video_seconds * FPS), 1))
    asked = parse_prompt(prompt, judge.world)
    whole = summarise(score_chunks(judge, frames, asked, FPS, len(frames)))
    first = summarise(score_chunks(judge, frames[:FPS], asked, FPS, min(FPS, len(frames))))
    # Digits that cover each other all the time are not seen, as little as those that are not there.
    return _VideoScore(prompt, whole["digit"] or 0.0, first["digit"] or 0.0, whole["colour"] or 0.0)


def _summary(scores: Sequence[_VideoScore]) -> dict[str, Any]:
    if not scores:
        return {}
    worst = min(scores, key=lambda score: score.digit)
    means = {name: float(np.mean([getattr(score, name) for score in scores])) for name in ("digit", "first_second")}
    return {
        "video": means["digit"],
        "first_second": means["first_second"],
        "colour": float(np.mean([score.colour for score in scores])),
        "worst": worst.digit,
        "worst_prompt": worst.prompt,
        "videos": len(scores),
    }


def _share_of_stills(frames: NDArray[np.uint8], prompts: Sequence[str], judge: Judge) -> float | None:
    right = list[NDArray[np.bool_]]()
    for frame, prompt in zip(frames, prompts, strict=True):
        asked = parse_prompt(prompt, judge.world)
        reading = judge.read(frame[None], asked)
        right.append((reading.numbers == np.array([digit.number for digit in asked]))[~reading.covered])
    every = np.concatenate(right)
    return float(every.mean()) if len(every) else None


class _Sampler:
    """A model folder on a device."""

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        self._checkpoint, self._device = Checkpoint.open(str(folder)), device
        model, encoder = self._checkpoint.backbone, self._checkpoint.text_encoder
        if not isinstance(model, STDiT3) or not isinstance(encoder, WordTextEncoder):
            raise ConfigError(f"{folder}: holds no model of moving digits")
        self._model, self._encoder = model.to(device), encoder
        self._codec: VideoCodec = load_codec(self._checkpoint.vae, device)
        self._params = params = SamplingParams.resolve(self._checkpoint)
        self._info = FrameInfo(params.height, params.width, params.fps)
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def video(self, prompt: str, seed: int, frames: int) -> NDArray[np.uint8]:
        """``[frames, H, W, 3]``."""
        stream = build_stream(VideoRequest(prompt, seed, frames), 0, self._params, self._checkpoint)
        texts = TextBank(self._model.project_text, self._device)
        denoise = StreamDenoiser(self._model, stream, texts, self._device)
        decoder, scale = self._codec.decoder(), stream.guidance_scale
        with self._autocast:
            clean = [chunk.latents for chunk in sample(stream.window(self._device), denoise, scale)]
        return torch.cat([decoder.decode(latents).cpu() for latents in clean])[:frames].numpy()

    @torch.inference_mode()
    def stills(self, prompts: Sequence[str]) -> NDArray[np.uint8]:
        """A picture of each prompt, ``[n, H, W, 3]``: a single latent, sampled by itself."""
        pictures = list[Tensor]()
        for first in range(0, len(prompts), _AT_ONCE):
            for latent in self._still_latents(prompts[first : first + _AT_ONCE], first):
                # As a later latent of a video, which most of those are that were trained on.
                pictures.append(self._codec.decoder().decode(latent.expand(-1, 2, -1, -1))[-1].cpu())
        return torch.stack(pictures).numpy()

    def _still_latents(self, prompts: Sequence[str], seed: int) -> Iterator[Tensor]:
        """``[C, 1, h, w]`` of each prompt."""
        model, count, scale = self._model, len(prompts), self._params.guidance_scale
        ids, mask = self._encoder.collate(prompts)
        grow = model.spec.text_len - ids.shape[1]
        with torch.no_grad():
            tokens = nn.functional.pad(self._encoder(ids, mask), (0, 0, 0, grow)).to(self._device)
        mask = nn.functional.pad(mask, (0, grow)).to(self._device)
        read = mask if model.spec.null_text_as_long else torch.ones_like(mask)
        null = model.null_text().to(tokens.dtype).expand(count, -1, -1)
        branches = [(tokens, mask)] if scale == 1 else [(tokens, mask), (null, read)]
        size = (model.spec.latent_channels, 1, *self._codec.spec.latent_size(self._info.height, self._info.width))
        x = torch.randn(count, *size, generator=torch.Generator().manual_seed(seed)).to(self._device)
        levels = NoiseSchedule(self._params.num_inference_steps, self._params.time_shift).levels[::-1]
        for before, after in pairwise(levels):
            level = torch.full((count, 1), before, device=self._device)
            with self._autocast:
                raw = [model(x, level, text, self._info, real) for text, real in branches]
            velocity = guide([model.to_velocity(out, x, level) for out in raw], scale)
            x = x + (before - after) * velocity
        return iter(x.unbind(0))
