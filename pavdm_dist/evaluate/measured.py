"""One video, measured in one pass over its frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.digits.judge import Judge
from pavdm_dist.digits.prompts import AskedDigit, parse_prompt
from pavdm_dist.digits.scores import score_chunk
from pavdm_dist.digits.settings import SIZE
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.evaluate.drift import Drift, drift_of
from pavdm_dist.evaluate.features import FeatureMeter, frechet_distance
from pavdm_dist.evaluate.made import chunk_lengths, cost_of, group_of, sidecar_of, text, within
from pavdm_dist.evaluate.motion import MotionMeter
from pavdm_dist.evaluate.official import Official
from pavdm_dist.evaluate.pixel_meter import PixelMeter
from pavdm_dist.evaluate.scenes import SceneMeter
from pavdm_dist.evaluate.settings import EvalConfig, Wanted
from pavdm_dist.io.reader import open_video

Floats = NDArray[np.float64]
T = TypeVar("T")
_DIGIT_MEASURES = (
    "digit", "colour", "count", "speed_ratio", "direction", "trajectory_error", "law_error", "bounce", "followed",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What was found of one video.

    Attributes:
        video: its path.
        prompt: as its sidecar or the caller says.
        seconds, frames, fps, height, width: of the file.
        group: what it is compared as; see :func:`~pavdm_dist.evaluate.made.group_of`.
        times: where each chunk begins, seconds.
        lengths: frames of each chunk.
        chunks: every measure by chunk.
        drift: what each measure did over time.
        whole: measures of the video as a whole, and what it cost.
        features: of its half seconds, for distances to others; not part of a report.
    """

    video: str
    prompt: str | None
    seconds: float
    frames: int
    fps: float
    height: int
    width: int
    group: str
    times: list[float]
    lengths: list[int]
    chunks: dict[str, list[float | None]]
    drift: dict[str, Drift]
    whole: dict[str, float | None]
    features: Floats | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        """All but the features."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("features", "drift")}
        drift = {
            name: asdict(found) | {"between_ends": found.between_ends, "holds": found.holds}
            for name, found in self.drift.items()
        }
        return values | {"drift": drift}


def measure(
    path: str, config: EvalConfig, reference: Floats | None = None, official: Sequence[Official] = ()
) -> Measured:
    """Measures a video.

    Args:
        path: of it, local or remote.
        config: what is wanted.
        reference: features of real videos, for the distance to them.
        official: measures on the user's networks, as :func:`~pavdm_dist.evaluate.official.open_official` opens those
            that ``config`` names: once for all videos.

    Raises:
        MediaError: it is no video, is damaged, changes its size or has fewer than two frames.
        ConfigError: something is wanted (``on``) that is not installed, or that this video has not; or a network gives
            numbers that are none.
    """
    sidecar = sidecar_of(path)
    prompt = text(sidecar.get("prompt")) or config.prompt
    with open_video(path) as reader:
        fps = float(reader.rate)
        digits = _digits(path, prompt, sidecar, config)
        planned = chunk_lengths(sidecar, fps, config.chunk_seconds)
        meters = _Meters(fps, config, digits, official)
        size: tuple[int, ...] | None = None
        starts, times = list[int](), list[float]()
        border = frames = 0
        for at, frame in reader.frames():
            picture = reader.picture(frame, None)
            if size is not None and picture.shape != size:
                raise MediaError(f"{path}: the size of its pictures changes at frame {frames}")
            size = picture.shape
            if new := frames == border:
                border += next(planned)
                starts.append(frames)
                times.append(float(at))
            meters.add(picture, new)
            frames += 1
    if frames < 2 or size is None:
        raise MediaError(f"{path}: has {frames} frame, at least 2 are needed")
    chunks, whole, features = meters.found(reference)
    times = [time - times[0] for time in times]
    lengths = [after - start for start, after in pairwise([*starts, frames])]
    drifts = {name: drift_of(times, values, config.resamples, config.seed, lengths) for name, values in chunks.items()}
    known = {name: drift for name, drift in drifts.items() if drift is not None}
    group = group_of(path, sidecar, config.groups)
    whole |= cost_of(sidecar)
    return Measured(
        path, prompt, frames / fps, frames, fps, size[0], size[1], group, times, lengths, chunks, known, whole, features
    )


def features_of(paths: Sequence[str]) -> Floats:
    """Features of several films' half seconds, one after another.

    Raises:
        MediaError: one of them is no video.
        ConfigError: the network is not installed, or there is too little to compare with.
    """
    found = []
    for path in paths:
        with open_video(path) as reader:
            meter = FeatureMeter(float(reader.rate))
            for number, (_, frame) in enumerate(reader.frames()):
                meter.add(reader.picture(frame, None), number == 0)
            found.append(meter.all())
    together = np.concatenate(found)
    if len(together) < 2:
        raise ConfigError(f"reference={list(paths)}: hold {len(together)} half second, at least 2 are needed")
    return together


class _Meters:
    """Everything that is measured, fed frame by frame."""

    def __init__(
        self, fps: float, config: EvalConfig, digits: tuple[AskedDigit, ...] | None, official: Sequence[Official]
    ) -> None:
        self._pixels = PixelMeter(fps)
        self._motion = _if_wanted(config.motion, lambda: MotionMeter(fps))
        self._scenes = _if_wanted(config.scenes, lambda: SceneMeter(fps))
        self._features = _if_wanted(config.features, lambda: FeatureMeter(fps))
        self._digits = None if digits is None else _DigitMeter(fps, digits)
        self._official = {own.name: own.meter(fps) for own in official}
        self._all = [
            meter
            for meter in (
                self._pixels, self._motion, self._scenes, self._features, self._digits, *self._official.values()
            )
            if meter is not None
        ]  # fmt: skip

    def add(self, picture: NDArray[np.uint8], new_chunk: bool) -> None:
        for meter in self._all:
            meter.add(picture, new_chunk)

    def found(
        self, reference: Floats | None
    ) -> tuple[dict[str, list[float | None]], dict[str, float | None], Floats | None]:
        chunks = self._pixels.per_chunk()
        # Consistency alone is won by a picture that stands still, so that motion always stands beside it.
        whole: dict[str, float | None] = {"loop_score": self._pixels.loop_score()}
        if self._motion is not None:
            chunks["motion"] = self._motion.per_chunk()
            whole["dynamic_degree"] = self._motion.dynamic_degree()
        if self._scenes is not None:
            whole["scenes"] = float(self._scenes.count())
        features = None
        if self._features is not None:
            chunks["subject_consistency_eff"] = self._features.per_chunk()
            features = self._features.all()
            if reference is not None and len(features) > 1:
                whole["frechet_distance_eff"] = frechet_distance(features, reference)
        chunks |= {name: meter.per_chunk() for name, meter in self._official.items()}
        whole |= {name: meter.whole() for name, meter in self._official.items()}
        if self._digits is not None:
            chunks |= self._digits.per_chunk()
        return chunks, whole, features


class _DigitMeter:
    """Reads digits back, a chunk at a time."""

    def __init__(self, fps: float, asked: tuple[AskedDigit, ...]) -> None:
        self._judge, self._asked, self._fps = _judge(), asked, fps
        self._before: NDArray[np.uint8] | None = None
        self._frames: list[NDArray[np.uint8]] = []
        self._scores: list[dict[str, Any]] = []

    def add(self, picture: NDArray[np.uint8], new_chunk: bool) -> None:
        if new_chunk:
            self._close()
        self._frames.append(picture)

    def per_chunk(self) -> dict[str, list[float | None]]:
        self._close()
        return {name: [row[name] for row in self._scores] for name in _DIGIT_MEASURES}

    def _close(self) -> None:
        if not self._frames:
            return
        frames = np.stack(self._frames)
        # Chunks of a video may differ in length; whether two are the same is asked of frames that both have.
        same = None if self._before is None or len(self._before) != len(frames) else self._before
        self._scores.append(asdict(score_chunk(self._judge, frames, same, self._asked, self._fps)))
        self._before, self._frames = frames, []


@cache
def _judge() -> Judge:
    """Trained once a process: it takes seconds."""
    return Judge()


def _if_wanted(wanted: Wanted, make: Callable[[], T]) -> T | None:
    """None where it is not wanted, or wanted if possible and not installed."""
    if wanted == "off":
        return None
    try:
        return make()
    except ConfigError:
        if wanted == "on":
            raise
        return None


def _digits(
    path: str, prompt: str | None, sidecar: Mapping[str, Any], config: EvalConfig
) -> tuple[AskedDigit, ...] | None:
    """What the judge is to look for; None where it is not asked, or could not read this video.

    Raises:
        ConfigError: it is asked and could not.
    """
    if config.digits == "off":
        return None
    try:
        if not prompt:
            raise ConfigError("no prompt is known; prompt=TEXT says it")
        if within(sidecar, "config", "timed_prompts") or within(sidecar, "config", "prompt_schedule"):
            raise ConfigError("its prompt changes on the way")
        asked = parse_prompt(prompt)
        with open_video(path) as reader:
            _, first = next(reader.frames())
            size = reader.picture(first, None).shape[:2]
        if size != (SIZE, SIZE):
            raise ConfigError(f"it has {size[0]}x{size[1]} pixels, the judge reads {SIZE}x{SIZE}")
        _judge()
    except ConfigError as error:
        if config.digits == "on":
            raise ConfigError(f"digits=on: {path}: {error}") from error
        return None
    return asked
