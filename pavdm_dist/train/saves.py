"""Checkpoints of a training run that cannot tear, and that another number of processes can go on from.

DeepSpeed names a checkpoint ``latest`` before it is complete, and writes no hashes. Here every process writes under a
temporary name; when all are done, a manifest with sizes and hashes is added, the folder gets its name in one rename,
and only then does ``latest`` point to it. A checkpoint that was damaged later is passed over for an older one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.storage import make_durable
from pavdm_dist.train.average import Average
from pavdm_dist.train.processes import World
from pavdm_dist.train.zero import ZeroEngine, foreign_names, to_universal

logger = logging.getLogger(__name__)

LATEST = "latest"
MANIFEST = "complete.json"
PARTIAL = ".partial"
UNIVERSAL = "-universal"


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
class Found:
    """The checkpoint to go on from.

    Attributes:
        tag: its name in the folder of checkpoints.
        convert: whether it must be laid out anew for this run's number of processes.
    """

    tag: str
    convert: bool


def save(
    engine: ZeroEngine,
    average: Average,
    root: str | Path,
    step: int,
    identity: Mapping[str, Any],
    layout: SaveLayout,
    world: World,
    keep_last: int = 2,
    keep_every: int = 0,
) -> None:
    """Writes checkpoint ``step``, publishes it, and drops old ones; every process must call it.

    Args:
        engine: the model and its optimizer.
        average: averaged weights.
        root: folder of checkpoints.
        step: number of optimizer steps done.
        identity: settings (parts of names and values) that :func:`find` insists on.
        layout: of this run.
        world: all processes.
        keep_last: how many stay.
        keep_every: those at multiples of it stay for good; 0 = none.
    """
    folder = Path(root)
    tag = f"step{step:07d}"
    partial = folder / f"{tag}{PARTIAL}"
    if world.first:
        shutil.rmtree(partial, ignore_errors=True)
    world.wait()
    engine.save(folder, partial.name, step)
    average.save(partial, world.rank, world.size)
    world.wait()
    files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    mine = {name: _fingerprint(partial / name, flush=True) for name in files[world.rank :: world.size]}
    hashes = {name: value for part in world.gather(mine) for name, value in part.items()}  # type: ignore[attr-defined]
    if world.first:
        manifest = {"step": step, "layout": asdict(layout), "identity": identity, "files": hashes}
        _publish(folder, tag, partial, manifest)
        _drop(folder, tag, keep_last, keep_every)
    world.wait()


def find(root: str | Path, identity: Mapping[str, Any], layout: SaveLayout, resume: str, world: World) -> Found | None:
    """The newest whole checkpoint that this run may go on from; every process must call it.

    Args:
        root: folder of checkpoints.
        identity: settings that must equal the checkpoint's.
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
    tags = [str(tag) for tag in world.gather(_tags(Path(root)) if world.first else None)[0]]  # type: ignore[attr-defined]
    check_resume(root, resume, tags)
    for tag in tags:
        manifest, fault = _checked(Path(root) / tag, world)
        faults = [text for text in world.gather(fault) if text]
        if manifest is None or faults:
            logger.warning("%s/%s is passed over: %s", root, tag, faults[0])
            continue
        _compare(str(root), manifest["identity"], identity)
        theirs = SaveLayout(**manifest["layout"])
        if theirs.zero_stage != layout.zero_stage:
            raise ConfigError(
                f"{root} was trained with zero.stage={theirs.zero_stage}, this run has {layout.zero_stage}: go on with "
                f"{theirs.zero_stage}, or start a new run from the exported model (model.pretrained)"
            )
        return Found(tag, theirs.zero_stage > 0 and theirs.processes != layout.processes)
    if tags:
        raise CheckpointError(f"{root}: no checkpoint is whole; the newest is {tags[0]}")
    return None


def any_there(root: str | Path) -> bool:
    """Whether a folder holds a checkpoint, whole or not."""
    return bool(_tags(Path(root)))


def check_resume(root: str | Path, resume: str, tags: list[str] | None = None) -> None:
    """Refuses to start afresh where a run must go on, and the other way round.

    Args:
        root: folder of checkpoints.
        resume: as in :func:`find`.
        tags: what is there; None looks.

    Raises:
        ConfigError: ``resume=must`` without a checkpoint, or ``never`` with one.
    """
    found = bool(_tags(Path(root)) if tags is None else tags)
    if resume == "must" and not found:
        raise ConfigError(f"resume=must: {root} holds no checkpoint; resume=auto starts afresh")
    if resume == "never" and found:
        raise ConfigError(f"resume=never: {root} holds a checkpoint; choose another run_dir or resume=auto")


def load(engine: ZeroEngine, average: Average, root: str | Path, found: Found, world: World) -> int:
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


def _tags(root: Path) -> list[str]:
    """Names of published checkpoints, the one ``latest`` names first, then from the newest on."""
    names = sorted((path.name for path in root.glob("step*") if path.name[4:].isdecimal()), reverse=True)
    pointer = root / LATEST
    if pointer.exists() and (named := pointer.read_text().strip()) in names:
        names.remove(named)
        names.insert(0, named)
    return names


def _checked(folder: Path, world: World) -> tuple[dict[str, Any] | None, str | None]:
    """The manifest, and what is wrong; every process reads its share of the files, listed there or not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return None, f"its {MANIFEST} is missing or broken ({type(error).__name__})"
    for name in sorted(files)[world.rank :: world.size]:
        try:
            if _fingerprint(folder / name) != files[name]:
                return manifest, f"{name} is not what was written"
        except OSError as error:
            return manifest, f"{name}: {error.strerror}"
    for path in sorted(folder.rglob("*.pt"))[world.rank :: world.size]:
        if names := foreign_names(path):
            return manifest, f"{path.name} is no file of this program, it would run {names[0]}"
    return manifest, None


def _compare(root: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for part, values in json.loads(json.dumps(ours)).items():
        for name, value in values.items():
            found = theirs.get(part, {}).get(name)
            if found != value:
                raise ConfigError(f"{root} was trained with {part}.{name}={found}, this run has {value}")


def _fingerprint(path: Path, flush: bool = False) -> dict[str, Any]:
    if flush:
        make_durable(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _publish(folder: Path, tag: str, partial: Path, manifest: dict[str, Any]) -> None:
    _write(partial / MANIFEST, json.dumps(manifest, indent=1))
    shutil.rmtree(folder / tag, ignore_errors=True)  # damaged, or it would not be written again
    os.replace(partial, folder / tag)
    _write(folder / f"{LATEST}{PARTIAL}", tag)
    os.replace(folder / f"{LATEST}{PARTIAL}", folder / LATEST)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    make_durable(path)


def _drop(folder: Path, newest: str, keep_last: int, keep_every: int) -> None:
    """Leaves ``keep_last`` checkpoints up to the newest, and those that are kept for good.

    Later ones were damaged and passed over: the run has taken another way since.
    """
    tags = sorted(_tags(folder), reverse=True, key=lambda tag: int(tag[4:]))
    abandoned = [tag for tag in tags if int(tag[4:]) > int(newest[4:])]
    old = [tag for tag in tags if tag not in abandoned][max(keep_last, 1) :]
    for tag in abandoned + [tag for tag in old if not keep_every or int(tag[4:]) % keep_every]:
        shutil.rmtree(folder / tag)
    for left in (*folder.glob(f"step*{PARTIAL}"), *folder.glob(f"step*{UNIVERSAL}")):
        shutil.rmtree(left)
