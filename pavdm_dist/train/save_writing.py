"""Writes checkpoints of a training run that cannot tear.

DeepSpeed names a checkpoint ``latest`` before it is complete, and writes no hashes. Here every process writes under a
temporary name; when all are done, a manifest with sizes and hashes is added, the folder gets its name in one rename,
and only then does ``latest`` point to it. Where one process cannot write, all of them end with the reason, and nothing
of the attempt is left.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pavdm_dist.errors import EngineError
from pavdm_dist.io.storage import disk_errors, make_durable
from pavdm_dist.train.average import FILE, Average
from pavdm_dist.train.ranks import World
from pavdm_dist.train.save_reading import LATEST, MANIFEST, UNIVERSAL, SaveLayout, fingerprint, tags_in
from pavdm_dist.train.zero import ZeroEngine, whole_shape

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
_UNFINISHED = re.compile(rf"step\d+({re.escape(PARTIAL)}|{UNIVERSAL})")
# Of a parameter in a checkpoint: itself, its master's two moments and its average, in float32.
_BYTES = 16
# How long a share may take to show one process what another wrote.
SHARED_S = 10.0
T = TypeVar("T")


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
        identity: settings (parts of names and values) that :func:`~pavdm_dist.train.save_reading.find` insists on.
        layout: of this run.
        world: all processes.
        keep_last: how many stay.
        keep_every: those at multiples of it stay for good; 0 = none.

    Raises:
        EngineError: a process cannot write its part, or the first one does not see another's.
    """
    folder, tag = Path(root), f"step{step:07d}"
    partial = folder / f"{tag}{PARTIAL}"

    def begin() -> None:
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        fault = engine.save(folder, partial.name, step)
        with disk_errors():
            average.save(partial, world.rank, world.size)
        if fault is not None:
            raise fault

    def publish() -> None:
        if world.first:
            manifest = {"step": step, "layout": asdict(layout), "identity": identity, "files": hashes}
            _publish(folder, tag, partial, manifest)

    size = _BYTES * sum(whole_shape(parameter).numel() for parameter in engine.module.parameters())
    attempt = _Attempt(partial, step, size, world)
    attempt.make(begin)
    attempt.make(write)
    files = _listed(partial, world)[world.rank :: world.size]
    mine = attempt.make(lambda: {name: fingerprint(partial / name, flush=True) for name in files})
    hashes = {name: value for part in world.gather(mine) for name, value in part.items()}  # type: ignore[attr-defined]
    attempt.make(publish)
    if world.first:
        _drop(folder, tag, keep_last, keep_every)
    world.wait()


class _Attempt:
    """The writing of one checkpoint.

    Args:
        partial: its folder.
        step: its number.
        size: about how many bytes it has.
        world: all processes.
    """

    def __init__(self, partial: Path, step: int, size: int, world: World) -> None:
        self._partial, self._step, self._size, self._world = partial, step, size, world

    def make(self, action: Callable[[], T]) -> T:
        """What ``action`` gives; every process must call it.

        Raises:
            EngineError: it failed on some process.
        """
        result: list[T] = []
        fault, reason = None, None
        try:
            result.append(action())
        except (OSError, RuntimeError) as error:  # torch's writer has no finer type for a full disk
            fault = error
            reason = getattr(error, "strerror", None) or self._refusal() or " ".join(str(error).split())
        reasons = self._world.faults(reason)
        if not reasons:
            return result[0]
        root = self._partial.parent
        kept = next((f"the last one, {tag}, is kept" for tag in tags_in(root)), "there is none before it")
        if self._world.first:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._world.wait()
        free = f", {shutil.disk_usage(root).free / 1e6:,.1f} MB are free" if root.exists() else ""
        raise EngineError(
            f"{root}: the checkpoint of step {self._step} cannot be written: {reasons[0]} (about"
            f" {self._size / 1e6:,.1f} MB are needed{free}); {kept}; make room and run again to go on"
        ) from fault

    def _refusal(self) -> str | None:
        """What the file system says of a file of this size: torch says that something was not as it expected."""
        try:
            with open(self._partial / "probe", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
        except OSError as error:
            return error.strerror
        return None


def _listed(partial: Path, world: World) -> list[str]:
    """The files of a checkpoint, as the first process sees them; every process must call it.

    Raises:
        EngineError: some process' are not among them.
    """
    names: list[str] = []
    fault = None
    if world.first:
        expected = [FILE.format(rank=rank, size=world.size) for rank in range(world.size)]
        end = time.monotonic() + SHARED_S
        while (lacking := [n for n, name in enumerate(expected) if not (partial / name).exists()]) and (
            time.monotonic() < end
        ):
            time.sleep(0.1)
        names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        fault = f"{partial} lacks the files of process {lacking[0]}" if lacking else None
    if faults := world.faults(fault):
        raise EngineError(f"{faults[0]}; run_dir must be a folder that all machines share, under the same path")
    return [str(name) for name in world.gather(names)[0]]  # type: ignore[attr-defined]


def _publish(folder: Path, tag: str, partial: Path, manifest: dict[str, Any]) -> None:
    _write(partial / MANIFEST, json.dumps(manifest, indent=1))
    shutil.rmtree(folder / tag, ignore_errors=True)  # damaged, or it would not be written again
    os.replace(partial, folder / tag)
    _write(folder / f"{LATEST}{PARTIAL}", tag)
    shutil.rmtree(folder / LATEST, ignore_errors=True)  # a folder cannot be replaced; a file stays
    os.replace(folder / f"{LATEST}{PARTIAL}", folder / LATEST)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    make_durable(path)


def _drop(folder: Path, newest: str, keep_last: int, keep_every: int) -> None:
    """Leaves ``keep_last`` checkpoints up to the newest, and those that are kept for good.

    Later ones were damaged and passed over: the run has taken another way since.
    """
    tags = sorted(tags_in(folder), reverse=True, key=lambda tag: int(tag[4:]))
    abandoned = [tag for tag in tags if int(tag[4:]) > int(newest[4:])]
    old = [tag for tag in tags if tag not in abandoned][max(keep_last, 1) :]
    for tag in abandoned + [tag for tag in old if not keep_every or int(tag[4:]) % keep_every]:
        _remove(folder / tag)
    clear_unfinished(folder)


def clear_unfinished(root: str | Path) -> None:
    """Removes what a run that was killed had not finished; no other run may be writing."""
    for left in Path(root).glob("step*"):
        if _UNFINISHED.fullmatch(left.name):
            _remove(left)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # a share may keep what somebody still reads; it goes the next time
        logger.warning("%s cannot be removed: %s", folder, error)
