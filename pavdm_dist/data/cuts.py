"""Where a video cuts from one shot to the next (PySceneDetect)."""

from __future__ import annotations

from typing import Any

from pavdm_dist.errors import ConfigError

# The detectors compare averages over the picture; more pixels only cost time.
_WIDTH = 160


class CutFinder:
    """Finds hard cuts in frames that arrive one by one, in constant memory.

    Two detectors vote and either may cut, since a missed cut spoils a clip and a false one costs some frames:
    the adaptive one compares a change with its neighbours (it stands fast camera motion), the plain one sees cuts
    in the first and last two frames too, where the other has no neighbours. Slow dissolves are not found.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from scenedetect import FrameTimecode
            from scenedetect.detectors import AdaptiveDetector, ContentDetector
        except ImportError as error:
            raise ConfigError(
                "scene_cuts=true needs PySceneDetect: pip install 'pavdm-dist[data]' (or set scene_cuts=false "
                "for videos that hold one shot each)"
            ) from error
        self._timecode = FrameTimecode
        # No least length between cuts: a cut that such a filter hides would lie inside a clip.
        self._detectors: list[Any] = [AdaptiveDetector(min_scene_len=0), ContentDetector(min_scene_len=0)]
        self._count = 0
        self._cuts: set[int] = set()

    def add(self, frame: Any) -> None:
        """The next decoded frame (PyAV)."""
        if not self._count:  # a shape that changes on the way is a change like any other
            self._height = max(2, round(frame.height * _WIDTH / frame.width))
        small = frame.reformat(width=_WIDTH, height=self._height, format="bgr24", interpolation="AREA").to_ndarray()
        # Frames are counted here and timed elsewhere, so the rate that the detectors see does not matter.
        position = self._timecode(self._count, 25.0)
        for detector in self._detectors:
            self._cuts.update(cut.frame_num for cut in detector.process_frame(position, small))
        self._count += 1

    def cuts(self) -> list[int]:
        """Numbers of the frames that begin a new shot, rising, without frame 0; call once, at the end."""
        for detector in self._detectors:
            self._cuts.update(cut.frame_num for cut in detector.post_process(self._timecode(self._count, 25.0)))
        return sorted(cut for cut in self._cuts if 0 < cut < self._count)
