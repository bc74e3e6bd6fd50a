"""Prompts by the time at which they begin: ``{"0s": "a red three", "20s": "a blue seven"}``. Light to import."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from pavdm_dist.errors import ConfigError
from pavdm_dist.values.fields import show

# No more digits than any video has seconds.
_FORM = re.compile(r"(?=.)(?:(\d{1,12})m)?(?:(\d{1,12}(?:\.\d{1,40})?)s)?")
_FIELD = "timed_prompts"


def timed(prompts: Mapping[str, str]) -> list[tuple[float, str]]:
    """``(second, prompt)`` in rising order.

    Args:
        prompts: by time, as ``20s``, ``1.5s``, ``2m`` or ``1m20s``.

    Raises:
        ConfigError: another form, an empty prompt, or one time given twice.
    """
    found: dict[float, tuple[str, str]] = {}
    for time, prompt in prompts.items():
        match = _FORM.fullmatch(time) if isinstance(time, str) else None
        if match is None:
            raise ConfigError(f"{_FIELD}: {show(time)!r} is no time; write 20s, 1.5s, 2m or 1m20s")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f"{_FIELD}[{time}]={prompt!r}: must be a prompt")
        seconds = 60 * int(match[1] or 0) + float(match[2] or 0)
        if seconds in found:
            raise ConfigError(f"{_FIELD}: {found[seconds][0]} and {time} are the same time")
        found[seconds] = time, prompt
    return [(seconds, found[seconds][1]) for seconds in sorted(found)]


def first_prompt(prompts: Mapping[str, str]) -> str | None:
    """The prompt of second 0; None where there is none. Raises as :func:`timed`."""
    found = timed(prompts)
    return found[0][1] if found and found[0][0] == 0 else None


def chunk_schedule(
    prompts: Mapping[str, str], fps: float, first_frames: int, later_frames: int
) -> tuple[tuple[int, str], ...]:
    """``(first chunk, prompt)`` of the prompts after second 0: each begins with the next chunk that is born.

    Args:
        prompts: by time.
        fps: frames per second.
        first_frames, later_frames: of a video's first chunk and of every other.

    Raises:
        ConfigError: as :func:`timed`, or two that begin with the same chunk.
    """
    schedule: dict[int, float] = {}
    found = []
    for seconds, prompt in timed(prompts):
        # A thousandth of a frame is what rounding may cost.
        frame = math.ceil(seconds * fps - 1e-3)
        if frame <= 0:
            continue
        chunk = 1 + max(0, -(-(frame - first_frames) // later_frames))
        if chunk in schedule:
            raise ConfigError(
                f"{_FIELD}: what begins at {schedule[chunk]:g} s and at {seconds:g} s would begin with the same chunk,"
                f" {chunk}; chunks are {later_frames / fps:.2f} s long"
            )
        schedule[chunk] = seconds
        found.append((chunk, prompt))
    return tuple(found)
