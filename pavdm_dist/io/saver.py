"""States are written beside the work: whoever samples does not wait for the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pavdm_dist.io.state import RecordingState, write_state


class StateSaver:
    """Writes the states of one folder, in order, in a thread of its own.

    Args:
        folder: of the states.
        check: raises OSError where they are no longer this process' to write; asked before one takes its place.
    """

    def __init__(self, folder: str | Path, check: Callable[[], None]) -> None:
        self._folder, self._check = folder, check
        self._thread = ThreadPoolExecutor(1, "state")
        self._pending: Future[None] | None = None

    def save(self, state: RecordingState) -> None:
        """Begins to write a state, whose tensors must not change any more, once the one before is on the disk.

        Raises:
            OSError: of the one before.
        """
        self.wait()
        self._pending = self._thread.submit(write_state, self._folder, state, self._check)

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
