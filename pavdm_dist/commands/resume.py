"""``pavdm sample --resume``: unfinished videos by their folders alone, from any working directory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pavdm_dist.commands.progress import Progress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.commands.videos import WantedVideo
from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.errors import ConfigError, FailedVideosError, PAVDMError
from pavdm_dist.io.leftovers import SETTINGS, settings_begun_with
from pavdm_dist.io.metadata import is_complete
from pavdm_dist.io.parts import LOCK_NAME, PARTS_SUFFIX
from pavdm_dist.io.storage import join, list_names
from pavdm_dist.values.merging import load_config, merged

logger = logging.getLogger(__name__)


def configs_to_resume(
    folder: str, overrides: Sequence[str] = (), *, needs_prompt: bool = True
) -> tuple[list[SampleConfig], list[PAVDMError]]:
    """The settings of each video that is to be finished, wherever the folder lies now.

    Args:
        folder: the ``.mp4.parts`` folder of one video, which is finished alone, or a folder of such folders.
        overrides: ``key=value``, for all of them.
        needs_prompt: see :func:`~pavdm_dist.config.validate_sample`.

    Returns:
        One of each video, and why others in the folder cannot be finished.

    Raises:
        ConfigError: the folder is neither, an override is wrong, or no video can be finished.
    """
    if not folder.strip("/"):
        raise ConfigError(f"--resume {folder!r}: name the .mp4{PARTS_SUFFIX} folder of a video, or a folder of them")
    load_config(SampleConfig, None, overrides)  # a slip in these is said once, and of no video
    folder = folder.rstrip("/")
    configs: list[SampleConfig] = []
    failed: list[PAVDMError] = []
    for parts in [folder] if _is_parts(folder) else _parts_in(folder):
        try:
            config = _config_of(parts, overrides, needs_prompt)
        except ConfigError as error:
            failed.append(ConfigError(f"--resume {parts}: {error}"))
        except OSError as error:
            failed.append(ConfigError(f"--resume {parts}: cannot be read ({error.strerror or error})"))
        else:
            configs += [] if config is None else [config]
    if not configs and not failed:
        raise ConfigError(
            f"--resume {folder}: is no folder of an interrupted video (NAME.mp4{PARTS_SUFFIX} with {SETTINGS}), and "
            "holds none"
        )
    if not configs:
        raise failed[0] if len(failed) == 1 else ConfigError("; ".join(map(str, failed)))
    for reason in failed:
        logger.warning("%s", reason)
    return configs, failed


def _is_parts(name: str) -> bool:
    return name.endswith(PARTS_SUFFIX) and name.removesuffix(PARTS_SUFFIX).lower().endswith(".mp4")


def _parts_in(folder: str) -> list[str]:
    try:
        return [join(folder, name) for name in list_names(folder) if _is_parts(name)]
    except OSError as error:
        raise ConfigError(f"--resume {folder}: cannot be read ({error.strerror or error})") from error


def _config_of(parts: str, overrides: Sequence[str], needs_prompt: bool) -> SampleConfig | None:
    """What a video was begun with; None where none was begun: no folder, or one that only says who was about to."""
    if not set(list_names(parts)) - {LOCK_NAME}:
        return None
    output = parts.removesuffix(PARTS_SUFFIX)
    try:
        values = settings_begun_with(output)
    except ConfigError as error:
        raise ConfigError(f"{error}; give the command that began the video") from error
    config = merged(SampleConfig, values, SETTINGS, [*overrides, f"output={output}"])
    validate_sample(config, needs_prompt=needs_prompt)
    return config


def resume_command(
    configs: Sequence[SampleConfig], failed: Sequence[PAVDMError], progress: Callable[..., Progress]
) -> dict[str, Any]:
    """Finishes videos; those with equal settings are made together.

    Args:
        configs: of one video each.
        failed: why others cannot be finished, as :func:`configs_to_resume` says.
        progress: see :func:`~pavdm_dist.commands.sample.render_command`.

    Returns:
        What :func:`~pavdm_dist.commands.sample.render_command` does, of all videos.

    Raises:
        FailedVideosError: some could not be finished, all others are.
        PAVDMError: nothing could be: see :func:`~pavdm_dist.commands.sample.render_command`.
        Stopped: a signal.
    """
    alike: dict[str, tuple[SampleConfig, list[WantedVideo]]] = {}
    for config in configs:
        one = WantedVideo(config.prompt or "", config.seed, config.output)
        common = repr(replace(config, prompt=None, seed=0, output=""))
        alike.setdefault(common, (config, []))[1].append(one)
    results: list[dict[str, Any]] = []
    reasons, count, kinds = [str(error) for error in failed], len(failed), len(alike) + len(failed)
    traces: Counter[str | None] = Counter()
    for config, wanted in alike.values():
        traces[config.trace] += 1
        try:
            results.append(render_command(_with_own_trace(config, traces[config.trace]), False, progress, wanted))
        except PAVDMError as error:
            if kinds == 1:
                raise
            reasons.append(str(error))
            # An error of the whole group may come when the sidecars are there already.
            unfinished = max(1, sum(not is_complete(one.output) for one in wanted))
            count += error.count if isinstance(error, FailedVideosError) else unfinished
    if reasons:
        raise FailedVideosError(f"not all could be finished, the others are complete: {'; '.join(reasons)}", count)
    seconds = sum(result["seconds"] for result in results)
    frames = sum(result["frames_per_second"] * result["seconds"] for result in results)
    return {
        "videos": [video for result in results for video in result["videos"]],
        "seconds": round(seconds, 3),
        "frames_per_second": round(frames / seconds, 3) if seconds else 0.0,
    }


def _with_own_trace(config: SampleConfig, nth: int) -> SampleConfig:
    """The second group of videos that names a trace gets ``NAME-2.json``: one file holds one run."""
    if config.trace is None or nth == 1:
        return config
    return replace(config, trace=f"{config.trace.removesuffix('.json')}-{nth}.json")
