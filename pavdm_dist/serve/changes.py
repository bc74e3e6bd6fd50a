"""Prompts that were changed in mid-video: a video's state has them from its next chunk on, until then a file has."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence

from pavdm_dist.errors import PAVDMError
from pavdm_dist.farm.tree import CANCEL, Tree
from pavdm_dist.io.storage import atomic_write, join, open_read, remove
from pavdm_dist.values.fields import json_value

logger = logging.getLogger(__name__)

# In a video's folder: all changes that were taken, in their order.
PROMPTS = "prompts.json"

# ``(from_chunk, prompt)`` as it was asked for; and ``(first chunk, prompt)`` as it came.
Change = tuple[int, str]


class Changes:
    """Of the videos that are being rendered here. Called from any thread.

    Args:
        tree: of their files.
        set_prompt: tells a video's renderer (:meth:`pavdm_dist.farm.pool.Pool.set_prompt`).
    """

    def __init__(self, tree: Tree, set_prompt: Callable[[str, int, str], bool]) -> None:
        self._tree, self._set_prompt, self._turn = tree, set_prompt, threading.Lock()
        self._taken: dict[str, list[Change]] = {}
        self._again: set[str] = set()  # that have given nothing since they were begun

    def begun(self, id: str) -> None:
        """It is rendered from now on; what was taken before may have been lost with its renderer."""
        found = self._read(id)
        with self._turn:
            self._taken[id] = found
            if found:
                self._again.add(id)

    def take(self, id: str, from_chunk: int, text: str) -> None:
        """Keeps a change that its renderer was told of: once this returns, no end of this process loses it.

        Raises:
            OSError: it cannot be written.
        """
        path = self._path(id)
        with self._turn:
            taken = [*(self._taken[id] if id in self._taken else self._read(id)), (from_chunk, text)]
            with atomic_write(path, "w") as file:
                json.dump(taken, file, ensure_ascii=False)
            if id in self._taken:
                self._taken[id] = taken
        if self._tree.is_marked(id, CANCEL):  # its files may be gone already
            remove(path)

    def pending(self, id: str, came: Sequence[Change]) -> list[Change]:
        """What was taken and is not in force yet, where its state has those that ``came``."""
        return _pending(self._taken.get(id, []), came)

    def grew(self, id: str, came: Sequence[Change]) -> None:
        """A chunk of it is written, with its state. What that does not know is told to its renderer again."""
        with self._turn:
            is_first = id in self._again
            self._again.discard(id)
            taken = self._taken.get(id, [])
        if is_first and (left := _pending(taken, came)):
            # With those behind it, too: the last one is to be in force. A text may take an encoder long.
            again = taken[taken.index(left[0]) :]
            threading.Thread(target=self._tell, args=(id, again), name="pavdm-prompts", daemon=True).start()

    def ended(self, id: str, done: bool) -> None:
        """It is not rendered here any more; of a complete one the sidecar says what its prompts were."""
        with self._turn:
            self._taken.pop(id, None)
            self._again.discard(id)
        if done:
            try:
                remove(self._path(id))
            except Exception as error:  # stores that are away have errors of kinds of their own
                logger.warning("%s: cannot be removed: %s", self._path(id), error)

    def _tell(self, id: str, changes: Sequence[Change]) -> None:
        try:
            for from_chunk, text in changes:
                self._set_prompt(id, from_chunk, text)
        except PAVDMError as error:  # it may be over by now
            logger.warning("shot %s: a changed prompt cannot be given again: %s", id, error, extra={"shot": id})

    def _read(self, id: str) -> list[Change]:
        try:
            with open_read(self._path(id)) as file:
                return [(int(chunk), str(text)) for chunk, text in json_value(file.read())]
        except FileNotFoundError:
            return []
        except Exception as error:  # damaged, or in a store that is away
            logger.warning("%s cannot be read, its prompts are as they were: %s", self._path(id), error)
            return []

    def _path(self, id: str) -> str:
        return join(self._tree.folder(id), PROMPTS)


def _pending(taken: Sequence[Change], came: Sequence[Change]) -> list[Change]:
    left = list(taken)
    for chunk, text in came:
        found = next((change for change in left if change[1] == text and change[0] <= chunk), None)
        if found is not None:
            left.remove(found)
    return left
