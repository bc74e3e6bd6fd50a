"""Files of prompts, one a line, as editors, shells and spreadsheets leave them."""

from __future__ import annotations

import codecs
import logging
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from pavdm_dist.errors import ConfigError
from pavdm_dist.values.fields import show

# No list of prompts is larger; a video that was named by mistake is.
MOST_BYTES = 64 * 2**20
# A file that begins with such a mark says itself how it is written; the longer marks begin like the shorter ones.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Their lines are no prompts, though they would be taken for some.
_TABLES = (".csv", ".json", ".jsonl", ".tsv", ".yaml", ".yml")
COMMENT = "#"
# How tools of DOS end a text file.
_END = "\x1a"

logger = logging.getLogger(__name__)


class PromptLine(NamedTuple):
    """A prompt, and the line of the file that it is, from 1."""

    number: int
    prompt: str


def read_prompts(path: str | Path) -> list[PromptLine]:
    """The prompts of a text file: UTF-8, or what its mark says; ends of lines of any system.

    Blank lines, and blanks around a prompt, say nothing, nor does a Ctrl-Z at the end; lines that begin with ``#`` are
    comments, which are counted in a log line.

    Raises:
        ConfigError: it cannot be read, is no text or too large, has no prompt, or a line of control characters only.
    """
    name = f"prompts={path}"
    if Path(path).suffix.lower() in _TABLES:
        raise ConfigError(f"{name}: must be a plain text file with a prompt in every line, not {Path(path).suffix}")
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{name}: is larger than {MOST_BYTES // 2**20} MiB; one prompt a line is expected")
    # Not str.splitlines: signs that break lines in text processors stand inside of prompts that were copied from one.
    lines = re.split(r"\r\n|\r|\n", _text(name, content))
    found = [PromptLine(number, line.strip()) for number, line in enumerate(lines, 1)]
    prompts = [line for line in found if line.prompt and not line.prompt.startswith(COMMENT)]
    comments = sum(line.prompt.startswith(COMMENT) for line in found)
    if not prompts:
        raise ConfigError(f"{name}: has no prompt, one a line is expected")
    for number, prompt in prompts:
        if "\0" in prompt:
            raise ConfigError(
                f"{name}: line {number} ({show(prompt)!r}) holds NUL: it is no text, or UTF-16 without a mark; save it"
                " as UTF-8"
            )
        if all(unicodedata.category(sign) == "Cc" for sign in prompt):
            raise ConfigError(f"{name}: line {number} ({show(prompt)!r}) holds control characters only, no prompt")
    if comments:
        logger.info("%s: %d prompts; comments, which begin with %s: %d", name, len(prompts), COMMENT, comments)
    return prompts


def _text(name: str, content: bytes) -> str:
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"line {line}, " if encoding == "utf-8" else ""
        raise ConfigError(
            f"{name}: is no readable UTF-8 text file ({where}byte 0x{content[error.start]:02x}: {error.reason}); save"
            " it as UTF-8"
        ) from error
    text = text.rstrip(_END)
    return text.replace("\ufeff", "")  # the mark of UTF-8, also in the middle, where files were joined
