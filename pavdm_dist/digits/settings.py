"""What worlds of moving digits can differ in, and the words that their prompts are made of.

Lengths are pixels, times seconds, ``y`` grows downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pavdm_dist.digits.handwriting import CLEAREST_FRACTION, HELDOUT_FRACTION, SPLIT_SEED
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.train_settings import WorldConfig

SIZE = 64
FPS = 24
CELL = 3.5  # screen pixels per pixel of the 8x8 image: a glyph is 28 px high
GLYPH_CELLS = 8  # a side of that image
# Cells of a glyph and of as much on either side as its edges reach, when it leaves the picture and comes back.
CELLS_ROUND_THE_TORUS = 12
INK_EDGE = (0.2, 0.7)  # interpolated ink that is fully outside and fully inside a stroke

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 40),
    "green": (50, 205, 60),
    "blue": (60, 90, 250),
    "yellow": (245, 215, 40),
    "cyan": (40, 215, 225),
    "magenta": (230, 60, 220),
    "white": (240, 240, 240),
}
SPEEDS: dict[str, float] = {"slowly": 8.0, "": 18.0, "fast": 36.0}  # px/s; the middle one goes without saying
DIRECTIONS: dict[str, tuple[int, int]] = {  # (y, x)
    "up": (-1, 0),
    "down": (1, 0),
    "to the left": (0, -1),
    "to the right": (0, 1),
    "up and to the left": (-1, -1),
    "up and to the right": (-1, 1),
    "down and to the left": (1, -1),
    "down and to the right": (1, 1),
}
MOTIONS = ("drifting", "bouncing")


@dataclass(frozen=True)
class DigitWorld:
    """What scenes are drawn from; the default is the world of the shipped model.

    Args:
        size: height and width of the picture, px; a multiple of 8.
        cell: screen pixels per pixel of the 8x8 image; 12 of them fit the picture.
        most_digits: of a scene; each has a colour of its own.
        clearest_fraction: share of every class' images that are used, the clearest first, above 0 to 1. Those that are
            more like another class are never used, so that 1 is all clear handwriting.
        colours: keys of ``COLOURS``.
        speeds: px/s of "slowly", of no word, and of "fast".
        digit_weights: how often scenes of one, two, ... digits are drawn, one weight each; () = all alike.

    Raises:
        ConfigError: no such world.
    """

    size: int = SIZE
    cell: float = CELL
    most_digits: int = 2
    clearest_fraction: float = CLEAREST_FRACTION
    colours: tuple[str, ...] = tuple(COLOURS)
    speeds: tuple[float, ...] = tuple(SPEEDS.values())
    digit_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.size % 8 or not 32 <= self.size <= 1024:
            nearest = min(max(round(self.size / 8) * 8, 32), 1024)
            raise ConfigError(f"world.size={self.size}: must be a multiple of 8 from 32 to 1024, such as {nearest}")
        most = self.size / CELLS_ROUND_THE_TORUS
        if not 1 <= self.cell <= most:
            raise ConfigError(f"world.cell={self.cell}: must be 1 to {most:.4g}, a twelfth of world.size={self.size}")
        if not 0 < self.clearest_fraction <= 1:
            raise ConfigError(f"world.clearest_fraction={self.clearest_fraction}: must be above 0, at most 1")
        unknown = [name for name in self.colours if name not in COLOURS]
        if unknown or not self.colours or len(set(self.colours)) < len(self.colours):
            raise ConfigError(f"world.colours={list(self.colours)}: must be some of {list(COLOURS)}, each once")
        if not 1 <= self.most_digits <= len(self.colours):
            raise ConfigError(f"world.most_digits={self.most_digits}: must be 1 to {len(self.colours)}, a colour each")
        if len(self.speeds) != len(SPEEDS) or not all(0 < speed < math.inf for speed in self.speeds):
            raise ConfigError(f"world.speeds={list(self.speeds)}: must be three numbers above 0, px/s")
        weights, count = self.digit_weights, self.most_digits
        if weights and (len(weights) != count or not all(0 <= w < math.inf for w in weights) or not sum(weights)):
            raise ConfigError(
                f"world.digit_weights={list(weights)}: must be {count} numbers from 0 on, not all 0, or []"
            )

    @classmethod
    def of(cls, config: WorldConfig) -> DigitWorld:
        """As a run's settings describe it.

        Raises:
            ConfigError: no such world.
        """
        colours = tuple(config.colours) or tuple(COLOURS)
        own = (config.size, config.cell, config.most_digits, config.clearest_fraction)
        return cls(*own, colours, tuple(config.speeds), tuple(config.digit_weights))

    @property
    def speed_of(self) -> dict[str, float]:
        """Px/s by word."""
        return dict(zip(SPEEDS, self.speeds, strict=True))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word (and the comma) a prompt of this world can hold."""
        words = ["a", ",", *self.colours, *NUMBERS, *MOTIONS, *(word for word in SPEEDS if word)]
        return tuple(dict.fromkeys([*words, *(word for phrase in DIRECTIONS for word in phrase.split())]))

    @property
    def longest_prompt(self) -> int:
        """Words and commas of the longest prompt."""
        # "a red three drifting fast", the longest direction, and a comma between two digits
        digit = 5 + max(len(phrase.split()) for phrase in DIRECTIONS)
        return self.most_digits * (digit + 1) - 1

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint trained on this world stores beside its weights, and cached clips beside them (JSON)."""
        found = {
            "source": "sklearn.datasets.load_digits",
            "heldout_fraction": HELDOUT_FRACTION,
            "split_seed": SPLIT_SEED,
            "clearest_fraction": self.clearest_fraction,
            "size": self.size,
            "fps": FPS,
            "cell": self.cell,
            "ink_edge": list(INK_EDGE),
            "colours": {name: list(COLOURS[name]) for name in self.colours},
            "speeds": self.speed_of,
            "directions": {name: list(step) for name, step in DIRECTIONS.items()},
            "vocabulary": list(self.vocabulary),
        }
        # What was stored before these could be chosen says nothing of them.
        return found | {name: value for name, value in self.later.items() if value != SHIPPED.later[name]}

    @property
    def later(self) -> dict[str, Any]:
        """Those of the settings that are stored only where they are not the shipped world's."""
        return {"most_digits": self.most_digits, "digit_weights": list(self.digit_weights)}


SHIPPED = DigitWorld()
"""The world of the model in this package."""
VOCABULARY = SHIPPED.vocabulary
WORLD_SETTINGS = SHIPPED.settings
