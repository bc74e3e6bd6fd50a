"""Which videos, with which captions: folders, JSONL and CSV files (Open-Sora's among them)."""

from __future__ import annotations

import csv
import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pavdm_dist.errors import ConfigError
from pavdm_dist.io.folders import VIDEO_SUFFIXES, files_in, passed_over
from pavdm_dist.io.storage import is_remote
from pavdm_dist.values.fields import json_value

logger = logging.getLogger(__name__)

Captions = Literal["required", "stem", "skip"]

INDEX_SUFFIXES = (".csv", ".jsonl")
PATH_COLUMNS = ("path", "video", "video_path", "file")
CAPTION_COLUMNS = ("caption", "text", "prompt")
# Names in an error; more would hide the sentence.
_SHOWN = 3


@dataclass(frozen=True)
class SourceVideo:
    """One video of the sources.

    Attributes:
        path: relative to the sources' common folder, or an address (``s3://...``).
        caption: None = it has none and is to be skipped.
    """

    path: str
    caption: str | None


@dataclass(frozen=True)
class Sources:
    """All videos of a run, in the order of the sources, each file once.

    Attributes:
        root: absolute folder that relative paths start from: the deepest one that holds all sources.
        videos: at least one.
    """

    root: str
    videos: list[SourceVideo]


@dataclass(frozen=True)
class _Entry:
    location: str
    caption: str
    place: str  # where the caption was looked for, for messages


def locate(root: str, path: str) -> str:
    """The file or address of a :attr:`SourceVideo.path`."""
    return path if is_remote(path) else os.path.join(root, path)


def read_sources(sources: Sequence[str], captions: Captions = "required") -> Sources:
    """Reads every source.

    Args:
        sources: folders (searched with their subfolders; the caption of ``a.mp4`` is in ``a.txt``), video files
            (as in folders), ``.jsonl`` and ``.csv`` files (columns ``path`` and ``caption``, or one of their other
            names; paths are relative to the index file).
        captions: of a video without one: ``required`` is an error, ``stem`` takes the file's name without
            suffix, ``skip`` leaves the video out.

    Raises:
        ConfigError: a source that does not exist or is of no known kind, an index that cannot be read, no video at
            all, a video named twice, or videos without captions.
    """
    if not sources:
        raise ConfigError("source=[]: name a folder of videos, a .csv or a .jsonl file")
    entries: list[_Entry] = []
    folders = []
    for source in sources:
        path = Path(source)
        if not os.path.exists(path):
            raise ConfigError(f"source={source}: no such file or folder")
        folders.append(os.path.realpath(path if path.is_dir() else path.absolute().parent))
        entries += _read(path)
    root = os.path.commonpath(folders)
    bare = [entry for entry in entries if not entry.caption]
    if bare and captions == "required":
        raise ConfigError(
            f"{len(bare)} of {len(entries)} videos have no caption: {_few([entry.place for entry in bare])}; "
            "write them, or set captions=stem (the file's name is the caption) or captions=skip"
        )
    videos, seen = [], dict[str, str]()
    for entry in entries:
        for text in (entry.location, entry.caption):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ConfigError(f"{entry.place!a}: {text!a} is not valid Unicode; rename it or correct the caption")
        name = entry.location if is_remote(entry.location) else os.path.relpath(entry.location, root)
        if name in seen:
            raise ConfigError(f"{name} is named twice, at {seen[name]} and {entry.place}: one clip would count double")
        seen[name] = entry.place
        stem = Path(name).stem if captions == "stem" else None
        videos.append(SourceVideo(name, entry.caption or stem))
    return Sources(root, videos)


def _read(source: Path) -> list[_Entry]:
    if source.is_dir():
        hidden: list[str] = []
        found = sorted(files_in(os.path.realpath(source), VIDEO_SUFFIXES, "source", hidden))
        passed = passed_over(hidden)
        if not found:
            more = passed and f"; {passed}"
            raise ConfigError(f"source={source}: holds no video ({', '.join(VIDEO_SUFFIXES)}){more}")
        if passed:
            logger.info("source=%s: %s", source, passed)
        return [_with_sidecar(path) for path in found]
    suffix = source.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return [_with_sidecar(Path(_physical(source)))]
    if suffix not in INDEX_SUFFIXES:
        raise ConfigError(
            f"source={source}: must be a folder, a video ({', '.join(VIDEO_SUFFIXES)}) or an index "
            f"({', '.join(INDEX_SUFFIXES)})"
        )
    rows = _csv_rows(source) if suffix == ".csv" else _jsonl_rows(source)
    try:
        entries = [_from_row(source, line, row) for line, row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"source={source}: not readable as {suffix[1:]} in UTF-8: {error}") from error
    if not entries:
        raise ConfigError(f"source={source}: names no video")
    return entries


def _with_sidecar(path: Path) -> _Entry:
    sidecar = path.with_suffix(".txt")
    try:
        caption = sidecar.read_text(encoding="utf-8-sig").strip() if sidecar.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{sidecar}: not readable as UTF-8 text: {error}") from error
    place = f"{sidecar} ({'empty' if sidecar.is_file() else 'missing'})" if not caption else str(path)
    return _Entry(str(path), " ".join(caption.split()), place)


def _physical(path: Path) -> str:
    """The path through its real folder, so that ``..`` in a relative one leads where it seems to."""
    return os.path.join(os.path.realpath(path.absolute().parent), path.name)


def _as_spelled(path: str) -> str:
    """The file that a path means: Macs take letters with accents apart in names, most others put them together."""
    spellings = (path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))
    return next((spelling for spelling in spellings if os.path.lexists(spelling)), path)


def _csv_rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(source, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)  # else a quote that is never closed swallows the rows behind it
        for row in reader:
            if None in row:
                raise ConfigError(f"{source}:{reader.line_num}: has more fields than the header; quote commas")
            yield reader.line_num, row


def _jsonl_rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(source, encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json_value(text)
            except ValueError as error:
                raise ConfigError(f"{source}:{line}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{source}:{line}: must be an object with path and caption")
            yield line, row


def _from_row(source: Path, line: int, row: dict[str, Any]) -> _Entry:
    """Other columns (Open-Sora's ``num_frames``, ``fps``, ...) are ignored: the file itself is asked."""
    place = f"{source}:{line}"
    path = _column(row, PATH_COLUMNS, place)
    caption = _column(row, CAPTION_COLUMNS, place)
    if not path:
        raise ConfigError(f"{place}: the path is empty")
    location = path if is_remote(path) else _as_spelled(_physical(source.parent / path))
    return _Entry(location, " ".join(caption.split()), place)


def _column(row: dict[str, Any], names: Sequence[str], place: str) -> str:
    for name in names:
        if name in row:
            value = row[name]
            if not isinstance(value, str | None):
                raise ConfigError(f"{place}: {name}={value!r}: must be text")
            return (value or "").strip()
    raise ConfigError(f"{place}: has no column {' or '.join(names)}; it has {', '.join(row) or 'none'}")


def _few(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
