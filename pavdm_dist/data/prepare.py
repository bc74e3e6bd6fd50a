"""``pavdm data prepare``: videos and captions -> clips, and their latents and text embeddings on disk.

First every video is looked at (parts of ``scan/``), then the clips of every bucket are listed, then they are encoded
shard by shard; ``index.json`` comes last. Every file is a function of the settings and the videos and appears whole, so
a run that was killed is gone on with by running it again, and ends with the bytes of an unbroken one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.catalog import encoder_identity
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder, TextOptions
from pavdm_dist.data.buckets import Bucket, parse_buckets
from pavdm_dist.data.clips import ClipRef
from pavdm_dist.data.index import Captions, Sources, read_sources
from pavdm_dist.data.readers import forget, left_behind
from pavdm_dist.data.settled import settle, unreadable, without
from pavdm_dist.data.shards import (
    INDEX,
    SETTINGS,
    SIZES,
    VERSION,
    clips_file,
    read_index,
    shard_file,
    write_clips,
    write_json,
)
from pavdm_dist.data.work import Job, encode_captions, encode_shard, look_alone, read_scan, scan_file, scan_part
from pavdm_dist.data.workers import Run, WorkerDied, workers
from pavdm_dist.errors import ConfigError, EngineError, MediaError
from pavdm_dist.io.storage import is_remote, remove
from pavdm_dist.values.fields import FrameRate, TextDevice, TextDtype

logger = logging.getLogger(__name__)

# What users should know of videos that are taken.
_REMARKS = {
    "hdr": "are HDR: they are brought to the range of SDR",
    "transparent": "are transparent in parts: they are shown on black",
    "interlaced": "are interlaced: their fields are not taken apart",
    "perhaps mirrored": "are shown mirrored where they are stored so: data of an unknown kind hides whether they are",
    "damaged": "are damaged: the clips before the fault are taken",
    "caption cut": "have captions that are longer than the text encoder takes: their ends are not read",
    "cropped": "lose more than a quarter of their picture to buckets of another shape; one of theirs would keep it",
}
# Videos a worker looks at before it writes what it found: what a kill can cost, and files per million videos.
PART_VIDEOS = 8


@dataclass
class PrepareConfig:
    """Everything ``pavdm data prepare`` knows."""

    source: list[str] = field(default_factory=list)  # folders, videos, .csv and .jsonl files
    output: str = "prepared"  # folder of the data set
    model: str = "embedded"  # whose codec and text encoder are used
    buckets: list[str] = field(default_factory=list)  # HEIGHTxWIDTHxLATENTS@FPS; [] = one, as the model samples
    fps: FrameRate | None = None  # of buckets without @FPS; None = the model's
    captions: Captions = "required"  # of a video without one: an error, the file's name, or the video is left out
    scene_cuts: bool = True  # look for cuts; false = every video is one shot
    upscale: bool = False  # enlarge videos that are smaller than a bucket
    encode: bool = True  # false = list the clips only; training then reads pixels
    shard_clips: int = 32  # clips per shard
    strict: bool = False  # an unreadable video ends the run
    processes: int = 1  # workers on this machine
    threads: int = 1  # of torch in each worker; part of what the latents' last bits depend on
    device: Literal["cpu", "cuda"] = "cpu"  # where the codec runs
    text_device: TextDevice = "auto"  # of a pretrained text encoder, in a process of its own
    text_dtype: TextDtype = "bfloat16"  # what that text encoder computes in
    text_cache: str | None = None  # folder of what it has encoded; null = this user's
    ray_address: str | None = None  # cluster that takes the place of processes; sources and output are shared folders
    damaged: Literal["skip", "cut"] = "skip"  # cut = of a corrupt or truncated video, what is before the fault is used
    besides: list[str] = field(default_factory=list)  # data sets whose videos are left out: this one is for new ones


def prepare_command(config: PrepareConfig) -> dict[str, Any]:
    """Prepares a data set, or goes on with one.

    Returns:
        What to print: videos, clips per bucket, skipped videos with reasons, frames read per second.

    Raises:
        ConfigError: impossible settings, unusable sources, a folder made with other settings, no usable clip, or with
            ``strict`` an unreadable video.
        EngineError: a worker died, or the cluster cannot be reached.
    """
    _check(config)
    checkpoint = replace(Checkpoint.open(config.model), text=TextOptions.of(config))
    checkpoint.check_text()
    sources = without(read_sources(config.source, config.captions), config.besides)
    job = _job(config, checkpoint, sources)
    _tell_of_idle_gpus(config)
    gpu = config.device == "cuda"
    with _locked(job.output), workers(config.processes, config.ray_address, config.threads, gpu) as run:
        try:
            settle(job, config.encode, config.output, sources)
            return _prepare(job, config, sources, run)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"what is done is in {job.output}; run again to go on") from interrupt
        except (OSError, SafetensorError) as error:  # a full disk, a share that went away
            raise MediaError(f"output={config.output}: cannot be written: {error}; run again to go on") from error


def _prepare(job: Job, config: PrepareConfig, sources: Sources, run: Run) -> dict[str, Any]:
    began = time.monotonic()
    index = complete = _read_complete(job.output)
    frames = 0
    scanned = 1.0
    if index is None:
        parts = -(-len(sources.videos) // PART_VIDEOS)
        frames = _look(job, sources, parts, run)
        scanned = time.monotonic() - began
        index = _list_clips(job, config, sources, parts)
    if config.encode:
        _encode(job, index, run, config.ray_address is None)  # only shards that are missing
    if complete is None or complete["root"] != sources.root:
        write_json(job.output / INDEX, {**index, "root": sources.root})
    remove(job.output / "scan")
    forget(job.output)
    _check_readable(config, index["skipped"], index["videos"])
    return {
        "output": str(job.output),
        "videos": index["videos"],
        "clips": {bucket["bucket"]: bucket["clips"] for bucket in index["buckets"]},
        "shards": sum(len(bucket["shards"]) for bucket in index["buckets"]),
        "short_scenes": index["short_scenes"],
        "captions_with_unknown_words": index["captions_with_unknown_words"],
        "remarks": index.get("remarks", {}),
        "frames_read": frames,
        "frames_per_second": frames / scanned,
        "seconds": time.monotonic() - began,
        "skipped": index["skipped"],
    }


def _look(job: Job, sources: Sources, parts: int, run: Run) -> int:
    """Looks at all videos that were not looked at yet, also when one of them ends its reader; the frames read."""
    frames = 0
    look_alone(job, sources.videos, again=True)
    while True:
        missing = [p for p in range(parts) if not scan_file(job.output, p).exists() or unreadable(job.output, p)]
        tasks = ((job, p, sources.videos[p * PART_VIDEOS : (p + 1) * PART_VIDEOS]) for p in missing)
        try:
            for number, read in enumerate(run(scan_part, tasks), 1):
                frames += read
                logger.info("looked at %d of %d parts of the videos, %d frames", number, len(missing), frames)
            return frames
        except WorkerDied:
            if not look_alone(job, sources.videos):
                raise


def _list_clips(job: Job, config: PrepareConfig, sources: Sources, parts: int) -> dict[str, Any]:
    """The clip lists on disk, and the index that will complete the data set."""
    skipped: list[dict[str, str]] = []
    totals: Counter[str] = Counter()
    remarks: dict[str, list[str]] = {}
    for entry in (entry for part in range(parts) for entry in read_scan(job.output, part)):
        totals["short_scenes"] += entry["short_scenes"]
        totals["unknown"] += entry.get("unknown_words", False)
        totals["clips"] += len(entry["clips"])
        for remark in entry.get("remarks", ()):
            remarks.setdefault(remark, []).append(entry["video"])
        if "skipped" in entry:
            skipped.append({name: entry[name] for name in ("video", "skipped", "reason")})
    for entry in skipped:
        logger.warning("skipped %s: %s", entry["video"], entry["reason"])
    for remark, names in remarks.items():
        logger.warning("%d videos, the first of them %s, %s", len(names), names[0], _REMARKS[remark])
    _check_readable(config, skipped, len(sources.videos))
    if not totals["clips"]:
        # Nothing is kept, so that other settings may be tried in the same folder.
        for path in (job.output / "scan", job.output / SETTINGS, job.output / SIZES):
            remove(path)
        forget(job.output)
        reasons = "; ".join(f"{entry['video']}: {entry['reason']}" for entry in skipped[:3])
        raise ConfigError(f"none of {len(sources.videos)} videos gives a clip: {reasons}")
    buckets = []
    for number, bucket in enumerate(job.buckets):
        cut = any(job.output.glob(shard_file(job.output, number, 0).name.replace("00000", "*")))
        try:
            count = write_clips(clips_file(job.output, number), _clips_of(job.output, parts, number), same=cut)
        except ValueError as error:
            raise ConfigError(
                f"output={config.output}: its shards of {bucket} hold other clips than the videos give now: name"
                " another output, or delete that folder"
            ) from error
        shards = -(-count // job.shard_clips) if config.encode else 0
        names = [shard_file(job.output, number, shard).name for shard in range(shards)]
        buckets.append({"bucket": str(bucket), "clips": count, "shards": names})
    return {
        "version": VERSION,
        "root": sources.root,
        "videos": len(sources.videos),
        "short_scenes": totals["short_scenes"],
        "captions_with_unknown_words": totals["unknown"],
        "remarks": {remark: len(names) for remark, names in remarks.items()},
        "shard_clips": job.shard_clips,
        "identities": dict(job.identities),
        "buckets": buckets,
        "skipped": skipped,
    }


def _check_readable(config: PrepareConfig, skipped: list[dict[str, str]], videos: int) -> None:
    broken = [entry for entry in skipped if entry["skipped"] == "unreadable"]
    if config.strict and broken:
        raise ConfigError(
            f"{len(broken)} of {videos} videos cannot be read, the first: {broken[0]['reason']}; "
            "strict=false skips them"
        )


def _clips_of(output: Path, parts: int, bucket: int) -> Iterator[ClipRef]:
    for entry in (entry for part in range(parts) for entry in read_scan(output, part)):
        for clip in entry["clips"]:
            if clip.pop("bucket") == bucket:
                yield ClipRef.from_json(clip)


def _encode(job: Job, index: dict[str, Any], run: Run, ahead: bool) -> None:
    shards = [(b, n) for b, bucket in enumerate(index["buckets"]) for n in range(len(bucket["shards"]))]
    missing = [(job, b, n) for b, n in shards if not shard_file(job.output, b, n).exists()]
    if ahead:  # a cluster's workers have caches of their own, and the driver perhaps nothing that encodes
        encode_captions(job, [(b, n) for _, b, n in missing])
    clips = 0
    began = time.monotonic()
    try:
        for number, done in enumerate(run(encode_shard, missing), 1):
            clips += done
            rate = clips / (time.monotonic() - began)
            logger.info("encoded %d of %d shards, %.2f clips/s", len(shards) - len(missing) + number, len(shards), rate)
    except WorkerDied as error:
        names = " or ".join(left_behind(job.output))
        if not names:
            raise
        raise EngineError(
            f"{error}; it was reading {names}: where that ends every run, prepare another folder without it"
        ) from error


def _tell_of_idle_gpus(config: PrepareConfig) -> None:
    """What a cluster has is not asked for; there tasks ask for what they compute on."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not config.encode or config.ray_address is not None:
        return
    if count and config.device == "cpu":
        logger.warning(
            "%d GPUs of this machine stay idle: device=cpu encodes videos on CPUs; device=cuda encodes them on GPUs, in"
            " turns between the processes (CUDA_VISIBLE_DEVICES= says that CPUs are meant)",
            count,
        )
    elif config.device == "cuda" and config.processes < count:
        logger.warning(
            "%d of %d GPUs of this machine stay idle: processes=%d use one each; processes=%d use all"
            " (CUDA_VISIBLE_DEVICES=0 says that one is meant)",
            count - config.processes,
            count,
            config.processes,
            count,
        )


def _check(config: PrepareConfig) -> None:
    for name in ("shard_clips", "processes", "threads"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)}: must be at least 1")
    if is_remote(config.output):
        raise ConfigError(
            f"output={config.output}: must be a local folder, shards are memory-mapped; copy it afterwards"
        )
    if os.path.exists(config.output) and not os.path.isdir(config.output):
        raise ConfigError(f"output={config.output} is a file; name a folder")
    for name, value in () if config.encode else TextOptions.of(config).given:
        raise ConfigError(f"{name}={value}: is for captions that are encoded, encode=false encodes none; leave it out")
    for name in ("device", "text_device"):
        if getattr(config, name) == "cuda" and config.ray_address is None and not torch.cuda.is_available():
            raise ConfigError(f"{name}=cuda: there is no CUDA device here; nearest legal: cpu")
    if config.text_device == "cuda" and config.ray_address is not None and config.device == "cpu":
        raise ConfigError("text_device=cuda: on Ray tasks get a GPU with device=cuda alone; set that, too, or use cpu")
    if config.scene_cuts:
        from pavdm_dist.data.cuts import CutFinder

        CutFinder()


def _job(config: PrepareConfig, checkpoint: Checkpoint, sources: Sources) -> Job:
    encoder = checkpoint.text_encoder
    return Job(
        output=Path(config.output).absolute(),
        root=sources.root,
        # A name is resolved by every worker, whose package may lie elsewhere.
        model=str(Path(config.model).absolute()) if os.path.isdir(config.model) else config.model,
        buckets=tuple(_buckets(config, checkpoint)),
        scene_cuts=config.scene_cuts,
        upscale=config.upscale,
        shard_clips=config.shard_clips,
        device=config.device,
        threads=config.threads,
        damaged=config.damaged,
        text=_anywhere(checkpoint.text) if config.encode and isinstance(encoder, PretrainedTextEncoder) else None,
        identities=(
            ("codec", encoder_identity(checkpoint.vae)),
            ("text_encoder", encoder.identity),
        )
        if config.encode
        else (),
    )


def _anywhere(options: TextOptions) -> TextOptions:
    """For workers, which may start in folders of their own."""
    return options if options.cache is None else replace(options, cache=os.path.abspath(options.cache))


def _buckets(config: PrepareConfig, checkpoint: Checkpoint) -> list[Bucket]:
    defaults = checkpoint.defaults
    fps = defaults.fps if config.fps is None else config.fps
    # A chunk more than a window, whose place can vary: not every one is to begin with a clip's first latent.
    window = defaults.latent_chunk_size * (defaults.window_chunks + defaults.context_chunks + 1)
    texts = config.buckets or [f"{defaults.height}x{defaults.width}x{window}"]
    return parse_buckets(texts, fps, checkpoint.codec_spec)


def _read_complete(output: Path) -> dict[str, Any] | None:
    """The index of a complete data set; None = none yet, or one that is damaged, which is made again."""
    if not (output / INDEX).exists():
        return None
    try:
        return read_index(output, "output")
    except ConfigError as error:
        if isinstance(error.__cause__, OSError):  # a share that is away has it nevertheless
            raise error.__cause__ from error
        logger.warning("%s; all videos are looked at again", error)
        return None


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it; a run that was refused leaves no empty one behind."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be made: {error.strerror}") from error
    try:
        folder = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be opened: {error.strerror}") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"output={output}: another run is preparing this folder") from error
        except OSError as error:
            logger.warning(
                "output=%s: its file system knows no locks (%s); see that no other run uses it", output, error
            )
        yield
    finally:
        os.close(folder)
        with suppress(OSError):
            output.rmdir()
