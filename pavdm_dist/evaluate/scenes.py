"""Scenes of a video, as the paper counts them: PySceneDetect's adaptive detector."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.errors import ConfigError


class SceneMeter:
    """Takes frames one by one.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, fps: float) -> None:
        try:
            from scenedetect import FrameTimecode
            from scenedetect.detectors import AdaptiveDetector
        except ImportError:
            raise ConfigError("scenes=on needs PySceneDetect: pip install 'pavdm-dist[metrics]'") from None
        self._timecode, self._fps = FrameTimecode, float(fps)
        self._detector: Any = AdaptiveDetector()
        self._count = self._cuts = 0

    def add(self, frame: NDArray[np.uint8], new_chunk: bool) -> None:
        """One frame ``[H, W, 3]``."""
        position = self._timecode(self._count, self._fps)
        self._cuts += len(self._detector.process_frame(position, np.ascontiguousarray(frame[..., ::-1])))
        self._count += 1

    def count(self) -> int:
        """Scenes; call once, at the end."""
        return 1 + self._cuts + len(self._detector.post_process(self._timecode(self._count, self._fps)))
