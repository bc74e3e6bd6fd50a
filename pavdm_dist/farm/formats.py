"""Lines of manifests as others write them, to names and values of a :class:`~pavdm_dist.farm.shot.Shot`.

JSON lines (this package's own, and OpenAI's batch lines), tables (this package's own columns, and Open-Sora's), and
text with one prompt a line (and PA-VDM's ``text||clip``). One line is in memory at a time.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, NamedTuple, TextIO

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.shot import FIELDS
from pavdm_dist.io.remote import is_remote
from pavdm_dist.io.storage import join, open_read
from pavdm_dist.values.fields import show

# A line longer than this is none of a manifest.
MOST_CHARACTERS = 2**20
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Other names for the same, as tables of Open-Sora and bodies of OpenAI's requests have them.
_NAMES = {"text": "prompt", "name": "id", "custom_id": "id", "width": None, "height": None, "path": None, "ref": None}
# What such a body or table says of a video besides, and this package calls a setting.
_SETTINGS = ("fps", "num_inference_steps", "guidance_scale")
# What asks for nothing: facts of a data set that a table of Open-Sora's brings along, and in OpenAI's batch lines the
# model, which is the farm's. Elsewhere these names are unknown ones.
_OF_TABLES = ("aspect_ratio", "resolution", "aes", "flow", "match", "score", "model")
_OF_BATCHES = ("model",)


class Line(NamedTuple):
    """A line of a manifest.

    Attributes:
        number: from 1; of a record of several lines the last one's.
        values: what it says; None where it cannot be read.
        fault: why not.
        ended: it has a line break; one that has none may be half written.
    """

    number: int
    values: dict[str, Any] | None
    fault: str = ""
    ended: bool = True


class _Lines:
    """A file's lines, and whether the newest one has its line break."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.ended = file, True

    def readline(self, most: int = -1) -> str:
        text = self._file.readline(most)
        self.ended = text.endswith("\n") or not text
        return text

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")


def read_lines(path: str) -> Iterator[Line]:
    """The lines of a manifest that say something; comments (``#``) of text files and blank lines do not.

    Paths of clips and pictures are relative to the manifest's folder, and are given absolute.

    Raises:
        ConfigError: it cannot be read, or is of no kind that this package knows.
    """
    suffix = PurePath(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"manifest={path}: must end in one of {', '.join(SUFFIXES)}")
    reader: Callable[[_Lines], Iterator[Line]] = {".txt": _of_text, ".csv": _of_csv, ".tsv": _of_tsv}.get(suffix, _json)
    folder = path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))
    with _opened(path) as file:
        try:
            lines = _Lines(file)
            for line in reader(lines):
                values = None if line.values is None else _with_paths(line.values, folder)
                yield line._replace(values=values, ended=lines.ended)
        except UnicodeDecodeError as error:
            raise ConfigError(f"manifest={path}: is no UTF-8 text ({error.reason}); save it as UTF-8") from error


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    try:
        raw = open_read(path)
    except OSError as error:
        raise ConfigError(f"manifest={path}: cannot be read: {error.strerror or error}") from error
    with raw:
        start = raw.read(4)
        raw.seek(0)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")
        with io.TextIOWrapper(raw, encoding, newline=None) as text:
            yield text


def _bounded(file: _Lines) -> Iterator[tuple[int, str | None]]:
    """Numbered lines; None for one that is too long, which is passed over."""
    number = 0
    while text := file.readline(MOST_CHARACTERS):
        number += 1
        if len(text) < MOST_CHARACTERS or text.endswith("\n"):
            yield number, text
            continue
        while (more := file.readline(MOST_CHARACTERS)) and not more.endswith("\n"):
            pass
        yield number, None


def _json(file: _Lines) -> Iterator[Line]:
    for number, text in _bounded(file):
        if text is None:
            yield Line(number, None, f"is longer than {MOST_CHARACTERS} characters")
        elif text.strip():
            try:
                values = _json_value(text)
            except ConfigError as error:
                yield Line(number, None, str(error))
                continue
            except ValueError as error:
                yield Line(number, None, f"is not valid JSON: {error}")
                continue
            if isinstance(values, Mapping):
                yield _named(number, values)
            else:
                yield Line(number, None, f"must hold names and values, not {show(values)}")


def _json_value(text: str) -> Any:
    """What JSON says.

    Raises:
        ConfigError: a name that says two things.
        ValueError: as :func:`~pavdm_dist.values.fields.json_value`.
    """
    try:
        return json.loads(text, object_pairs_hook=_names_and_values)
    except RecursionError as reason:
        raise ValueError("it is nested too deeply") from reason


def _names_and_values(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            one, other = f"{show(name)}={show(found[name])}", f"{show(name)}={show(value)}"
            raise ConfigError(f"{one} and {other}: is said twice; give one of them")
        found[name] = value
    return found


def _of_text(file: _Lines) -> Iterator[Line]:
    for number, text in _bounded(file):
        if text is None:
            yield Line(number, None, f"is longer than {MOST_CHARACTERS} characters")
            continue
        text = text.strip().rstrip("\x1a")
        if not text or text.startswith("#"):
            continue
        prompt, bars, clip = text.partition("||")
        values = {"prompt": prompt.strip()}
        clip = clip.strip()
        yield Line(number, values | {_field_of(clip): clip} if bars and clip else values)


def _of_csv(file: _Lines) -> Iterator[Line]:
    return _table(file, ",")


def _of_tsv(file: _Lines) -> Iterator[Line]:
    return _table(file, "\t")


def _table(file: _Lines, delimiter: str) -> Iterator[Line]:
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if (twice := next((name for name in names if name and names.count(name) > 1), None)) is not None:
            yield Line(reader.line_num, None, f"{show(twice)}: is the name of several columns; give one of them")
            return
        for row in reader:
            number = reader.line_num
            if None in row or None in row.values():
                yield Line(number, None, f"has not the {len(reader.fieldnames or ())} columns of the first line")
                continue
            values = {str(name).strip(): text for name, text in row.items() if text.strip()}
            try:
                yield _named(number, {name: _number(name, text) for name, text in values.items()}, _OF_TABLES)
            except ConfigError as error:
                yield Line(number, None, f"overrides: {error}")
            except ValueError as error:
                yield Line(number, None, f"overrides is not valid JSON: {error}")
    except csv.Error as error:  # what follows cannot be told apart any more
        yield Line(reader.line_num, None, f"is no line of a table: {error}")


def _number(name: str, text: str) -> Any:
    """A cell as its column means it; what is no number stays text, which the check then names."""
    if name == "overrides":
        return _json_value(text)
    if name == "tags":
        return [tag.strip() for tag in text.split(";") if tag.strip()]
    if name in ("seed", "num_frames", "priority", "width", "height", "num_inference_steps"):
        kinds: tuple[type, ...] = (int, float)
    elif name in ("seconds", "guidance_scale"):
        kinds = (float,)
    else:
        return text
    for kind in kinds:
        try:
            value = kind(text)
        except ValueError:
            continue
        return int(value) if kinds[0] is int and isinstance(value, float) and value.is_integer() else value
    return text


def _named(number: int, values: Mapping[str, Any], ignored: Container[str] = ()) -> Line:
    """Names of a shot for those that others use; what is unknown, and not ``ignored``, is named as a fault."""
    values = dict(values)
    if isinstance(values.get("body"), Mapping):  # a batch line of OpenAI's
        method, url = values.pop("method", "POST"), values.pop("url", "/v1/videos")
        if method != "POST" or not str(url).endswith("/videos"):
            return Line(number, None, f"{show(method)} {show(url)}: must be POST /v1/videos")
        ignored = _OF_BATCHES
        body = {name: value for name, value in values.pop("body").items() if value is not None}
        for name, value in body.items():
            if name not in ignored and values.get(name) not in (None, value):
                return Line(number, None, _twice(name, values[name], f"body.{name}", value))
        values |= body
        if isinstance(values.get("seconds"), str):
            values["seconds"] = _number("seconds", values["seconds"])
        if (reference := values.pop("input_reference", None)) is not None:
            if not isinstance(reference, str):
                return Line(number, None, _no_path("input_reference", reference))
            field = _field_of(reference)
            if values.get(field) not in (None, reference):
                return Line(number, None, _twice(field, values[field], "input_reference", reference))
            values[field] = reference
    known: dict[str, Any] = {}
    overrides = values.pop("overrides", None)
    overrides = {} if overrides is None else overrides
    for name, value in values.items():
        if value is None or name in ignored:
            continue
        if name in _SETTINGS and isinstance(overrides, dict):
            if name in overrides and overrides[name] != value:
                return Line(number, None, _twice(name, value, f"overrides.{name}", overrides[name]))
            overrides = {name: value, **overrides}
        elif (own := _NAMES.get(name, name)) is None:
            continue
        elif own not in FIELDS:
            return Line(number, None, f"no such field {show(name)}; the fields are {', '.join(FIELDS)}")
        elif own in known and known[own] != value:
            other = next(one for one in values if one != name and _NAMES.get(one, one) == own)
            return Line(number, None, _twice(other, known[own], name, value))
        else:
            known[own] = value
    for name in ("path", "ref"):
        if (path := values.get(name)) is not None:
            if not isinstance(path, str):
                return Line(number, None, _no_path(name, path))
            field = _field_of(path)
            if known.get(field, path) != path:
                other = "path" if values.get(field) is None else field
                return Line(number, None, _twice(other, known[field], name, path))
            known[field] = path
    sides = [name for name in ("width", "height") if values.get(name) is not None]
    if len(sides) == 1:
        return Line(number, None, f"{sides[0]}={show(values[sides[0]])}: give width and height, or size=WIDTHxHEIGHT")
    if sides:
        size = f"{values['width']}x{values['height']}"
        if known.get("size", size) != size:
            return Line(number, None, _twice("size", known["size"], "width x height", size))
        known["size"] = size
    if isinstance(known.get("id"), int) and not isinstance(known["id"], bool):
        known["id"] = str(known["id"])
    if overrides != {}:
        known["overrides"] = overrides
    return Line(number, known)


def _twice(one: str, value: Any, other: str, further: Any) -> str:
    return f"{one}={show(value)} and {other}={show(further)}: are names of the same; give one of them"


def _no_path(name: str, value: Any) -> str:
    return f"{name}={show(value)}: must be text, the path of a clip or a picture"


def _field_of(path: str) -> str:
    """Whether it is a clip or a picture that a shot begins with, by its name."""
    return "image" if PurePath(path).suffix.lower() in _PICTURES else "video"


def _with_paths(values: dict[str, Any], folder: str) -> dict[str, Any]:
    for name in ("video", "image"):
        path = values.get(name)
        if isinstance(path, str) and path and not is_remote(path):
            path = os.path.expanduser(path)
            absolute = path if os.path.isabs(path) else join(folder, path)
            values[name] = absolute if is_remote(folder) else os.path.normpath(absolute)
    return values
