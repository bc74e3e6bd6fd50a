"""What every stage did when, as a JSON file: written by a run, drawn and summed up by ``pavdm simulate trace=FILE``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pavdm_dist.engine.order import Unit
from pavdm_dist.engine.spans import DecodeSpan, RunReport, Span
from pavdm_dist.errors import ConfigError, TraceError
from pavdm_dist.io.storage import atomic_write
from pavdm_dist.values.fields import json_value

# Raised whenever what a file holds changes its meaning.
VERSION = 1


def write_trace(path: str | Path, reports: Sequence[RunReport], decoded: Sequence[DecodeSpan] = ()) -> None:
    """Writes the spans of all stages and of the decoder, all or nothing; times are seconds from the first span on.

    Stages on several machines are comparable as far as these agree on the time of day.

    Raises:
        TraceError: it cannot be written.
    """
    zero = min((report.clock + span.ready for report in reports for span in report.trace), default=0.0)
    stages = [
        [
            {
                "unit": asdict(span.unit),
                "ready": round(report.clock + span.ready - zero, 6),
                "start": round(report.clock + span.start - zero, 6),
                "end": round(report.clock + span.end - zero, 6),
            }
            for span in report.trace
        ]
        for report in reports
    ]
    decoder = [
        [span.stream, span.chunk, round(max(0.0, span.start - zero), 6), round(max(0.0, span.end - zero), 6)]
        for span in decoded
    ]
    try:
        with atomic_write(path, "w") as file:
            json.dump({"version": VERSION, "stages": stages, "decoder": decoder}, file)
    except Exception as error:  # stores that are away have errors of kinds of their own
        why = getattr(error, "strerror", None) or error
        raise TraceError(f"trace={path}: cannot be written ({why}); the videos are not touched by that") from error


def read_trace(path: str | Path) -> list[list[Span]]:
    """The spans of every stage.

    Raises:
        ConfigError: no such file, no trace, or one of another version.
    """
    content = _content(path)
    try:
        return [[_span(**entry) for entry in spans] for spans in content["stages"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"trace={path}: is damaged ({error})") from error


def read_decoder(path: str | Path) -> list[DecodeSpan]:
    """What the decoder did, on the clock of the stages; nothing where it was not traced.

    Raises:
        ConfigError: as :func:`read_trace`.
    """
    content = _content(path)
    try:
        spans = [DecodeSpan(int(a), int(b), float(c), float(d)) for a, b, c, d in content.get("decoder", ())]
        if not all(0 <= span.start <= span.end < math.inf for span in spans):
            raise ValueError("times of the decoder")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trace={path}: is damaged ({error})") from error
    return spans


def _content(path: str | Path) -> dict[str, Any]:
    try:
        content: Any = json_value(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"trace={path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"trace={path}: is no JSON") from error
    if not isinstance(content, dict) or not {"version", "stages"} <= set(content):
        raise ConfigError(f"trace={path}: is no trace; pavdm sample ... num_stages=2 trace=FILE writes one")
    if content["version"] != VERSION:
        raise ConfigError(f"trace={path}: is of version {content['version']}, this package reads version {VERSION}")
    return content


def _span(unit: dict[str, Any], ready: float, start: float, end: float) -> Span:
    read = Unit(**{**unit, "fed": tuple(int(chunk) for chunk in unit["fed"])})
    for name in ("order", "stream", "row", "branch", "chunk"):
        if not isinstance(getattr(read, name), int):
            raise ValueError(f"{name}={getattr(read, name)!r} of a unit")
    if not 0 <= ready <= start <= end < math.inf:
        raise ValueError(f"times {ready}, {start}, {end}")
    return Span(read, float(ready), float(start), float(end))
