"""What public bug reports broke once, one case a report, on the real command line; ``tests/cases`` has them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import clusters, data_sets, films, models, stages, stopped, training, written

Case = Callable[[Path], None]

# The table of reports: those of its rows that a script can show.
REPORTS = [
    "A1", "A2", "A3", "A5", "A6", "A8", "B1", "B2", "B4", "B6", "C1", "C3", "C4", "C7", "C8",
    "D1", "D3", "D4", "D5", "D6", "E1", "E2", "E3", "E5", "F1", "F3", "F4", "F5", "F6", "F7", "F8", "F9",
    "G1", "G2", "G4", "G5", "H1", "H2", "H3", "H3b", "H5", "K3", "K7",
]  # fmt: skip


def _cases() -> list[tuple[str, Case]]:
    """Every case with its report's number, in the order of the table."""
    found = []
    for module in (clusters, data_sets, films, models, stages, stopped, training, written):
        for name, case in inspect.getmembers(module, inspect.isfunction):
            if case.__module__ == module.__name__ and not name.startswith("_"):
                number = re.match(r"([A-K]\d+b?): ", case.__doc__ or "")
                assert number is not None, f"{module.__name__}.{name}: its docstring names no report"
                found.append((number[1], case))
    return sorted(found, key=lambda one: one[0])


def test_every_report_has_one_case() -> None:
    assert [number for number, _ in _cases()] == sorted(REPORTS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{number}-{case.__name__}") for number, case in _cases()])
def test_case(case: Case, tmp_path: Path) -> None:
    case(tmp_path)
