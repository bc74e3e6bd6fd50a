"""Finds the checkpoint that a training run goes on from, also with another number of processes.

A checkpoint that was damaged since it was written (:mod:`pavdm_dist.train.save_writing`) is passed over for an older
one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.storage import make_durable
from pavdm_dist.train.average import Average
from pavdm_dist.train.identity import check_same
from pavdm_dist.train.ranks import World
from pavdm_dist.train.zero import ZeroEngine, foreign_names, to_universal

logger = logging.getLogger(__name__)

LATEST = "latest"
MANIFEST = "complete.json"
UNIVERSAL = "-universal"
T = TypeVar("T")


@dataclass(frozen=True)
class SaveLayout:
    """How a checkpoint's tensors lie: what must fit for a plain load.

    Attributes:
        zero_stage: DeepSpeed's.
        processes: that hold a part each.
    """

    zero_stage: int
    processes: int


@dataclass(frozen=True)
class _Manifest:
    """What a checkpoint says of itself.

    Attributes:
        files: size and hash by name.
        identity: of the run that wrote it.
        layout: of its tensors.
    """

    files: dict[str, Any]
    identity: dict[str, Any]
    layout: SaveLayout

    @classmethod
    def parse(cls, text: str) -> _Manifest:
        """From JSON; whatever that lacks or holds instead is an error of :func:`_read`'s."""
        found = json.loads(text)
        layout = SaveLayout(**found["layout"])
        for value, kind in (
            (found["files"], dict),
            (found["identity"], dict),
            (layout.zero_stage, int),
            (layout.processes, int),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{value!r} is no {kind.__name__}")
        return cls(found["files"], found["identity"], layout)


@dataclass(frozen=True)
class FoundSave:
    """The checkpoint to go on from.

    Attributes:
        tag: its name in the folder of checkpoints.
        convert: whether it must be laid out anew for this run's number of processes.
    """

    tag: str
    convert: bool


def find(
    root: str | Path,
    identity: Mapping[str, Any],
    layout: SaveLayout,
    resume: str,
    world: World,
) -> FoundSave | None:
    """The newest whole checkpoint that this run may go on from; every process must call it.

    Args:
        root: folder of checkpoints.
        identity: what must equal the checkpoint's (:func:`~pavdm_dist.train.identity.identity_of`).
        layout: of this run.
        resume: ``auto`` starts afresh where there is none, ``must`` refuses to, ``never`` refuses to go on.
        world: all processes.

    Returns:
        None for a fresh start.

    Raises:
        ConfigError: nothing to resume, or something that must not be; another world, model, objective or ZeRO stage.
        CheckpointError: there are checkpoints, and none is whole.
    """
    # One process looks: a shared folder need not show all of them the same at the same moment.
    tags = world.of_first(lambda: tags_in(Path(root)))
    check_resume(root, resume, tags)
    if world.first and tags and (reason := _named(Path(root))[1]):
        logger.warning("%s/%s is passed over: %s", root, LATEST, reason)
    for tag in tags:
        manifest, fault = _checked(Path(root) / tag, world)
        faults = [text for text in world.gather(fault) if text]
        if manifest is None or faults:
            logger.warning("%s/%s is passed over: %s", root, tag, faults[0])
            continue
        check_same(str(root), manifest.identity, identity)
        theirs = manifest.layout
        if theirs.zero_stage != layout.zero_stage:
            raise ConfigError(
                f"{root} was trained with zero.stage={theirs.zero_stage}, this run has {layout.zero_stage}: go on with "
                f"{theirs.zero_stage}, or start a new run from the exported model (model.pretrained)"
            )
        return FoundSave(tag, theirs.zero_stage > 0 and theirs.processes != layout.processes)
    if tags:
        raise CheckpointError(f"{root}: no checkpoint is whole; the newest is {tags[0]}")
    return None


def any_there(root: str | Path) -> bool:
    """Whether a folder holds a checkpoint, whole or not."""
    return bool(tags_in(Path(root)))


def check_resume(root: str | Path, resume: str, tags: list[str] | None = None) -> None:
    """Refuses to start afresh where a run must go on, and the other way round.

    Args:
        root: folder of checkpoints.
        resume: as in :func:`find`.
        tags: what is there; None looks.

    Raises:
        ConfigError: ``resume=must`` without a checkpoint, or ``never`` with one.
    """
    found = bool(tags_in(Path(root)) if tags is None else tags)
    if resume == "must" and not found:
        raise ConfigError(f"resume=must: {root} holds no checkpoint; resume=auto starts afresh")
    if resume == "never" and found:
        raise ConfigError(f"resume=never: {root} holds a checkpoint; choose another run_dir or resume=auto")


def load(engine: ZeroEngine, average: Average, root: str | Path, found: FoundSave, world: World) -> int:
    """Fills the engine and the average; returns the number of steps done. Every process must call it.

    Args:
        engine: started for a converted checkpoint when this one must be.
        average: of the engine's module.
        root: folder of checkpoints.
        found: which one.
        world: all processes.

    Raises:
        CheckpointError: it cannot be read.
    """
    tag = found.tag
    if found.convert:
        tag = f"{found.tag}{UNIVERSAL}"
        fault = to_universal(Path(root), found.tag, tag) if world.first else None
        faults = [text for text in world.gather(fault) if text]
        if faults:
            raise CheckpointError(f"{root}/{found.tag} could not be laid out for {world.size} processes: {faults[0]}")
    step = engine.load(root, tag)
    if step is None:
        raise CheckpointError(f"{root}/{found.tag} could not be loaded")
    average.restore(Path(root) / found.tag)
    world.wait()
    if found.convert and world.first:
        shutil.rmtree(Path(root) / tag)
        (Path(root) / "latest_universal").unlink(missing_ok=True)
    return step


def tags_in(root: Path) -> list[str]:
    """Names of published checkpoints, the one ``latest`` names first, then from the newest on."""
    names = sorted((path.name for path in root.glob("step*") if path.name[4:].isdecimal()), reverse=True)
    named, _ = _named(root)
    if named is not None and named in names:
        names.remove(named)
        names.insert(0, named)
    return names


def _named(root: Path) -> tuple[str | None, str | None]:
    """Which checkpoint ``latest`` names, and what is wrong with it."""
    return _read(root / LATEST, str.strip)


def _read(path: Path, parse: Callable[[str], T]) -> tuple[T | None, str | None]:
    """What a small file of text says, or what is wrong with it, whatever a disk or another version made of it."""
    try:
        return parse(path.read_text()), None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{path.name} is missing or broken ({type(error).__name__})"


def _checked(folder: Path, world: World) -> tuple[_Manifest | None, str | None]:
    """The manifest, and what is wrong; every process reads its share of the files, listed there or not."""
    manifest, fault = _read(folder / MANIFEST, _Manifest.parse)
    if manifest is None:
        return None, f"its {fault}"
    files = manifest.files
    for name in sorted(files)[world.rank :: world.size]:
        try:
            if fingerprint(folder / name) != files[name]:
                return manifest, f"{name} is not what was written"
        except OSError as error:
            return manifest, f"{name}: {error.strerror}"
    for path in sorted(folder.rglob("*.pt"))[world.rank :: world.size]:
        if names := foreign_names(path):
            return manifest, f"{path.name} is no file of this program, it would run {names[0]}"
    return manifest, None


def fingerprint(path: Path, flush: bool = False) -> dict[str, Any]:
    """Size and hash of a file, which ``flush`` first makes durable."""
    if flush:
        make_durable(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
