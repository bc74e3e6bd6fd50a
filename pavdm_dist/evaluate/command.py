"""``pavdm eval``: measures videos, and goes on where one of them cannot be."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pavdm_dist.errors import ConfigError, FailedVideosError, PAVDMError
from pavdm_dist.evaluate.measured import Measured, features_of, measure
from pavdm_dist.evaluate.official import open_official
from pavdm_dist.evaluate.page import page
from pavdm_dist.evaluate.plots import plots
from pavdm_dist.evaluate.report import summary, whole_rows
from pavdm_dist.evaluate.settings import EvalConfig
from pavdm_dist.io.folders import check_no_link, files_in, passed_over, whole_folder
from pavdm_dist.io.storage import disk_errors, is_remote

logger = logging.getLogger(__name__)

_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".gif")
REPORT = "report.json"


def eval_report(config: EvalConfig, overwrite: bool) -> tuple[dict[str, Any], FailedVideosError | None]:
    """Measures every video.

    Args:
        config: settings.
        overwrite: an earlier report at ``output`` may be replaced.

    Returns:
        ``videos`` (as :meth:`~pavdm_dist.evaluate.measured.Measured.as_json`), ``failed``, ``whole``, ``summary`` and,
        by their settings, the user's ``networks`` where some are named;
        and what the command is to end with where some could not be measured.

    Raises:
        ConfigError: no video is named, a setting asks for what is not installed, or the report cannot be written.
        CheckpointError: what is named as a network is none.
        MediaError: a reference is no video.
    """
    paths = _videos(config.videos)
    if config.groups == "folder":
        _tell_of_equal_names(paths)
    if config.output is not None:
        check_new_report(Path(config.output), overwrite)
    if config.reference and config.features == "off":
        raise ConfigError("reference: features=off takes none to compare with it; leave one of them out")
    official = open_official(config)
    reference = features_of(_videos(config.reference)) if config.reference else None
    measured: list[Measured] = []
    failed: list[dict[str, str]] = []
    for path in paths:
        try:
            measured.append(measure(path, config, reference, official))
        except PAVDMError as error:
            logger.warning("not measured: %s", error)
            failed.append({"video": path, "error": str(error)})
        except Exception as error:  # of a decoder or detector: one file must not end the measuring of thousands
            logger.exception("not measured: %s", path)
            failed.append({"video": path, "error": f"{path}: {type(error).__name__}: {error}"})
    rows = summary(measured, config.resamples, config.seed)
    report: dict[str, Any] = {
        "videos": [video.as_json() for video in measured],
        "failed": failed,
        "whole": whole_rows(measured),
        "summary": rows,
    }
    if official:
        report["networks"] = {own.field: own.network.about for own in official}
    if config.output is not None and measured:
        drawn = plots(measured)
        write_report(Path(config.output), report, page(measured, failed, rows, drawn, config.shown), drawn)
    if not failed:
        return report, None
    first = f"{failed[0]['error']}"
    message = f"{len(failed)} of {len(paths)} videos could not be measured; the first: {first}"
    return report, FailedVideosError(message, len(failed))


def for_people(report: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal: without the curves of each video."""
    return {name: report[name] for name in ("whole", "summary", "failed") if report[name]}


def _videos(words: Sequence[str]) -> list[str]:
    """Files as they are named; of folders the videos in them, not those of unfinished ones or in trash cans."""
    if not words:
        raise ConfigError("videos: must be given; pavdm eval DIR|FILE...")
    found: list[str] = []
    for word in words:
        if is_remote(word) or not Path(word).is_dir():
            found.append(word)
            continue
        hidden: list[str] = []
        inside = sorted(files_in(str(Path(word)), _SUFFIXES, "videos", hidden))
        own = [str(file) for file in inside if not any(part.endswith(".parts") for part in file.parts)]
        passed = passed_over(hidden)
        if not own:
            more = passed and f"; {passed}"
            raise ConfigError(f"videos={word}: holds no video ({', '.join(_SUFFIXES)}){more}")
        if passed:
            logger.info("videos=%s: %s", word, passed)
        found += own
    return list(dict.fromkeys(found))


def _tell_of_equal_names(paths: Sequence[str]) -> None:
    parents = sorted({str(PurePosixPath(path).parent) for path in paths})
    for name, count in Counter(PurePosixPath(parent).name for parent in parents).items():
        if count > 1:
            same = [parent for parent in parents if PurePosixPath(parent).name == name]
            logger.warning("groups=folder: %s have one name, and are one group", " and ".join(same))


def check_new_report(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that is no earlier report, or is one that may not be replaced.

    Raises:
        ConfigError: naming it.
    """
    check_no_link(folder, "output")
    if folder.exists() and not overwrite:
        raise ConfigError(f"output={folder}: exists already; --overwrite replaces an earlier report")
    if folder.exists() and not (folder / REPORT).exists():
        raise ConfigError(f"output={folder}: holds no report that could be replaced; name another")


def write_report(folder: Path, report: dict[str, Any], text: str, drawn: dict[str, bytes]) -> None:
    """Writes ``report.json``, ``report.html`` and plots, all or nothing.

    Raises:
        ConfigError: they cannot be written.
    """
    try:
        with whole_folder(folder) as partial, disk_errors():
            (partial / REPORT).write_text(json.dumps(report, indent=1))
            (partial / "report.html").write_text(text)
            (partial / "plots").mkdir()
            for name, png in drawn.items():
                (partial / "plots" / f"{name}.png").write_bytes(png)
    except OSError as error:
        raise ConfigError(f"output={folder}: cannot be written ({error.strerror or error})") from error
