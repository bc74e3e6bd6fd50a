"""The embedded model's world: real handwritten digits that move in colour, described in full by their prompt.

The digits are scikit-learn's bundled set (1,797 real 8x8 scans, BSD-3); their motion is synthetic. Identity,
colour, direction, speed and count are all in the text, so what a generated video got wrong can be measured.
Both kinds of motion go on for ever: drifting digits re-enter on the opposite side, bouncing ones turn at the
walls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.errors import ConfigError

Split = Literal["train", "held-out"]

SIZE = 64  # pixels, height and width
FPS = 24
GLYPH = 28  # pixels, height and width of a digit's box
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 52, 52),
    "green": (60, 200, 80),
    "blue": (70, 110, 255),
    "yellow": (245, 215, 60),
    "cyan": (60, 220, 230),
    "pink": (245, 110, 205),
    "white": (240, 240, 240),
}
DIRECTIONS: dict[str, tuple[int, int]] = {  # (down, right)
    "up": (-1, 0),
    "down": (1, 0),
    "to the left": (0, -1),
    "to the right": (0, 1),
    "up and to the left": (-1, -1),
    "up and to the right": (-1, 1),
    "down and to the left": (1, -1),
    "down and to the right": (1, 1),
}
SPEEDS: dict[str, float] = {"slowly": 8.0, "": 18.0, "fast": 36.0}  # pixels per second
BACKGROUND_TOP, BACKGROUND_BOTTOM = (14, 16, 26), (34, 36, 52)
HELD_OUT_EVERY = 5  # every fifth scan is never seen by the generator's training

VOCABULARY: tuple[str, ...] = (
    ",", "a", "an", "and", "bouncing", "down", "drifting", "fast", "left", "right", "slowly", "the", "to", "up",
    *COLOURS, *NUMBERS,
)  # fmt: skip

# Stored with checkpoints: weights trained in one world do not go on in another.
WORLD_SETTINGS = {
    "size": SIZE,
    "fps": FPS,
    "glyph": GLYPH,
    "colours": {name: list(rgb) for name, rgb in COLOURS.items()},
    "speeds": {name or "normal": value for name, value in SPEEDS.items()},
    "held_out_every": HELD_OUT_EVERY,
}


@dataclass(frozen=True)
class Digit:
    """One moving digit and the whole truth about it.

    Attributes:
        number: 0..9.
        scan: index into the digit set.
        colour: name in :data:`COLOURS`.
        motion: ``drifting`` or ``bouncing``.
        direction: name in :data:`DIRECTIONS` (of the start, for a bouncing digit).
        speed: name in :data:`SPEEDS`.
        position: top-left corner of its box at frame 0, ``(row, column)`` in pixels.
    """

    number: int
    scan: int
    colour: str
    motion: Literal["drifting", "bouncing"]
    direction: str
    speed: str
    position: tuple[float, float]

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame ``(down, right)`` at the start."""
        down, right = DIRECTIONS[self.direction]
        rate = SPEEDS[self.speed] / FPS / np.hypot(down, right)
        return down * rate, right * rate

    @property
    def phrase(self) -> str:
        """The digit's part of the prompt."""
        words = ["a", self.colour, NUMBERS[self.number], self.motion, self.speed]
        if self.motion == "drifting":
            words.append(self.direction)
        return " ".join(word for word in words if word)

    def positions(self, start: int, count: int) -> NDArray[np.float64]:
        """Top-left corners at frames ``start .. start + count - 1``: ``[count, 2]``, row and column."""
        frames = np.arange(start, start + count)[:, None]
        path = np.asarray(self.position) + frames * np.asarray(self.velocity)
        if self.motion == "drifting":
            return path % SIZE
        span = SIZE - GLYPH
        return span - np.abs(path % (2 * span) - span)


@dataclass(frozen=True)
class Scene:
    """Digits from back to front."""

    digits: tuple[Digit, ...]

    @property
    def prompt(self) -> str:
        """The whole description, in a closed grammar (:data:`VOCABULARY`)."""
        return ", ".join(digit.phrase for digit in self.digits)


def sample_scene(rng: np.random.Generator, split: Split = "train", max_digits: int = 2) -> Scene:
    """A random scene of 1 .. ``max_digits`` digits of different colours."""
    count = int(rng.integers(1, max_digits + 1))
    colours = rng.permutation(list(COLOURS))[:count]
    _, numbers = _scans()
    allowed = split_indices(split)
    digits = []
    for colour in colours:
        scan = int(rng.choice(allowed))
        motion: Literal["drifting", "bouncing"] = "drifting" if rng.random() < 0.6 else "bouncing"
        diagonal = [name for name in DIRECTIONS if " and " in name]
        direction = str(rng.choice(list(DIRECTIONS) if motion == "drifting" else diagonal))
        span = SIZE if motion == "drifting" else SIZE - GLYPH
        position = (float(rng.uniform(0, span)), float(rng.uniform(0, span)))
        speed = str(rng.choice(list(SPEEDS)))
        digits.append(Digit(int(numbers[scan]), scan, str(colour), motion, direction, speed, position))
    return Scene(tuple(digits))


def split_indices(split: Split) -> NDArray[np.int64]:
    """Scans of a split; the two never overlap."""
    held_out = np.arange(len(_scans()[1])) % HELD_OUT_EVERY == 0
    return np.flatnonzero(held_out if split == "held-out" else ~held_out)


def render(scene: Scene, start: int = 0, count: int = 1) -> NDArray[np.uint8]:
    """Frames ``start .. start + count - 1`` at 24 fps: uint8 ``[count, 64, 64, 3]``."""
    shade = np.linspace(0, 1, SIZE)[:, None, None]
    background = (1 - shade) * np.array(BACKGROUND_TOP) + shade * np.array(BACKGROUND_BOTTOM)
    frames = np.broadcast_to(background, (count, SIZE, SIZE, 3)).astype(np.float32)
    for digit in scene.digits:
        alpha = _alpha(digit, start, count)[..., None]
        frames += alpha * (np.array(COLOURS[digit.colour], dtype=np.float32) - frames)
    return np.round(frames).astype(np.uint8)


def render_mask(scene: Scene, start: int = 0, count: int = 1) -> NDArray[np.bool_]:
    """Where a digit is: bool ``[count, 64, 64]``."""
    alphas = [_alpha(digit, start, count) for digit in scene.digits]
    return np.max(alphas, axis=0) > 0.1


def _alpha(digit: Digit, start: int, count: int) -> NDArray[np.float32]:
    """Coverage of a digit, placed with sub-pixel precision: ``[count, 64, 64]`` in 0..1."""
    glyph = np.pad(_glyph(digit.scan), ((1, 1), (1, 1)))
    positions = digit.positions(start, count)
    corner = np.floor(positions).astype(np.int64)
    fraction = (positions - corner).astype(np.float32)
    down, right = fraction[:, 0, None, None], fraction[:, 1, None, None]
    rows = glyph[None, 1:] * (1 - down) + glyph[None, :-1] * down
    patch = rows[:, :, 1:] * (1 - right) + rows[:, :, :-1] * right
    reach = np.arange(patch.shape[1])
    canvas = np.zeros((count, SIZE, SIZE), dtype=np.float32)
    frame = np.arange(count)[:, None, None]
    row = (corner[:, 0, None] + reach) % SIZE
    column = (corner[:, 1, None] + reach) % SIZE
    canvas[frame, row[:, :, None], column[:, None, :]] = patch
    return canvas


@lru_cache(maxsize=4096)
def _glyph(scan: int) -> NDArray[np.float32]:
    """A scan enlarged to the glyph box with crisp, smooth edges: ``[28, 28]`` in 0..1."""
    from PIL import Image

    small = Image.fromarray(_scans()[0][scan].astype(np.float32) / 16)
    large = np.asarray(small.resize((GLYPH, GLYPH), Image.Resampling.BICUBIC))
    edge = np.clip((large - 0.25) / 0.35, 0, 1)
    return (edge * edge * (3 - 2 * edge)).astype(np.float32)


@lru_cache(maxsize=1)
def _scans() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All scans ``[1797, 8, 8]`` (0..16) and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the embedded world needs scikit-learn's digits: pip install 'pavdm-dist[train]'"
        ) from error
    data = load_digits()
    return data.images, data.target
