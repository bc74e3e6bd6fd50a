"""Where a run writes what it shows: its own ``log.jsonl``, and trackers that a setting names."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pavdm_dist.errors import ConfigError

# What each tracker needs.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
# In the run's folder: which of wandb's runs it is.
_WANDB_ID = "wandb-id"

logger = logging.getLogger(__name__)

# Takes the number of a step and what is known of it, by name.
Track = Callable[[int, Mapping[str, float]], None]


def check_trackers(names: list[str]) -> None:
    """Refuses trackers that are not there.

    Raises:
        ConfigError: an unknown one, or one whose package is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(f"trackers=[{name}]: must be of {', '.join(PACKAGES)}")
        package = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"trackers=[{name}] needs {package}: pip install {package}, or leave it out")


class Records:
    """The log of a run; for its first process.

    Args:
        folder: of the run.
        trackers: their names.
        settings: of the run, for trackers that show them.
    """

    def __init__(self, folder: Path, trackers: list[str], settings: Mapping[str, Any]) -> None:
        self._file = folder / "log.jsonl"
        makers = {"tensorboard": _tensorboard, "wandb": _wandb}
        self._tracks = dict[str, tuple[Track, Callable[[], None]]]()
        for name in trackers:
            try:
                self._tracks[name] = makers[name](folder, settings)
            except Exception as error:  # whatever a tracker raises: it is not worth a run
                logger.warning("%s is told nothing, it cannot be started: %s", name, error)

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """Adds a line."""
        try:
            with open(self._file, "ab+") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(end - 1, 0))
                # A full disk may have cut the last line short, which is not to spoil this one.
                before = "\n" if file.read(1) not in (b"", b"\n") else ""
                file.write(f"{before}{json.dumps({'step': step, **line})}\n".encode())
        except OSError as error:  # a line is not worth a run
            logger.warning("step %d is not logged: %s", step, error)
        numbers = dict(_numbers(line))
        for name, (track, _) in self._tracks.items():
            try:
                track(step, numbers)
            except Exception as error:
                logger.warning("step %d is not told to %s: %s", step, name, error)

    def close(self) -> None:
        """Ends the trackers."""
        for name, (_, close) in self._tracks.items():
            try:
                close()
            except Exception as error:
                logger.warning("%s cannot be ended: %s", name, error)
        self._tracks.clear()  # what comes later is in the file alone


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a line, those inside others by ``name/name``."""
    for name, value in values.items():
        if isinstance(value, list):
            value = {str(place): part for place, part in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> tuple[Track, Callable[[], None]]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track, writer.close


def _wandb(folder: Path, settings: Mapping[str, Any]) -> tuple[Track, Callable[[], None]]:
    import wandb

    # A run that goes on writes on in the same place, after a slice that ended well and on another machine, too.
    file = folder / _WANDB_ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    own = {"id": file.read_text().strip(), "resume": "allow"}
    run = wandb.init(dir=str(folder), name=folder.name, config=dict(settings), **own)
    return (lambda step, numbers: run.log(dict(numbers), step=step)), run.finish
