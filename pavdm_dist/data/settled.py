"""What a prepared folder was made with, so that a run goes on with its own and refuses others by name."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pavdm_dist.codecs.pretrained_text import TextOptions
from pavdm_dist.data.index import Sources, locate
from pavdm_dist.data.shards import INDEX, SETTINGS, SIZES, VERSION, clips_file, read_index, write_json
from pavdm_dist.data.work import Job, read_scan
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.storage import remove
from pavdm_dist.values.fields import json_value, read_object

# Reasons for skipping a video that another file or another caption takes away.
_MENDED = ("unreadable", "caption")

logger = logging.getLogger(__name__)


def settle(job: Job, encode: bool, output: str, sources: Sources) -> None:
    """Compares the folder's settings with this run's, or writes them into an empty folder.

    Args:
        job: of this run.
        encode: whether it makes latents.
        output: the folder as the user named it.
        sources: of this run.

    Raises:
        ConfigError: other settings, videos or captions than before, or a folder that holds something else.
    """
    wanted = {
        "version": VERSION,
        "source": _digest(sources),
        "buckets": [str(bucket) for bucket in job.buckets],
        "scene_cuts": job.scene_cuts,
        "upscale": job.upscale,
        "encode": encode,
        "shard_clips": job.shard_clips,
        "threads": job.threads,
        "device": job.device,
        "damaged": job.damaged,
        **({} if job.text is None else {"text_dtype": job.text.dtype}),
        **dict(job.identities),
    }
    path = job.output / SETTINGS
    if not path.exists():
        # What a run leaves that was killed at its very first writes.
        ours = (SIZES, f".{SIZES}.", f".{SETTINGS}.")
        others = sorted(name for name in os.listdir(job.output) if not name.startswith(ours))
        if others:
            raise ConfigError(f"output={output} holds {others[0]} and no data set: name an empty folder")
        write_json(job.output / SIZES, _sizes(sources))
        write_json(path, wanted)
        return
    before, now = _own(job.output / SIZES, output), _sizes(sources)
    # What sets of older versions do not say.
    found = {"damaged": "skip", **_own(path, output)}
    if job.text is not None:
        found.setdefault("text_dtype", TextOptions.dtype)
    for name in (*wanted, *(found.keys() - wanted.keys())):
        if found.get(name) != wanted.get(name):
            both = f"{name}={found.get(name)}, this run has {wanted.get(name)}"
            said = _other_videos(before, now) if name == "source" else both
            advice = "name another output, or delete that folder"
            if said.startswith("fewer"):
                advice = (
                    f"the new ones go into a folder of their own (output=... besides=[{output}]), and training takes"
                    f" both (data.folder=[{output}, ...])"
                )
            raise ConfigError(f"output={output} was made with {said}: {advice}")
    for leftover in list(job.output.rglob(".*.tmp")):  # of a run that was killed
        remove(leftover)
    # A video that is gone is missed where its clips are read, if any are still to be.
    again = {name for part in (job.output / "scan").glob("*.json") for name in unreadable(job.output, int(part.stem))}
    changed = [
        name
        for name, size in now.items()
        if None not in (size, before[name]) and size != before[name] and name not in again
    ]
    if changed:
        raise ConfigError(
            f"output={output}: {changed[0]} had {before[changed[0]]} bytes when the data set was begun and has"
            f" {now[changed[0]]} ({len(changed)} such videos): put it back, or name another output"
        )
    if now != before:
        write_json(job.output / SIZES, {name: size or before[name] for name, size in now.items()})


def _own(path: Path, output: str) -> dict[str, Any]:
    """One of the files that say what a folder was made with."""
    try:
        return read_object(path, ConfigError)
    except (ConfigError, OSError) as error:
        raise ConfigError(
            f"output={output}: {path.name}, which says what was begun there, is missing or damaged: {error}; name"
            " another output, or delete that folder"
        ) from error


def without(sources: Sources, folders: Sequence[str]) -> Sources:
    """The sources without the videos of other data sets, which are complete.

    What a set skipped as unreadable or without a usable caption is not in it, and may have been mended since.

    Raises:
        ConfigError: a folder that holds no data set or a damaged one, or nothing is left.
    """
    if not folders:
        return sources
    known: set[str] = set()
    here = [os.path.realpath(locate(sources.root, video.path)) for video in sources.videos]
    for folder in folders:
        index = read_index(folder, "besides")
        try:
            names = set(json_value((Path(folder) / SIZES).read_bytes()))
            names -= {entry["video"] for entry in index["skipped"] if entry["skipped"] in _MENDED}
            own = {os.path.realpath(locate(index["root"], name)) for name in names}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"besides={folder}: {SIZES} or {INDEX}, which say what is in there, cannot be read:"
                f" {type(error).__name__}: {error}"
            ) from error
        if own and own.isdisjoint(here):
            logger.warning(
                "besides=%s: none of its %d videos is among these; where they have moved since (they lay in %s), clips"
                " of both sets are the same",
                folder, len(own), index["root"],
            )  # fmt: skip
        known |= own
    videos = [video for video, place in zip(sources.videos, here, strict=True) if place not in known]
    if not videos:
        raise ConfigError(f"besides={', '.join(folders)}: all {len(sources.videos)} videos are in there, none is new")
    return replace(sources, videos=videos)


def unreadable(output: Path, part: int) -> set[str]:
    """Videos that could not be read when a part was looked at, and may have been repaired or delivered since.

    None once the clips are listed: shards count on their numbers.
    """
    if clips_file(output, 0).exists():
        return set()
    return {entry["video"] for entry in read_scan(output, part) if entry.get("skipped") == "unreadable"}


def _other_videos(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    gone, new = before.keys() - now.keys(), now.keys() - before.keys()
    if gone:
        return f"other videos ({min(gone)} is gone, {len(gone)} such; put them back to go on)"
    if new:
        return f"fewer videos ({min(new)} is new, {len(new)} such)"
    return "other captions, or videos in another order"


def _digest(sources: Sources) -> str:
    """Hash of names and captions."""
    digest = hashlib.sha256()
    for video in sources.videos:
        digest.update(json.dumps([video.path, video.caption]).encode())
    return digest.hexdigest()[:16]


def _sizes(sources: Sources) -> dict[str, int | None]:
    """Bytes of every video that is a file here: cheap, and enough to notice one that was replaced."""
    places = {video.path: locate(sources.root, video.path) for video in sources.videos}
    return {name: os.path.getsize(place) if os.path.isfile(place) else None for name, place in places.items()}
