"""What a prompt of the embedded world asks for, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pavdm_dist.codecs.text import split_words
from pavdm_dist.digits.settings import DIRECTIONS, MOTIONS, NUMBERS, SHIPPED, SPEEDS, DigitWorld
from pavdm_dist.errors import ConfigError


@dataclass(frozen=True)
class AskedDigit:
    """One digit of a prompt.

    Attributes:
        number: class, 0..9.
        colour: key of ``COLOURS``.
        motion: "drifting" or "bouncing".
        angle: direction of travel when drifting, radians, atan2(y, x) with y downwards; None when bouncing.
        speed: px/s.
    """

    number: int
    colour: str
    motion: str
    angle: float | None
    speed: float


def parse_prompt(prompt: str, world: DigitWorld = SHIPPED) -> tuple[AskedDigit, ...]:
    """The digits of a prompt of ``world``, in its order.

    Raises:
        ConfigError: not a sentence of the embedded world, or two digits of one colour, which pixels cannot tell apart.
    """
    phrases = [phrase.split() for phrase in " ".join(split_words(prompt)).split(" , ")]
    digits = tuple(_parse_phrase(words, prompt, world) for words in phrases)
    if len({digit.colour for digit in digits}) < len(digits):
        raise ConfigError(f"prompt {prompt!r} has two digits of one colour, which the judge cannot tell apart")
    return digits


def _parse_phrase(words: list[str], prompt: str, world: DigitWorld) -> AskedDigit:
    speed = next((word for word in SPEEDS if word and word in words), "")
    direction = " ".join(word for word in words[4:] if word != speed)
    drifts = len(words) > 3 and words[3] == "drifting"
    if (
        len(words) < 4
        or words[0] != "a"
        or words[1] not in world.colours
        or words[2] not in NUMBERS
        or words[3] not in MOTIONS
        or (direction not in DIRECTIONS if drifts else direction != "")
    ):
        raise ConfigError(
            f"prompt {prompt!r}: {' '.join(words)!r} is not of the form the judge reads, such as"
            " 'a red three drifting fast up and to the left' or 'a blue seven bouncing slowly'"
        )
    angle = math.atan2(*DIRECTIONS[direction]) if drifts else None
    return AskedDigit(NUMBERS.index(words[2]), words[1], words[3], angle, world.speed_of[speed])
