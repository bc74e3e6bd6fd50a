"""From a manifest, which may grow while it is rendered, to the shots that are still to be made."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.begun import check_as_before, check_unchanged
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.manifest import checked, read_shots
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import FAILED, SIDECAR, VIDEO, Tree
from pavdm_dist.io import processes
from pavdm_dist.io.leftovers import remove_parts
from pavdm_dist.io.lock import Watch
from pavdm_dist.io.parts import PARTS_SUFFIX
from pavdm_dist.io.remote import filesystem, is_remote
from pavdm_dist.io.storage import list_names

logger = logging.getLogger(__name__)

# Of lines that have changed, as many are named.
_TOLD = 5
# Letters of a manifest's name that its copy has, too: with what is put behind them, and in front while it is written,
# they must be a name that every file system holds.
_STEM = 100


@dataclass
class Found:
    """What a look at a manifest found.

    Attributes:
        left: shots to render, in the manifest's order.
        done, failed: shots that are complete, or have failed, already.
        frames_done, frames_left: new frames of the complete ones and of those that are left.
    """

    left: list[Shot]
    done: int = 0
    failed: int = 0
    frames_done: int = 0
    frames_left: int = 0


class Intake:
    """Shots that were asked for, and have not been given out by this object.

    Args:
        manifest: a file; None = all manifests that the tree keeps.
        tree: where they are kept, and what has become of them.
        kinds: what is asked of them besides.
        only: ids, of all others nothing is wanted, and these are tried again where they have failed; None = all.
    """

    def __init__(self, manifest: str | None, tree: Tree, kinds: Kinds, only: Collection[str] | None = None) -> None:
        self._manifest, self._tree, self._kinds, self._only = manifest, tree, kinds, only
        self._name = ""
        self._watch = Watch()
        self._known: dict[str, bytes] = {}  # what was said of each shot when it was taken in
        self._newest: Collection[str] = ()  # of these, what the last look found
        self._changed: list[str] = []  # lines that are not what was taken in, as they were told of last
        self._stamp: object = None  # of what was taken in
        self._looked_at: object = None  # at the last look, whatever came of it

    def first(self) -> Found:
        """All of it, checked as a whole; kept in the tree.

        Raises:
            ManifestError: lines that cannot be used, by number; or a shot that was made, or begun, otherwise.
            ConfigError: it cannot be read, or nothing is asked for.
        """
        self._stamp = self._looked_at = self._seen()
        self._name = "" if self._manifest is None else _kept_as(self._manifest, self._tree)
        found = self._sorted(None)
        self._newest = ()  # nothing of it is put back
        if not self._known:
            raise ConfigError(f"out={self._tree.root}: keeps no manifest; name one")
        return found

    def more(self) -> Found | None:
        """Lines that have come since; None where there are none.

        A line counts from its line break on: until then somebody may be writing it.

        Raises:
            ManifestError: as :meth:`first`; nothing of what is new is taken in, and the next look sees it all again.
            Exception: whatever a store says that is away; likewise.
        """
        self._newest = ()
        self._looked_at = stamp = self._seen()
        if stamp == self._stamp:
            return None
        found = self._sorted(self._known)
        self._stamp = stamp
        return found if found.left or found.done or found.failed else None

    @property
    def has_changed(self) -> bool:
        """Whether the manifest is another one than at the last look, whatever came of that."""
        return self._seen() != self._looked_at

    def put_back(self) -> None:
        """Lets the next look find again what the last one found."""
        for id in self._newest:
            del self._known[id]
        self._newest, self._stamp = (), object()

    def forget_failures(self, shots: Iterable[Shot]) -> None:
        """Removes the records of failures of shots that are tried again from now on.

        Raises:
            OSError: one cannot be removed.
        """
        if self._only is not None:
            for shot in shots:
                self._tree.forget_failure(shot.id)

    def _shots(
        self, there: Mapping[str, frozenset[str]], growing: Container[str] | None, frames: dict[str, int]
    ) -> Iterator[Shot]:
        """All shots, once every one is checked; ``frames`` gets the length of each new one, which takes its settings:
        those of many kinds would have to be settled a second time."""

        def check(shot: Shot) -> None:
            self._kinds.check(shot)
            names = there.get(shot.id, frozenset())
            if shot.id not in self._known:
                frames[shot.id] = self._kinds.frames(shot)
                check_as_before(shot, names, self._tree, self._kinds, retried=self._only is not None)
            elif SIDECAR in names:
                check_unchanged(shot, self._tree, self._kinds)

        if self._manifest is not None:
            shots = self._as_taken(checked(self._manifest, check, growing))
            self._tree.keep(self._name, shots, lambda id: id in there or id in self._known)
            yield from self._tree.shots_of(self._name)
            return
        for shot in self._tree.shots(past=self._only is not None):
            if self._only is None or shot.id in self._only:
                check(shot)
                yield shot

    def _as_taken(self, shots: Iterator[Shot]) -> Iterator[Shot]:
        """Shots as they were taken in: what changes of them while they are rendered would be in no video."""
        before: dict[str, Shot] = {}
        changed = []
        for shot in shots:
            if self._known.get(shot.id, _said(shot)) != _said(shot):
                changed.append(shot.id)
                before = before or {one.id: one for one in self._tree.shots_of(self._name)}
                shot = before.get(shot.id, shot)
            yield shot
        if changed and changed != self._changed:
            self._changed = changed
            more = f" and {len(changed) - _TOLD} more" if len(changed) > _TOLD else ""
            said = "manifest=%s: id=%s%s: changed after it was taken in, and is rendered as it was; give it another id"
            logger.warning(said, self._manifest, ", ".join(changed[:_TOLD]), more)

    def _sorted(self, growing: Container[str] | None) -> Found:
        there, found, lengths = self._tree.scan(), Found([]), dict[str, int]()
        new = [shot for shot in self._shots(there, growing, lengths) if shot.id not in self._known]
        for shot in new:
            names = there.get(shot.id, frozenset())
            # Another farm may have kept, in this moment, a manifest that has grown since it was read here.
            frames = lengths[shot.id] if shot.id in lengths else self._kinds.frames(shot)
            if SIDECAR in names:
                if VIDEO + PARTS_SUFFIX in names:
                    self._tidy(shot.id)
                found.done, found.frames_done = found.done + 1, found.frames_done + frames
            elif FAILED in names and self._only is None:
                found.failed += 1
            else:
                found.left.append(shot)
                found.frames_left += frames
        taken = {shot.id: _said(shot) for shot in new}
        self._known |= taken
        self._newest = taken.keys()
        return found

    def _tidy(self, id: str) -> None:
        """Removes what a process has left of a complete shot that died between its sidecar and its end."""
        output = self._tree.output(id)
        try:
            if self._watch.is_free(output):
                remove_parts(output)
        except (ConfigError, OSError) as error:  # the shot is complete all the same
            logger.warning("%s: what is left of its parts cannot be removed: %s", output, error)

    def _seen(self) -> object:
        """What changes when the manifest does."""
        path = self._manifest
        if path is None:
            return None
        try:
            if is_remote(path):
                fs, inner = filesystem(path)
                facts = fs.info(inner)
                return {name: str(facts[name]) for name in ("size", "mtime", "ETag", "LastModified") if name in facts}
            found = os.stat(path)
            return found.st_size, found.st_mtime_ns, found.st_ino
        except (OSError, ConfigError):
            return None


def _said(shot: Shot) -> bytes:
    return hashlib.sha256(shot.to_line().encode()).digest()[:8]


def _kept_as(manifest: str, tree: Tree) -> str:
    """The name of a manifest's copy in a tree: manifests of several folders, and machines, may well be called the same.

    A path of this machine may name another file elsewhere, or the same one on a share. It is taken for the same where a
    copy from elsewhere has a shot in common with it.

    Raises:
        ConfigError: the manifest, or a copy, cannot be read.
    """
    whole = manifest if is_remote(manifest) else os.path.realpath(manifest)
    # A file that begins with a dot is one that nobody looks for.
    stem = f"{whole.rpartition('/')[2].rpartition('.')[0].lstrip('.')[:_STEM]}-{_digits(whole, 6)}"
    if is_remote(manifest):
        return f"{stem}.jsonl"
    own = PurePath(tree.manifest(f"{stem}-{_digits(processes.machine(), 4)}.jsonl")).name
    alike = PurePath(tree.manifest(f"{stem}.jsonl")).stem
    there = [name for name in list_names(tree.path("manifests")) if name.startswith(alike) and name.endswith(".jsonl")]
    if not there or own in there:
        return own
    ids = {shot.id for _, shot in read_shots(manifest) if isinstance(shot, Shot)}
    return next((name for name in there if any(shot.id in ids for shot in tree.shots_of(name))), own)


def _digits(text: str, count: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:count]
