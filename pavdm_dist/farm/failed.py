"""The list of a farm's failed shots, as a manifest of its own."""

from __future__ import annotations

import json
import logging

from pavdm_dist.farm.tree import FAILED, SIDECAR, Tree
from pavdm_dist.io.storage import atomic_write

logger = logging.getLogger(__name__)


def list_failed(tree: Tree) -> None:
    """As :func:`write_failed`, where that can be: every failed shot has a record of its own, and all is done."""
    try:
        write_failed(tree)
    except Exception as error:  # stores that are away have errors of kinds of their own
        logger.warning("failed.jsonl, the list of failed shots, cannot be written: %s: %s", type(error).__name__, error)


def write_failed(tree: Tree) -> int:
    """Writes ``failed.jsonl``, a manifest of the failed shots; how many."""
    found = {
        id: tree.failure(id).shot
        for id, names in sorted(tree.scan().items())
        if FAILED in names and SIDECAR not in names
    }
    damaged = {id for id, line in found.items() if line.get("id") != id}
    if damaged:  # what was asked for is kept elsewhere, too
        found |= {shot.id: json.loads(shot.to_line()) for shot in tree.shots() if shot.id in damaged}
    lines = [json.dumps(line, ensure_ascii=False) for id, line in found.items() if line.get("id") == id]
    with atomic_write(tree.path("failed.jsonl"), "w") as file:
        file.writelines(f"{line}\n" for line in lines)
    return len(lines)
