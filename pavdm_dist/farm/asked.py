"""The manifests that a farm's folder keeps: all that was ever asked for there."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace

from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.shot import Shot, make_shot
from pavdm_dist.io.remote import is_remote
from pavdm_dist.io.storage import atomic_write, exists, join, list_names, open_read
from pavdm_dist.values.fields import json_value

logger = logging.getLogger(__name__)

_FOLDER, _PAST = "manifests", "manifests/past"
_NAME = re.compile(r"[^A-Za-z0-9._-]+")
# Of the shots that a manifest has no more, as many are named.
_TOLD = 5


class Asked:
    """Paths in a farm's folder, and what it keeps of manifests.

    Args:
        root: local, or a path of fsspec's.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") or "/"

    def path(self, name: str) -> str:
        return join(self.root, name)

    def folder(self, id: str) -> str:
        """Of a shot's files."""
        return f"{self.root}/shots/{id}"

    def manifest(self, name: str) -> str:
        """Where the shots of a manifest of this name are kept."""
        return self.path(f"{_FOLDER}/{_file_name(name)}")

    def shots(self, past: bool = True) -> Iterator[Shot]:
        """What was asked for, in the order of the manifests' names; of two with one id the first.

        Args:
            past: behind them those, too, that a manifest had once and has no more.

        Raises:
            ConfigError: a manifest is damaged.
        """
        known: set[str] = set()
        for folder in (_FOLDER, _PAST)[: 1 + past]:
            for name in list_names(self.path(folder)):
                if name.startswith(".") or not name.endswith(".jsonl"):  # still being written, or of some other program
                    continue
                for shot in self._read(self.path(f"{folder}/{name}")):
                    if shot.id not in known:
                        known.add(shot.id)
                        yield shot

    def shots_of(self, name: str) -> Iterator[Shot]:
        """The shots of one manifest that is kept here. Raises as :meth:`shots`."""
        return self._read(self.manifest(name))

    def keep(self, name: str, shots: Iterable[Shot], is_there: Callable[[str], bool] | None = None) -> int:
        """Writes a manifest of this folder in one move, when all of them have come; how many there are.

        Args:
            name: of the manifest.
            shots: all of it.
            is_there: whether there is something of a shot of this id. Such shots that the manifest had until now, and
                has no more, are kept beside it, and told of; None = of none.

        Raises:
            OSError: it cannot be written.
            PAVDMError: what ``shots`` raises; then nothing is changed.
        """
        count, ids = 0, set[str]()
        with atomic_write(self.manifest(name), "w") as file:
            for shot in shots:
                file.write(self._closed(shot).to_line() + "\n")
                count += 1
                if is_there is not None:
                    ids.add(shot.id)
            if is_there is not None:
                self._keep_past(name, ids, is_there)
        return count

    def _keep_past(self, name: str, ids: Container[str], is_there: Callable[[str], bool]) -> None:
        """Of a manifest that is about to have these shots alone, keeps others of which there is something."""
        now, past = self.manifest(name), self.path(f"{_PAST}/{_file_name(name)}")
        try:
            before = self._read(now) if exists(now) else ()
            lost = {shot.id: shot for shot in before if shot.id not in ids and is_there(shot.id)}
            kept = {shot.id: shot for shot in self._read(past)} if exists(past) else {}
        except ConfigError as error:
            logger.warning("%s; what it alone asks for is forgotten", error)
            return
        # Those that are back are none of the past, nor are those of which nothing was ever made.
        still = {id: shot for id, shot in kept.items() if id not in ids and is_there(id)}
        if not lost and len(still) == len(kept):
            return
        with atomic_write(past, "w") as file:
            file.writelines(self._closed(shot).to_line() + "\n" for shot in (still | lost).values())
        if not lost:
            return
        named = ", ".join(list(lost)[:_TOLD]) + (f" and {len(lost) - _TOLD} more" if len(lost) > _TOLD else "")
        said = "%s: %d shots of before are no longer in the manifest, and stay in status and report as they are: %s"
        logger.warning(said, now, len(lost), named)

    def _read(self, path: str) -> Iterator[Shot]:
        with open_read(path) as file:
            for number, line in enumerate(file, 1):
                where = f"{path} line {number}"
                try:
                    yield self._opened(make_shot(json_value(line), where))
                except ValueError as error:
                    raise ConfigError(f"{where}: {error}") from error

    def _closed(self, shot: Shot) -> Shot:
        """A shot as it is kept: what lies in its own folder by its name alone, so that the tree may be moved."""
        own = f"{self.folder(shot.id)}/"
        return _begun_with(shot, lambda path: path.removeprefix(own))

    def _opened(self, shot: Shot) -> Shot:
        """A kept shot with the places of what it begins with."""
        folder = self.folder(shot.id)
        return _begun_with(shot, lambda path: path if is_remote(path) or os.path.isabs(path) else join(folder, path))


def _file_name(manifest: str) -> str:
    stem = manifest.rsplit("/", 1)[-1].rpartition(".")[0] or manifest
    return f"{_NAME.sub('-', stem)}.jsonl"


def _begun_with(shot: Shot, place: Callable[[str], str]) -> Shot:
    """A shot whose clip or picture lies where ``place`` says."""
    if shot.video is None and shot.image is None:
        return shot
    video, image = (None if path is None else place(path) for path in (shot.video, shot.image))
    return replace(shot, video=video, image=image)
