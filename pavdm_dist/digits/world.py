"""The embedded model's world: real handwritten digits moving in colour over a dim background.

Every fact a prompt states (how many, which digit, colour, direction, speed) is a field of :class:`Digit`, so that what
a model draws can be checked against what was asked.

Lengths are pixels, times seconds, ``y`` grows downwards. Everything follows from the random generator given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.digits.handwriting import Floats, Split, clear_images, load_glyphs
from pavdm_dist.digits.settings import (
    COLOURS,
    DIRECTIONS,
    FPS,
    GLYPH_CELLS,
    INK_EDGE,
    MOTIONS,
    NUMBERS,
    SHIPPED,
    SPEEDS,
    DigitWorld,
)
from pavdm_dist.errors import ConfigError

MASK_ALPHA = 0.05


@dataclass(frozen=True)
class Digit:
    """One moving digit.

    Args:
        number: class, 0..9.
        image: index into scikit-learn's digits.
        colour: key of ``COLOURS``.
        motion: "drifting" (constant velocity on a torus) or "bouncing" (the ink reflects at the borders).
        direction: key of ``DIRECTIONS`` when drifting, "" when bouncing.
        speed: key of ``SPEEDS``.
        start: (y, x) of the glyph's top left corner at frame 0, px.
        velocity: (y, x) at frame 0, px/s.
    """

    number: int
    image: int
    colour: str
    motion: str
    direction: str
    speed: str
    start: tuple[float, float]
    velocity: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Digits in painting order (the last is on top) over a background.

    Args:
        digits: one or more digits.
        background: colour at the middle of the frame, 0..255.
        gradient: change of brightness along (y, x) over the whole frame, 0..255 levels.
        world: whose sizes hold.
    """

    digits: tuple[Digit, ...]
    background: tuple[float, float, float]
    gradient: tuple[float, float]
    world: DigitWorld = SHIPPED


@cache
def _ink_box(image: int, world: DigitWorld) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of the visible ink, px from the glyph's top left corner."""
    corner = world.size / 4
    mask = _alpha(image, np.zeros((1, 2)) + corner, False, world)[0] > 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0] - corner, columns[0] - corner, rows[-1] + 1 - corner, columns[-1] + 1 - corner


def sample_scene(
    rng: np.random.Generator, split: Split = "train", num_digits: int | None = None, world: DigitWorld = SHIPPED
) -> Scene:
    """Draw a scene of up to ``world.most_digits`` digits (``num_digits`` fixes the count) with different colours.

    Raises:
        ConfigError: ``num_digits`` below 1 or above the number of colours, or an unknown ``split``.
    """
    count = _draw_count(rng, world) if num_digits is None else num_digits
    if not 1 <= count <= len(world.colours):
        raise ConfigError(f"num_digits={count} is impossible: use 1 to {len(world.colours)}, one colour each.")
    colours = rng.permutation(list(world.colours))[:count]
    digits: list[Digit] = []
    for colour in colours:
        # Digits that start on top of each other could not be told apart in the first seconds: take the
        # loneliest of a few places.
        tries = [_sample_digit(rng, split, str(colour), world) for _ in range(6 if digits else 1)]
        digits.append(max(tries, key=lambda digit: _least_distance(digit, digits, world)))
    tint = rng.uniform(12, 30) + rng.uniform(-5, 5, size=3)
    slope = rng.uniform(-12, 12, size=2)
    background, gradient = (float(tint[0]), float(tint[1]), float(tint[2])), (float(slope[0]), float(slope[1]))
    return Scene(tuple(digits), background, gradient, world)


def _draw_count(rng: np.random.Generator, world: DigitWorld) -> int:
    if not world.digit_weights:
        return int(rng.integers(1, world.most_digits + 1))
    weights = np.array(world.digit_weights)
    return 1 + int(rng.choice(world.most_digits, p=weights / weights.sum()))


def _sample_digit(rng: np.random.Generator, split: Split, colour: str, world: DigitWorld) -> Digit:
    number = int(rng.integers(10))
    image = int(rng.choice(clear_images(split, world.clearest_fraction)[number]))
    motion = MOTIONS[rng.integers(len(MOTIONS))]
    speed = list(SPEEDS)[rng.integers(len(SPEEDS))]
    if motion == "drifting":
        direction = list(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
        angle = math.atan2(*DIRECTIONS[direction])
        start = rng.uniform(0, world.size, size=2)
    else:
        direction = ""
        # Away from the axes, so that a bouncing digit visits more than one line of the frame.
        angle = rng.integers(4) * math.pi / 2 + rng.uniform(math.pi / 9, math.pi / 2 - math.pi / 9)
        low, high = _bounds(image, world)
        start = rng.uniform(low, high)
    pace = world.speed_of[speed]
    velocity = (math.sin(angle) * pace, math.cos(angle) * pace)
    return Digit(number, image, colour, motion, direction, speed, (float(start[0]), float(start[1])), velocity)


def _least_distance(digit: Digit, others: Sequence[Digit], world: DigitWorld) -> float:
    """Px from where ``digit`` starts to the nearest start of ``others`` on the torus; 0 without any."""
    return min((_distance(digit, other, world.size) for other in others), default=0.0)


def _distance(a: Digit, b: Digit, size: int) -> float:
    gaps = [abs((p - q + size / 2) % size - size / 2) for p, q in zip(a.start, b.start, strict=True)]
    return math.hypot(*gaps)


def _bounds(image: int, world: DigitWorld) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest (y, x) of the glyph's corner that keep its ink inside the frame."""
    top, left, bottom, right = _ink_box(image, world)
    return np.array([-top, -left]), np.array([world.size - bottom, world.size - right])


def scene_prompt(scene: Scene) -> str:
    """The sentence that describes a scene: "a red three drifting up and to the left, a blue seven bouncing fast"."""
    phrases = []
    for digit in scene.digits:
        words = ["a", digit.colour, NUMBERS[digit.number], digit.motion, digit.speed, digit.direction]
        phrases.append(" ".join(word for word in words if word))
    return ", ".join(phrases)


def positions(digit: Digit, start_frame: int, num_frames: int, world: DigitWorld = SHIPPED) -> NDArray[np.float64]:
    """(y, x) ``[num_frames, 2]`` of the glyph's top left corner, px; on the torus [0, size) when drifting."""
    times = (start_frame + np.arange(num_frames))[:, None] / FPS
    free = np.array(digit.start) + times * np.array(digit.velocity)
    if digit.motion == "drifting":
        return free % world.size
    low, high = _bounds(digit.image, world)
    phase = (free - low) % (2 * (high - low))
    return low + np.minimum(phase, 2 * (high - low) - phase)


def _weights(offsets: NDArray[np.float64], cell: float) -> Floats:
    """Catmull-Rom weights ``[..., 8]`` of the eight image rows at ``offsets`` px from the glyph's edge."""
    x = np.abs((offsets[..., None] + 0.5) / cell - 0.5 - np.arange(GLYPH_CELLS)).astype(np.float32)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))


def _alpha(image: int, corners: NDArray[np.float64], wrap: bool, world: DigitWorld) -> Floats:
    """Opacity ``[t, size, size]`` in 0..1 of one glyph at ``corners [t, 2]``."""
    size, cell = world.size, world.cell
    offsets = np.arange(size)[None, :, None] - corners[:, None, :]
    if wrap:
        margin = (size - GLYPH_CELLS * cell) / 2
        offsets = (offsets + margin) % size - margin
    rows, columns = _weights(offsets[..., 0], cell), _weights(offsets[..., 1], cell)
    ink = (rows @ load_glyphs()[0][image]) @ columns.transpose(0, 2, 1)
    low, high = INK_EDGE
    edge = np.clip((ink - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return edge * edge * (3 - 2 * edge)


def _alphas(scene: Scene, start_frame: int, num_frames: int) -> list[Floats]:
    return [
        _alpha(
            digit.image,
            positions(digit, start_frame, num_frames, scene.world),
            digit.motion == "drifting",
            scene.world,
        )
        for digit in scene.digits
    ]


def _paint(scene: Scene, alphas: list[Floats]) -> NDArray[np.uint8]:
    size = scene.world.size
    ramp = (np.arange(size) + 0.5) / size - 0.5
    shade = scene.gradient[0] * ramp[:, None, None] + scene.gradient[1] * ramp[None, :, None]
    background = np.clip(np.array(scene.background) + shade, 0, 255).astype(np.float32)
    frames = np.broadcast_to(background, (*alphas[0].shape, 3))
    for digit, alpha in zip(scene.digits, alphas, strict=True):
        frames = frames + alpha[..., None] * (np.array(COLOURS[digit.colour], np.float32) - frames)
    return (frames + np.float32(0.5)).astype(np.uint8)


def _cover(alphas: list[Floats]) -> NDArray[np.bool_]:
    mask = alphas[0] > MASK_ALPHA
    for alpha in alphas[1:]:
        mask |= alpha > MASK_ALPHA
    return mask


def render(scene: Scene, start_frame: int, num_frames: int) -> NDArray[np.uint8]:
    """Frames ``[num_frames, size, size, 3]``, uint8 RGB, from ``start_frame`` on (any frame: motion has no end)."""
    return _paint(scene, _alphas(scene, start_frame, num_frames))


def render_mask(scene: Scene, start_frame: int, num_frames: int) -> NDArray[np.bool_]:
    """Foreground ``[num_frames, size, size]``: where any digit covers more than ``MASK_ALPHA`` of a pixel."""
    return _cover(_alphas(scene, start_frame, num_frames))


def render_pair(scene: Scene, start_frame: int, num_frames: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """:func:`render` and :func:`render_mask` at the price of one."""
    alphas = _alphas(scene, start_frame, num_frames)
    return _paint(scene, alphas), _cover(alphas)
