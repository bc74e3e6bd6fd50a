"""How much moves: VBench's rule of dynamic degree on Farneback's optical flow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.errors import ConfigError

# VBench looks at about so many frames a second, whole frames apart, ...
_RATE = 8
# ... at the fastest share of pixels, and asks for so many pixels a step at a short side of 256.
_FASTEST, _PIXELS, _SIDE = 0.05, 6.0, 256
# Larger pictures are halved until their short side is at most this: flow costs by the pixel.
_LARGEST = 512


class MotionMeter:
    """Takes frames one by one.

    Raises:
        ConfigError: OpenCV is not installed.
    """

    def __init__(self, fps: float) -> None:
        try:
            import cv2
        except ImportError:
            raise ConfigError("motion=on needs OpenCV: pip install 'pavdm-dist[metrics]'") from None
        cv2.setNumThreads(1)
        self._cv2: Any = cv2
        self._every = max(1, round(fps / _RATE))
        self._rate = fps / self._every
        self._count = 0
        self._before: NDArray[np.uint8] | None = None
        self._fast: list[list[float]] = []
        self._threshold = math.inf

    def add(self, frame: NDArray[np.uint8], new_chunk: bool) -> None:
        """One frame ``[H, W, 3]``; ``new_chunk`` where a chunk begins with it."""
        if new_chunk:
            self._fast.append([])
        if self._count % self._every == 0:
            grey = self._small(frame)
            if self._before is not None:
                self._fast[-1].append(self._fastest(self._before, grey))
            self._before = grey
            self._threshold = _PIXELS * (min(grey.shape) / _SIDE)
        self._count += 1

    def per_chunk(self) -> list[float | None]:
        """Speed of the fastest twentieth of the pixels, in shares of the short side per second, by chunk."""
        side = 1 if self._before is None else min(self._before.shape)
        return [float(np.mean(steps)) / side * self._rate if steps else None for steps in self._fast]

    def dynamic_degree(self) -> float | None:
        """VBench's verdict: 1 where a quarter of the steps is fast enough, else 0; None of fewer than two frames."""
        steps = [step for chunk in self._fast for step in chunk]
        if not steps:
            return None
        return float(sum(step > self._threshold for step in steps) >= max(1, round((len(steps) + 1) / 4)))

    def _small(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        grey = self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2GRAY)
        while min(grey.shape) > _LARGEST:
            grey = self._cv2.pyrDown(grey)
        return grey

    def _fastest(self, before: NDArray[np.uint8], now: NDArray[np.uint8]) -> float:
        flow = self._cv2.calcOpticalFlowFarneback(before, now, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        lengths = np.sort(np.linalg.norm(flow, axis=-1), axis=None)
        return float(lengths[-max(1, int(len(lengths) * _FASTEST)) :].mean())
