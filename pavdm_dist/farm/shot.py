"""One shot of a manifest: what is asked for, and the name and seed that belong to it alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from pavdm_dist.errors import ConfigError
from pavdm_dist.values.fields import Within, is_writable, made, show

# What an id may be: it names a folder, in every store and on every system.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SIZE = re.compile(r"([1-9]\d{0,4})[xX]([1-9]\d{0,4})")
# Of an id that is made of a prompt: bytes of its words, hexadecimal digits of what tells it from others.
_WORDS, _DIGITS = 40, 10
# Above these a number in a manifest is a slip of the finger.
_MOST_FRAMES, _MOST_SECONDS, _MOST_PRIORITY = 10**12, 10**9, 10**6


@dataclass(frozen=True, slots=True)
class Shot:
    """One video to render.

    Attributes:
        id: its name, of letters, digits, ``.``, ``_`` and ``-``; also of its folder.
        prompt: text of the first chunk; empty where ``timed_prompts`` among the overrides has one for 0 s.
        negative_prompt: text of the unconditional branch.
        seed: None = a function of the id and the farm's ``seed``.
        num_frames, seconds: length, one of them; None = the farm's own.
        size: ``WIDTHxHEIGHT`` in pixels; None = the farm's.
        video: conditioning clip.
        image: picture that it begins with.
        priority: higher ones are begun first; equal ones in the manifest's order.
        overrides: further settings of this shot (:data:`~pavdm_dist.farm.kinds.OVERRIDES`).
        tags: words for whoever sorts the results.
    """

    id: str
    prompt: str = ""
    negative_prompt: str | None = None
    seed: Annotated[int, Within(0, 2**63 - 1)] | None = None
    num_frames: Annotated[int, Within(0, _MOST_FRAMES, above=True)] | None = None
    seconds: Annotated[float, Within(0, _MOST_SECONDS, above=True)] | None = None
    size: str | None = None
    video: str | None = None
    image: str | None = None
    priority: Annotated[int, Within(-_MOST_PRIORITY, _MOST_PRIORITY)] = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def to_line(self) -> str:
        """The shot as a line of JSON: what is not given is left out."""
        given = {name: value for name, value in asdict(self).items() if value not in (None, {}, ()) or name == "prompt"}
        if not self.priority:
            given.pop("priority", None)
        return json.dumps(given, ensure_ascii=False)


FIELDS = tuple(entry.name for entry in fields(Shot))


def make_shot(values: Mapping[str, Any], where: str) -> Shot:
    """A shot from names and values, checked as far as no model is needed for it.

    Args:
        values: of a line; ``id`` must be among them.
        where: the line, for messages.

    Raises:
        ConfigError: naming the line, the field, its value and what is legal.
    """
    shot = made(Shot, values, where)
    check_id(shot.id, where)
    if not is_writable(json.dumps(shot.overrides, ensure_ascii=False)):
        raise ConfigError(f"{where}: overrides={show(shot.overrides)}: is not text that a file can hold")
    if not shot.prompt.strip() and "timed_prompts" not in shot.overrides:
        said = "prompt is missing; it" if values.get("prompt") is None else f"prompt={show(shot.prompt)!r}:"
        raise ConfigError(f"{where}: {said} must be text, or timed_prompts among the overrides has one for 0s")
    if shot.num_frames is not None and shot.seconds is not None:
        raise ConfigError(f"{where}: num_frames={shot.num_frames} and seconds={shot.seconds:g}: give one of them")
    if shot.video is not None and shot.image is not None:
        raise ConfigError(f"{where}: video={shot.video} and image={shot.image}: a shot begins with one of them")
    if shot.size is not None:
        size_of(shot.size, where)
    return shot


def is_id(text: str) -> bool:
    """Whether a text may be an id."""
    return _ID.fullmatch(text) is not None


def check_id(text: str, where: str) -> None:
    """Refuses an id that could lead out of its folder, or that some file system could not hold.

    Raises:
        ConfigError: naming it and what is legal.
    """
    if not is_id(text):
        raise ConfigError(
            f"{where}: id={show(text)!r}: must be 1 to 100 letters, digits, '.', '_' and '-', and begin with a"
            " letter or digit"
        )


def size_of(size: str, where: str) -> tuple[int, int]:
    """Height and width of ``WIDTHxHEIGHT``.

    Raises:
        ConfigError: another form.
    """
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ConfigError(f"{where}: size={show(size)!r}: must be WIDTHxHEIGHT in pixels, as 424x240")
    return int(match[2]), int(match[1])


def id_of(values: Mapping[str, Any], nth: int = 0) -> str:
    """The id of a line that gives none: words of its prompt, and a hash of all that it says.

    Args:
        values: of the line.
        nth: how many equal lines came before it.
    """
    said = json.dumps(dict(values), sort_keys=True, ensure_ascii=False) + (f" {nth}" if nth else "")
    words = re.sub(r"[^a-z0-9]+", "-", str(values.get("prompt", "")).lower())[:_WORDS].strip("-") or "shot"
    return f"{words}-{hashlib.sha256(said.encode('utf-8', 'replace')).hexdigest()[:_DIGITS]}"


def seed_of(shot: Shot, farm_seed: int) -> int:
    """Its own seed, or one of 31 bits that follows from its id and the farm's: other lines have no say in it."""
    if shot.seed is not None:
        return shot.seed
    return int.from_bytes(hashlib.sha256(f"{farm_seed} {shot.id}".encode()).digest()[:4]) >> 1
