"""What a command's videos are made from and with: what their bits depend on, and what sidecars say of it."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pavdm_dist.codecs.catalog import RGB
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder
from pavdm_dist.config import SampleConfig
from pavdm_dist.io.differences import PREVIEW_FILE, changes
from pavdm_dist.io.leftovers import latents_path
from pavdm_dist.io.metadata import versions
from pavdm_dist.io.state import BegunOtherwiseError
from pavdm_dist.io.storage import exists
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.redaction import hide_secrets
from pavdm_dist.request.sampling import SamplingParams, tier
from pavdm_dist.request.video_request import VideoRequest
from pavdm_dist.values.merging import to_dict

# Facts of an identity that nobody asks for: what a machine has. A begun video needs the same to go on to the same bits;
# a complete one is what it is: an upgrade, or another machine for the rest, is no reason to refuse a whole batch.
_OF_MACHINE = frozenset({"versions", "device", "decoder_device", "decoder_threads"})
# Facts that are checksums of pixels, which must be decoded for it.
_PIXELS = ("clip", "image")
# Checksums of pixels by the id of their tensor, as long as it lives: videos of a command share their clip and their
# picture, and a server must not hold those of videos that are done.
_digests: dict[int, str] = {}


class OtherMachineError(BegunOtherwiseError):
    """An unfinished video was begun by other versions, or on other devices, than this machine has: it goes on where
    these are."""


@dataclass(frozen=True)
class Origin:
    """What the videos of a command have in common.

    Attributes:
        config, params, pipeline: of the command.
        weights: identity of the model.
    """

    config: SampleConfig
    params: SamplingParams
    pipeline: PAVDMPipeline
    weights: str

    def identity(self, request: VideoRequest) -> dict[str, Any]:
        """What a video's bits depend on, but for the models of CPUs and GPUs, which a cluster may mix."""
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "prompt_schedule": [list(change) for change in request.prompt_schedule],
            "seed": request.seed,
            "num_frames": request.num_frames,
            "clip": _pixels(request.clip),
            "include_input": self.config.include_input,
            "sampling": asdict(self.params),
            "weights": self.weights,
            "threads": self.config.threads_per_stage,
            "compile": self.pipeline.compiled,
            "dtype": self.pipeline.dtype_name,
            "decoder_dtype": self.config.decoder_dtype,
            **self.pipeline.computed_on,
            "versions": self._versions(),
            **self._further(request),
        }

    def facts(
        self, request: VideoRequest, resyncs: Sequence[int], changes: Sequence[tuple[int, str]]
    ) -> dict[str, Any]:
        """What a finished video's sidecar says of how it was made.

        Args:
            request: what was asked for.
            resyncs: rows that adaptive re-sync of mode displaced has made exact.
            changes: ``(first chunk, prompt)`` of what was changed while it ran.
        """
        return {
            "config": to_dict(self.config, hide_secrets),
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "device": self.pipeline.device_name,
            "threads": self.config.threads_per_stage,
            "weights": self.weights,
            "identity": self.identity(request),
            "extra": {
                "sampling": asdict(self.params),
                "chunk_frames": self._chunk_frames(),
                **self._exactness(),
                **({"resyncs": list(resyncs)} if resyncs else {}),
                **({"prompt_changes": [list(change) for change in changes]} if changes else {}),
            },
        }

    def _chunk_frames(self) -> list[int]:
        """Frames of the first new chunk and of every other."""
        spec, size = self.pipeline.checkpoint.codec_spec, self.params.latent_chunk_size
        return [spec.frames_in_chunk(size, first) for first in (self.params.start == "noise", False)]

    def _exactness(self) -> dict[str, Any]:
        """How what was computed relates to the model as published, run block by block."""
        pipeline = self.pipeline
        facts: dict[str, Any] = {"tier": tier(self.params, pipeline.compiled)}
        if pipeline.compiled:
            facts["compiled"] = {"relative_error": pipeline.relative_error, "attention": pipeline.kernels}
        return facts

    def _versions(self) -> dict[str, str | None]:
        """Of what computes: modules of every codec and of some backbones are diffusers' own."""
        found, names = versions(), ["pavdm_dist", "torch", "av", "diffusers"]
        # A machine that renders from kept embeddings need not have it.
        if isinstance(self.pipeline.checkpoint.text_encoder, PretrainedTextEncoder) and found["transformers"]:
            names.append("transformers")
        return {name: found[name] for name in names}

    def _further(self, request: VideoRequest) -> dict[str, Any]:
        """Facts that most videos do not have."""
        facts: dict[str, Any] = {"image": _pixels(request.image)}
        facts["decoder_tile"] = self.config.decoder_tile
        preview = self.pipeline.preview_identity
        if preview in (None, RGB):
            facts["preview_decoder"] = preview
        else:
            facts |= {"preview_decoder": PREVIEW_FILE, "preview_sha256": preview}
        checkpoint, encoder = self.pipeline.checkpoint, self.pipeline.checkpoint.text_encoder
        facts["lora_settings"] = checkpoint.lora_settings or None
        if isinstance(encoder, PretrainedTextEncoder):
            facts["text_encoder"] = encoder.identity
            texts = [request.prompt, request.negative_prompt or "", *(prompt for _, prompt in request.prompt_schedule)]
            facts["text_cleaning"] = "ftfy" if any(map(encoder.is_mended, texts)) else None
        if request.negative_prompt is None and self.params.guidance_scale != 1:
            facts["null_text"] = "as long" if checkpoint.shape.spec.null_text_as_long else None
        return {name: value for name, value in facts.items() if value is not None}


def difference(output: str, made: Mapping[str, Any], asked: Mapping[str, Any], config: SampleConfig) -> str:
    """How a complete video is another one than a command asks for, as the end of a sentence; empty where it is that.

    Args:
        output: its mp4.
        made: its identity, as its sidecar has it.
        asked: the identity that the command would give it.
        config: of the command.
    """
    different = changes(_asked(made, config), _asked(asked, config))
    if different:
        return f"was made with {different}"
    if not exists(output):
        return "is gone, its sidecar is not"
    if config.save_latents and not exists(latents_path(output)):
        return "is complete, without the latents of save_latents=true"
    return ""


def is_of_machine(name: str, config: SampleConfig) -> bool:
    """Whether a fact of an identity, dotted where it is nested, is the machine's own with these settings."""
    return name.partition(".")[0] in _OF_MACHINE | _left_to_machine(config)


def without_pixels(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity that says of a clip and of a picture only whether there is one."""
    return {name: "given" if name in _PIXELS and value is not None else value for name, value in identity.items()}


def _left_to_machine(config: SampleConfig) -> frozenset[str]:
    return frozenset(name for name in ("dtype", "compile") if getattr(config, name) == "auto")


def _asked(identity: Mapping[str, Any], config: SampleConfig) -> dict[str, Any]:
    """Of an identity, what a command asks of a video that is complete."""
    asked = {name: value for name, value in identity.items() if not is_of_machine(name, config)}
    sampling = asked.get("sampling")
    if config.chunks_per_unit is None and isinstance(sampling, Mapping):
        asked["sampling"] = {name: value for name, value in sampling.items() if name != "chunks_per_unit"}
    return asked


def _pixels(frames: Tensor | None) -> str | None:
    if frames is None:
        return None
    if (digest := _digests.get(id(frames))) is None:
        digest = _digests[id(frames)] = hashlib.sha256(frames.contiguous().numpy().data).hexdigest()
        weakref.finalize(frames, _digests.pop, id(frames), None).atexit = False
    return digest
