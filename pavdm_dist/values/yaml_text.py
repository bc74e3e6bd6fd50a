"""YAML as settings are written in it: numbers mean what people mean, and text of any characters reads back equal."""

from __future__ import annotations

import re
from typing import Any

from yaml import (
    CollectionEndEvent,
    CollectionStartEvent,
    SafeDumper,
    SafeLoader,
    ScalarNode,
    YAMLError,
    dump,
    parse,
)

# What reading YAML raises: no YAML, no text, a date or a tagged (!!int) value that is none, a number of thousands of
# digits, endless nesting.
NO_YAML = (YAMLError, ValueError, LookupError, AttributeError, RecursionError)
_DEEPEST, _MOST = 50, 100_000
_ZEROS = re.compile(r"[-+]?0\d+")


def read_yaml(text: str | bytes) -> Any:
    """What YAML says, as plain lists, dicts and scalars.

    Raises:
        YAMLError, ValueError, LookupError, AttributeError, RecursionError: (:data:`NO_YAML`) none, or nothing that
            settings could be: a hundred lists in lists, which take the parser minutes, or anchors that multiply.
    """
    depth = 0
    for event in parse(text, SafeLoader):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
    content = _Loader(text).get_single_data()
    left, found = [content], 0
    while left:
        value, found = left.pop(), found + 1
        if found > _MOST:
            raise ValueError("its anchors make it endless, or too large")
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return content


def as_yaml(values: dict[str, Any]) -> str:
    """Plain lists, dicts and scalars as YAML that :func:`read_yaml` reads back to equal ones."""
    return dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(SafeLoader):
    """Reads numbers as people mean them: 010 is ten, which YAML 1.1 reads as eight, and 30:1, which it reads in base 60
    as 1801, is text."""


def _whole(loader: SafeLoader, node: ScalarNode) -> int | str:
    text = loader.construct_scalar(node)
    if ":" in text:
        return text
    digits = text.replace("_", "")
    return int(digits) if _ZEROS.fullmatch(digits) else loader.construct_yaml_int(node)


def _decimal(loader: SafeLoader, node: ScalarNode) -> float | str:
    text = loader.construct_scalar(node)
    return text if ":" in text else loader.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _decimal)


class _Dumper(SafeDumper):
    """Writes characters that YAML would read as ends of lines, or not at all, as escapes."""


def _quoted(dumper: SafeDumper, text: str) -> ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _quoted)
