"""What a worker does: look at a few videos, or encode one shard. Each result is a file that appears in one move."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.base import VideoCodec
from pavdm_dist.codecs.catalog import load_codec
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder, TextOptions
from pavdm_dist.data.buckets import Bucket, smallest
from pavdm_dist.data.clips import plan_clips, read_frames, scan_video
from pavdm_dist.data.index import SourceVideo, locate
from pavdm_dist.data.readers import NOTES, forget, left_behind, reading, survived
from pavdm_dist.data.shards import SETTINGS, ClipList, clips_file, shard_file, write_json, write_shard
from pavdm_dist.data.workers import worker_number
from pavdm_dist.errors import ConfigError, EngineError, MediaError, UnreachableError
from pavdm_dist.models.devices import intra_op_threads
from pavdm_dist.values.fields import json_value

logger = logging.getLogger(__name__)

# Share of a picture below which its loss to a bucket of another shape is reported.
_LEAST_KEPT = Fraction(3, 4)
# Captions that one start of a large text encoder is for: all their embeddings are in memory at once.
_CAPTIONS = 1024


@dataclass(frozen=True)
class Job:
    """What all tasks of a run share.

    Attributes:
        output: the data set's folder, reachable by every worker.
        root: of the sources.
        model: folder with codec and text encoder.
        buckets: shapes of clips.
        scene_cuts, damaged, upscale, shard_clips, device, threads: as in ``PrepareConfig``.
        identities: of codec and text encoder, for the shards' headers.
        text: of the pretrained text encoder that captions are encoded with, its folder as a whole path; None = none is.
    """

    output: Path
    root: str
    model: str
    buckets: tuple[Bucket, ...]
    scene_cuts: bool
    upscale: bool
    shard_clips: int
    device: str
    threads: int
    identities: tuple[tuple[str, str], ...]
    damaged: str = "skip"
    text: TextOptions | None = None


def scan_file(output: Path, part: int) -> Path:
    """What was found in part ``part`` of the videos."""
    return output / "scan" / f"{part:06d}.json"


def scan_part(job: Job, part: int, videos: Sequence[SourceVideo]) -> int:
    """Looks at some videos and writes their clips, or why there are none; returns the frames decoded.

    What an earlier look could read is kept.
    """
    _check_folders(job)
    entries = read_scan(job.output, part) if scan_file(job.output, part).exists() else []
    before = {entry["video"]: entry for entry in entries if entry.get("skipped") != "unreadable"}
    alone = _read_alone(job.output)
    found = [before.get(video.path) or alone.get(video.path) or _scan(job, video) for video in videos]
    write_json(scan_file(job.output, part), {"videos": found})
    return sum(entry["frames"] for entry in found if entry["video"] not in before)


def look_alone(job: Job, videos: Sequence[SourceVideo], again: bool = False) -> bool:
    """Looks at videos whose readers were ended, each in a process of its own, and keeps what is found for
    :func:`scan_part`.

    Args:
        job: whose readers; none may be at work.
        videos: of the job.
        again: also at those that ended such a process in an earlier run: they may have been repaired.

    Returns:
        Whether there were any.
    """
    known = {} if clips_file(job.output, 0).exists() else _read_alone(job.output)
    suspects = set(left_behind(job.output))
    if again:
        suspects |= {name for name, entry in known.items() if entry.get("skipped") == "unreadable"}
    found = [video for video in videos if video.path in suspects]
    if clips_file(job.output, 0).exists():
        for video in found:
            logger.warning("an earlier run was ended while it read %s", video.path)
        found = []
    for video in found:
        logger.warning("%s: the process that read it was ended; it is looked at alone", video.path)
        entry = survived(_scan, job, video)
        reason = f"{video.path}: it ended the process that read it (the decoder crashed, or memory was lacking)"
        known[video.path] = entry or {**_nothing(video), "skipped": "unreadable", "reason": reason}
    forget(job.output)
    if known:
        (job.output / NOTES).mkdir(exist_ok=True)
        write_json(_alone_file(job.output), {"videos": list(known.values())})
    return bool(found)


def _alone_file(output: Path) -> Path:
    return output / NOTES / "alone.json"


def _read_alone(output: Path) -> dict[str, dict[str, Any]]:
    file = _alone_file(output)
    return {entry["video"]: entry for entry in (_read_looked_at(file) if file.exists() else [])}


def encode_shard(job: Job, bucket: int, number: int) -> int:
    """Encodes one shard; returns its clips.

    Raises:
        MediaError: a video is not what it was when it was scanned.
    """
    _check_folders(job)
    codec, checkpoint = _encoders(job.model, job.text, job.device, worker_number())
    clips_on_disk = ClipList(clips_file(job.output, bucket))
    first = number * job.shard_clips
    clips = clips_on_disk.read(range(first, min(first + job.shard_clips, len(clips_on_disk))))
    shape = job.buckets[bucket]
    checkpoint.text_encoder.prepare(clip.caption for clip in clips)  # a large encoder is loaded once for all of them
    latents, texts = [], list[Tensor]()
    with intra_op_threads(job.threads), _quiet(), _memory_advice(shape):
        for clip in clips:
            try:
                with reading(job.output, clip.video):
                    frames = read_frames(locate(job.root, clip.video), clip, shape, shape.num_frames(codec.spec))
            except MediaError as error:
                raise MediaError(
                    f"{error}; its clips are listed: put the video back and run again, or prepare another folder"
                    " without it"
                ) from error
            except MemoryError as error:
                raise EngineError(
                    f"{clip.video}: memory was lacking while a clip of bucket {shape} was read: use smaller buckets or"
                    " fewer processes; run again to go on"
                ) from error
            latents.append(codec.encode(torch.from_numpy(frames)).half())
            texts.append(checkpoint.text_encoder.encode(clip.caption))
    about = {"bucket": str(shape), **dict(job.identities)}
    write_shard(shard_file(job.output, bucket, number), latents, texts, clips, about)
    return len(clips)


def encode_captions(job: Job, shards: Sequence[tuple[int, int]]) -> None:
    """Encodes the captions of shards, by bucket and number, where that takes the start of a large encoder: as few as
    can be. Workers that share this user's cache find them there.
    """
    encoder = _checkpoint(job.model, job.text).text_encoder
    if not isinstance(encoder, PretrainedTextEncoder) or encoder.folder is None:
        return
    waiting = dict[str, None]()
    for bucket in sorted({bucket for bucket, _ in shards}):
        listed = ClipList(clips_file(job.output, bucket))
        for number in (number for at, number in shards if at == bucket):
            first = number * job.shard_clips
            clips = listed.read(range(first, min(first + job.shard_clips, len(listed))))
            waiting |= dict.fromkeys(clip.caption for clip in clips)
            if len(waiting) >= _CAPTIONS:
                encoder.prepare(waiting)
                waiting.clear()
    encoder.prepare(waiting)


def _check_folders(job: Job) -> None:
    """A machine that does not share the folders must not take its videos for missing."""
    for name, place in (("source", Path(job.root)), ("output", job.output / SETTINGS)):
        if not place.exists():
            raise ConfigError(f"{name}: {place} is not there on {platform.node()}; every machine must share it")


@contextmanager
def _memory_advice(bucket: Bucket) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"the device's memory is full while encoding a clip of bucket {bucket}: use smaller buckets, fewer"
            " processes per device, or device=cpu; run again to go on"
        ) from error


def _nothing(video: SourceVideo) -> dict[str, Any]:
    return {"video": video.path, "frames": 0, "short_scenes": 0, "clips": []}


def _scan(job: Job, video: SourceVideo) -> dict[str, Any]:
    entry = _nothing(video)
    if video.caption is None:
        return {**entry, "skipped": "caption", "reason": "it has no caption"}
    checkpoint = _checkpoint(job.model, job.text)
    try:
        with _quiet():
            checkpoint.text_encoder.check(video.caption, checkpoint.text_encoder.max_length)
            is_cut = bool(checkpoint.text_encoder.unread(video.caption, checkpoint.text_encoder.max_length))
    except ConfigError as error:
        return {**entry, "skipped": "caption", "reason": str(error)}
    entry["unknown_words"] = bool(checkpoint.text_encoder.unknown_words(video.caption))
    try:
        with reading(job.output, video.path):
            place = locate(job.root, video.path)
            cut = {"cut": True} if job.damaged == "cut" else {}
            scan = scan_video(place, job.scene_cuts, **cut)
    except UnreachableError as error:  # listing it as damaged would leave it out for good
        raise EngineError(
            f"{error}; run again to go on: where that ends every run, prepare another folder without it"
        ) from error
    except MediaError as error:
        return {**entry, "skipped": "unreadable", "reason": str(error)}
    except ConfigError:
        raise
    except MemoryError as error:  # a size that no machine has, or one that this machine lacks today: looked at again
        reason = f"{video.path}: memory was lacking{f' ({error})' if str(error) else ''}"
        return {**entry, "skipped": "unreadable", "reason": reason}
    except Exception as error:  # a decoder's or detector's own; one video must not end a run over thousands
        logger.exception("%s", video.path)
        return {**entry, "skipped": "unreadable", "reason": f"{video.path}: {type(error).__name__}: {error}"}
    spec = checkpoint.codec_spec
    clips, short = plan_clips(video.path, video.caption, scan, job.buckets, spec, job.upscale)
    listed = [{"bucket": bucket, **clip.as_json()} for bucket, clip in clips]
    entry = {**entry, "frames": len(scan.times), "short_scenes": short, "clips": listed}
    if clips:
        kept = min(job.buckets[bucket].kept(*scan.size(clip.first)) for bucket, clip in clips)
        if scan.fault is not None:
            logger.warning("%s; the clips before are taken", scan.fault)
        more = {"cropped": kept < _LEAST_KEPT, "damaged": scan.fault is not None, "caption cut": is_cut}
        return {**entry, "remarks": [*scan.remarks, *(name for name, holds in more.items() if holds)]}
    if scan.fault is not None:
        return {**entry, "skipped": "unreadable", "reason": scan.fault}
    small = all(b.height > height or b.width > width for b in job.buckets for _, height, width in scan.sizes)
    if small and not job.upscale:
        least = smallest(job.buckets)
        size = "x".join(map(str, max((height, width) for _, height, width in scan.sizes)))
        reason = f"{size} is smaller than every bucket (smallest {least}); upscale=true enlarges it"
        return {**entry, "skipped": "small", "reason": reason}
    shortest = min(job.buckets, key=lambda bucket: bucket.seconds(spec))
    behind, ends = scan.shots(shortest.rate)
    longest = float(max(end - scan.times[first] for first, end in zip([0, *behind[:-1]], ends, strict=True)))
    between = " between gaps in its timestamps" if len(behind) > len(scan.cuts) + 1 else ""
    reason = (
        f"its longest scene{between} has {longest:.2f} s, no bucket for its shape is that short"
        f" (shortest {float(shortest.seconds(spec)):.2f} s)"
    )
    return {**entry, "skipped": "short", "reason": reason}


@lru_cache(maxsize=1)
def _checkpoint(model: str, text: TextOptions | None) -> Checkpoint:
    return replace(Checkpoint.open(model), text=text or TextOptions())


@lru_cache(maxsize=1)
def _encoders(model: str, text: TextOptions | None, device: str, worker: int) -> tuple[VideoCodec, Checkpoint]:
    """Loaded once per process; the processes of a machine share its GPUs in turn."""
    checkpoint = _checkpoint(model, text)
    if device == "cuda":
        device = f"cuda:{worker % torch.cuda.device_count()}"
    return load_codec(checkpoint.vae, device), checkpoint


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning per caption: unknown words and ends that are not read are counted and reported once."""
    loggers = [logging.getLogger(f"pavdm_dist.codecs.{name}") for name in ("text", "pretrained_text")]
    before = [each.disabled for each in loggers]
    for each in loggers:
        each.disabled = True
    try:
        yield
    finally:
        for each, disabled in zip(loggers, before, strict=True):
            each.disabled = disabled


def read_scan(output: Path, part: int) -> list[dict[str, Any]]:
    """What :func:`scan_part` wrote.

    Raises:
        ConfigError: it is damaged.
    """
    return _read_looked_at(scan_file(output, part))


def _read_looked_at(file: Path) -> list[dict[str, Any]]:
    try:
        return [{**entry, "video": entry["video"]} for entry in json_value(file.read_bytes())["videos"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error}): delete it; run again, and its videos are looked at") from error
