"""Frame rates: what people write, and the exact fractions that they mean."""

from __future__ import annotations

import re
from contextlib import suppress
from fractions import Fraction

from pavdm_dist.errors import ConfigError

# As ffmpeg has them.
_NAMES = {
    "ntsc": Fraction(30000, 1001),
    "ntsc-film": Fraction(24000, 1001),
    "film": Fraction(24),
    "pal": Fraction(25),
}
_RATIO = re.compile(r"(\d{1,9})\s*[/:]\s*(\d{1,9})")
_LOWEST, _HIGHEST = Fraction(1, 1000), 1000
# How far a decimal, rounded or cut off, is from the NTSC rate that it names: 23.98 and 23.97 are 24000/1001.
_ROUNDED = Fraction(61, 10_000)


def as_rate(fps: float | Fraction | str) -> Fraction:
    """Frames per second as the fraction that a container stores.

    Args:
        fps: a number, a fraction such as ``30000/1001``, or a name of ffmpeg's: ntsc, ntsc-film, film, pal. Decimals
            that name an NTSC rate (23.976, 23.98, 29.97, 59.94, 119.88) are that rate, which editors conform by.

    Raises:
        ConfigError: none of these, or not between 1/1000 and 1000.
    """
    number = _number(fps) if isinstance(fps, str) else fps
    if number is None:
        raise ConfigError(f"fps={fps}: must be a number, a fraction such as 30000/1001, or one of {', '.join(_NAMES)}")
    if not _LOWEST <= number <= _HIGHEST:
        raise ConfigError(f"fps={fps}: must be between 0.001 and 1000")
    rate = Fraction(number)
    nominal = round(rate * Fraction(1001, 1000))
    ntsc = Fraction(nominal * 1000, 1001)
    if nominal and (nominal % 12 == 0 or nominal % 15 == 0) and abs(rate - ntsc) <= _ROUNDED:
        return ntsc
    return rate.limit_denominator(1001)


def _number(text: str) -> float | Fraction | None:
    text = text.strip().lower()
    if text in _NAMES:
        return _NAMES[text]
    ratio = _RATIO.fullmatch(text)
    if ratio is not None:
        return Fraction(int(ratio[1]), int(ratio[2])) if int(ratio[2]) else None
    try:
        return float(text)
    except ValueError:
        return None


def rate_text(fps: float) -> str:
    """The shortest decimal that is the same rate: 29.97 for 30000/1001."""
    short = f"{fps:.3f}".rstrip("0").rstrip(".")
    with suppress(ConfigError):
        if as_rate(short) == as_rate(fps):
            return short
    return f"{fps:.10g}"
