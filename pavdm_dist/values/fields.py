"""Legal values as annotations: ``depth: Annotated[int, Within(1, 256)]`` is checked, and said in words, in one place.

Settings (:mod:`pavdm_dist.values.merging`) and the JSON files of model folders go through it. It imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.values.rates import as_rate

T = TypeVar("T")


@dataclass(frozen=True)
class Within:
    """Numbers from ``low`` to ``high``; with ``above``, ``low`` itself is not one of them."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"above {self.low:,}" if self.above else f"{self.low:,} or more"
        if self.high == math.inf:
            return low
        return f"{low} and at most {self.high:,}" if self.above else f"{self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Rate(Within):
    """Frames per second, which may also be written as text that :func:`~pavdm_dist.values.rates.as_rate` knows."""


# What settings and model folders both give. The upper ends are far above any use: they are there so that a slip of the
# finger is a sentence at once, and not a computation without an end.
Steps = Annotated[int, Within(0, 10_000, above=True)]
WindowChunks = Annotated[int, Within(0, 10_000, above=True)]
ChunkLatents = Annotated[int, Within(0, 1024, above=True)]
ContextChunks = Annotated[int, Within(0, 1024)]
ContextNoise = Annotated[float, Within(0, 0.9)]
Guidance = Annotated[float, Within(0)]
TimeShift = Annotated[float, Within(0, above=True)]
Side = Annotated[int, Within(0, 16_384, above=True)]  # what H.264 can hold
FrameRate = Annotated[float, Rate(0, 1000, above=True)]
FrameCount = Annotated[int, Within(0, 10**12, above=True)]
UnitChunks = Annotated[int, Within(1, 10_000)]
StageCount = Annotated[int, Within(0, 1024)]
Threads = Annotated[int, Within(0, 1024, above=True)]
TileSide = Annotated[int, Within(1, 16_384)]
# Of a pretrained text encoder, in the settings of all verbs that may start one.
TextDevice = Literal["auto", "cpu", "cuda"]
TextDtype = Literal["bfloat16", "float32"]


def made(
    cls: type[T],
    values: Mapping[str, Any],
    where: object,
    *,
    prefix: str = "",
    ignore_unknown: bool = False,
    error: type[PAVDMError] = ConfigError,
) -> T:
    """A dataclass from a file's names and values; names that are left out have the class's defaults, and so have those
    that are null where null says nothing of its own.

    Args:
        cls: a dataclass whose annotations say what is legal.
        values: what the file holds.
        where: the file, for the message.
        prefix: of the names in the message.
        ignore_unknown: names that ``cls`` does not have are nobody's concern.
        error: what is raised.

    Raises:
        PAVDMError: of the kind ``error``, naming the file, the field, its value and what is legal.
    """
    if not isinstance(values, Mapping):
        raise error(f"{where}: must hold names and values, not {show(values)}")
    hints = _hints(typing.cast(Any, cls))
    values = {name: read(hints[name], value) if name in hints else value for name, value in values.items()}
    for name in values if not ignore_unknown else ():
        if name not in hints:
            raise error(f"{where}: no such key {prefix}{show(name)}; the keys are {', '.join(hints)}")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    for field in fields:
        optional = not field.default is field.default_factory is dataclasses.MISSING
        if optional and values.get(field.name, ...) is None and type(None) not in members(hints[field.name]):
            values = {name: value for name, value in values.items() if name != field.name}
    for field in fields:
        if field.name in values:
            found = fault(hints[field.name], prefix + field.name, values[field.name])
            if found is not None:
                raise error(f"{where}: {found}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise error(f"{where}: {prefix}{field.name} is missing; it must be {expected(hints[field.name])}")
    return cls(**{name: _plain(hints[name], value) for name, value in values.items() if name in hints})


def check_fields(config: Any) -> None:
    """Refuses a dataclass of settings, sections included, that holds an illegal value.

    Raises:
        ConfigError: naming the field, its value and what is legal.
    """
    found = fault(type(config), "", config)
    if found is not None:
        raise ConfigError(found)


def checked_arguments(kinds: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call as plain values; those that are None, and those of no kind here, as they are.

    Args:
        kinds: what is legal, by name.
        given: numbers of numpy, and fractions, are numbers like others.

    Raises:
        ConfigError: naming the argument, its value and what is legal.
    """
    values = dict(given)
    for name, value in given.items():
        if value is not None and name in kinds:
            values[name] = read(kinds[name], _number(value))
            found = fault(kinds[name], name, values[name])
            if found is not None:
                raise ConfigError(found)
    return values


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def read_object(path: Path, error: type[PAVDMError]) -> dict[str, Any]:
    """The names and values of a JSON file.

    Raises:
        PAVDMError: of the kind ``error``: unreadable, not JSON, or JSON of something else.
    """
    try:
        content = json_value(path.read_bytes())
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}") from reason
    except ValueError as reason:
        raise error(f"{path} is not valid JSON: {reason}") from reason
    if not isinstance(content, dict):
        raise error(f"{path} is not valid JSON of a model: it must hold names and values")
    return content


def json_value(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: no JSON, no UTF-8, a number of thousands of digits, or lists in lists without an end.
    """
    try:
        return json.loads(text)
    except RecursionError as reason:
        raise ValueError("it is nested too deeply") from reason


def fault(annotation: Any, name: str, value: Any) -> str | None:
    """What is wrong with a value, as ``name=value: must be ...``; None where nothing is."""
    faults = [_fault(kind, name, value) for kind in members(annotation)]
    if None in faults:
        return None
    # What is said of an entry, or of a range, says more than that the whole is of no legal kind.
    precise = [found for found in faults if found]
    return precise[0] if precise else f"{name}={show_no_text(value)}: must be {expected(annotation)}"


def read(annotation: Any, value: Any) -> Any:
    """A value as its annotation holds it: of a frame rate's text the number, of a truth the word where it is one of
    several; what is none stays as it is."""
    words = {
        word for kind in members(annotation) if typing.get_origin(kind) is Literal for word in typing.get_args(kind)
    }
    if isinstance(value, bool) and {"true", "false"} <= words:
        return str(value).lower()
    limits = (limit for kind in members(annotation) for limit in getattr(kind, "__metadata__", ()))
    if isinstance(value, str) and any(isinstance(limit, Rate) for limit in limits):
        with suppress(ConfigError):
            return float(as_rate(value))
    return value


def members(annotation: Any) -> tuple[Any, ...]:
    """The kinds of a union, or the one kind there is."""
    union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


_NO_WORD = re.compile(r"\s*([-+]?[\d.].*|[-+]?(nan|inf)|true|false|null|none)?\s*", re.IGNORECASE | re.DOTALL)
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def expected(annotation: Any) -> str:
    """What is legal, in words."""
    return " or ".join(_expected(kind) for kind in members(annotation))


def _expected(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        also = ", a fraction such as 30000/1001 or a name such as ntsc" if isinstance(arguments[1], Rate) else ""
        return _expected(arguments[0]) + also
    if origin is Literal:
        return ", ".join(arguments[:-1]) + " or " + arguments[-1]
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}, each entry {expected(arguments[0])}"
    if origin in (list, tuple):
        return f"a list, each entry {expected(arguments[0])}"
    if dataclasses.is_dataclass(kind):
        return "{" + ", ".join(field.name for field in dataclasses.fields(kind)) + "}"
    return _WORDS.get(kind, "a mapping")


def show(value: Any) -> str:
    """A value in a message, not too long."""
    try:
        text = "null" if value is None else str(value)
    except (ValueError, RecursionError):  # Python prints no number of more than some thousand digits
        text = "(too large to show)"
    return text if len(text) <= 80 else text[:77] + "..."


def show_no_text(value: Any) -> str:
    """As :func:`show`, where no text is meant: one that would pass for what is (``'5'``) is in quotes."""
    return repr(show(value)) if isinstance(value, str) and _NO_WORD.fullmatch(value) else show(value)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _fault(kind: Any, name: str, value: Any) -> str | None:
    """As :func:`fault` for one kind; empty text where the value is not of this kind at all."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        found = _fault(arguments[0], name, value)
        limits = arguments[1]
        return found if found is not None or limits.holds(value) else f"{name}={show(value)}: must be {limits}"
    if origin is Literal:
        return None if any(type(value) is type(word) and value == word for word in arguments) else ""
    if dataclasses.is_dataclass(kind):
        hints = _hints(typing.cast(Any, kind))
        parts = ((hint, _dotted(name, key), getattr(value, key)) for key, hint in hints.items())
        return _first(parts) if type(value) is kind else ""
    if origin in (list, tuple):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        if not isinstance(value, list | tuple) or (fixed and len(value) != len(arguments)):
            return ""
        each = arguments if fixed else arguments[:1] * len(value)
        return _first((hint, f"{name}[{i}]", entry) for i, (hint, entry) in enumerate(zip(each, value, strict=True)))
    if origin is dict:
        entries = value.items() if isinstance(value, dict) else ()
        parts = ((arguments[1], _dotted(name, str(key)), entry) for key, entry in entries)
        return _first(parts) if isinstance(value, dict) else ""
    if kind is float:
        if type(value) not in (int, float):
            return ""
        return None if _is_finite(value) else f"{name}={show(value)}: must be a finite number"
    if kind is str and type(value) is str and not is_writable(value):
        return f"{name}={value!r}: is not text that a file or its name can hold"
    return None if kind is Any or type(value) is kind else ""


def _first(parts: Iterator[tuple[Any, str, Any]]) -> str | None:
    return next((found for found in (fault(*part) for part in parts) if found is not None), None)


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def is_writable(text: str) -> bool:
    """Whether a file, and its name, can hold it: no NUL, and no half of a character."""
    try:
        return "\0" not in text and bool(text.encode() or True)
    except UnicodeEncodeError:
        return False


def _plain(annotation: Any, value: Any) -> Any:
    """A list where a tuple is annotated becomes one, so that the dataclass can be hashed."""
    is_tuple = any(typing.get_origin(kind) is tuple for kind in members(annotation))
    return tuple(value) if is_tuple and isinstance(value, list) else value
