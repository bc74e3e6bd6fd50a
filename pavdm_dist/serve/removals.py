"""What clients have deleted: its files go as soon as nobody writes them, whatever ends the server meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from pavdm_dist.farm.tree import CANCEL, Tree
from pavdm_dist.io.lock import Watch
from pavdm_dist.io.metadata import sidecar_path
from pavdm_dist.io.storage import join, list_names, open_read, remove
from pavdm_dist.serve.asked import REQUEST, created_at, manifests_of

logger = logging.getLogger(__name__)

# In the marker: what is cancelled by hand keeps its files.
_DELETED = "deleted"
# The file that comes first is followed by the manifest in less than that, whatever the clocks of machines show.
_ORPHAN_S = 86_400.0


class Removals:
    """Removes deleted videos. Called from any thread, and waits for nobody.

    Args:
        tree: of their files.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree, self._turn = tree, threading.Lock()
        self._left: dict[str, Watch] = {}  # with what was seen of each one's lock so far
        self._busy: set[str] = set()  # that a thread is at

    def mark(self, id: str) -> None:
        """Says that a video is deleted: whatever happens behind that, nobody begins it, and its files go.

        Raises:
            OSError: it cannot be written.
        """
        self._tree.mark(id, "cancel", _DELETED)

    def clear(self, id: str) -> bool:
        """Removes all files of a marked video but its mark, which others may have yet to see; and its manifest.

        Returns:
            Whether they are gone; if somebody is writing still, or they cannot be removed, :meth:`sweep` tries again.
            No where another thread is at them in this moment: nobody waits for what a store takes to answer.
        """
        with self._turn:
            watch = self._left.setdefault(id, Watch())
            if id in self._busy:
                return False
            self._busy.add(id)
        cleared = False
        try:
            if watch.is_free(self._tree.output(id)):
                self._remove(id)
                cleared = True
        except Exception as error:  # stores that are away have errors of kinds of their own
            logger.warning("%s is deleted, and its files cannot be removed yet: %s", id, error)
        finally:
            with self._turn:
                self._busy.discard(id)
                if cleared:
                    self._left.pop(id, None)
        return cleared

    def sweep(self) -> list[str]:
        """Tries again what could not be removed; ids of what is gone now."""
        with self._turn:
            left = sorted(self._left)
        return [id for id in left if self.clear(id)]

    def finish(self, there: Mapping[str, frozenset[str]], known: Mapping[str, object]) -> None:
        """Removes what a server has left that was killed: of deleted videos, and of requests that it promised nothing.

        Args:
            there: names of all files, by id, as they were before manifests were read.
            known: by id, what manifests ask for.
        """
        for id, names in there.items():
            if CANCEL in names:
                if len(names) > 1 and self.is_deleted(id):
                    self.clear(id)
            elif REQUEST in names and id not in known and self._is_old(id):
                with suppress(OSError):
                    remove(self._tree.folder(id))

    def _remove(self, id: str) -> None:
        folder, output = self._tree.folder(id), self._tree.output(id)
        remove(sidecar_path(output))  # it says that the video is complete
        for name in manifests_of(self._tree, id):
            remove(self._tree.manifest(name))
        for name in list_names(folder):
            if name != CANCEL:
                remove(join(folder, name))

    def is_deleted(self, id: str) -> bool:
        """Whether a client has deleted it; what was cancelled by hand, as farms are told to, is not.

        No where the mark cannot be read: the next start of a server looks again.
        """
        try:
            with open_read(join(self._tree.folder(id), CANCEL)) as file:
                return file.read(64).strip() == _DELETED.encode()
        except FileNotFoundError:
            return False
        except Exception as error:  # stores that are away have errors of kinds of their own
            logger.warning("%s: whether it is deleted cannot be read: %s: %s", id, type(error).__name__, error)
            return False

    def _is_old(self, id: str) -> bool:
        asked_at = created_at(self._tree, id)
        return asked_at is not None and time.time() - asked_at > _ORPHAN_S
