"""Videos to prepare a data set from, good and bad, and what is looked at of a set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from videos import numbered, shots, write_video

from pavdm_dist.data import prepare as prepare_module
from pavdm_dist.data import work
from pavdm_dist.data.prepare import PrepareConfig, prepare_command

BUCKETS = ["32x48x3@24", "32x48x2@24", "48x32x2@24", "16x96x2@24"]


def write_source(folder: Path) -> Path:
    """Four good videos, two corrupt ones, one too small and one too short."""
    write_video(folder / "a.mp4", shots([20, 25]))
    write_video(folder / "b.mp4", numbered(30), 30)
    write_video(folder / "deep" / "tall.mkv", numbered(12, 96, 64))
    write_video(folder / "e.mp4", numbered(11))
    write_video(folder / "short.mp4", numbered(3))
    write_video(folder / "small.mp4", numbered(20, 16, 32))
    whole = (folder / "b.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video at all")
    captions = {"a": "a red three drifting up", "b": "blue seven", "e": "a green three"}
    for path in [*folder.rglob("*.mp4"), *folder.rglob("*.mkv")]:
        path.with_suffix(".txt").write_text(captions.get(path.stem, "a three"))
    return folder


def write_captioned(folder: Path, captions: Sequence[str], *shape: int) -> Path:
    """One good video of 24 fps for every caption; ``shape``: frames, height, width."""
    for number, caption in enumerate(captions):
        write_video(folder / f"{number}.mp4", numbered(*shape), 24)
        (folder / f"{number}.txt").write_text(caption)
    return folder


def forget_opened() -> None:
    """What data preparation has opened in this process, as a new one would have nothing."""
    work._checkpoint.cache_clear()
    work._encoders.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scanned_then_replaced(config: PrepareConfig, source: Path, tmp_path: Path) -> PrepareConfig:
    """A run that was ended behind its scan, one of whose videos then changed without changing its size."""
    shutil.copytree(source, tmp_path / "videos")
    settings = replace(config, source=[str(tmp_path / "videos")], output=str(tmp_path / "set"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_command(settings)
    video = tmp_path / "videos" / "b.mp4"
    size = video.stat().st_size
    write_video(video, numbered(20), 24)
    os.truncate(video, size)  # zeros behind the last box are legal
    return settings
