"""SHA-256 of files of many gigabytes, computed once and kept beside what tells whether a file is still the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pavdm_dist.io.local_disk import cache_folder
from pavdm_dist.io.storage import atomic_write, sha256_file
from pavdm_dist.values.fields import json_value

# Smaller ones are read in no time; of reading larger ones people are told.
KEPT_BYTES, TOLD_BYTES = 64 * 2**20, 2**30
# A file that was changed less than so long before it was read may change again without another time.
_SETTLED_NS = 2 * 10**9
# At both ends of a file, where it is not read whole.
_END_BYTES = 2**20

logger = logging.getLogger(__name__)


def kept_sha256(path: str | Path) -> str:
    """SHA-256 of a local file's bytes, hexadecimal; a large one that was read before and is the same is not read again.

    The same is one with equal place, number, size and times: that of its last change is the system's own, and no copy
    or archive brings it back.
    """
    size = os.stat(path).st_size
    if size < KEPT_BYTES:
        return sha256_file(path)
    before = _facts(path)
    kept = _kept(before)
    if kept is not None:
        return kept
    if size >= TOLD_BYTES:
        logger.info("%s: reading %.1f GB once for the checksum that tells these weights from others", path, size / 1e9)
    began = time.time_ns()
    digest = sha256_file(path)
    if _facts(path) == before and began - before["changed"] > _SETTLED_NS:
        _keep(before, digest)
    return digest


def _facts(path: str | Path) -> dict[str, Any]:
    found = os.stat(path)
    times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    return {"path": os.path.realpath(path), "number": found.st_ino, "size": found.st_size, **times}


def _file(facts: dict[str, Any]) -> Path:
    return cache_folder("sha256") / f"{hashlib.sha256(os.fsencode(str(facts['path']))).hexdigest()[:32]}.json"


def _kept(facts: dict[str, Any]) -> str | None:
    try:
        found = json_value(_file(facts).read_bytes())
        return found["sha256"] if found["file"] == facts and isinstance(found["sha256"], str) else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or none that can be read: it is computed
        return None


def _keep(facts: dict[str, Any], digest: str) -> None:
    try:
        with atomic_write(_file(facts), "w") as file:
            json.dump({"file": facts, "sha256": digest}, file)
    except OSError as error:
        logger.debug("the checksum of %s cannot be kept: %s", facts["path"], error)


def ends_digest(files: Iterable[Path]) -> str:
    """What tells large files from others at little cost: a hash of their names, sizes, and a megabyte at both ends."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_END_BYTES))
            opened.seek(max(0, size - _END_BYTES))
            digest.update(opened.read())
    return digest.hexdigest()
