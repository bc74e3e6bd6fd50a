"""Dataclass defaults <- YAML file <- ``key=value`` overrides, for any dataclass of settings.

OmegaConf stays in this file; what comes out are plain dataclasses. Every mistake is a
:class:`~pavdm_dist.errors.ConfigError` that names the field, its value and what is legal.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from pavdm_dist.errors import ConfigError, first_line
from pavdm_dist.redaction import hide_in_urls, is_redacted
from pavdm_dist.values.fields import check_fields, expected, members, read, show
from pavdm_dist.values.names import UnknownSettingError, alike, same
from pavdm_dist.values.yaml_text import NO_YAML, as_yaml, read_yaml

T = TypeVar("T")
# What stands for ``???`` while OmegaConf has it; no legal text holds a NUL.
_MARK = "\0???"
_PROMPTS = ("prompt", "negative_prompt", "timed_prompts", "prompt_suffix")
_HALVES = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_KINDS = {bool: "true or false", int: "a number", float: "a number", date: "a date", datetime: "a time"}


def load_config(cls: type[T], yaml_path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Merge ``cls``'s defaults, a YAML file and ``key=value`` overrides, later ones winning.

    Text fields take an override literally (``prompt=a: b``); other values are read as YAML; ``null`` is None.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest one is named), a value that the field's annotation
            does not allow, or an address whose password :func:`to_yaml` has left out.
    """
    if yaml_path is None:
        return merged(cls, {}, "", overrides)
    if not os.path.isfile(yaml_path):
        raise ConfigError(f"{yaml_path}: no such config file (`pavdm configs ls` lists the shipped ones)")
    try:
        content = Path(yaml_path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{yaml_path}: not readable ({error.strerror})") from error
    return merged(cls, settings_of(content, yaml_path), yaml_path, overrides)


def settings_of(content: bytes, where: object) -> dict[Any, Any]:
    """Names and values of a config file.

    Raises:
        ConfigError: naming ``where``: it is no YAML, or YAML of something else.
    """
    try:
        values = read_yaml(content)
    except NO_YAML as error:
        raise ConfigError(f"{where}: not readable as YAML ({first_line(error)})") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{where}: must hold `key: value` lines, not {show(values)}")
    return values or {}


def merged(cls: type[T], values: Mapping[Any, Any], where: object, overrides: Sequence[str] = ()) -> T:
    """As :func:`load_config`, from what a file at ``where`` holds."""
    config = OmegaConf.structured(cls)
    for key, value in values.items():
        _set(config, cls, [str(key)], value, origin=f"{where}: ")
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item!r} is not an override: write key=value")
        _set(config, cls, key.split("."), text, parse=True)
    try:
        result = _unescape(OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    assert isinstance(result, cls)
    check_fields(result)
    for name, value in _texts(dataclasses.asdict(typing.cast(Any, result))):
        if is_redacted(value):
            raise ConfigError(f"{name}={value}: *** stands for a secret that no file keeps; give {name}=... again")
    return result


def to_dict(config: Any, hide: Callable[[str], str] = hide_in_urls) -> dict[str, Any]:
    """The settings as plain lists, dicts and scalars, for files.

    Args:
        config: a dataclass.
        hide: takes secrets out of texts that are no prompts; without more said out of addresses only, so that whatever
            else is read back is as it was.
    """
    return _without_secrets(dataclasses.asdict(config), hide)


def to_yaml(config: Any) -> str:
    """The settings as YAML that :func:`load_config` reads back to an equal object, but for secrets in addresses."""
    return as_yaml(to_dict(config))


def _without_secrets(value: Any, hide: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        # What a video shows is no secret, and a word changed in it would make another video.
        return {key: entry if key in _PROMPTS else _without_secrets(entry, hide) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_secrets(entry, hide) for entry in value]
    return hide(value) if isinstance(value, str) else value


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text with its setting's name, but for prompts."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key not in _PROMPTS:
                yield from _texts(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, name)
    elif isinstance(value, str):
        yield name, value


def _set(config: DictConfig, cls: type, path: list[str], value: Any, *, parse: bool = False, origin: str = "") -> None:
    """Set one field, or every field of one section, descending through ``cls``'s annotations."""
    name, annotation, limited = "", cls, cls
    for depth, key in enumerate(path):
        known = _hints(annotation)
        if key not in known:
            section = f"{name}: " if name else ""
            is_prose = parse and " " in value and "prompt" in _hints(cls)
            more = " (a prompt that holds = is given as prompt='...')" if is_prose else ""
            raise _no_such_key(key, annotation, origin + section, bool(name), more)
        limited = _hints(annotation, include_extras=True)[key]
        annotation, name = known[key], ".".join(path[: depth + 1])
        if not dataclasses.is_dataclass(annotation):
            break
    rest = path[len(name.split(".")) :]
    if rest and typing.get_origin(annotation) is not dict:
        raise ConfigError(f"{origin}{'.'.join(path)}: {name} has no keys of its own")
    if parse:
        value = _parse(annotation, name, value)
    value = read(limited, value)
    if isinstance(value, str) and list[str] in members(annotation):
        value = [value]  # one is written without brackets
    for key in reversed(rest):
        value = {key: value}
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, dict):
            raise ConfigError(f"{origin}{name}={show(value)}: is a section, set its keys ({name}.KEY=VALUE)")
        for key, entry in value.items():
            _set(config, cls, [*path, str(key)], entry, origin=origin)
        return
    found = _no_text(annotation, name, value)
    if found is not None:
        raise ConfigError(origin + found)
    value = _as_meant(name, value)
    try:
        nested = _escape(value)
        for key in reversed(name.split(".")):
            nested = {key: nested}
        config.merge_with(nested)
    except (OmegaConfBaseException, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(origin + _explain(error, name, annotation, value)) from error


@cache
def _hints(cls: Any, include_extras: bool = False) -> dict[str, Any]:
    """Annotations of a class. To read them takes milliseconds, and every setting that is set asks for them."""
    return typing.get_type_hints(cls, include_extras=include_extras)


def _no_text(annotation: Any, name: str, value: Any) -> str | None:
    """What is wrong where YAML found a number, a date or a truth and text is meant: as ``False`` or ``7``, ``no`` and
    ``007`` would be other words."""
    kinds = members(annotation)
    if isinstance(value, list | dict | str | None):
        item = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list), None)
        parts: Iterable[tuple[Any, str, Any]] = ()
        if isinstance(value, list) and item is not None:
            parts = ((item, f"{name}[{number}]", entry) for number, entry in enumerate(value))
        elif isinstance(value, dict) and dataclasses.is_dataclass(kinds[0]):
            hints = _hints(typing.cast(Any, kinds[0]))
            parts = ((hints[key], f"{name}.{key}", entry) for key, entry in value.items() if key in hints)
        elif isinstance(value, dict) and typing.get_origin(kinds[0]) is dict:
            parts = ((typing.get_args(kinds[0])[1], f"{name}.{key}", entry) for key, entry in value.items())
        return next((found for found in (_no_text(*part) for part in parts) if found is not None), None)
    if str not in kinds:
        return None
    kind = _KINDS.get(type(value), "another kind of value")
    return f"{name}={show(value)}: must be {expected(annotation)}; YAML reads {kind} here, put text in quotes"


def _parse(annotation: Any, name: str, text: str) -> Any:
    """The value an override's text stands for."""
    optional = members(annotation)
    if text == "null" and type(None) in optional:
        return None
    if str in optional or typing.get_origin(annotation) is Literal:
        return text
    try:
        return read_yaml(text)
    except NO_YAML as error:
        raise ConfigError(f"{name}={show(text)}: must be {expected(annotation)}") from error


def _explain(error: Exception, name: str, annotation: Any, value: Any) -> str:
    (inner, *_) = members(annotation)
    item = typing.get_args(inner)[0] if typing.get_origin(inner) is list else None
    key = getattr(error, "key", None)
    if dataclasses.is_dataclass(item) and isinstance(key, str):
        known = _hints(typing.cast(Any, item))
        if key in known:
            return f"{name}: {key}={show(_unescape(getattr(error, 'value', None)))}: must be {expected(known[key])}"
        if isinstance(error, ConfigKeyError):
            return str(_no_such_key(key, item, f"{name}: ", is_part=True))
    where = getattr(error, "full_key", None) or name
    if item is not None and where.startswith(f"{name}["):
        return f"{where}={show(_unescape(getattr(error, 'value', None)))}: must be {expected(item)}"
    return f"{name}={show(value)}: must be {expected(annotation)}"


def _no_such_key(key: str, cls: Any, where: str, is_part: bool, more: str = "") -> UnknownSettingError:
    known, bare = _hints(cls), f"{where}no such key {key!r}"
    meant = same(key, list(_dotted_names(cls)))
    near = meant or alike(key, known)
    hint = f"the keys are {', '.join(known)}" if len(known) <= 12 else "--print-config lists the keys"
    return UnknownSettingError(
        bare + (f", did you mean {near}?" if near else f"; {hint}") + more, key, None if meant or is_part else bare
    )


def _dotted_names(cls: Any) -> Iterator[str]:
    """Names of settings, and of those in sections."""
    for name, annotation in _hints(cls).items():
        yield name
        if dataclasses.is_dataclass(annotation):
            yield from (f"{name}.{part}" for part in _dotted_names(annotation))


def _escape(value: Any) -> Any:
    """Keep OmegaConf from taking ``${`` in a prompt as an interpolation, and ``???`` as a value that is still to come;
    the second is taken back by :func:`_unescape`."""
    if isinstance(value, str):
        return _MARK if value == "???" else re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _escape(entry) for key, entry in value.items()}
    return [_escape(entry) for entry in value] if isinstance(value, list) else value


def _unescape(value: Any) -> Any:
    if isinstance(value, str):
        return "???" if value == _MARK else value
    if isinstance(value, list):
        return [_unescape(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _unescape(entry) for key, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{key: _unescape(entry) for key, entry in vars(value).items()})
    return value


def _as_meant(name: str, value: Any) -> Any:
    """Texts as they are meant: ``~/`` in front of a path, which few shells replace behind an equals sign and none in a
    file; and characters that JSON, which is YAML to nearly all who write it, gives in two halves."""
    if isinstance(value, list):
        return [_as_meant(name, entry) for entry in value]
    if isinstance(value, dict):
        return {key: _as_meant(str(key), entry) for key, entry in value.items()}
    if not isinstance(value, str):
        return value
    text = _HALVES.sub(lambda found: found[0].encode("utf-16", "surrogatepass").decode("utf-16"), value)
    is_path = text.startswith("~/") and name.rpartition(".")[2] not in _PROMPTS
    return os.path.expanduser(text) if is_path else text
