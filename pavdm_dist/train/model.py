"""What is trained: the backbone, alone or together with a small text encoder, built whole or already sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.models.base import FrameInfo, WindowSlice
from pavdm_dist.models.loading import read_tensors
from pavdm_dist.models.source import load_config
from pavdm_dist.models.stdit3 import OPTIONAL_TENSORS, STDiT3, STDiT3Config
from pavdm_dist.train.settings import ModelConfig, TrainConfig
from pavdm_dist.train.zero import whole_shape

# Makes the given parameters whole on every process, and shards what the first one wrote into them again.
Whole = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Text:
    """A batch's prompts, and their embeddings where these are not learned.

    Attributes:
        prompts: one per sample.
        embeddings: ``[b, L, D]`` of a frozen text encoder; None = the trained one reads the prompts.
        mask: ``[b, L]`` bool, True = real token.
    """

    prompts: list[str]
    embeddings: Tensor | None = None
    mask: Tensor | None = None

    def part(self, rows: slice) -> Text:
        """Some of the samples."""
        cut = (None if value is None else value[rows] for value in (self.embeddings, self.mask))
        return Text(self.prompts[rows], *cut)

    def to(self, device: torch.device) -> Text:
        """On another device."""
        moved = (None if value is None else value.to(device) for value in (self.embeddings, self.mask))
        return Text(self.prompts, *moved)


class TextToVideo(nn.Module):
    """The modules that are trained together.

    Args:
        transformer: the backbone.
        text_encoder: trained along; None where batches bring embeddings.
        autocast: compute in bfloat16, with weights in float32.
    """

    def __init__(self, transformer: STDiT3, text_encoder: WordTextEncoder | None, autocast: bool = False) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.autocast = transformer, text_encoder, autocast

    def forward(
        self,
        x: Tensor,
        levels: Tensor,
        text: Text,
        dropped: list[bool],
        info: FrameInfo,
        chunk_causal: int | None,
        window: WindowSlice | None = None,
    ) -> Tensor:
        """Velocity ``[b, C, F, h, w]``, float32; ``dropped`` prompts are replaced by the model's null text.

        Args:
            x: noisy latents ``[b, C, F, h, w]``.
            levels: ``[b, F]``.
            text: prompts or their embeddings.
            dropped: which samples see the null text.
            info: size in pixels and frames per second.
            chunk_causal: chunk size when the mask is chunk-causal.
            window: of which window ``x`` and ``levels`` are a slice; None when they are all of it.
        """
        # Not around the engine: DeepSpeed turns off what it did not turn on itself.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            tokens, mask = self._tokens(x, text, dropped)
            out = self.transformer(x, levels, tokens, info, mask, chunk_causal, window)
            return self.transformer.to_velocity(out, x, levels)

    def _tokens(self, x: Tensor, text: Text, dropped: list[bool]) -> tuple[Tensor, Tensor]:
        """Text ``[b, L, D]`` and its mask ``[b, L]``."""
        if text.embeddings is None:
            if self.text_encoder is None:
                raise ConfigError("the batch brings no text embeddings, and no text encoder is trained")
            ids, mask = self.text_encoder.collate(text.prompts)
            tokens, mask = self.text_encoder(ids.to(x.device), mask.to(x.device)), mask.to(x.device)
        else:
            assert text.mask is not None
            tokens, mask = text.embeddings, text.mask
        null = self.transformer.null_text().to(tokens.dtype)
        grow = null.shape[0] - tokens.shape[1]
        tokens = nn.functional.pad(tokens, (0, 0, 0, grow))
        mask = nn.functional.pad(mask, (0, grow))
        rows = torch.tensor(dropped, device=x.device)
        return torch.where(rows[:, None, None], null, tokens), mask | rows[:, None]


def shape_of(config: TrainConfig, channels: int) -> STDiT3Config:
    """The backbone's shape: the pretrained folder's, else the config's.

    Raises:
        CheckpointError: the folder is none.
        ConfigError: the data's latents have other channels.
    """
    m, causal = config.model, config.objective.causal_share > 0
    if m.pretrained is not None:
        model = Checkpoint.open(m.pretrained).shape
        if not isinstance(model, STDiT3):
            raise CheckpointError(f"model.pretrained={m.pretrained} is {type(model).__name__}; STDiT3 can be trained")
        shape = model.config
        if shape.in_channels != channels:
            raise ConfigError(
                f"model.pretrained={m.pretrained} takes {shape.in_channels} latent channels, the data has {channels}"
            )
        return replace(shape, level_support="staircase-trained", causal_trained=shape.causal_trained or causal)
    return STDiT3Config(
        depth=m.depth,
        hidden_size=m.hidden_size,
        num_heads=m.num_heads,
        in_channels=channels,
        patch_size=(m.patch_size[0], m.patch_size[1], m.patch_size[2]),
        caption_channels=m.caption_channels,
        model_max_length=m.model_max_length,
        pred_sigma=False,
        level_support="staircase-trained",
        causal_trained=causal,
    )


def build(
    config: TrainConfig,
    channels: int,
    vocabulary: Sequence[str] | None,
    whole: Whole | None = None,
    sharding: AbstractContextManager[Any] | None = None,
) -> TextToVideo:
    """The model with its initial or pretrained weights, float32.

    Args:
        config: settings; seed the generator first, fresh weights come from it.
        channels: of the latents.
        vocabulary: words of the text encoder that is trained along, unless a pretrained one brings its own; None where
            none is trained.
        whole: given when the weights are sharded as they are made.
        sharding: the context that does so; only around the backbone, a text encoder is small and fills itself.
    """
    model, m = _modules(config, channels, vocabulary, sharding), config.model
    if m.pretrained is None:
        model.transformer.init_weights(whole)
    else:
        folder = Checkpoint.open(m.pretrained)
        _fill(model.transformer, read_tensors(folder.transformer), whole, m.pretrained)
        if model.text_encoder is not None:
            _fill(model.text_encoder, read_tensors(folder.source.part("text_encoder")), None, m.pretrained)
    return model


def filled(
    config: TrainConfig, channels: int, vocabulary: Sequence[str] | None, weights: dict[str, Tensor]
) -> TextToVideo:
    """The model that :func:`build` makes, with these weights, in main memory, for sampling and saving."""
    with torch.device("meta"):
        model = _modules(config, channels, vocabulary)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _modules(
    config: TrainConfig,
    channels: int,
    vocabulary: Sequence[str] | None,
    sharding: AbstractContextManager[Any] | None = None,
) -> TextToVideo:
    with sharding or nullcontext():
        transformer = STDiT3(shape_of(config, channels))
    encoder = None if vocabulary is None else _text_encoder(config.model, vocabulary)
    return TextToVideo(transformer, encoder, config.zero.precision == "autocast")


def _text_encoder(m: ModelConfig, vocabulary: Sequence[str]) -> WordTextEncoder:
    if m.pretrained is not None:
        source = Checkpoint.open(m.pretrained).source.part("text_encoder")
        return WordTextEncoder.of_shape(load_config(source), f"{source}/config.json")
    return WordTextEncoder(vocabulary, m.caption_channels, m.text_depth, 4, m.model_max_length)


@torch.no_grad()
def _fill(module: nn.Module, tensors: dict[str, Tensor], whole: Whole | None, source: str) -> None:
    wanted = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in wanted.items():
        if name not in tensors and name not in OPTIONAL_TENSORS:
            raise CheckpointError(f"model.pretrained={source}: {name} is missing")
        shape = whole_shape(value)
        if name in tensors and tensors[name].shape != shape:
            raise CheckpointError(
                f"model.pretrained={source}: {name} is {list(tensors[name].shape)}, not {list(shape)}"
            )
    for name in tensors.keys() - wanted.keys():
        raise CheckpointError(f"model.pretrained={source}: {name} is no part of this model")
    if whole is None:
        module.load_state_dict(tensors, strict=False)
        return
    for name, parameter in module.named_parameters():
        with whole([parameter]):
            parameter.copy_(tensors[name])
    for name, buffer in module.named_buffers():
        if name in tensors:
            buffer.copy_(tensors[name])
