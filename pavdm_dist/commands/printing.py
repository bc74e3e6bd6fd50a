"""A report as lines for people: aligned ``name  value`` pairs and tables, no wider than a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

WIDTH = 120

# Headers of columns that would be wider than what they hold.
_SHORT = {
    "num_stages": "stages",
    "layers_per_stage": "layers",
    "memory_gib": "GiB",
    "decoder_devices": "decoders",
    "decode_seconds": "s/decode",
    "decoder_memory_gib": "dec. GiB",
    "seconds_per_video": "s/video",
    "utilisation": "busy",
    "device_hours": "dev. h",
}
_GAP = "  "
# What a last column of sentences gets at least, however wide its neighbours are.
_NARROWEST = 20


def report_lines(report: dict[str, Any], width: int = WIDTH) -> list[str]:
    """Lines of at most ``width`` columns; only a single word that is longer (a path) stands out.

    Nested mappings are indented; a list of mappings becomes a table. In a table a list of numbers is written as
    ``2x3 1`` (2 2 2 1), or as its range where that is too wide; columns that still find no place are named below it.
    """
    name_width = max((len(str(key)) for key in report), default=0)
    lines: list[str] = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [str(key), *_indented(report_lines(value, width - len(_GAP)))]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [str(key), *_indented(_table(value, width - len(_GAP)))]
        else:
            first, *rest = _wrapped(_cell(value), width - name_width - len(_GAP))
            lines.append(f"{key!s:{name_width}}{_GAP}{first}".rstrip())
            lines += [f"{'':{name_width}}{_GAP}{line}" for line in rest]
    return lines


class _Column:
    """One key of a table's rows: its header and its cells as text."""

    def __init__(self, name: str, values: Sequence[Any]) -> None:
        self.name, self.header, self.values = name, _SHORT.get(name, name), values
        self.is_list = any(isinstance(value, list | tuple) for value in values)
        self.is_text = any(isinstance(value, str) for value in values)
        self.cells = [_counted(value) for value in values]

    @property
    def width(self) -> int:
        return max(len(self.header), *map(len, self.cells))

    def give_ranges(self) -> None:
        """Writes the smallest and the largest number of each list in place of all of them."""
        self.is_list = False
        self.cells = [_range(value) for value in self.values]

    def padded(self, text: str) -> str:
        return text.ljust(self.width) if self.is_text else text.rjust(self.width)


def _table(rows: Sequence[dict[str, Any]], width: int) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [_Column(name, [row.get(name) for row in rows]) for name in names]
    while _total(columns) > width and any(column.is_list for column in columns):
        max((column for column in columns if column.is_list), key=lambda column: column.width).give_ranges()
    left_out: list[str] = []
    while _total(columns) > width and any(not column.is_text for column in columns[1:]):
        dropped = next(column for column in reversed(columns) if not column.is_text)
        columns.remove(dropped)
        left_out.insert(0, dropped.name)
    *left, last = columns
    room = max(_NARROWEST, width - _total(left) - len(_GAP) if left else width)
    lines = [_line(left, [column.header for column in left], last.header, last)]
    for row, cell in enumerate(last.cells):
        first, *rest = _wrapped(cell, room)
        lines.append(_line(left, [column.cells[row] for column in left], first, last))
        lines += [_line(left, [""] * len(left), more, last) for more in rest]
    if left_out:
        lines += _wrapped(f"(no room for {', '.join(left_out)}: --json has them)", width)
    return lines


def _line(columns: Sequence[_Column], cells: Sequence[str], last_cell: str, last: _Column) -> str:
    return _GAP.join([*map(_Column.padded, columns, cells), last.padded(last_cell)]).rstrip()


def _total(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns) + len(_GAP) * (len(columns) - 1)


def _indented(lines: list[str]) -> list[str]:
    return [_GAP + line for line in lines]


def _wrapped(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    # Names and paths stay whole, so that they can be copied.
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)


def _counted(value: Any) -> str:
    """A list as runs of equal items, ``2x3`` for 2 2 2."""
    if not isinstance(value, list | tuple):
        return _cell(value)
    runs = [(text, len(list(run))) for text, run in groupby(map(_cell, value))]
    return " ".join(text if count == 1 else f"{text}x{count}" for text, count in runs)


def _range(value: Any) -> str:
    if not isinstance(value, list | tuple) or not value:
        return _counted(value)
    low, high = _cell(min(value)), _cell(max(value))
    return low if low == high else f"{low}..{high}"


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_cell(item) for item in value)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
