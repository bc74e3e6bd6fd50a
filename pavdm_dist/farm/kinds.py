"""Shots of one kind share all settings but prompts, seed, length and what they begin with; a kind is settled once."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.origin import Origin, without_pixels
from pavdm_dist.commands.resolve import engine_options, open_checkpoint, open_pipeline, sampling_params
from pavdm_dist.commands.sample import check_clip, requests_of
from pavdm_dist.commands.videos import Video, Videos
from pavdm_dist.commands.videos import WantedVideo as Output
from pavdm_dist.config import SampleConfig, check_first, frames_wanted, validate_sample
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.begun import as_begun
from pavdm_dist.farm.prompts import PROMPTS, later_prompts
from pavdm_dist.farm.settings import SERVED_SEGMENT, FarmConfig, sample_settings
from pavdm_dist.farm.shot import Shot, seed_of, size_of
from pavdm_dist.io.encode import check_size, require_libx264
from pavdm_dist.io.leftovers import identity_begun_with, recording_facts
from pavdm_dist.io.parts import parts_folder
from pavdm_dist.io.remote import is_remote
from pavdm_dist.io.storage import exists
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.texts import check_prompts, needed_texts, timed_prompts
from pavdm_dist.request.video_request import VideoRequest
from pavdm_dist.values.merging import merged
from pavdm_dist.values.rates import as_rate
from pavdm_dist.values.timed import first_prompt

# Settings that a shot may have of its own: what is sampled, never with which weights, where, or on what.
OVERRIDES = (
    "num_inference_steps", "window_chunks", "latent_chunk_size", "context_chunks", "context", "anchor_chunks", "step",
    "context_noise", "guidance_scale", "time_shift", "start", "end", "fps", "mode", "allow_untrained_causal",
    "displaced", "prompt_schedule", "timed_prompts", "prompt_suffix", "include_input", "chunks_per_segment",
    "save_latents",
)  # fmt: skip
# Kinds that are kept settled; a farm with more settles some again, which takes tens of milliseconds each.
_KEPT = 1024
# Shots whose texts a large encoder gets at a time.
_TEXTS = 1024


@dataclass(frozen=True)
class Kind:
    """Settings of shots that are alike.

    Attributes:
        config: all but what each shot says itself.
        params: what is sampled.
    """

    config: SampleConfig
    params: SamplingParams


class Kinds:
    """From shots to what a pipeline takes, with the settings of one farm.

    Args:
        config: checked (:func:`~pavdm_dist.farm.settings.validate_farm`).

    Attributes:
        base: the kind of a shot that says nothing but its prompt; stages are cut for it.

    Raises:
        CheckpointError: not a model this package runs, or one without weights.
        ConfigError: settings that the model cannot take.
    """

    def __init__(self, config: FarmConfig) -> None:
        self.config = config
        self._common = sample_settings(config)
        self.checkpoint: Checkpoint = open_checkpoint(self._common)
        self._settled = lru_cache(_KEPT)(self._settle)
        require_libx264()
        self.base = self._settled(None, "{}", False, False)
        self._identity: str | None = None

    def check_engine(self) -> None:
        """Refuses what no renderer could be made of, before one is.

        Raises:
            CheckpointError: a model without weights.
            ConfigError: a device that is not there, or a cut into stages that cannot be.
        """
        if self._pipeline.engine is not None:
            self._pipeline.split(self.base.params)

    def pipeline(self, trace: str | None = None) -> PAVDMPipeline:
        """A pipeline of its own for a renderer; loads nothing yet.

        Args:
            trace: file that gets what its stages did when; None = none.

        Raises:
            PAVDMError: as :func:`~pavdm_dist.commands.resolve.open_pipeline`.
        """
        return open_pipeline(replace(self._common, trace=trace or self._common.trace))

    @property
    def engine(self) -> EngineOptions:
        """Of every renderer's gang."""
        return engine_options(self._common)

    @property
    def identity(self) -> str:
        """Of the weights; read once."""
        if self._identity is None:
            self._identity = self.checkpoint.identity
        return self._identity

    def kind_of(self, shot: Shot) -> Kind:
        """The settings that a shot shares with others; its prompts are looked at by :meth:`config_of`.

        Raises:
            ConfigError: an override that is none, or settings that the model cannot take.
        """
        return self._settled(*self.key_of(shot))

    def key_of(self, shot: Shot) -> tuple[str | None, str, bool, bool]:
        """Equal for shots of one kind; checks nothing."""
        own = {name: value for name, value in shot.overrides.items() if name not in PROMPTS}
        overrides = json.dumps(own, sort_keys=True) if own else "{}"
        return shot.size, overrides, shot.video is not None, shot.image is not None

    def config_of(self, shot: Shot, output: str) -> SampleConfig:
        """Settings that make this shot alone.

        Raises:
            ConfigError: as :meth:`kind_of`, later prompts that cannot be, or none or two to begin with.
        """
        own, later = self.kind_of(shot).config, later_prompts(shot.overrides)
        first, at_zero = shot.prompt if shot.prompt.strip() else None, first_prompt(later.timed_prompts)
        check_first(first, at_zero)
        if first is None and at_zero is None:
            raise ConfigError(f"prompt={shot.prompt!r}: must be text, or timed_prompts needs one for 0s")
        length = _length(shot, own)
        return replace(
            own,
            prompt=first or at_zero,
            negative_prompt=shot.negative_prompt,
            prompt_schedule=later.prompt_schedule,
            timed_prompts=later.timed_prompts,
            seed=seed_of(shot, self.config.seed),
            num_frames=length[0],
            seconds=length[1],
            video=shot.video,
            image=shot.image,
            output=output,
        )

    def frames(self, shot: Shot) -> int:
        """New frames of a shot.

        Raises:
            ConfigError: as :meth:`kind_of`.
        """
        kind = self.kind_of(shot)
        length = _length(shot, kind.config)
        return frames_wanted(replace(kind.config, num_frames=length[0], seconds=length[1]), kind.params.fps)

    def frames_before(self, shot: Shot, chunk: int) -> int:
        """New frames of a shot that come before a chunk. Raises as :meth:`frames`."""
        params, spec = self.kind_of(shot).params, self.checkpoint.codec_spec
        size = params.latent_chunk_size
        first, later = (spec.frames_in_chunk(size, first=is_first) for is_first in (not params.warm, False))
        return min(first + (chunk - 1) * later, self.frames(shot)) if chunk else 0

    def seconds(self, shot: Shot) -> float:
        """Seconds of its new frames. Raises as :meth:`frames`."""
        return self.frames(shot) / self.kind_of(shot).params.fps

    def check(self, shot: Shot) -> None:
        """Refuses a shot that cannot be rendered, as far as that shows without decoding what it begins with.

        Raises:
            ConfigError: naming the field, its value and what is legal.
        """
        params, config = self.kind_of(shot).params, self.config_of(shot, "-")
        for name in ("video", "image"):
            path = getattr(shot, name)
            if path is not None and not (exists(path) if is_remote(path) else os.path.isfile(path)):
                raise ConfigError(f"{name}={path}: no such file")
        check_prompts(self._request(config, params), params, self.checkpoint)

    def asked(self, shot: Shot) -> dict[str, Any]:
        """The ``identity`` that the sidecar of a shot's video would have, but for clips and pictures, which would have
        to be decoded: see :func:`~pavdm_dist.commands.origin.without_pixels`.

        Raises:
            ConfigError: as :meth:`kind_of`, or a device that is not there.
            CheckpointError: the weights cannot be read.
        """
        return self._asked(shot, self.config_of(shot, "-"), self.kind_of(shot).params)

    def asked_of_begun(self, shot: Shot, output: str, begun: Mapping[str, Any]) -> dict[str, Any]:
        """The facts that the state of a shot's recording must have to be gone on with, but for pixels as
        :meth:`asked`. Raises as that.

        Args:
            shot: which.
            output: its mp4.
            begun: what that has (:func:`~pavdm_dist.io.leftovers.identity_begun_with`).
        """
        config, params = self._as_begun(shot, self.config_of(shot, output), begun)
        shape = (params.fps, params.height, params.width, config.chunks_per_segment, config.save_latents)
        return recording_facts(self._asked(shot, config, params), *shape)

    def _asked(self, shot: Shot, config: SampleConfig, params: SamplingParams) -> dict[str, Any]:
        found = Origin(config, params, self._pipeline, self.identity).identity(self._request(config, params))
        begins_with = {"clip": shot.video, "image": shot.image}
        return without_pixels({**found, **{name: path for name, path in begins_with.items() if path is not None}})

    def prepare_texts(self, shots: Iterable[Shot]) -> None:
        """Encodes the texts of shots that no cache has yet, many at a time: a large encoder is loaded for each batch,
        whatever settings its shots have.

        Raises:
            CheckpointError: the encoder cannot be loaded.
        """
        left = iter(shots)
        while batch := list(islice(left, _TEXTS)):
            texts: dict[str, None] = {}
            for shot in batch:
                params = self.kind_of(shot).params
                request = self._request(self.config_of(shot, "-"), params)
                texts |= dict.fromkeys(needed_texts(request, params, self.checkpoint))
            self.checkpoint.text_encoder.prepare(texts)

    def videos(self, shot: Shot, output: str, pipeline: PAVDMPipeline) -> Videos:
        """The files of a shot, and what is asked for it: a command of one video.

        Args:
            shot: which.
            output: its mp4.
            pipeline: that renders it.

        Raises:
            ConfigError: a clip, a picture or a prompt that cannot be used.
        """
        config, params = self._as_begun(shot, self.config_of(shot, output), identity_begun_with(output))
        check_clip(config, [output])
        (request,) = requests_of(config, [Output(config.prompt or "", config.seed, output)], params, self.checkpoint)
        video = Video(0, replace(request, params=params), output)
        advice = (
            f"; it goes on where all is the same, and is begun anew once {parts_folder(output)} is removed (where it"
            " counts as failed, by `pavdm farm retry`)"
        )
        return Videos([video], config, params, pipeline, self.identity, overwrite=False, advice=advice)

    @cached_property
    def _pipeline(self) -> PAVDMPipeline:
        """One that never runs, to ask what videos are computed by."""
        return self.pipeline()

    def _as_begun(
        self, shot: Shot, config: SampleConfig, begun: Mapping[str, Any] | None
    ) -> tuple[SampleConfig, SamplingParams]:
        """Settings that a shot goes on with (:func:`~pavdm_dist.farm.begun.as_begun`)."""
        params = self.kind_of(shot).params
        if begun is None:
            return config, params
        defaults = (FarmConfig.chunks_per_segment, SERVED_SEGMENT)  # farm.json may be a server's, read by a farm
        is_said = "chunks_per_segment" in shot.overrides or self.config.chunks_per_segment not in defaults
        return as_begun(config, params, begun, is_said)

    def _request(self, config: SampleConfig, params: SamplingParams) -> VideoRequest:
        """What is asked for in words."""
        schedule = tuple((change.from_chunk, change.prompt) for change in config.prompt_schedule)
        schedule = schedule or timed_prompts(config.timed_prompts, params, self.checkpoint)
        length = frames_wanted(config, params.fps)
        return VideoRequest(config.prompt or "", config.seed, length, config.negative_prompt, schedule)

    def _settle(self, size: str | None, overrides: str, has_video: bool, has_image: bool) -> Kind:
        own: dict[str, Any] = json.loads(overrides)
        for name in own:
            if name not in OVERRIDES:
                raise ConfigError(f"overrides: {name} is not a shot's to change; {', '.join(OVERRIDES)} are")
        values = dataclasses.asdict(self._common)
        if has_video and values["start"] == "noise":
            values["start"] = "clip"
        if not has_video:  # what some shots of the manifest begin with is no concern of the others
            values["start"], values["include_input"] = "noise", False
        for name, value in own.items():
            is_part = name == "displaced" and isinstance(value, dict)  # the only section of them: its keys one by one
            values[name] = {**values[name], **value} if is_part else value
        if size is not None:
            values["height"], values["width"] = size_of(size, "shot")
        config = merged(SampleConfig, values, "overrides")
        params = sampling_params(config, self.checkpoint)
        as_rate(params.fps)
        check_size(params.height, params.width)
        validate_sample(replace(config, include_input=False), needs_prompt=False)
        if config.start != "noise" and not has_video:
            raise ConfigError(f"start={config.start}: needs a conditioning clip, video")
        if has_video and config.start == "noise":
            raise ConfigError("start=noise uses no clip; set start=clip or start=chunk, or drop video")
        if has_image and config.start != "noise":
            raise ConfigError(f"image: start={config.start} begins with a clip; set start=noise, or drop the image")
        return Kind(config, params)


def _length(shot: Shot, shared: SampleConfig) -> tuple[int | None, float | None]:
    """``num_frames`` and ``seconds`` of a shot: its own, or those of all."""
    if shot.num_frames is not None or shot.seconds is not None:
        return shot.num_frames, shot.seconds
    return shared.num_frames, shared.seconds
