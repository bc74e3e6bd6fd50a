"""A model in the Hugging Face layout: which component lies where, and its sampling defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.codecs.base import CodecSpec, VideoCodec
from pavdm_dist.codecs.catalog import CODECS, codec_spec, load_codec
from pavdm_dist.codecs.pretrained_text import PRETRAINED, PretrainedTextEncoder, TextOptions
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.errors import CheckpointError
from pavdm_dist.fields import (
    ChunkLatents,
    ContextChunks,
    ContextNoise,
    FrameRate,
    Guidance,
    Side,
    Steps,
    TimeShift,
    WindowChunks,
    made,
    read_object,
)
from pavdm_dist.io.metadata import weights_identity
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.models.base import Backbone
from pavdm_dist.models.catalog import BACKBONES, backbone_shape, load_backbone
from pavdm_dist.models.loading import has_weights, read_tensor, stored_dtype, stored_tensors
from pavdm_dist.models.source import Source, load_config

TEXT_ENCODER = "WordTextEncoder"


@dataclass(frozen=True)
class SamplingDefaults:
    """What a checkpoint was trained for; every value can be overridden per run.

    ``time_shift`` None means the resolution-dependent formula of
    :func:`~pavdm_dist.method.schedule.time_shift_ratio`. ``prompt_suffix`` is said behind every prompt but the negative
    one: words that the captions of training ended with, such as Open-Sora's ``aesthetic score: 6.5.``.
    """

    num_inference_steps: Steps = 30
    window_chunks: WindowChunks = 6
    latent_chunk_size: ChunkLatents = 5
    context_chunks: ContextChunks = 1
    guidance_scale: Guidance = 7.0
    height: Side = 240
    width: Side = 424
    fps: FrameRate = 24
    time_shift: TimeShift | None = None
    context_noise: ContextNoise = 0.0
    prompt_suffix: str = ""


@dataclass(frozen=True)
class _ModelIndex:
    """What ``model_index.json`` says; what else is in it (versions, a record of training) is nobody's concern."""

    transformer: tuple[str, str]
    vae: tuple[str, str]
    text_encoder: tuple[str, str]
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A model's components and shapes; weights are read when asked for, and may be lacking where none are asked for.

    Attributes:
        source: with ``model_index.json``, ``transformer/``, ``vae/`` and ``text_encoder/``; small, it may travel.
        defaults: sampling defaults.
        text: where a pretrained text encoder computes, and where what it gives is kept.
    """

    source: Source
    defaults: SamplingDefaults
    text: TextOptions = field(default_factory=TextOptions)

    @classmethod
    def open(cls, model: str | Path | Source = "embedded", revision: str | None = None) -> Checkpoint:
        """Opens a model that comes with the package (``embedded``, or a shape such as ``stdit3-xl``), a folder or a
        hub id; reads configuration files only.

        Args:
            model: which.
            revision: of a hub id: branch, tag or commit; None = the default branch.

        Raises:
            CheckpointError: not a model folder, a component of a kind this package does not have, or components
                that do not fit each other.
            ConfigError: a revision of what has none.
        """
        source = Source.of(shipped_models().get(str(model), model), revision)
        file = source.find("model_index.json")
        if file is None:
            raise CheckpointError(f"model={model}: {source.missing('model_index.json')}")
        where = f"model={model}: {file}"
        values = read_object(file, CheckpointError)
        index = made(_ModelIndex, values, where, ignore_unknown=True, error=CheckpointError)
        # A text encoder matters when something is sampled, not when it is planned.
        for component, found, kinds in (
            ("transformer", index.transformer[1], BACKBONES),
            ("vae", index.vae[1], CODECS),
        ):
            if found not in kinds:
                raise CheckpointError(f"model={model}: {component} is {found}, this version runs {', '.join(kinds)}")
        defaults = made(SamplingDefaults, index.sampling, where, prefix="sampling.", error=CheckpointError)
        checkpoint = cls(source.pinned("model_index.json"), defaults)
        checkpoint._check_fit()
        return checkpoint

    @property
    def transformer(self) -> Source:
        return self.source.part("transformer")

    @property
    def vae(self) -> Source:
        return self.source.part("vae")

    @property
    def identity(self) -> str:
        """What tells these weights from others: SHA-256 of a folder's files, the commit of a hub id."""
        return weights_identity(self.source.location) if self.source.is_folder else str(self.source)

    @cached_property
    def shape(self) -> Backbone:
        """The backbone without its weights, on the meta device."""
        return backbone_shape(self.transformer)

    @cached_property
    def codec_spec(self) -> CodecSpec:
        """Strides and channels of the codec."""
        return codec_spec(self.vae)

    @cached_property
    def has_weights(self) -> bool:
        """Whether it can be sampled, or only planned."""
        return has_weights(self.transformer)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type the backbone's weights are stored in; float32 where there are none."""
        return stored_dtype(self.transformer)

    def require_weights(self) -> None:
        """Refuses what can only be planned, and files of weights that are lacking or torn; reads their headers.

        Raises:
            CheckpointError: there are no weights, or not all.
        """
        if not self.has_weights:
            away = self.source.offline
            what = f": a file of weights is {away}" if away else " holds no weights: it can be planned, not sampled"
            raise CheckpointError(f"model={self.source}{what}")
        for component in (self.transformer, self.vae):
            stored_tensors(component)
        if self._text_class not in PRETRAINED:  # those may be left out where all that is rendered is cached
            stored_tensors(self.source.part("text_encoder"))

    @cached_property
    def text_encoder(self) -> WordTextEncoder | PretrainedTextEncoder:
        """What encodes prompts. A pretrained one is loaded in a process of its own, for as long as it takes."""
        found = self._text_class
        if found in PRETRAINED:
            return PretrainedTextEncoder(self.source, self.shape.spec.text_len, self.text)
        if found != TEXT_ENCODER:
            kinds = ", ".join((TEXT_ENCODER, *PRETRAINED))
            raise CheckpointError(f"model={self.source}: text_encoder is {found}, this version runs {kinds}")
        return WordTextEncoder.from_pretrained(self.source.part("text_encoder"))

    @cached_property
    def _text_class(self) -> str:
        config = load_config(self.source.part("text_encoder"))
        names = config.get("architectures")
        found = config.get("_class_name") or (names[0] if isinstance(names, list) and names else TEXT_ENCODER)
        return str(found)

    @cached_property
    def codec(self) -> VideoCodec:
        """In this process, float32, on the CPU."""
        return load_codec(self.vae)

    @cached_property
    def backbone(self) -> Backbone:
        """The whole backbone in this process, float32, on the CPU; stages load their own parts instead."""
        return load_backbone(self.transformer)

    @cached_property
    def null_text(self) -> Tensor:
        """The text of no prompt, ``[L, text_dim]``: learned by the backbone, or the encoding of an empty prompt."""
        name = self.shape.null_text_tensor
        return self.text_encoder.encode("") if name is None else read_tensor(self.transformer, name)

    def _check_fit(self) -> None:
        spec = self.shape.spec
        latents = self.codec_spec.latent_channels
        if latents != spec.latent_channels:
            raise CheckpointError(
                f"{self.source}: vae has {latents} latent channels, transformer takes {spec.latent_channels}"
            )
        config = load_config(self.source.part("text_encoder"))
        text = config.get("text_dim")
        if text is None:
            text = config.get("d_model")  # T5's own name for it
        if text != spec.text_dim:
            raise CheckpointError(
                f"{self.source}: text_encoder gives {text} channels, transformer takes {spec.text_dim}"
            )
