"""What public bug reports broke once, as a user meets it: real commands, in processes and folders of their own.

One function a report, in a file a mechanism. Its docstring begins with the report's number; the folder it is given is
empty and its own, and what it raises is what still breaks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from helpers import hear_signals, tiny_checkpoint
from videos import write_video

# Of batch systems, torchrun and Ray: whoever runs this may have them.
FOREIGN = (
    "RAY_ADDRESS",
    "RAY_TMPDIR",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_NTASKS",
)
# Neither is a limit that anything is measured by: only what hangs ends by them.
LONG_S = 240.0
PROMPT = "a red three"
PROGRAM = (sys.executable, "-m", "pavdm_dist")
# Clips of nine pictures, and nothing computed of them.
LISTED = ("encode=false", "scene_cuts=false", "buckets=[64x64x3@24]", "output=set", "--json")

Ended = subprocess.CompletedProcess[str]


def environment(**more: str) -> dict[str, str]:
    """Somebody's shell, with ``more`` set."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    return {**kept, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **more}


def run(folder: Path, command: Sequence[str | bytes | Path], timeout: float = LONG_S, **more: Any) -> Ended:
    """A command in a folder, to its end; ``more`` of :func:`subprocess.run`."""
    settings = {"env": environment(), "capture_output": True, "text": True, "errors": "replace", **more}
    return subprocess.run(list(command), cwd=folder, timeout=timeout, check=False, **settings)  # type: ignore[call-overload, no-any-return]


def pavdm(folder: Path, *words: str | bytes, **more: Any) -> Ended:
    """The command line with these words."""
    return run(folder, [*PROGRAM, *words], **more)


def python(folder: Path, code: str, *words: str, **more: Any) -> Ended:
    """A program of a user's, or the command line on a machine that ``code`` makes worse before it calls it."""
    return run(folder, [sys.executable, "-c", code, *words], **more)


def model(folder: Path) -> str:
    """The setting for a tiny untrained model, which is made there."""
    return f"model={tiny_checkpoint(folder / 'model')}"


def grey(frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Pictures ``[frames, height, width, 3]`` that get slowly brighter."""
    shades = (40 + np.arange(frames) % 160).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (frames, height, width, 3))


def film(path: Path, frames: int = 30, height: int = 64, width: int = 64) -> Path:
    """An ordinary video."""
    return write_video(path, grey(frames, height, width))


def last_line(ended: Ended) -> str:
    """What the user reads at the end."""
    return (ended.stderr.strip().splitlines() or [""])[-1]


def went_well(ended: Ended) -> str:
    """What it said; it must have ended well."""
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, (ended.returncode, ended.stderr[-3000:])
    return ended.stderr


def sentence(ended: Ended, status: int = 2) -> str:
    """The last line; it must have ended with that status, and nothing of the program's inside may be shown."""
    assert ended.returncode == status and "Traceback" not in ended.stderr, (ended.returncode, ended.stderr[-3000:])
    assert last_line(ended).startswith("pavdm: "), ended.stderr[-3000:]
    return last_line(ended)


class Running:
    """A command that goes on while the case does something to it.

    Args:
        folder: where it runs, and its log is.
        words: of the command line.
        name: of the log.
        program: before them.
        more: of Popen.
    """

    def __init__(
        self, folder: Path, *words: str, name: str = "log", program: Sequence[str] = PROGRAM, **more: Any
    ) -> None:
        self._log = folder / f"{name}.txt"
        settings = {"env": environment(), "preexec_fn": hear_signals, **more}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*program, *words], **{"cwd": folder, "stdout": log, "stderr": log, **settings}
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        return self._log.read_text()

    def until(self, condition: str | Callable[[], bool]) -> None:
        """Waits for a text in its log, or for what is asked."""
        given_up = time.monotonic() + LONG_S
        while not (condition in self.said if isinstance(condition, str) else condition()):
            assert self.process.poll() is None, f"ended before {condition!r}: {self.said[-3000:]}"
            assert time.monotonic() < given_up, f"not there after {LONG_S:.0f} s: {condition!r}: {self.said[-3000:]}"
            time.sleep(0.02)

    def end(self, number: int | None = None) -> Ended:
        """How it ended, by itself or by a signal."""
        if number is not None:
            self.process.send_signal(number)
        return subprocess.CompletedProcess([], self.process.wait(LONG_S), "", self.said)
