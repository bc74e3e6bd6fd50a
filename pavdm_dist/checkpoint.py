"""A checkpoint folder in the Hugging Face layout: which component lies where, and its sampling defaults."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.codecs.wan import WanCodec, read_spec
from pavdm_dist.errors import CheckpointError
from pavdm_dist.models.loading import load_config, local_folder, read_tensors
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config

# The small model that ships inside the package.
EMBEDDED = Path(__file__).parent / "embedded"
NULL_TEXT = "y_embedder.y_embedding"


@dataclass(frozen=True)
class SamplingDefaults:
    """What a checkpoint was trained for; every value can be overridden per run.

    ``time_shift`` None means the resolution-dependent formula of
    :func:`~pavdm_dist.method.schedule.time_shift_ratio`.
    """

    num_inference_steps: int = 30
    window_chunks: int = 6
    latent_chunk_size: int = 5
    context_chunks: int = 1
    guidance_scale: float = 7.0
    height: int = 240
    width: int = 424
    fps: float = 24
    time_shift: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Paths and shapes of a model's components; weights are read when asked for.

    Attributes:
        folder: local folder with ``model_index.json``, ``transformer/``, ``vae/`` and ``text_encoder/``.
        defaults: sampling defaults.
    """

    folder: Path
    defaults: SamplingDefaults

    @classmethod
    def open(cls, model: str | Path = "embedded", **hub: Any) -> Checkpoint:
        """Opens ``embedded``, a local folder or a hub id.

        Raises:
            CheckpointError: not a model folder, a component of a kind this package does not have, or components
                that do not fit each other.
        """
        folder = EMBEDDED if str(model) == "embedded" else local_folder(model, **hub)
        index_file = folder / "model_index.json"
        try:
            index = json.loads(index_file.read_text())
        except FileNotFoundError as error:
            raise CheckpointError(f"model={model}: {index_file} is missing, so this is no model folder") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"model={model}: {index_file} is not valid JSON: {error}") from error
        if not isinstance(index, dict) or not isinstance(index.get("sampling", {}), dict):
            raise CheckpointError(f"model={model}: {index_file} must map component names to [library, class]")
        for component, kind in (
            ("transformer", "STDiT3"),
            ("vae", "AutoencoderKLWan"),
            ("text_encoder", "WordTextEncoder"),
        ):
            entry = index.get(component)
            found = entry[1] if isinstance(entry, list) and len(entry) == 2 else "nothing"
            if found != kind:
                raise CheckpointError(f"model={model}: {component} is {found}, this version runs {kind}")
        known = {field.name for field in fields(SamplingDefaults)}
        unknown = set(index.get("sampling", {})) - known
        if unknown:
            raise CheckpointError(f"model={model}: unknown sampling default {sorted(unknown)[0]!r} in {index_file}")
        checkpoint = cls(folder, SamplingDefaults(**index.get("sampling", {})))
        checkpoint._check_fit()
        return checkpoint

    @property
    def transformer(self) -> Path:
        return self.folder / "transformer"

    @property
    def vae(self) -> Path:
        return self.folder / "vae"

    @cached_property
    def transformer_config(self) -> STDiT3Config:
        """Shape of the backbone."""
        return STDiT3Config.from_dict(load_config(self.transformer))

    @cached_property
    def codec_spec(self) -> CodecSpec:
        """Strides and channels of the codec."""
        return read_spec(self.vae)

    @cached_property
    def text_encoder(self) -> WordTextEncoder:
        return WordTextEncoder.from_pretrained(self.folder / "text_encoder")

    @cached_property
    def codec(self) -> WanCodec:
        return WanCodec.from_pretrained(self.vae)

    @cached_property
    def backbone(self) -> STDiT3:
        """The whole backbone in this process; stage actors load their own parts instead."""
        return STDiT3.from_pretrained(self.transformer)

    @cached_property
    def null_text(self) -> Tensor:
        """The backbone's learned null text, ``[L, text_dim]``."""
        tensors = read_tensors(self.transformer, lambda key: key == NULL_TEXT)
        if NULL_TEXT not in tensors:
            raise CheckpointError(f"{self.transformer} lacks tensor {NULL_TEXT}, the null text of guidance")
        return tensors[NULL_TEXT]

    def _check_fit(self) -> None:
        latents, expected = self.codec_spec.latent_channels, self.transformer_config.in_channels
        if latents != expected:
            raise CheckpointError(f"{self.folder}: vae has {latents} latent channels, transformer takes {expected}")
        text = load_config(self.folder / "text_encoder").get("text_dim")
        if text != self.transformer_config.caption_channels:
            raise CheckpointError(
                f"{self.folder}: text_encoder gives {text} channels, transformer takes "
                f"{self.transformer_config.caption_channels}"
            )
