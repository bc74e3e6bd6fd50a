"""``pavdm sample --resume``: unfinished videos by their folders alone, from any working directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from yaml import YAMLError, safe_load

from pavdm_dist.commands.sample import render_command
from pavdm_dist.commands.videos import Shot
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError, PAVDMError, VideoError
from pavdm_dist.io.recording import SETTINGS
from pavdm_dist.io.storage import PARTS_SUFFIX, exists, join, list_names, open_read


def words_to_resume(folder: str) -> list[list[str]]:
    """The words of a command for each video that is to be finished, wherever the folder lies now.

    Args:
        folder: the ``.mp4.parts`` folder of one video, which is finished alone, or a folder of such folders.

    Raises:
        ConfigError: it is neither, or a video in it was begun without settings.
    """
    folder = folder.rstrip("/") or "/"
    if folder.endswith(f".mp4{PARTS_SUFFIX}"):
        found = [folder] if exists(join(folder, SETTINGS)) else []
    else:
        names = [name for name in list_names(folder) if name.endswith(f".mp4{PARTS_SUFFIX}")]
        found = [join(folder, name) for name in names if exists(join(join(folder, name), SETTINGS))]
    if not found:
        raise ConfigError(
            f"--resume {folder}: is no folder of an interrupted video (NAME.mp4{PARTS_SUFFIX} with {SETTINGS}), and "
            "holds none"
        )
    for parts in found:
        with open_read(settings := join(parts, SETTINGS)) as file:
            try:
                begun = safe_load(file)
            except (YAMLError, UnicodeDecodeError):
                begun = None
        if not isinstance(begun, Mapping):
            raise ConfigError(f"--resume {parts}: {settings} is not readable; give the command that began the video")
    return [[join(parts, SETTINGS), f"output={parts.removesuffix(PARTS_SUFFIX)}"] for parts in found]


def resume_command(configs: Sequence[SampleConfig], progress: Callable[..., Any]) -> dict[str, Any]:
    """Finishes videos; those with equal settings are made together.

    Args:
        configs: of one video each.
        progress: see :func:`~pavdm_dist.commands.sample.render_command`.

    Returns:
        What :func:`~pavdm_dist.commands.sample.render_command` does, of all videos.

    Raises:
        PAVDMError: what could not be finished, after all others were.
        Stopped: a signal.
    """
    alike: dict[str, tuple[SampleConfig, list[Shot]]] = {}
    for config in configs:
        shot = Shot(config.prompt or "", config.seed, config.output)
        common = repr(replace(config, prompt=None, seed=0, output=""))
        alike.setdefault(common, (config, []))[1].append(shot)
    results: list[dict[str, Any]] = []
    failed: list[PAVDMError] = []
    for config, shots in alike.values():
        try:
            results.append(render_command(config, False, progress, shots))
        except PAVDMError as error:
            if len(alike) == 1:
                raise
            failed.append(error)
    if failed:
        reasons = "; ".join(map(str, failed))
        raise VideoError(f"of {len(alike)} kinds of settings {len(failed)} failed, the others are complete: {reasons}")
    seconds = sum(result["seconds"] for result in results)
    frames = sum(result["frames_per_second"] * result["seconds"] for result in results)
    return {
        "videos": [video for result in results for video in result["videos"]],
        "seconds": round(seconds, 3),
        "frames_per_second": round(frames / seconds, 3) if seconds else 0.0,
    }
