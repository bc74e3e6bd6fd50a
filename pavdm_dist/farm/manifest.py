"""A manifest, checked as a whole before anything runs: errors by line, at constant memory however long it is."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Container, Iterator
from contextlib import closing
from tempfile import gettempdir

from pavdm_dist.errors import ConfigError, MediaError, PAVDMError
from pavdm_dist.farm.formats import Line, read_lines
from pavdm_dist.farm.shot import Shot, id_of, make_shot

# Faults that a message tells of one by one; more are counted.
TOLD = 12


class ManifestError(ConfigError):
    """Lines of a manifest that cannot be used."""


class _Ids:
    """Which ids there have been, in a temporary file of SQLite's: a set of them would grow with the manifest."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("")
        self._cursor = self._base.cursor()  # one for all: Python keeps a list of them
        self._cursor.execute("PRAGMA synchronous=OFF")
        self._cursor.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        self._cursor.execute("CREATE TABLE same (said BLOB PRIMARY KEY, count INTEGER) WITHOUT ROWID")

    def close(self) -> None:
        self._base.close()

    def first_line(self, id: str, line: int) -> int:
        """The line that had this id first: ``line`` itself where it is new."""
        self._cursor.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (id, line))
        (first,) = self._cursor.execute("SELECT line FROM ids WHERE id = ?", (id,)).fetchone()
        return int(first)

    def equal_before(self, said: bytes) -> int:
        """How many lines before said the same."""
        count = "INSERT INTO same VALUES (?, 1) ON CONFLICT (said) DO UPDATE SET count = count + 1 RETURNING count"
        (found,) = self._cursor.execute(count, (said,)).fetchone()
        return int(found) - 1


def read_shots(path: str, growing: Container[str] | None = None) -> Iterator[tuple[int, Shot | ManifestError]]:
    """The shots of a manifest with their line numbers; for a line that is none, why.

    A line without an id gets one that follows from what it says, and from how many equal lines come before it. So
    taking a line out, or putting one in, changes no other shot.

    Args:
        path: ``.jsonl``, ``.csv``, ``.tsv`` or ``.txt``; local or remote.
        growing: somebody may be writing it: a line without a line break is left out, unless it is a shot of these ids.

    Raises:
        ConfigError: it cannot be read at all.
    """
    with closing(_Ids()) as ids:
        for line in read_lines(path):
            found: Shot | ManifestError
            try:
                found = _shot(line, ids)
            except ManifestError as error:
                found = error
            except sqlite3.Error as error:
                raise MediaError(f"{path}: its ids find no room in {gettempdir()} ({error}); set TMPDIR") from error
            if growing is None or line.ended or (isinstance(found, Shot) and found.id in growing):
                yield line.number, found


def checked(
    path: str, check: Callable[[Shot], None] = lambda _: None, growing: Container[str] | None = None
) -> Iterator[Shot]:
    """The shots of a manifest that is well; read to the end, or nothing of it may be used.

    Args:
        path: of the manifest.
        check: what else is asked of a shot; raises a :class:`PAVDMError` of one that cannot be rendered.
        growing: see :func:`read_shots`.

    Raises:
        ManifestError: behind the last line: all that is wrong, by line; or there is no shot in it.
        ConfigError: it cannot be read.
    """
    faults: list[str] = []
    count = wrong = 0
    for number, shot in read_shots(path, growing):
        if not isinstance(shot, ManifestError):
            count += 1
            try:
                check(shot)
            except PAVDMError as error:
                shot = ManifestError(f"line {number}: {error}")
        if isinstance(shot, ManifestError):
            wrong += 1
            faults += [str(shot)] if len(faults) < TOLD else []
        elif not wrong:
            yield shot
    if wrong:
        more = f"; and {wrong - len(faults)} more" if wrong > len(faults) else ""
        raise ManifestError(f"manifest={path}: {wrong} line(s) cannot be used: {'; '.join(faults)}{more}")
    if not count:
        raise ManifestError(f"manifest={path}: has no shot; one a line is expected")


def _shot(line: Line, ids: _Ids) -> Shot:
    where = f"line {line.number}"
    if line.values is None:
        raise ManifestError(f"{where}: {line.fault}")
    values = dict(line.values)
    if "id" not in values:
        said = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode("utf-8", "replace")).digest()
        values["id"] = id_of(values, ids.equal_before(said))
    try:
        shot = make_shot(values, where)
    except ManifestError:
        raise
    except ConfigError as error:
        raise ManifestError(str(error)) from error
    first = ids.first_line(shot.id, line.number)
    if first != line.number:
        raise ManifestError(f"{where}: id={shot.id} is that of line {first}, too; every shot needs its own")
    return shot
