"""Settings with what they mean: each field's comment in the source, and its legal values, as comments in YAML.

The comment behind a field is its own, and so are the lines above it where none is behind it; lines above a field that
has one are the heading of a group. Classes that say it in their docstring's ``Attributes:`` are read there.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import math
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pavdm_dist.values.fields import Rate, Within, expected, members
from pavdm_dist.values.merging import to_dict
from pavdm_dist.values.yaml_text import as_yaml

_WIDTH, _INDENT = 120, "  "
# Upper ends from here on only keep slips of a finger from computing without an end; see values.fields.
_SLIP = 100_000
_MARKUP = re.compile(r":\w+:`~?([^`]*)`|``([^`]*)``")
_ATTRIBUTES = re.compile(r"^Attributes:\n((?:[ \t]+.*\n?|\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Said:
    """What the source says of a field: of the field itself, and of the group that begins with it."""

    about: str = ""
    heading: str = ""


def described_yaml(config: Any) -> str:
    """The settings as YAML that reads back as :func:`~pavdm_dist.values.merging.to_yaml` does, each with what it means
    and, where few values are legal, with those; longer ones stand above their key.

    Args:
        config: a dataclass.
    """
    return "\n".join(_lines(type(config), to_dict(config), "")).lstrip("\n") + "\n"


@cache
def said_of(cls: type) -> dict[str, Said]:
    """What the source says of the fields of a dataclass, inherited ones included; none of those it says nothing of.

    Where there is no source, what docstrings say is left.
    """
    found: dict[str, Said] = {}
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part):
            comments, attributes = _comments(part), _attributes(inspect.getdoc(part) or "")
            for name in inspect.get_annotations(part):
                said = comments.get(name, Said())
                about = said.about or attributes.get(name) or (found[name].about if name in found else "")
                found[name] = Said(_as_yaml_says(about), _as_yaml_says(said.heading))
    hints = typing.get_type_hints(cls)
    for name, said in found.items():
        if not said.about and dataclasses.is_dataclass(hints[name]):  # a section: what its class says first
            first = (inspect.getdoc(typing.cast(Any, hints[name])) or "").partition("\n\n")[0]
            found[name] = dataclasses.replace(said, about=_as_yaml_says(first.replace("\n", " ")))
    return {name: said for name, said in found.items() if said.about or said.heading}


def _lines(cls: type, values: dict[str, Any], indent: str) -> Iterator[str]:
    said, hints = said_of(cls), typing.get_type_hints(cls, include_extras=True)
    for name, value in values.items():
        of_field, hint = said.get(name, Said()), hints[name]
        if of_field.heading:
            yield ""
            yield from _comment_lines(of_field.heading, indent)
        is_section = dataclasses.is_dataclass(hint)
        written = [f"{name}:"] if is_section else as_yaml({name: value}).splitlines()
        legal = _legal(hint)
        comment = " ".join(filter(None, (legal and f"[{legal}]", of_field.about)))
        whole = f"{indent}{written[0]}{_INDENT}# {comment}"
        if comment and len(written) == 1 and len(whole) <= _WIDTH:
            yield whole
        else:
            yield from _comment_lines(comment, indent)
            yield from (indent + line for line in written)
        if is_section:
            yield from _lines(typing.cast(type, hint), value, indent + _INDENT)


def _comment_lines(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _legal(annotation: Any) -> str:
    """The words or the range of numbers that are legal, where there are such; empty text elsewhere."""
    kinds = [kind for kind in members(annotation) if kind is not type(None)]
    is_optional = len(kinds) < len(members(annotation))
    return " | ".join(filter(None, (_legal_kind(kind, is_optional) for kind in kinds)))


def _legal_kind(kind: Any, is_optional: bool) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(arguments)
    if kind is bool and is_optional:  # the value shown says nothing of it
        return "true | false"
    if origin is Annotated and isinstance(arguments[1], Within):
        limits: Within = arguments[1]
        if limits.high >= _SLIP:
            limits = dataclasses.replace(limits, high=math.inf)
        return f"{limits}, also 30000/1001 or ntsc" if isinstance(limits, Rate) else str(limits)
    if origin is list:
        entry = arguments[0]
        legal = expected(entry) if dataclasses.is_dataclass(entry) else _legal(entry)
        return legal and f"a list, each entry {legal}"
    return ""


def _comments(cls: type) -> dict[str, Said]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            place = behind if token.line[: token.start[1]].strip() else alone
            place[token.start[0]] = token.string.removeprefix("#").strip()
    (definition,) = ast.parse(source).body
    found = {}
    for node in typing.cast(ast.ClassDef, definition).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            own = " ".join(text for line in lines for text in (behind.get(line), alone.get(line)) if text)
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            above = " ".join(alone[line] for line in range(first, node.lineno))
            found[node.target.id] = Said(own, above) if own else Said(above)
    return found


def _attributes(docstring: str) -> dict[str, str]:
    """Of a cleaned docstring's ``Attributes:``, what is said of each name; several may share an entry."""
    section = _ATTRIBUTES.search(docstring + "\n")
    entries = re.split(r"^(?=\S)", textwrap.dedent(section[1]), flags=re.MULTILINE) if section else []
    found: dict[str, str] = {}
    for entry in entries:
        names, colon, about = " ".join(entry.split()).partition(": ")
        if colon:
            found |= dict.fromkeys(names.split(", "), about)
    return found


def _as_yaml_says(text: str) -> str:
    """Without Python's markup, and null by its name in YAML."""
    plain = _MARKUP.sub(lambda match: match[1] or match[2], text)
    return re.sub(r"(?<!\.)\.$", "", re.sub(r"\bNone\b", "null", plain))
