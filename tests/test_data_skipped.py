"""Videos that give no clip: the reason is the right one, and one of them ends no run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_checkpoint
from videos import numbered, write_video

from pavdm_dist.data import work as work_module
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.errors import ConfigError, EngineError


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    write_video(tmp_path / "v" / "a.mp4", numbered(20))
    write_video(tmp_path / "v" / "b.mp4", numbered(20))
    model = tiny_checkpoint(tmp_path / "model")
    return PrepareConfig([str(tmp_path / "v")], str(tmp_path / "set"), str(model), ["32x48x3@24"], captions="stem")


def lacking(function: Any) -> Any:
    """A function that runs out of memory at ``b.mp4``."""

    def call(location: str, *words: Any, **more: Any) -> Any:
        if location.endswith("b.mp4"):
            raise MemoryError("Unable to allocate 3.00 GiB")
        return function(location, *words, **more)

    return call


def test_a_video_that_memory_does_not_hold_is_skipped_by_name(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, encode=False)
    monkeypatch.setattr(work_module, "scan_video", lacking(work_module.scan_video))
    report = prepare_command(config)
    assert report["clips"] == {"32x48x3@24": 2}
    assert report["skipped"] == [
        {
            "video": "b.mp4",
            "skipped": "unreadable",
            "reason": "b.mp4: memory was lacking (Unable to allocate 3.00 GiB)",
        }
    ]


def test_memory_that_lacks_while_latents_are_made_names_the_video(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "read_frames", lacking(work_module.read_frames))
    with pytest.raises(EngineError, match=r"b\.mp4: memory was lacking while a clip of bucket 32x48x3@24 was read"):
        prepare_command(config)


def test_a_film_of_gaps_is_measured_between_them(config: PrepareConfig, tmp_path: Path) -> None:
    """Five seconds a picture, as of a slide show: no clip reaches over one."""
    write_video(tmp_path / "w" / "gaps.mp4", numbered(6), times=[5000 * k for k in range(6)])
    config = replace(config, source=[str(tmp_path / "w")], encode=False, scene_cuts=False)
    with pytest.raises(
        ConfigError, match=r"gaps\.mp4: its longest scene between gaps in its timestamps has 0\.\d\d s, no bucket"
    ):
        prepare_command(config)
