"""What is trained: the backbone, alone or together with a small text encoder, built whole or already sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from operator import eq
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.checksums import ends_digest
from pavdm_dist.models.base import Backbone, FrameInfo, LevelSupport, WindowSlice
from pavdm_dist.models.devices import to_device
from pavdm_dist.models.layers import RotaryTable
from pavdm_dist.models.loading import check_tensors, read_tensors, weight_files
from pavdm_dist.models.source import Source, load_config
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config
from pavdm_dist.models.stdit3_init import init_weights
from pavdm_dist.train.lora_training import add_lora
from pavdm_dist.train.train_settings import ModelConfig, TrainConfig

# Makes the given parameters whole on every process, and shards what the first one wrote into them again.
Whole = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Text:
    """A batch's prompts, and their embeddings where these are not learned.

    Attributes:
        prompts: one per sample.
        embeddings: ``[b, L, D]`` of a frozen text encoder; None = the trained one reads the prompts.
        mask: ``[b, L]`` bool, True = real token.
        lengths: real tokens of each sample, which come first, as the host knows them without asking a GPU; found where
            the mask lies in main memory, None where it does not.
    """

    prompts: list[str]
    embeddings: Tensor | None = None
    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.lengths is None and self.mask is not None and self.mask.device.type == "cpu":
            lengths = self.mask.sum(dim=1)
            if torch.equal(self.mask, torch.arange(self.mask.shape[1]) < lengths[:, None]):
                object.__setattr__(self, "lengths", tuple(lengths.tolist()))

    def part(self, rows: slice) -> Text:
        """Some of the samples."""
        cut = self._each(lambda value: value[rows])
        return replace(cut, prompts=self.prompts[rows], lengths=self.lengths and self.lengths[rows])

    def to(self, device: torch.device) -> Text:
        """On another device."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> Text:
        """In memory that a GPU reads by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Text:
        """With its tensors changed, where it has some."""
        embeddings, mask = (value if value is None else change(value) for value in (self.embeddings, self.mask))
        return replace(self, embeddings=embeddings, mask=mask)


class TextToVideo(nn.Module):
    """The modules that are trained together.

    Args:
        transformer: the backbone.
        text_encoder: trained along; None where batches bring embeddings.
        autocast: compute in bfloat16, with weights in float32.
    """

    def __init__(self, transformer: Backbone, text_encoder: WordTextEncoder | None, autocast: bool = False) -> None:
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
        """Velocity ``[b, C, F, h, w]``, float32.

        The text of ``dropped`` prompts is the model's learned one of no prompt. Where it has none, the trained encoder
        reads no words for them; embeddings that a batch brings are those of no words then.

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

    def _tokens(self, x: Tensor, text: Text, dropped: list[bool]) -> tuple[Tensor, Tensor | None]:
        """Text ``[b, L, D]`` and its mask ``[b, L]``; None where all tokens are known to be real, which fused kernels
        of attention take in half the time.

        Raises:
            ConfigError: a text is longer than the model reads, or there is nothing to read.
        """
        null = self.transformer.null_text()
        if text.embeddings is None:
            if self.text_encoder is None:
                raise ConfigError("the batch brings no text embeddings, and no text encoder is trained")
            pairs = zip(text.prompts, dropped, strict=True)
            prompts = text.prompts if null is not None else ["" if drop else prompt for prompt, drop in pairs]
            ids, mask = self.text_encoder.collate(prompts)
            ids, mask = to_device(ids, x.device), to_device(mask, x.device)
            tokens = self.text_encoder(ids, mask)
        else:
            assert text.mask is not None
            tokens, mask = text.embeddings, text.mask
        grow = self.transformer.spec.text_len - tokens.shape[1]
        if grow < 0:
            raise ConfigError(f"a text of {tokens.shape[1]} tokens: the model reads {self.transformer.spec.text_len}")
        if null is None:
            return tokens, mask
        null = null.to(tokens.dtype)
        if text.lengths is not None:
            return self._known(tokens, null, text.lengths, dropped)
        tokens = nn.functional.pad(tokens, (0, 0, 0, grow))
        mask = nn.functional.pad(mask, (0, grow))
        rows = to_device(torch.tensor(dropped), x.device)
        if not self.transformer.spec.null_text_as_long:
            mask = mask | rows[:, None]
        return torch.where(rows[:, None, None], null, tokens), mask

    def _known(
        self, tokens: Tensor, null: Tensor, lengths: tuple[int, ...], dropped: list[bool]
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`_tokens`, of texts whose lengths the host knows: nothing behind the longest is read."""
        whole = not self.transformer.spec.null_text_as_long
        reads = [len(null) if drop and whole else length for length, drop in zip(lengths, dropped, strict=True)]
        longest = max(reads)
        tokens = nn.functional.pad(tokens, (0, 0, 0, longest - tokens.shape[1]))  # or cut
        if any(dropped):
            rows = to_device(torch.tensor(dropped), tokens.device)
            tokens = torch.where(rows[:, None, None], null[:longest], tokens)
        if min(reads) == longest:
            return tokens, None
        places = torch.arange(longest, device=tokens.device)
        return tokens, places < to_device(torch.tensor(reads), tokens.device)[:, None]


def levels_met(config: TrainConfig) -> LevelSupport:
    """How a run's windows bring different noise levels together."""
    kinds = [kind for _, kind in config.objective.kinds()]
    if any(kind.method == "pavdm" and kind.pattern != "random" for kind in kinds):
        return "staircase-trained"
    return "accepts" if all(kind.method == "replacement-noise" for kind in kinds) else "mixed-trained"


def shape_of(config: TrainConfig, channels: int) -> Backbone:
    """The backbone's shape, on the meta device: the pretrained model's, else the config's.

    Raises:
        CheckpointError: ``model.pretrained`` is no model.
        ConfigError: the data's latents have other channels.
    """
    m, causal, levels = config.model, config.objective.causal_share > 0, levels_met(config)
    if m.pretrained is None:
        shape = STDiT3Config(
            depth=m.depth,
            hidden_size=m.hidden_size,
            num_heads=m.num_heads,
            in_channels=channels,
            patch_size=(m.patch_size[0], m.patch_size[1], m.patch_size[2]),
            caption_channels=m.caption_channels,
            model_max_length=m.model_max_length,
            pred_sigma=False,
            level_support=levels,
            causal_trained=causal,
        )
        with torch.device("meta"):
            return STDiT3(shape)
    model = Checkpoint.open(m.pretrained).shape
    if model.spec.latent_channels != channels:
        raise ConfigError(
            f"model.pretrained={m.pretrained} takes {model.spec.latent_channels} latent channels, the data has"
            f" {channels}"
        )
    if m.lora.rank:
        return model  # what its weights met stays as it is
    causal = model.spec.causal_trained or causal
    return _made(model, replace(model.config, level_support=levels, causal_trained=causal), "meta")


def described(config: TrainConfig) -> dict[str, Any]:
    """What tells a pretrained model from others that a run must not go on with, wherever it lies.

    Weights that are all trained are those of the checkpoint; of those that stay as they are both ends are looked at.
    """
    assert config.model.pretrained is not None
    source = Checkpoint.open(config.model.pretrained).transformer
    found: dict[str, Any] = {"config": load_config(source)}
    if config.model.lora.rank:
        files = [source.file(name) for name in sorted(weight_files(source))] if source.is_folder else []
        found["weights"] = ends_digest(files) if files else str(source)
    return found


def build(
    config: TrainConfig,
    channels: int,
    vocabulary: Sequence[str] | None,
    whole: Whole | None = None,
    sharding: AbstractContextManager[Any] | None = None,
    device: torch.device | str = "cpu",
) -> TextToVideo:
    """The model with its initial or pretrained weights, of which those require gradients that are trained.

    Fresh weights are float32; pretrained ones are read as what the run computes in.

    Args:
        config: settings; seed the generator first, fresh weights come from it.
        channels: of the latents.
        vocabulary: words of the text encoder that is trained along, unless a pretrained one brings its own; None where
            none is trained.
        whole: given when the weights are sharded as they are made.
        sharding: the context that does so; only around the backbone, a text encoder is small and fills itself.
        device: that pretrained weights are read to, unless they are sharded.

    Raises:
        CheckpointError: ``model.pretrained`` lacks a tensor, or has one of another size or too many.
        ConfigError: no such target of low-rank changes.
    """
    shape, m = shape_of(config, channels), config.model
    if m.pretrained is None:
        assert isinstance(shape, STDiT3)  # no other is trained from nothing
        with sharding or nullcontext():
            fresh = STDiT3(shape.config)
        if sharding is not None:
            _restore_tables(fresh, {})
        encoder = None if vocabulary is None else _text_encoder(m, vocabulary)
        init_weights(fresh, whole)
        return TextToVideo(fresh, encoder, config.zero.precision == "autocast")
    source = Checkpoint.open(m.pretrained).source
    # What DeepSpeed would make of them at once: nothing is held in float32 that need not be.
    dtype = torch.bfloat16 if config.zero.precision == "bfloat16" else torch.float32
    try:
        if sharding is None:
            transformer = type(shape).load(source.part("transformer"), None, dtype, device)
        else:
            assert whole is not None
            transformer = _sharded(shape, source.part("transformer"), whole, sharding)
        encoder = None if vocabulary is None else _text_encoder(m, vocabulary)
        if encoder is not None:
            check_tensors(encoder.state_dict(), source.part("text_encoder"))
            encoder.load_state_dict(read_tensors(source.part("text_encoder")))
    except CheckpointError as error:
        raise CheckpointError(f"model.pretrained={error}") from error
    model = TextToVideo(transformer, encoder, config.zero.precision == "autocast").requires_grad_(True).train()
    if m.lora.rank:
        model.requires_grad_(False)  # a text encoder too: changes of the backbone are all that is saved
        with sharding or nullcontext():
            add_lora(_module(transformer), m.lora, whole)
    return model


def filled(
    config: TrainConfig, channels: int, vocabulary: Sequence[str] | None, weights: dict[str, Tensor]
) -> TextToVideo:
    """The model that :func:`build` makes, with these weights, in main memory, for sampling and saving."""
    transformer = shape_of(config, channels)
    with torch.device("meta"):
        encoder = None if vocabulary is None else _text_encoder(config.model, vocabulary)
        if config.model.lora.rank:
            add_lora(_module(transformer), config.model.lora)
    model = TextToVideo(transformer, encoder, config.zero.precision == "autocast")
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _sharded(shape: Backbone, source: Source, whole: Whole, sharding: AbstractContextManager[Any]) -> Backbone:
    """A model that is sharded as it is made, with its weights, of which no process holds more than one whole."""
    check_tensors(shape.state_dict(), source, None, shape.optional_tensors)
    with sharding:
        model = _made(shape, shape.config)
    module, first = _module(model), torch.distributed.get_rank() == 0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # What the first process wrote is sharded again; the others need not read it.
            with whole([parameter]):
                if first:
                    parameter.copy_(read_tensors(source, partial(eq, name))[name])
    tables = dict(module.named_buffers())
    _restore_tables(module, read_tensors(source, lambda name: name in tables))
    return model


def _restore_tables(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Float32 buffers again: sharded building rounds whatever is made to the type of the weights."""
    for module in model.modules():
        if isinstance(module, RotaryTable):
            module.restore()
    for name, buffer in model.named_buffers():
        buffer.data = stored.get(name, buffer).to(buffer.device, torch.float32)


def _made(shape: Backbone, config: Any, device: str | None = None) -> Backbone:
    """Another backbone of that class."""
    kind: Any = type(shape)
    with nullcontext() if device is None else torch.device(device):
        return kind(config)


def _module(model: Backbone) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _text_encoder(m: ModelConfig, vocabulary: Sequence[str]) -> WordTextEncoder:
    if m.pretrained is not None:
        source = Checkpoint.open(m.pretrained).source.part("text_encoder")
        return WordTextEncoder.of_shape(load_config(source), f"{source}/config.json")
    return WordTextEncoder(vocabulary, m.caption_channels, m.text_depth, 4, m.model_max_length)
