"""What a command says: results on standard output, complaints on standard error."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

from pavdm_dist.errors import PAVDMError
from pavdm_dist.redaction import hide_secrets


def print_config(config: Any) -> None:
    """Merged settings with what they mean, as the YAML that would be read as them."""
    from pavdm_dist.values.described import described_yaml

    say(described_yaml(config).removesuffix("\n"))


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """A report as one JSON object, or as lines for people."""
    from pavdm_dist.commands.printing import report_lines

    say(json.dumps(report) if as_json else "\n".join(report_lines(report)))


def say(text: str) -> None:
    """What a command was asked for, on standard output, which may be a file on a disk that is full."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        raise
    except UnicodeEncodeError as error:
        raise PAVDMError(
            f"standard output takes {error.encoding} only, not {error.object[error.start : error.end]!a}; set"
            " PYTHONIOENCODING=utf-8"
        ) from error
    except OSError as error:
        # What is still held back would be tried again at the end, and complained about without a name.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise PAVDMError(f"standard output cannot be written: {error.strerror}") from error


def printable(text: str) -> str:
    """Names of files that are no text show their bytes."""
    return text.encode(errors="backslashreplace").decode()


def complain(message: str, status: int) -> int:
    """What went wrong, as one line without secrets; gives ``status`` back."""
    text = printable(hide_secrets(" ".join(message.split())))
    with suppress(OSError):  # nobody may be left to read it
        print(f"pavdm: {text}", file=sys.stderr)
    return status
