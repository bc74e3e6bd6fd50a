"""Measures that need pixels alone, frame by frame, at constant memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Mean absolute difference of pixels, 0..255, below which two frames are the same picture.
SAME = 0.05
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601, as grey pictures are made everywhere
# Pictures that loops are looked for in: their side, how many of them a second, and how far apart a loop's ends are.
_SMALL, SMALL_RATE, _LOOP_SECONDS = 16, 2, 2.0
# Frames nearer than this share of what half a second usually changes are the same moment again.
_LOOP_SHARE = 0.25
_ROWS = 512  # small pictures that are compared at a time


@dataclass
class Sums:
    """Sums over the frames of one chunk.

    Attributes:
        frames: how many.
        steps: pairs of neighbours, the pair over the border to the chunk before included.
        border: difference at that border, 0..255; None at the first chunk.
    """

    frames: int = 0
    steps: int = 0
    sharpness: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    difference: float = 0.0
    inside: float = 0.0
    frozen: int = 0
    border: float | None = None
    colour: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))


class PixelMeter:
    """Takes frames one by one.

    Attributes:
        chunks: sums so far, by chunk.
    """

    def __init__(self, fps: float) -> None:
        self.chunks: list[Sums] = []
        self._before: Floats | None = None
        self._small: list[Floats] = []
        self._fps, self._count = fps, 0

    def add(self, frame: Picture, new_chunk: bool) -> None:
        """One frame ``[H, W, 3]``; ``new_chunk`` where a chunk begins with it."""
        if new_chunk:
            self.chunks.append(Sums())
        sums = self.chunks[-1]
        picture = frame.astype(np.float32)
        luma = picture @ _LUMA
        sums.frames += 1
        sums.sharpness += _sharpness(luma)
        sums.brightness += float(luma.mean()) / 255
        sums.contrast += float(luma.std()) / 255
        sums.saturation += _saturation(picture)
        # The channels lie apart in memory, where numpy adds one by one: past 2^24 float32 rounds every addition alike.
        sums.colour = sums.colour + picture.mean((0, 1), dtype=np.float64) / 255
        if self._before is not None:
            step = float(np.abs(picture - self._before).mean())
            sums.steps += 1
            sums.difference += step
            sums.frozen += step < SAME
            if new_chunk:
                sums.border = step
            else:
                sums.inside += step
        self._before = picture
        if self._count >= len(self._small) * self._fps / SMALL_RATE:
            self._small.append(_thumbnail(luma))
        self._count += 1

    def per_chunk(self) -> dict[str, list[float | None]]:
        """Every measure by chunk; see ``docs/evaluation.md``."""
        first = self.chunks[0].colour / self.chunks[0].frames

        def means(name: str) -> list[float | None]:
            return [getattr(sums, name) / sums.frames for sums in self.chunks]

        # VBench's temporal flickering.
        flicker = [1 - sums.difference / sums.steps / 255 if sums.steps else None for sums in self.chunks]
        return {
            "sharpness": means("sharpness"),
            "brightness": means("brightness"),
            "contrast": means("contrast"),
            "saturation": means("saturation"),
            "colour_shift": [
                float(np.linalg.norm(sums.colour / sums.frames - first)) for sums in self.chunks
            ],
            "flicker": list(flicker),
            "frozen": [sums.frozen / sums.steps if sums.steps else None for sums in self.chunks],
            "join": [_join(sums) for sums in self.chunks],
        }  # fmt: skip

    def loop_score(self) -> float | None:
        """Share of half seconds that were seen before, at least two seconds ago; None where the picture stands still.

        Seen before means: nearer to an earlier small grey picture than a quarter of what half a second usually changes.
        """
        apart = round(_LOOP_SECONDS * SMALL_RATE)
        if len(self._small) <= apart:
            return None
        pictures = np.stack([small.reshape(-1) for small in self._small]).astype(np.float64)
        usual = float(np.median(np.linalg.norm(np.diff(pictures, axis=0), axis=1)))
        if usual / np.sqrt(pictures.shape[1]) < SAME:
            return None
        seen, squares = 0, (pictures**2).sum(1)
        for start in range(apart, len(pictures), _ROWS):
            rows = np.arange(start, min(start + _ROWS, len(pictures)))
            distances = squares[rows, None] + squares[None] - 2 * pictures[rows] @ pictures.T
            distances[np.arange(len(pictures))[None] > rows[:, None] - apart] = np.inf
            seen += int((distances.min(1) < (_LOOP_SHARE * usual) ** 2).sum())
        return seen / (len(pictures) - apart)


def _join(sums: Sums) -> float | None:
    """How much more changes at the border to the chunk before than inside: 1 where the border cannot be seen."""
    inside = sums.steps - (sums.border is not None)
    if sums.border is None or not inside or sums.inside / inside < SAME:
        return None
    return sums.border / (sums.inside / inside)


def _sharpness(luma: Floats) -> float:
    """Standard deviation of the Laplacian, 0..255."""
    inner = luma[1:-1, 1:-1]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((4 * inner - around).std()) if inner.size else 0.0


def _saturation(picture: Floats) -> float:
    """Mean of HSV's saturation, 0..1."""
    high = picture.max(-1)
    return float((np.divide(high - picture.min(-1), high, out=np.zeros_like(high), where=high > 0)).mean())


def _thumbnail(luma: Floats) -> Floats:
    """Means over a grid of ``_SMALL`` by ``_SMALL`` cells, fewer where there are fewer pixels."""
    for axis in (0, 1):
        edges = np.linspace(0, luma.shape[axis], min(_SMALL, luma.shape[axis]) + 1).astype(int)
        sums = np.add.reduceat(luma, edges[:-1], axis=axis)
        sizes = np.diff(edges).astype(np.float32)
        luma = (sums / (sizes[:, None] if axis == 0 else sizes)).astype(np.float32)
    return luma
