"""What every stage did when, as a JSON file: written by a run, drawn and summed up by ``pavdm simulate trace=FILE``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pavdm_dist.engine.order import Unit
from pavdm_dist.engine.runner import RunReport, Span
from pavdm_dist.errors import ConfigError

# Raised whenever what a file holds changes its meaning.
VERSION = 1


def write_trace(path: str | Path, reports: Sequence[RunReport]) -> None:
    """Writes the spans of all stages; times are seconds from the first span on."""
    zero = min((span.ready for report in reports for span in report.trace), default=0.0)
    stages = [
        [
            {
                "unit": asdict(span.unit),
                "ready": round(span.ready - zero, 6),
                "start": round(span.start - zero, 6),
                "end": round(span.end - zero, 6),
            }
            for span in report.trace
        ]
        for report in reports
    ]
    Path(path).write_text(json.dumps({"version": VERSION, "stages": stages}))


def read_trace(path: str | Path) -> list[list[Span]]:
    """The spans of every stage.

    Raises:
        ConfigError: no such file, no trace, or one of another version.
    """
    try:
        content: Any = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"trace={path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace={path}: is no JSON") from error
    found = content.get("version") if isinstance(content, dict) else None
    if found != VERSION:
        raise ConfigError(f"trace={path}: is of version {found}, this package reads version {VERSION}")
    try:
        return [[_span(**entry) for entry in spans] for spans in content["stages"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"trace={path}: is damaged ({error})") from error


def _span(unit: dict[str, Any], ready: float, start: float, end: float) -> Span:
    return Span(Unit(**{**unit, "fed": tuple(unit["fed"])}), ready, start, end)
