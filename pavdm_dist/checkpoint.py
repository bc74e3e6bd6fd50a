"""A model in the Hugging Face layout: which component lies where, and its sampling defaults."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from pavdm_dist.codecs.base import CodecSpec, VideoCodec
from pavdm_dist.codecs.catalog import CODECS, codec_spec, load_codec
from pavdm_dist.codecs.pretrained_text import PRETRAINED, PretrainedTextEncoder, TextOptions
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.metadata import weights_identity
from pavdm_dist.method.schedule import Context
from pavdm_dist.method.window import Step
from pavdm_dist.models.base import Backbone, LevelSupport
from pavdm_dist.models.catalog import BACKBONES, backbone_shape, load_backbone
from pavdm_dist.models.known import ONE_LEVEL, known_model
from pavdm_dist.models.loading import has_weights, read_tensor, stored_dtype, stored_tensors, weight_files
from pavdm_dist.models.lora import changes_of, lora_file, settings_beside
from pavdm_dist.models.nearby import hidden_folder, model_near
from pavdm_dist.models.source import Adapter, Source, load_config, named_class
from pavdm_dist.values.fields import (
    ChunkLatents,
    ContextChunks,
    ContextNoise,
    FrameRate,
    Guidance,
    Side,
    Steps,
    TimeShift,
    WindowChunks,
    Within,
    made,
    read_object,
)

logger = logging.getLogger(__name__)

TEXT_ENCODER = "WordTextEncoder"
COMPONENTS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class SamplingDefaults:
    """What a checkpoint was trained for; every value can be overridden per run.

    ``time_shift`` None means the resolution-dependent formula of
    :func:`~pavdm_dist.method.levels.time_shift_ratio`, ``trained_latents`` the longest window of training, where that
    is known. ``prompt_suffix`` is said behind every prompt but the negative one: words that the captions of training
    ended with, such as Open-Sora's ``aesthetic score: 6.5.``. ``levels`` are those that a student was distilled to,
    noisiest first; None makes them of the time shift.
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
    trained_latents: Annotated[int, Within(1)] | None = None
    context_noise: ContextNoise = 0.0
    prompt_suffix: str = ""
    step: Step = "euler"
    context: Context = "joint"
    anchor_chunks: ContextChunks = 0
    levels: tuple[Annotated[float, Within(0, 1, above=True)], ...] | None = None


@dataclass(frozen=True)
class _ModelIndex:
    """What ``model_index.json`` says; what else is in it (versions, a record of training) is nobody's concern."""

    transformer: tuple[str, str]
    vae: tuple[str, str]
    text_encoder: tuple[str, str]
    transformer_2: tuple[str | None, str | None] = (None, None)
    _class_name: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model's components and shapes; weights are read when asked for, and may be lacking where none are asked for.

    Attributes:
        source: with ``model_index.json``, ``transformer/``, ``vae/`` and ``text_encoder/``; small, it may travel.
        defaults: sampling defaults.
        pipeline: class of diffusers' pipeline that the model was published for, where it names one.
        adapters: what is added to the backbone's weights as they are loaded.
        text: where a pretrained text encoder computes, and where what it gives is kept.
        codec_device: where clips and pictures are encoded.
        has_own_size: whether height and width of the defaults are the model's, not what any model has that says none.
    """

    source: Source
    defaults: SamplingDefaults
    pipeline: str | None = None
    adapters: tuple[Adapter, ...] = ()
    text: TextOptions = field(default_factory=TextOptions)
    codec_device: str = "cpu"
    has_own_size: bool = True

    @classmethod
    def open(
        cls,
        model: str | Path | Source = "embedded",
        revision: str | None = None,
        lora: Sequence[Adapter] = (),
        quietly: bool = False,
    ) -> Checkpoint:
        """Opens a model that comes with the package (``embedded``, or a shape such as ``stdit3-xl``), a folder or a
        hub id; reads configuration files only.

        Args:
            model: which.
            revision: of a hub id: branch, tag or commit; None = the default branch.
            lora: changes of the backbone's weights.
            quietly: nothing of the model is logged, whoever opens it later is told.

        A licence that restricts what may be done with the weights is logged, once.

        Raises:
            CheckpointError: not a model folder, a component of a kind this package does not have, or components
                that do not fit each other.
            ConfigError: a revision of what has none.
        """
        source = Source.of(model, revision)
        file = source.find("model_index.json")
        if file is None:
            hint = model_near(source.folder()) if source.is_folder else ""
            raise CheckpointError(f"model={model}: {source.missing('model_index.json')}{hint}")
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
        if index.transformer_2[1] is not None:
            raise CheckpointError(
                f"model={model}: has two transformers, one for high and one for low levels; this version runs one"
            )
        source = source.pinned("model_index.json")
        known = known_model(source, values, load_config(source.part("transformer")), where)
        defaults = made(SamplingDefaults, known.sampling, where, prefix="sampling.", error=CheckpointError)
        adapters = (replace(adapter, source=adapter.source.pinned(lora_file(adapter.source))) for adapter in lora)
        has_own_size = all(known.sampling.get(side) is not None for side in ("height", "width"))
        checkpoint = cls(source, defaults, index._class_name, tuple(adapters), has_own_size=has_own_size)
        checkpoint._check_fit()
        for said in (known.license and f"its weights are under {known.license}", known.doubt):
            if said and not quietly:
                _say_once(f"model={model}: {said}")
        return checkpoint

    @property
    def transformer(self) -> Source:
        return replace(self.source.part("transformer"), adapters=self.adapters)

    @property
    def vae(self) -> Source:
        return self.source.part("vae")

    @property
    def identity(self) -> str:
        """What tells these weights from others: SHA-256 of what is used of a folder, the commit of a hub id.

        A pretrained text encoder is not a part of it, it has an identity of its own: machines that render may lack it.

        Raises:
            CheckpointError: a file of it cannot be read.
        """
        names = {"model_index.json"}
        if self.source.is_folder:
            for component in self._components:
                files = weight_files(self.source.part(component))
                names |= {f"{component}/{name}" for name in ("config.json", *files)}
        identities = [_identity(self.source, names)]
        for adapter in self.adapters:
            identity = _identity(adapter.source, [lora_file(adapter.source)])
            identities.append(f"{identity} x {adapter.scale:g}")
        return " + ".join(identities)

    @cached_property
    def lora_settings(self) -> list[str | None]:
        """What tells from others how strongly each adapter is merged: SHA-256 of what the settings beside its weights
        say of it.

        None where there are none, and for a hub id, whose commit says it. Not a part of :attr:`identity`, which videos
        of earlier versions have without it.

        Raises:
            CheckpointError: a file of them cannot be read.
        """
        sources = [adapter.source for adapter in self.adapters]
        settings = [settings_beside(source) if source.is_folder else None for source in sources]
        texts = [None if found is None else json.dumps(found, sort_keys=True) for found in settings]
        return [None if text is None else hashlib.sha256(text.encode()).hexdigest() for text in texts]

    @property
    def level_support(self) -> LevelSupport:
        """How the weights met per-frame levels in training."""
        return "accepts" if self.pipeline in ONE_LEVEL else self.shape.spec.level_support

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

    def check_size(self, height: int, width: int) -> None:
        """Refuses a picture size, in pixels, that the codec or the backbone's patches cannot take.

        Raises:
            ConfigError: naming the nearest legal size.
        """
        cells = self.codec_spec.latent_size(height, width)
        try:
            self.shape.grid(1, *cells)
        except ConfigError as error:
            patch, stride = self.shape.spec.patch[1:], self.codec_spec.spatial_stride
            units = [stride * side for side in patch]
            nearest = [max(1, round(side / unit)) * unit for side, unit in zip((height, width), units, strict=True)]
            raise ConfigError(
                f"height={height}, width={width}: this model's patches cover {units[0]}x{units[1]} pixels, sides must"
                f" be multiples of these; nearest legal: height={nearest[0]} width={nearest[1]}"
            ) from error

    def check_text(self, section: str = "") -> None:
        """Refuses settings of a pretrained text encoder that this model has no use for.

        Args:
            section: what the settings' names begin with, its dot included.

        Raises:
            ConfigError: naming the first of them.
        """
        if self._text_class != TEXT_ENCODER:
            return
        for name, value in self.text.given:
            raise ConfigError(
                f"{section}{name}={value}: is for a pretrained text encoder; that of model={self.source} is small and"
                " runs where it is needed, leave it out"
            )

    def require_weights(self) -> None:
        """Refuses what can only be planned, and files of weights that are lacking or torn; reads their headers.

        Raises:
            CheckpointError: there are no weights, or not all.
        """
        if not self.has_weights:
            away = self.source.offline
            what = f": a file of weights is {away}" if away else " holds no weights: it can be planned, not sampled"
            raise CheckpointError(f"model={self.source}{what}{hidden_folder(self.source.location)}")
        for component in self._components:
            stored_tensors(self.source.part(component))
        changes_of(self.transformer, self.shape.state_dict())

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

    @property
    def _components(self) -> tuple[str, ...]:
        """Folders whose weights every machine needs; what a pretrained text encoder gives may be cached."""
        return COMPONENTS[:-1] if self._text_class in PRETRAINED else COMPONENTS

    @cached_property
    def _text_class(self) -> str:
        return named_class(self.source.part("text_encoder")) or TEXT_ENCODER

    @cached_property
    def codec(self) -> VideoCodec:
        """In this process, float32, on ``codec_device``."""
        return load_codec(self.vae, self.codec_device)

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


def _identity(source: Source, names: Iterable[str]) -> str:
    """Of some of a folder's files; the commit of a hub id."""
    if not source.is_folder:
        return str(source)
    try:
        return weights_identity(source.folder(), names)
    except OSError as error:
        raise CheckpointError(f"model={source}: {error.filename} cannot be read: {error.strerror}") from error


@cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)
