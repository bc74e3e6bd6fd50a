"""Unfinished videos that nobody can go on with where they are asked for, and that are begun anew."""

from __future__ import annotations

import logging

from pavdm_dist.farm.desk import Ended, end_of
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import Tree
from pavdm_dist.io.leftovers import remove_own
from pavdm_dist.io.lock import OutputLock
from pavdm_dist.io.metadata import is_complete
from pavdm_dist.io.parts import parts_folder
from pavdm_dist.io.storage import remove_empty

logger = logging.getLogger(__name__)


def forget_begun(shot: Shot, tree: Tree) -> Ended:
    """Removes what is there of an unfinished video, while nobody else can write it.

    Args:
        shot: which.
        tree: where it lies.

    Returns:
        What becomes of it: it is looked at again soon, or what kept its files from being removed.
    """
    output = tree.output(shot.id)
    try:
        lock = OutputLock.acquire(output)
        try:
            if not is_complete(output):  # another process may have gone on with it in this moment
                remove_own(parts_folder(output))
        finally:
            lock.release()
            remove_empty(parts_folder(output))
    except Exception as error:  # stores that are away have errors of kinds of their own
        return end_of(error)
    # Why nobody goes on with it was said when it was opened.
    logger.warning("shot %s: what was begun of it is removed, and it is begun anew", shot.id, extra={"shot": shot.id})
    return Ended("aside")
