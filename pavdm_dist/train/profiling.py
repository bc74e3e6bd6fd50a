"""A look at single steps with torch's profiler, by a setting."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Profiler:
    """Records some steps of this process and writes what they did as a trace, for chrome://tracing or Perfetto.

    A run that ends among these steps has a trace of those it took, and the run that goes on one of the rest.

    Args:
        folder: of the run; ``profile/`` in it gets the traces.
        steps: number of the first step, and how many; 0 = none.
        rank: of this process.
        writing: around the writing of a trace, which takes longer than steps do.
    """

    def __init__(
        self,
        folder: Path,
        steps: tuple[int, int],
        rank: int,
        writing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._folder, self._rank, self._writing = folder / "profile", rank, writing
        self._first, self._behind = steps[0], steps[0] + steps[1]
        self._running: Any = None
        self._began = self._done = 0  # of what is recorded: its first step, and the one behind its last

    def before(self, step: int) -> None:
        """Called before step ``step``."""
        if self._running is not None or not self._first <= step < self._behind:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._running = torch.profiler.profile(activities=activities, record_shapes=True)
        self._began = self._done = step
        self._running.start()

    def after(self, step: int) -> None:
        """Called after step ``step``."""
        self._done = step + 1
        if self._done >= self._behind:
            self.close()

    def close(self) -> None:
        """Ends a recording that is under way, and writes it."""
        running, self._running = self._running, None
        if running is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        with self._writing():
            running.stop()
            if self._done > self._began:
                self._write(running)

    def _write(self, recorded: Any) -> None:
        name = f"steps-{self._began:07d}-{self._done - 1:07d}-rank{self._rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(self._folder / f"{name}.json"))
            sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = recorded.key_averages().table(sort_by=sort, row_limit=40)
            (self._folder / f"{name}.txt").write_text(table)
        except OSError as error:  # a trace is not worth a run
            logger.warning("no profile: %s", error)
