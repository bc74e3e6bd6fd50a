"""From the fields of a request to a shot: names of OpenAI's ``/v1/videos``, and those that other servers add."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.shot import Shot, make_shot
from pavdm_dist.values.fields import show
from pavdm_dist.values.rates import as_rate

# What a shot may be asked to change of the sampling, as other servers of this interface call it.
_OVERRIDES = {"fps": float, "num_inference_steps": int, "guidance_scale": float}
_NUMBERS: dict[str, type] = {"seconds": float, "num_frames": int, "seed": int, "priority": int, **_OVERRIDES}
FIELDS = ("prompt", "model", "seconds", "size", "negative_prompt", "num_frames", "seed", "priority", *_OVERRIDES)


# What a text of a request may have. Encoders read some hundred words; what is kept, listed and logged must end.
MOST_CHARACTERS = 4000
# What a picture that is sent may have, in pixels: those of telephones have less. A small file may be of very many more.
MOST_REFERENCE_PIXELS = 50_000_000


def new_id() -> str:
    return f"video_{uuid.uuid4().hex[:24]}"


def shot_of(id: str, fields: Mapping[str, Any], served: str, reference: str | None = None) -> Shot:
    """What a request asks for.

    Args:
        id: of the new video.
        fields: of a form, where all is text, or of JSON.
        served: name of the model that this server has.
        reference: file of the picture or clip that the video begins with.

    Raises:
        ConfigError: naming the field, its value and what is legal.
    """
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in FIELDS:
            raise ConfigError(f"no such field {show(name)}; the fields are {', '.join(FIELDS)} and input_reference")
        if value is not None and value != "":
            check_text(name, value)
            values[name] = _number(name, value) if name in _NUMBERS else value
    model = values.pop("model", served)
    if model != served:
        raise ConfigError(f"model={show(model)}: this server has {served}")
    if "prompt" not in values:
        raise ConfigError("prompt is missing; it must be text")
    overrides = {name: values.pop(name) for name in _OVERRIDES if name in values}
    for name, value in overrides.items():
        if type(value) not in (int, float):
            also = ", a fraction such as 30000/1001 or a name such as ntsc" if name == "fps" else ""
            raise ConfigError(f"{name}={show(value)}: must be a number{also}")
    if reference is not None:
        values["video" if reference.endswith(".mp4") else "image"] = reference
    return make_shot({**values, "id": id, "overrides": overrides}, "request")


def check_text(name: str, value: Any) -> None:
    """Refuses a text that is too long to be a prompt, or that no file could hold.

    Raises:
        ConfigError: naming the field, its value and what is legal.
    """
    if not isinstance(value, str):
        return
    if len(value) > MOST_CHARACTERS:
        raise ConfigError(f"{name}={show(value)!r}: is {len(value)} characters long; at most {MOST_CHARACTERS} may be")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name}={show(value)!r}: has half a character at place {error.start + 1}; it must be Unicode text"
        ) from error


def _number(name: str, value: Any) -> Any:
    """A text as the number that it stands for; what is none stays as it is, which the check then names."""
    if not isinstance(value, str):
        return value
    if _NUMBERS[name] is int:
        with suppress(ValueError):
            return int(value)
    try:
        number = float(value)
    except ValueError:
        with suppress(ConfigError):
            return float(as_rate(value)) if name == "fps" else value
        return value
    # Above that a float is not the number that was written.
    return int(number) if _NUMBERS[name] is int and number.is_integer() and abs(number) < 2**53 else number


def nearest_size(size: tuple[int, int], most: int, units: Sequence[int]) -> tuple[int, int]:
    """The largest size of about the same shape with so few pixels.

    Args:
        size: height and width, with more than that.
        most: pixels.
        units: which sides must be multiples of.
    """
    share = math.sqrt(most / (size[0] * size[1]))
    short = 0 if size[0] <= size[1] else 1
    sides = [max(unit, int(side * share) // unit * unit) for side, unit in zip(size, units, strict=True)]
    unit = units[1 - short]  # a short side that could not be shortened leaves less for the other
    sides[1 - short] = max(unit, min(sides[1 - short], most // sides[short] // unit * unit))
    return sides[0], sides[1]


def check_picture(reference: BinaryIO) -> None:
    """Refuses a picture that would take very much memory, by its first bytes; what is none is refused where it is read.

    Raises:
        ConfigError: with its size, and how large it may be.
    """
    from PIL import Image

    try:
        with Image.open(reference) as picture:
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return
    if width * height > MOST_REFERENCE_PIXELS:
        most = MOST_REFERENCE_PIXELS // 1_000_000
        raise ConfigError(
            f"input_reference: is {width}x{height}, and may have {most} million pixels at most; scale it down"
        )


def suffix_of(start: bytes) -> str:
    """The kind of file that a reference is, by its first bytes.

    Raises:
        ConfigError: neither a picture nor a clip that can be begun with.
    """
    kinds = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"BM": ".bmp"}
    for mark, suffix in kinds.items():
        if start.startswith(mark):
            return suffix
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return ".webp"
    if start[4:8] == b"ftyp":
        return ".mp4"
    raise ConfigError("input_reference: must be a picture (JPEG, PNG, WebP, BMP) or an mp4")
