"""``pavdm text-cache``: prompts are encoded once, where the text encoder is; machines that render need none then."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder, TextOptions
from pavdm_dist.commands.prompt_files import read_prompts
from pavdm_dist.errors import ConfigError
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.texts import check_prompts, prepare_texts
from pavdm_dist.request.video_request import VideoRequest
from pavdm_dist.values.fields import TextDevice, TextDtype


@dataclass
class TextCacheConfig:
    """Everything ``pavdm text-cache`` knows."""

    prompts: str | None = None  # file, one prompt a line
    prompt: str | None = None  # or one prompt
    negative_prompt: str | None = None  # null = the model's learned null text, or that of no words
    prompt_suffix: str | None = None  # said behind every prompt; null = the checkpoint's own
    model: str = "embedded"  # folder or hub id
    revision: str | None = None  # of a hub id: branch, tag or commit
    text_device: TextDevice = "auto"  # auto: this machine's GPU, if it has room
    text_dtype: TextDtype = "bfloat16"  # what that text encoder computes in
    text_cache: str | None = None  # folder; null = this user's


def text_cache_report(config: TextCacheConfig) -> dict[str, Any]:
    """Encodes what is not cached yet, all of it in one process, and says what there is.

    Raises:
        ConfigError: no prompt, one that cannot be encoded, or a model whose text encoder needs no cache.
        CheckpointError: no such model, or the encoder cannot be loaded.
    """
    checkpoint = replace(Checkpoint.open(config.model, config.revision), text=TextOptions.of(config))
    encoder = checkpoint.text_encoder
    if not isinstance(encoder, PretrainedTextEncoder):
        raise ConfigError(f"model={config.model}: its text encoder is small and needs no cache")
    if encoder.folder is None:
        raise ConfigError("text_cache: must be given, this user has no home that a cache could be in")
    prompts = _prompts(config)
    # Any guidance: a negative prompt is encoded whatever will read it.
    guidance = None if config.negative_prompt is None else 2.0
    params = SamplingParams.resolve(checkpoint, prompt_suffix=config.prompt_suffix, guidance_scale=guidance)
    requests = [VideoRequest(prompt, 0, None, config.negative_prompt) for prompt in prompts]
    for request in requests:
        check_prompts(request, params, checkpoint)
    began, before = time.monotonic(), encoder.encoded
    prepare_texts(requests, params, checkpoint)
    return {
        "model": config.model,
        "text_cache": str(encoder.folder),
        "prompts": len(prompts),
        "encoded": encoder.encoded - before,
        "seconds": round(time.monotonic() - began, 3),
    }


def _prompts(config: TextCacheConfig) -> list[str]:
    if config.prompt is not None and config.prompts is not None:
        raise ConfigError(f"prompt={config.prompt!r} and prompts={config.prompts}: give one of them")
    if config.prompts is None:
        if not (config.prompt or "").strip():
            raise ConfigError(
                "nothing to encode: give a file of prompts, pavdm text-cache prompts.txt, or prompt=WORDS"
            )
        return [config.prompt or ""]
    return [line.prompt for line in read_prompts(config.prompts)]
