"""Reads digits back from pixels: which, in what colour, how many, where they are and how they move.

The reader of handwriting is trained, in seconds, on the images that no generator of this repository was trained on
(``train.world`` uses the clearest of the training split only), drawn in the world's style. Digits are found by colour:
every digit of a prompt has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.digits.handwriting import clear_images, load_glyphs
from pavdm_dist.digits.prompts import AskedDigit
from pavdm_dist.digits.settings import CELL, COLOURS, GLYPH_CELLS, SHIPPED, SIZE, DigitWorld
from pavdm_dist.digits.world import Digit, Scene, render
from pavdm_dist.errors import ConfigError

Floats = NDArray[np.float64]

PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)
NAMES = tuple(COLOURS)
# Backgrounds stay below 42 and digits reach 200: ink is what lies between, scaled to 0..1.
INK_FROM, INK_RANGE = 70.0, 120.0
EDGE = 0.5  # ink above this is inside a stroke
# In the shipped world's pixels; other worlds' glyphs may be larger.
MIN_INK = 20.0  # a thin "one" has about 70
# Digits nearer than this cover each other, and nobody can be asked to read them.
APART = 26.0
CROP_CELLS = 16  # a side of the square that is read, which is 32 px in the shipped world


@dataclass(frozen=True)
class Reading:
    """What was seen in ``t`` frames of which ``d`` digits were asked.

    Attributes:
        seen: ``[t, d]``, the digit's colour has enough ink.
        strangers: ``[t]``, how many other colours have.
        numbers: ``[t, d]``, class 0..9, -1 where not seen.
        covered: ``[t, d]``, too near another digit to be read.
        centres: ``[t, d, 2]``, (y, x) of the ink's middle on the torus, px; NaN where not seen.
        reach: ``[t, d, 4]``, how far its ink goes from there up, left, down and right, px; NaN where not seen, and of
            no meaning where a digit lies across the frame's border.
    """

    seen: NDArray[np.bool_]
    strangers: NDArray[np.int64]
    numbers: NDArray[np.int64]
    covered: NDArray[np.bool_]
    centres: Floats
    reach: Floats


class Judge:
    """Reader of videos of the embedded world.

    Args:
        drawings: how often every image is drawn, at different sub-pixel places, to train the reader.
        seed: of those places.
        world: whose videos are read.

    Raises:
        ConfigError: scikit-learn is not installed.
    """

    def __init__(self, drawings: int = 3, seed: int = 0, world: DigitWorld = SHIPPED) -> None:
        try:
            from sklearn.svm import SVC
        except ImportError:
            raise ConfigError("The judge needs scikit-learn: run `pip install 'pavdm-dist[train]'`.") from None
        crops, classes = _unseen_handwriting(drawings, seed, world)
        self.world, scale = world, world.cell / CELL
        self._min_ink, self._apart = MIN_INK * scale**2, APART * scale
        self._reader: Any = SVC(C=10.0, gamma="scale").fit(crops, classes)

    def read(self, frames: NDArray[np.uint8], asked: Sequence[AskedDigit]) -> Reading:
        """Reads frames ``[t, size, size, 3]`` in the light of what was asked.

        Raises:
            ConfigError: frames of another size.
        """
        size = self.world.size
        if frames.ndim != 4 or frames.shape[1:] != (size, size, 3):
            raise ConfigError(f"frames of shape {list(frames.shape)}: the judge reads [t, {size}, {size}, 3]")
        ink, labels = _ink(frames)
        amounts = np.stack([(ink * (labels == i)).sum((1, 2)) for i in range(len(NAMES))], axis=1)
        wanted = [NAMES.index(digit.colour) for digit in asked]
        seen = amounts[:, wanted] >= self._min_ink
        others = [i for i in range(len(NAMES)) if i not in wanted]
        centres, reach = np.full((*seen.shape, 2), np.nan), np.full((*seen.shape, 4), np.nan)
        numbers = np.full(seen.shape, -1, dtype=np.int64)
        for column, colour in enumerate(wanted):
            own = ink * (labels == colour)
            rows = np.flatnonzero(seen[:, column])
            if len(rows):
                centres[rows, column] = torus_centre(own[rows])
                reach[rows, column] = ink_reach(own[rows], centres[rows, column])
                numbers[rows, column] = self._reader.predict(crop(own[rows], centres[rows, column], self.world))
        covered = np.zeros_like(seen)
        for i in range(len(asked)):
            for j in range(i):
                gap = np.linalg.norm(on_torus(centres[:, i] - centres[:, j], size), axis=-1)
                near = np.nan_to_num(gap, nan=np.inf) < self._apart
                covered[:, i] |= near
                covered[:, j] |= near
        return Reading(seen, (amounts[:, others] >= self._min_ink).sum(1), numbers, covered, centres, reach)


def on_torus(difference: Floats, size: int = SIZE) -> Floats:
    """Shortest way for a difference of places, px, in -size/2 .. size/2."""
    return (difference + size / 2) % size - size / 2


def torus_centre(ink: Floats) -> Floats:
    """Middle (y, x) ``[n, 2]`` of ``ink [n, size, size]`` by circular means, px in 0..size."""
    size = ink.shape[-1]
    turn = np.exp(2j * np.pi * (np.arange(size) + 0.5) / size)
    angles = np.angle(np.stack([ink.sum(2) @ turn, ink.sum(1) @ turn], axis=1))
    return angles * size / (2 * np.pi) % size


def ink_reach(ink: Floats, centres: Floats) -> Floats:
    """How far ``ink [n, size, size]`` goes from ``centres`` up, left, down and right, ``[n, 4]``, px."""
    size, sides = ink.shape[-1], []
    for axis, middle in ((2, centres[:, 0]), (1, centres[:, 1])):
        inside = ink.max(axis) > EDGE
        first, last = inside.argmax(1), size - inside[:, ::-1].argmax(1)
        sides.append((middle - first, last - middle))
    (up, down), (left, right) = sides
    return np.stack([up, left, down, right], axis=1)


def crop(ink: Floats, centres: Floats, world: DigitWorld = SHIPPED) -> Floats:
    """Squares around ``centres`` that hold a glyph, as means over ``CROP_CELLS`` cells a side: ``[n, cells^2]``."""
    size, cells = world.size, CROP_CELLS
    pixels = math.ceil(GLYPH_CELLS * world.cell / cells)  # a side of a cell: two in the shipped world
    side = cells * pixels
    corner = size // 2 - side // 2
    squares = []
    for picture, (y, x) in zip(ink, centres, strict=True):
        middle = np.roll(picture, (size // 2 - round(y), size // 2 - round(x)), axis=(0, 1))
        square = middle[corner : corner + side, corner : corner + side]
        squares.append(square.reshape(cells, pixels, cells, pixels).mean((1, 3)).ravel())
    return np.array(squares)


def _ink(frames: NDArray[np.uint8]) -> tuple[Floats, NDArray[np.int64]]:
    """Amount of ink ``[t, H, W]`` in 0..1 and nearest colour of the palette by direction in RGB."""
    pixels = frames.astype(np.float64)
    ink = np.clip((pixels.max(-1) - INK_FROM) / INK_RANGE, 0, 1)
    directions = PALETTE / np.linalg.norm(PALETTE, axis=1, keepdims=True)
    return ink, (pixels @ directions.T).argmax(-1)


@cache
def _unseen_handwriting(drawings: int, seed: int, world: DigitWorld) -> tuple[Floats, NDArray[np.int64]]:
    """Crops and classes of all images but those that generators are trained on."""
    rng = np.random.default_rng((seed, 29))
    used = set(np.concatenate(list(clear_images("train", world.clearest_fraction).values())).tolist())
    classes = load_glyphs()[1]
    images = [i for i in range(len(classes)) if i not in used]
    inks = []
    for image in np.repeat(images, drawings):
        start = (float(rng.uniform(0, world.size)), float(rng.uniform(0, world.size)))
        digit = Digit(int(classes[image]), int(image), "white", "drifting", "up", "", start, (0.0, 0.0))
        inks.append(_ink(render(Scene((digit,), (20.0, 20.0, 20.0), (0.0, 0.0), world), 0, 1))[0][0])
    stack = np.stack(inks)
    return crop(stack, torus_centre(stack), world), np.repeat(classes[images], drawings)
