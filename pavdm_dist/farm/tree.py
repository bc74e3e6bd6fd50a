"""The folder of a farm's outputs, which is its only record: what became of a shot follows from its files alone.

    farm.json               settings of the newest run, versions
    manifests/NAME.jsonl    the shots that were asked for, one file a manifest (:mod:`pavdm_dist.farm.asked`); in
                            ``past/`` those that it has no more, though something of them is there
    shots/ID/video.mp4      with video.json, the sidecar, written last: sidecar there = shot complete
    shots/ID/video.mp4.parts/   of an unfinished one: segments, state, the lock of who renders it
    shots/ID/failed.json    why it failed; nobody begins it until that is removed (``pavdm farm retry``)
    shots/ID/skip, cancel   markers, of any content: not to be begun; and, of ``cancel``, to be ended where it is
    failed.jsonl            the failed shots, as a manifest
    traces/                 where asked for: when each stage computed what (:mod:`pavdm_dist.farm.traces`)
    drain                   marker: all farms on this folder finish their chunks, save and end

Local, or in any store of fsspec's. Nothing is ever renamed or moved between shots, so that any number of farms may work
in one folder: a shot is theirs whose lock is in its parts.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.farm.asked import Asked
from pavdm_dist.farm.settings import of_videos
from pavdm_dist.io import processes
from pavdm_dist.io.local_disk import check_place
from pavdm_dist.io.lockfile import Seen, read_lock
from pavdm_dist.io.metadata import read_sidecar, sidecar_path
from pavdm_dist.io.parts import LOCK_NAME, PARTS_SUFFIX, holds_work, parts_folder
from pavdm_dist.io.remote import check_store, filesystem, is_remote
from pavdm_dist.io.segments import ENTRY, PLAYLIST
from pavdm_dist.io.storage import atomic_write, exists, join, list_names, open_read, remove
from pavdm_dist.values.fields import json_value, made

VIDEO, SIDECAR, FAILED = "video.mp4", "video.json", "failed.json"
SKIP, CANCEL, DRAIN = "skip", "cancel", "drain"
# Of frames, pixels or seconds in a sidecar, a number as large as this is damage.
_MOST = 1e15
_HEAD = "ffconcat version 1.0\n"  # of a playlist

logger = logging.getLogger(__name__)

Standing = Literal["queued", "running", "begun", "done", "failed", "skipped", "cancelled"]


@dataclass(frozen=True)
class Failure:
    """Why a shot will not be rendered, as ``failed.json`` has it.

    Attributes:
        error: in one sentence.
        kind: ``input`` (what was asked for), ``video`` (what was computed), ``lost`` (too many renderers were),
            ``stalled``, ``storage``, or ``unfit`` (begun otherwise: of a server alone, and in no file).
        attempts: how often the farm that gave it up began it without getting further.
        by: the process.
        at: seconds since 1970.
        log: the last lines that were logged of it.
        shot: the line of the manifest.
        settings: that it would have been rendered with (:func:`~pavdm_dist.farm.settings.of_videos`); empty where that
            is not known, as in records of earlier versions.
    """

    error: str
    kind: str = "video"
    attempts: int = 1
    by: str = field(default_factory=lambda: f"process {os.getpid()} on {platform.node()}")
    at: float = field(default_factory=lambda: round(time.time(), 3))
    log: tuple[str, ...] = ()
    shot: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What a shot's files say of it.

    Attributes:
        standing: ``begun`` is unfinished with nobody at it.
        by: who renders it; a process on another machine is taken at its lock's word.
        failure: of a failed one.
    """

    standing: Standing
    by: str = ""
    failure: Failure | None = None


class Tree(Asked):
    """Paths, manifests and states in a folder.

    Args:
        root: local, or a path of fsspec's.

    Raises:
        ConfigError: it is a file, or no name at all.
    """

    def __init__(self, root: str) -> None:
        if not root:
            raise ConfigError("out='': is no folder; name one, or . for the one that you are in")
        super().__init__(root)
        self._settings: dict[str, Any] = {}  # of the run that this object is for
        if not is_remote(root) and os.path.lexists(root) and not os.path.isdir(root):
            raise ConfigError(f"out={root}: is a file; name a folder")

    def output(self, id: str) -> str:
        """The mp4 that a shot becomes."""
        return join(self.folder(id), VIDEO)

    def without_places(self, id: str, text: str) -> str:
        """What is said of a shot without saying where its files are, for who need not know."""
        return text.replace(f"{self.folder(id)}/", "").replace(f"{self.root}/", "")

    def check_writable(self, traces: bool) -> None:
        """Refuses a folder where what a run is asked for cannot be written; changes nothing.

        What is only looked at is left out in such a case: logs, the list of failed shots. Of an object store nothing
        more is known until it is written.

        Args:
            traces: whether they are asked for.

        Raises:
            ConfigError: naming what is in the way.
        """
        if is_remote(self.root):
            check_store(self.root, "out")
        else:
            for name in ("farm.json", "manifests/~.jsonl", f"shots/~/{VIDEO}", *["traces/~.json"] * traces):
                check_place(Path(self.path(name)), "out")

    def try_room(self, size: int) -> None:
        """Takes so many bytes beside the shots, and gives them back; in a store, which has room, it writes a few.

        Raises:
            OSError: there is no room for them, or the folder is away; or what stores raise.
        """
        name = f".room-{platform.node()}-{os.getpid()}"
        if is_remote(self.root):
            with atomic_write(self.path(name), "wb") as file:
                file.write(b"room")
            return remove(self.path(name))
        path = Path(self.path(f"shots/{name}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        finally:
            path.unlink(missing_ok=True)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Keeps what a run was given: ``settings``, and more. Shots that fail from now on have failed with these."""
        self._settings = of_videos(settings["settings"])
        with atomic_write(self.path("farm.json"), "w") as file:
            json.dump(settings, file, indent=2, ensure_ascii=False)

    # --- what has become of it -------------------------------------------------------------------------------

    def scan(self) -> dict[str, frozenset[str]]:
        """Names of the files of every shot that has any, by id: one listing, whatever the number of shots."""
        folder = self.path("shots")
        alike: dict[frozenset[str], frozenset[str]] = {}  # most shots have the same names: one set is all of theirs
        if is_remote(folder):
            fs, inner = filesystem(folder)
            found: dict[str, set[str]] = {}
            for path in fs.find(inner) if fs.exists(inner) else ():
                id, _, rest = str(path)[len(inner.rstrip("/")) + 1 :].partition("/")
                found.setdefault(id, set()).add(rest.partition("/")[0])
            whole = ((id, frozenset(names)) for id, names in found.items())
            return {id: alike.setdefault(names, names) for id, names in whole}
        if not os.path.isdir(folder):
            return {}
        with os.scandir(folder) as entries:
            ids = [entry.name for entry in entries if entry.is_dir()]
        there = {}
        for id in ids:
            with suppress(FileNotFoundError):
                names = frozenset(os.listdir(f"{folder}/{id}"))
                there[id] = alike.setdefault(names, names)
        return there

    def state(self, id: str, names: frozenset[str] | None = None) -> State:
        """What a shot's files say; reads few of them.

        Args:
            id: of the shot.
            names: of its files, where :meth:`scan` has told them.
        """
        if names is None:
            names = frozenset(list_names(self.folder(id)))
        if SIDECAR in names:
            return State("done")
        holder = self.holder(id) if VIDEO + PARTS_SUFFIX in names else None
        if holder is not None:
            return State("running", by=holder)
        if FAILED in names:
            return State("failed", failure=self.failure(id))
        if CANCEL in names or SKIP in names:
            return State("cancelled" if CANCEL in names else "skipped")
        begun = VIDEO + PARTS_SUFFIX in names and holds_work(parts_folder(self.output(id)))
        return State("begun" if begun else "queued")

    def holder(self, id: str) -> str | None:
        """Who renders a shot, by its lock; None where nobody does, as far as can be seen from here."""
        found = self.lock(id)
        if found is None:
            return None
        owner = found.owner
        if owner is not None and owner.machine == processes.machine():
            return str(owner) if processes.is_alive(owner.pid, owner.started) else None
        return found.who

    def lock(self, id: str) -> Seen | None:
        """A shot's lock as it is now."""
        try:
            return read_lock(join(parts_folder(self.output(id)), LOCK_NAME))
        except OSError:
            return None

    def sidecar(self, id: str) -> dict[str, Any] | None:
        """Of a complete shot, with length, rate, size and what its chunks took; None where there is none, or it is none
        of this program's, or damaged."""
        try:
            found = read_sidecar(self.output(id))
        except (MediaError, OSError):
            return None
        if not isinstance(found, dict):
            return None
        facts: list[Any] = [found.get(name) for name in ("num_frames", "fps", "width", "height")]
        took = found.get("chunk_seconds") or []
        is_whole = (
            all(isinstance(found.get(name) or {}, dict) for name in ("versions", "config"))
            and "pavdm_dist" in (found.get("versions") or {})
            and all(_is_number(fact) and fact > 0 for fact in facts)
            and isinstance(took, list)
            and all(_is_number(seconds) and seconds >= 0 for seconds in took)
        )
        return found if is_whole else None

    def seconds_rendered(self, id: str) -> float:
        """Seconds of an unfinished shot's video that are closed and playable; 0 where its playlist is damaged."""
        path = join(parts_folder(self.output(id)), PLAYLIST)
        try:
            with open_read(path) as file:
                return _seconds(file.read().decode("ascii"))
        except OSError:
            return 0.0
        except ValueError as error:
            logger.warning("%s: is damaged (%s); what it lists counts as 0 s", path, error)
            return 0.0

    # --- marks -------------------------------------------------------------------------------------------------

    def fail(self, id: str, failure: Failure) -> None:
        """Says that a shot will not be rendered, and why."""
        with atomic_write(join(self.folder(id), FAILED), "w") as file:
            json.dump(asdict(replace(failure, settings=self._settings)), file, indent=2, ensure_ascii=False)

    def failure(self, id: str) -> Failure:
        """Why a shot failed; what cannot be read says so."""
        path = join(self.folder(id), FAILED)
        try:
            with open_read(path) as file:
                return made(Failure, json_value(file.read()), path, ignore_unknown=True)
        except (OSError, ValueError) as error:
            return Failure(f"{path} cannot be read: {error}")

    def forget_failure(self, id: str) -> None:
        """Lets a failed shot be begun again."""
        remove(join(self.folder(id), FAILED))

    def mark(self, id: str, marker: Literal["skip", "cancel"], why: str = "") -> None:
        """Keeps a shot from being begun; with ``cancel`` whoever renders it ends it, too. ``why`` is what it holds."""
        with atomic_write(join(self.folder(id), marker), "w") as file:
            file.write(why)

    def unmark(self, id: str) -> None:
        """Takes such marks away."""
        for marker in (SKIP, CANCEL):
            remove(join(self.folder(id), marker))

    def is_marked(self, id: str, *markers: str) -> bool:
        return any(exists(join(self.folder(id), marker)) for marker in markers)

    def is_done(self, id: str) -> bool:
        return exists(sidecar_path(self.output(id)))

    @property
    def drains(self) -> bool:
        """Whether all farms here are to end."""
        return exists(self.path(DRAIN))


def _seconds(playlist: str) -> float:
    """Seconds of all segments that a playlist lists.

    Raises:
        ValueError: it holds something else.
    """
    if ENTRY.sub("", playlist) != _HEAD:
        raise ValueError("not what this program writes")
    lengths = [float(entry[5]) for entry in ENTRY.finditer(playlist)]
    if not all(_is_number(length) and length >= 0 for length in lengths):
        raise ValueError("a length that is none")
    return sum(lengths)


def _is_number(value: Any) -> bool:
    """Whether it is one that a record may hold; NaN is none."""
    return type(value) in (int, float) and abs(value) < _MOST
