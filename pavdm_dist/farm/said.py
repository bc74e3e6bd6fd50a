"""What is said of the shots of a pool in its log, and the record of each that has failed."""

from __future__ import annotations

import logging
import threading

from pavdm_dist.farm.desk import Ended
from pavdm_dist.farm.logs import ShotLog
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import CANCEL, Failure, Tree

logger = logging.getLogger(__name__)

_WORDS = {
    "done": "done",
    "failed": "failed",
    "again": "to be begun again",
    "aside": "another process has it",
    "cancelled": "cancelled",
    "saved": "saved, to go on later",
    "unfit": "left as it was begun",
}
_UNSAVED = "not saved, goes on later from its state before"
# Failures that say nothing of the shot itself, which has a record already, or is complete.
_NOT_ITS_OWN = ("elsewhere", "otherwise")
_ELSEWHERE = {"done": "is complete already", "failed": "had failed"}


class Said:
    """Called from threads of renderers.

    Args:
        tree: gets the records.
        log: keeps the last lines of every shot.
    """

    def __init__(self, tree: Tree, log: ShotLog) -> None:
        self._tree, self._log = tree, log
        self._turn = threading.Lock()
        self._unwritten: dict[str, Failure] = {}
        self._left: dict[str, Failure] = {}  # of this process alone: others may go on with these

    def unwritten(self, id: str) -> Failure | None:
        """Why a shot has failed whose record could not be written yet, or gets none, so that its files do not say
        so."""
        return self._unwritten.get(id) or self._left.get(id)

    def sweep(self) -> None:
        """Tries again to write the records that could not be; of what was cancelled meanwhile none is wanted."""
        with self._turn:
            left = dict(self._unwritten)
        for id, failure in left.items():
            try:
                if not self._tree.is_marked(id, CANCEL):
                    self._tree.fail(id, failure)
                if self._tree.is_marked(id, CANCEL):  # in this moment, and its files may be gone already
                    self._tree.forget_failure(id)
            except Exception:  # as in _fail, where it was told of; the others could not be written either
                return
            with self._turn:
                del self._unwritten[id]

    def taken(self, renderer: str, shot: Shot) -> None:
        """What the renderer says from now on is of this shot, too."""
        self._log.begun(renderer, shot.id)

    def begun(self, renderer: str, shot: Shot, chunk: int, attempts: int, video: int) -> None:
        """It is rendered from ``chunk`` on, after so many attempts that came no further; ``video`` is its number in the
        renderer's run, by which the engine calls it."""
        self._log.numbered(renderer, video, shot.id)
        where = f" at chunk {chunk}" if chunk else ""
        again = f", attempt {attempts + 1}" if attempts else ""
        self._tell(logging.INFO, renderer, shot, f"begun on {renderer}{where}{again}")

    def ended(self, renderer: str, shot: Shot, ended: Ended, attempts: int) -> None:
        """It is not the renderer's any more. ``attempts``: how often it was begun without getting further."""
        try:
            if ended.how != "aside":
                said = f": {ended.error}" if ended.error else ""
                level = logging.WARNING if ended.how in ("failed", "again", "unfit") else logging.INFO
                words = (_ELSEWHERE if ended.kind == "elsewhere" else _WORDS)[ended.how]
                if ended.how == "saved" and ended.error:
                    level, words = logging.ERROR, _UNSAVED
                self._tell(level, renderer, shot, f"{words}{said}")
            self._log.ended(renderer, shot.id)
        finally:  # whatever happens to what is said of it: it is in no queue any more
            if ended.how == "failed" and ended.kind not in _NOT_ITS_OWN:
                self._fail(shot, ended, attempts)
        if ended.how in ("done", "failed", "cancelled", "unfit"):
            self._log.forget(shot.id)

    def dropped(self, shot: Shot) -> None:
        """It was taken out of the queue, where it may have waited to go on."""
        self._log.forget(shot.id)

    def forget(self, id: str) -> None:
        """Nobody wants it any more."""
        self._left.pop(id, None)

    def _fail(self, shot: Shot, ended: Ended, attempts: int) -> None:
        line = {name: getattr(shot, name) for name in shot.__dataclass_fields__}
        failure = Failure(ended.error, ended.kind, attempts, log=self._log.tail(shot.id), shot=line)
        if ended.kind == "unfit":
            self._left[shot.id] = failure
            return
        try:
            self._tree.fail(shot.id, failure)
        except Exception as error:  # stores that are away have errors of kinds of their own
            logger.error("%s: its failure cannot be written yet: %s", shot.id, error)
            with self._turn:
                self._unwritten[shot.id] = failure

    @staticmethod
    def _tell(level: int, renderer: str, shot: Shot, text: str) -> None:
        logger.log(level, "shot %s: %s", shot.id, text, extra={"shot": shot.id, "renderer": renderer})
