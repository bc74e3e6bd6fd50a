"""A look at single steps with torch's profiler, by a setting."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Profiler:
    """Records some steps of this process and writes what they did as a trace, for chrome://tracing or Perfetto.

    Args:
        folder: of the run; ``profile/`` in it gets the traces.
        steps: number of the first step, and how many; 0 = none.
        rank: of this process.
    """

    def __init__(self, folder: Path, steps: tuple[int, int], rank: int) -> None:
        self._folder, self._rank = folder / "profile", rank
        self._first, self._behind = steps[0], steps[0] + steps[1]
        self._running: Any = None

    def before(self, step: int) -> None:
        """Called before step ``step``."""
        if step != self._first or self._first == self._behind:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._running = torch.profiler.profile(activities=activities, record_shapes=True)
        self._running.start()

    def after(self, step: int) -> None:
        """Called after step ``step``."""
        if self._running is None or step + 1 < self._behind:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._running.stop()
        name = f"steps-{self._first:07d}-{self._behind - 1:07d}-rank{self._rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._running.export_chrome_trace(str(self._folder / f"{name}.json"))
            sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self._running.key_averages().table(sort_by=sort, row_limit=40)
            (self._folder / f"{name}.txt").write_text(table)
        except OSError as error:  # a trace is not worth a run
            logger.warning("no profile: %s", error)
        self._running = None
