"""VBench's measures on features of a pretrained network: frames come one by one, and of them nothing is kept but sums.

Huang et al., VBench: Comprehensive Benchmark Suite for Video Generative Models (CVPR 2024, arXiv 2311.17982), section 3
and its repository (Vchitect/VBench: ``subject_consistency.py``, ``background_consistency.py``,
``aesthetic_quality.py``).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.evaluate.features import subject_consistency

# Frames that go through a network together.
_BATCH = 8
Floats = NDArray[np.float64]


class Features(Protocol):
    """A network, as a meter sees it."""

    def prepared(self, frame: NDArray[np.uint8]) -> Tensor:
        """``[H, W, 3]``, RGB, as the network takes it: ``[3, h, w]``."""

    def __call__(self, pictures: Tensor) -> Floats:
        """Features ``[n, d]`` of pictures ``[n, 3, h, w]``."""


class Score(Protocol):
    """What features say of a video; one for each video, since it may remember."""

    def __call__(self, features: Floats) -> Floats:
        """Scores of the next ``n`` frames, ``[n]``; NaN where a frame has none."""


class Consistency:
    """VBench's subject and background consistency: of every frame but the first the mean of its likeness to the first
    frame and to the one before it, where likeness is the cosine of their features, and 0 where that is less.

    What it remembers are two frames' features, whatever the video's length.
    """

    def __init__(self) -> None:
        self._first: Floats | None = None
        self._before: Floats | None = None

    def __call__(self, features: Floats) -> Floats:
        """Scores ``[n]`` of the next frames; NaN of the video's first."""
        if self._first is None or self._before is None:
            self._first = features[0]
            found = np.concatenate([[np.nan], subject_consistency(features)])
        else:
            found = subject_consistency(np.concatenate([self._before, features]), self._first)
        self._before = features[-1:]
        return found


class Aesthetic:
    """VBench's aesthetic quality: LAION's linear head on features of length 1, over 10.

    Args:
        weight: ``[d]``.
        bias: of the sum.
    """

    def __init__(self, weight: Floats, bias: float) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, features: Floats) -> Floats:
        """Scores ``[n]``, about 0..1."""
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        return (unit @ self._weight + self._bias) / 10


class NetworkMeter:
    """Takes frames one by one; some at a time go through the network.

    Args:
        name: of the measure, for messages.
        network: what makes features of frames.
        score: what makes a number of features; of this video alone.
        fps: frames per second of the video.
        rate: frames per second that are looked at; None = all.
    """

    def __init__(self, name: str, network: Features, score: Score, fps: float, rate: float | None) -> None:
        self._name, self._network, self._score = name, network, score
        self._every = 1.0 if rate is None else max(1.0, fps / rate)
        self._count = self._taken = 0
        self._waiting: list[Tensor] = []
        self._places: list[int] = []  # chunks of those that wait
        self._sums: list[float] = []
        self._counts: list[int] = []

    def add(self, frame: NDArray[np.uint8], new_chunk: bool) -> None:
        """One frame ``[H, W, 3]``; ``new_chunk`` where a chunk begins with it.

        Raises:
            ConfigError: the network gives numbers that are none.
        """
        if new_chunk:
            self._sums.append(0.0)
            self._counts.append(0)
        if self._count >= self._taken * self._every:
            self._waiting.append(self._network.prepared(frame))
            self._places.append(len(self._sums) - 1)
            self._taken += 1
            if len(self._waiting) == _BATCH:
                self._flush()
        self._count += 1

    def per_chunk(self) -> list[float | None]:
        """Mean of the scores of each chunk's frames; None where none of them has one. Raises as :meth:`add`."""
        self._flush()
        return [total / count if count else None for total, count in zip(self._sums, self._counts, strict=True)]

    def whole(self) -> float | None:
        """Mean of all scores, VBench's figure of a video; None where there are none. Raises as :meth:`add`."""
        self._flush()
        return sum(self._sums) / sum(self._counts) if any(self._counts) else None

    def _flush(self) -> None:
        if not self._waiting:
            return
        features = self._network(torch.stack(self._waiting))
        if not np.isfinite(features).all():
            raise ConfigError(f"{self._name}: the network's features are not finite; dtype=float32 has room for them")
        for place, score in zip(self._places, self._score(features), strict=True):
            if not np.isnan(score):
                self._sums[place] += float(score)
                self._counts[place] += 1
        self._waiting, self._places = [], []
