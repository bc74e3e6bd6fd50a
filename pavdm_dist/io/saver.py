"""States are written beside the work: whoever samples does not wait for the disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pavdm_dist.io.state import State, write_state


class StateSaver:
    """Writes the states of one folder, in order, in a thread of its own.

    Args:
        folder: of the states.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "state")
        self._pending: Future[None] | None = None

    def save(self, state: State) -> None:
        """Begins to write a state, whose tensors must not change any more, once the one before is on the disk.

        Raises:
            OSError: of the one before.
        """
        self.wait()
        self._pending = self._thread.submit(write_state, self._folder, state)

    def wait(self) -> None:
        """Returns when the last state is on the disk.

        Raises:
            OSError: it cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread once it has done what it was given; errors of that are nobody's any more."""
        self._thread.shutdown()
