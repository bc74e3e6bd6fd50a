"""``pavdm eval``: measures videos, and goes on where one of them cannot be."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.errors import ConfigError, FailedVideosError, PAVDMError
from pavdm_dist.evaluate.measured import Measured, features_of, measure
from pavdm_dist.evaluate.official import Official, open_official
from pavdm_dist.evaluate.page import page
from pavdm_dist.evaluate.plots import check_matplotlib, plots
from pavdm_dist.evaluate.report import summary, whole_rows
from pavdm_dist.evaluate.settings import EvalConfig
from pavdm_dist.io.folders import VIDEO_SUFFIXES, check_no_link, check_only, files_in, passed_over, whole_folder
from pavdm_dist.io.storage import discard, disk_errors, is_remote, stage

logger = logging.getLogger(__name__)

_SUFFIXES = (*VIDEO_SUFFIXES, ".gif")
_REPORT, _PAGE, _PLOTS = "report.json", "report.html", "plots"
# What is in the folder of a report, with what `benchmarks/drift.py` adds.
_OWN = (_REPORT, _PAGE, _PLOTS, "drift.json")


def eval_report(config: EvalConfig, overwrite: bool) -> tuple[dict[str, Any], Exception | KeyboardInterrupt | None]:
    """Measures every video. What was measured is not lost: not by Ctrl-C, nor by a report that cannot be made.

    Args:
        config: settings.
        overwrite: an earlier report at ``output`` may be replaced.

    Returns:
        ``videos`` (as :meth:`~pavdm_dist.evaluate.measured.Measured.as_json`), ``failed``, ``whole``, ``summary`` and,
        by their settings, the user's ``networks`` where some are named;
        and what the command is to end with: where it was interrupted, the report could not be made in the end (an
        error that is none of this package's is a fault of it, and has its traceback), or some could not be measured.

    Raises:
        ConfigError: no video is named, a setting asks for what is not installed, or there can be no report.
        CheckpointError: what is named as a network is none.
        MediaError: a reference is no video.
    """
    paths = _videos(config.videos)
    if config.groups == "folder":
        _tell_of_equal_names(paths)
    if config.output is not None:
        check_matplotlib()
        check_new_report(Path(config.output), overwrite)
    if config.reference and config.features == "off":
        raise ConfigError("reference: features=off takes none to compare with it; leave one of them out")
    official = open_official(config)
    reference = features_of(_videos(config.reference)) if config.reference else None
    measured: list[Measured] = []
    failed: list[dict[str, str]] = []
    stopped: KeyboardInterrupt | None = None
    try:
        for path in paths:
            _measure_one(path, config, reference, official, measured, failed)
    except KeyboardInterrupt as interrupt:
        left = len(paths) - len(measured) - len(failed)
        stopped = interrupt
        stopped.args = (f"{left} of {len(paths)} videos are not measured",)
    report: dict[str, Any] = {
        "videos": [video.as_json() for video in measured],
        "failed": failed,
        "whole": whole_rows(measured),
        "summary": summary(measured),
    }
    if official:
        report["networks"] = {own.field: own.network.about for own in official}
    unwritten = None
    if config.output is not None and measured:
        unwritten = _reported(Path(config.output), report, measured, config.shown, overwrite)
    # Whoever ended the measuring may end the report, too: then it is said what is not measured.
    ended = unwritten if isinstance(unwritten, Exception) else stopped or unwritten
    if ended is not None:
        return report, ended
    if not failed:
        return report, None
    first = f"{failed[0]['error']}"
    message = f"{len(failed)} of {len(paths)} videos could not be measured; the first: {first}"
    return report, FailedVideosError(message, len(failed))


def _measure_one(
    path: str,
    config: EvalConfig,
    reference: NDArray[np.float64] | None,
    official: Sequence[Official],
    measured: list[Measured],
    failed: list[dict[str, str]],
) -> None:
    """Adds a video to ``measured``, or to ``failed`` where it cannot be."""
    try:
        # Features take a megabyte for every minute, and are in what they were compared with.
        measured.append(replace(measure(path, config, reference, official), features=None))
    except PAVDMError as error:
        logger.warning("not measured: %s", error)
        failed.append({"video": path, "error": str(error)})
    except Exception as error:  # of a decoder or detector: one file must not end the measuring of thousands
        logger.exception("not measured: %s", path)
        failed.append({"video": path, "error": f"{path}: {type(error).__name__}: {error}"})


def _reported(
    folder: Path, report: dict[str, Any], measured: Sequence[Measured], shown: int, overwrite: bool
) -> Exception | KeyboardInterrupt | None:
    """Draws plots and page and writes them; what ended that, which must not cost what took hours to measure."""
    try:
        drawn = plots(measured)
        text = page(measured, report["failed"], report["summary"], drawn, shown)
        write_report(folder, report, text, drawn, overwrite)
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"output={folder} was still being made",)
        return interrupt
    except Exception as error:
        return error
    return None


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
    # By whatever names: a video that counted twice would make its group look surer than it is.
    return list({path if is_remote(path) else os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def _tell_of_equal_names(paths: Sequence[str]) -> None:
    parents = sorted({str(PurePosixPath(path).parent) for path in paths})
    for name, count in Counter(PurePosixPath(parent).name for parent in parents).items():
        if count > 1:
            same = [parent for parent in parents if PurePosixPath(parent).name == name]
            logger.warning("groups=folder: %s have one name, and are one group", " and ".join(same))


def check_new_report(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that cannot be made, is no earlier report and nothing else, or is one that may not be replaced.

    Raises:
        ConfigError: naming it.
    """
    check_no_link(folder, "output")
    try:
        discard(stage(os.path.realpath(folder)))  # whether there is a place for it
        if not folder.exists():
            return
        if not overwrite:
            raise ConfigError(f"output={folder}: exists already; --overwrite replaces an earlier report")
        if not (folder / _REPORT).is_file():
            raise ConfigError(f"output={folder}: holds no report that could be replaced; name another")
        check_only(folder, _OWN, "output", "a report")
        if (drawn := folder / _PLOTS).is_dir():
            pictures = {file.name for file in drawn.iterdir() if file.suffix == ".png"}
            check_only(folder, pictures, "output", "a report", _PLOTS)
    except OSError as error:
        raise ConfigError(f"output={folder}: cannot be written ({error.strerror or error})") from error


def write_report(folder: Path, report: dict[str, Any], text: str, drawn: dict[str, bytes], overwrite: bool) -> None:
    """Writes ``report.json``, ``report.html`` and plots, all or nothing.

    Raises:
        ConfigError: they cannot be written, or something has come to be there that they must not replace.
    """
    try:
        with whole_folder(folder, replaces=overwrite) as partial, disk_errors():
            (partial / _REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
            # Names of files may hold what is no text.
            (partial / _PAGE).write_text(text, encoding="utf-8", errors="backslashreplace")
            (partial / _PLOTS).mkdir()
            for name, png in drawn.items():
                (partial / _PLOTS / f"{name}.png").write_bytes(png)
            if folder.exists():
                check_new_report(folder, overwrite)
    except OSError as error:
        raise ConfigError(f"output={folder}: cannot be written ({error.strerror or error})") from error
