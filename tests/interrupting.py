"""Videos that are made in this process, and what is left of them when they are stopped in the middle."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig

PROMPT = "a red three drifting up"


def render(model: Path, output: Path, overwrite: bool = False, **settings: object) -> list[dict]:
    """A short video, or a batch, in this process."""
    config = SampleConfig(prompt=PROMPT, model=str(model), output=str(output), num_frames=21, guidance_scale=1.0)
    for name, value in settings.items():
        setattr(config, name, value)
    return render_command(config, overwrite, ChunkProgress)["videos"]


def interrupted(model: Path, output: Path, monkeypatch: pytest.MonkeyPatch, after: int, **settings: object) -> None:
    """Leaves what a command leaves that is stopped after so many chunks."""
    given: list[int] = []

    def chunk(self: ChunkProgress, stream: int, index: int, frames: int) -> None:
        given.append(index)
        if len(given) == after:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with monkeypatch.context() as patched:
        patched.setattr(ChunkProgress, "chunk", chunk)
        with pytest.raises(KeyboardInterrupt, match="the same command again goes on"):
            render(model, output, **settings)
