"""The videos of ``drift.py``: the same prompts and the same noise for every method, one process a core.

Every video is what ``pavdm sample`` would write, in ``WORK/METHOD/pNNNN-sSEED.mp4`` with its sidecar; what is complete
is left alone and what was begun goes on. Beside each lies what it cost, ``pNNNN-sSEED.cost.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.resolve import open_checkpoint, sampling_params
from pavdm_dist.commands.sample import check_videos, render_command
from pavdm_dist.commands.signals import Signals
from pavdm_dist.commands.videos import WantedVideo
from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.digits.settings import SIZE
from pavdm_dist.digits.world import FPS, Scene, render, sample_scene, scene_prompt
from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.io.differences import changes
from pavdm_dist.io.encode import export_to_video
from pavdm_dist.io.metadata import Sidecar, cpu_model, is_complete, read_sidecar, sidecar_path, weights_identity
from pavdm_dist.io.parts import parts_folder
from pavdm_dist.io.storage import atomic_write, exists
from pavdm_dist.models.loading import weight_files
from pavdm_dist.values.merging import load_config

# What is compared, each by the settings that `pavdm sample` would be given.
METHODS: dict[str, tuple[str, ...]] = {
    "pavdm": (),
    "causal": ("mode=causal",),
    "displaced": ("mode=displaced",),
    "replacement": ("method=replacement",),
    "replacement-noise": ("method=replacement-noise",),
    "fifo": ("method=fifo",),
    "autoregressive": ("method=autoregressive",),
}
# Held-out scenes themselves, as they are and through the codec: no model makes them.
REFERENCES = ("real", "codec")
# The codec takes a clip whole, of 4n + 1 frames: ten seconds and the first one at most.
_CODEC_FRAMES = 241
# Seeds of a prompt lie this far apart, so that those of two prompts never meet.
_SEED_STEP = 100_000
# Processes that were told to stop have so long for what they are writing; what was written before then is kept.
_STOPPING_S = 60.0
# Videos that lack so much of a slice's time are not begun: the longest one so far, and a little.
_RESERVE = 1.1


@dataclass(frozen=True)
class Variant:
    """A way to make videos.

    Attributes:
        name: of it, and of its folder.
        words: ``key=value`` as ``pavdm sample`` takes them; of a reference none.
    """

    name: str
    words: tuple[str, ...] = ()

    @property
    def is_reference(self) -> bool:
        return self.name in REFERENCES


@dataclass(frozen=True)
class Job:
    """One video to be made."""

    variant: Variant
    number: int  # of the scene
    seed: int
    frames: int
    path: str
    digits: int | None


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``error`` where it failed, neither where no time was left to begin it."""

    job: Job
    seconds: float | None = None
    error: str | None = None


def variants_of(
    names: Sequence[str], further: Sequence[str], models: Sequence[str], common: Sequence[str]
) -> list[Variant]:
    """The ways to be compared.

    Args:
        names: of ``METHODS`` and ``REFERENCES``.
        further: ``NAME:key=value,key=value``.
        models: ``NAME=FOLDER``; a way without one has its method's, else that of pavdm, else the shipped one.
        common: settings of all that a way does not give itself.

    Raises:
        ConfigError: naming the word that is none of these.
    """  # fmt: skip
    known = [*METHODS, *REFERENCES]
    for name in names:
        if name not in known:
            raise ConfigError(f"methods={name}: must be of {', '.join(known)}")
    chosen: dict[str, tuple[str, ...]] = {name: METHODS.get(name, ()) for name in names}
    for word in further:
        name, colon, settings = word.partition(":")
        if not colon or not settings or not name or "/" in name or name.startswith("."):
            raise ConfigError(f"variants={word}: write NAME:key=value,key=value")
        if name in known or name in chosen:
            raise ConfigError(f"variants={word}: {name} is taken; choose another name")
        chosen[name] = tuple(settings.split(","))
    folders = dict(_named_model(word, chosen) for word in models)

    def words(name: str, own: tuple[str, ...]) -> tuple[str, ...]:
        given = {word.partition("=")[0] for word in own}
        method = next((word.removeprefix("method=") for word in own if word.startswith("method=")), "pavdm")
        model = folders.get(name) or folders.get(method) or folders.get("pavdm")
        basis = [f"model={model}"] if model and "model" not in given else []
        return (*basis, *(word for word in common if word.partition("=")[0] not in given), *own)

    return [Variant(name, () if name in REFERENCES else words(name, own)) for name, own in chosen.items()]


def _named_model(word: str, chosen: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    name, equals, folder = word.partition("=")
    if not equals or not folder or name not in {*METHODS, *chosen}:
        raise ConfigError(f"models={word}: write NAME=FOLDER, NAME being of {', '.join({**METHODS, **chosen})}")
    return name, folder


def scene_of(number: int, digits: int | None) -> Scene:
    """Held-out scene ``number``, as in ``embedded.py``."""
    return sample_scene(np.random.default_rng((53, number)), "heldout", digits)


def jobs_of(
    work: Path, variants: Sequence[Variant], prompts: int, seeds: int, frames: int, digits: int | None
) -> list[Job]:
    """Every video, references first, then prompt by prompt, so that whenever it is stopped all methods have as many."""

    def job(variant: Variant, number: int, repetition: int) -> Job:
        seed = number + repetition * _SEED_STEP
        length = frames if variant.name != "codec" else (min(frames, _CODEC_FRAMES) - 1) // 4 * 4 + 1
        path = work / variant.name / f"p{number:04d}-s{seed}.mp4"
        return Job(variant, number, seed, length, str(path), digits)

    references = [job(one, number, 0) for one in variants if one.is_reference for number in range(prompts)]
    return references + [
        job(one, number, repetition)
        for repetition in range(seeds)
        for number in range(prompts)
        for one in variants
        if not one.is_reference
    ]


def config_of(job: Job) -> SampleConfig:
    """Settings of ``pavdm sample`` that make a job's video.

    Raises:
        ConfigError: a setting that is none.
    """
    words = (f"prompt={scene_prompt(scene_of(job.number, job.digits))}", f"seed={job.seed}", f"output={job.path}")
    config = load_config(SampleConfig, None, (*job.variant.words, *words, f"num_frames={job.frames}"))
    validate_sample(config)
    return config


def missing(jobs: Sequence[Job]) -> list[Job]:
    """What is still to be made, once all of it was found possible.

    Raises:
        PAVDMError: a setting or a model that cannot be used, or a complete video that was made otherwise.
    """
    left: list[Job] = []
    for variant in dict.fromkeys(job.variant for job in jobs):
        own = [job for job in jobs if job.variant == variant]
        if variant.is_reference:
            left += [job for job in own if not _is_referred(job)]
            continue
        configs = [config_of(job) for job in own]
        try:
            _check_world(configs[0])
            shots = [WantedVideo(str(one.prompt), one.seed, one.output) for one in configs]
            for job in own:
                Path(job.path).parent.mkdir(parents=True, exist_ok=True)
            videos = check_videos(configs[0], False, shots)
        except PAVDMError as error:
            raise type(error)(f"{variant.name}: {error}") from error
        left += [job for job, video in zip(own, videos.all, strict=True) if video.result is None]
    order = {job: place for place, job in enumerate(jobs)}
    return sorted(left, key=lambda job: order[job])


def _check_world(config: SampleConfig) -> None:
    """Refuses what the judge could not read."""
    params = sampling_params(config, open_checkpoint(config))
    if (params.height, params.width, params.fps) != (SIZE, SIZE, FPS):
        raise ConfigError(
            f"height={params.height} width={params.width} fps={params.fps:g}: the prompts are of a world of"
            f" {SIZE}x{SIZE} pixels at {FPS} fps"
        )


def is_there(job: Job) -> bool:
    """Whether a job's video is complete."""
    if not is_complete(job.path) or not exists(job.path):
        return False
    if job.variant.is_reference:
        return _made_as(job.path) == reference_identity(job)
    return bool(read_sidecar(job.path)["num_frames"] == job.frames)


def _is_referred(job: Job) -> bool:
    """Whether a reference is complete and of this job's scene; one that does not say what it is of is made again.

    Raises:
        ConfigError: it is of another scene, length, world or codec.
    """
    if not is_complete(job.path) or not exists(job.path) or not (found := _made_as(job.path)):
        return False
    if different := changes(found, reference_identity(job)):
        raise ConfigError(
            f"{job.variant.name}: output={job.path} was made with {different}; choose another --work or remove that"
            f" file and its sidecar {sidecar_path(job.path)}"
        )
    return True


def _made_as(path: str) -> Mapping[str, Any]:
    """Identity of a complete video; {} where its sidecar has none."""
    found = read_sidecar(path).get("identity")
    return found if isinstance(found, Mapping) else {}


def reference_identity(job: Job) -> dict[str, Any]:
    """What a reference's pictures depend on, as JSON gives it back: the scene, how long it is, its world, the codec."""
    drawn = scene_of(job.number, job.digits)
    scene = asdict(drawn)
    world = scene.pop("world")
    identity = {
        "prompt": scene_prompt(drawn),
        "seed": job.seed,
        "num_frames": job.frames,
        "scene": scene,
        "world": world,
        "codec": _codec_identity() if job.variant.name == "codec" else None,
    }
    return json.loads(json.dumps(identity))


@cache
def _codec_identity() -> str:
    codec = Checkpoint.open("embedded").vae
    return weights_identity(codec.folder(), ["config.json", *weight_files(codec)])


def make_all(
    jobs: Sequence[Job], workers: int, minutes: float | None, told: Callable[[Outcome], None]
) -> list[Outcome]:
    """Makes videos in processes of one thread each.

    Args:
        jobs: in the order of their beginning.
        workers: processes.
        minutes: after which none is begun, nor any that would probably end later; None = all are made.
        told: called with each outcome as it comes.

    Raises:
        KeyboardInterrupt: a signal; what was begun is left to be gone on with.
    """  # fmt: skip
    context = multiprocessing.get_context("spawn")
    until = None if minutes is None else time.time() + 60 * minutes
    waiting, results = context.Queue(), context.Queue()
    for job in [*jobs, *[None] * workers]:
        waiting.put(job)
    crew = [context.Process(target=_worker, args=(waiting, results, until)) for _ in range(workers)]
    outcomes: list[Outcome] = []
    try:
        for process in crew:
            process.start()
        while len(outcomes) < len(jobs):
            try:
                outcome = results.get(timeout=1.0)
            except queue.Empty:
                if not any(process.is_alive() for process in crew):
                    break  # all were killed
                continue
            outcomes.append(outcome)
            told(outcome)
    finally:
        _end([process for process in crew if process.pid is not None], stop=len(outcomes) < len(jobs))
        waiting.cancel_join_thread()
    found = {outcome.job for outcome in outcomes}
    return outcomes + [Outcome(job, error="its process was killed") for job in jobs if job not in found]


def _end(started: Sequence[Any], stop: bool) -> None:
    """Waits for processes, of which none outlives this.

    Args:
        started: those that were; others cannot be waited for.
        stop: they are in the middle of something and are told so.
    """
    if stop:
        for process in started:
            process.terminate()
    until = time.monotonic() + _STOPPING_S
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _worker(waiting: Any, results: Any, until: float | None) -> None:
    torch.set_num_threads(1)
    begun: Job | None = None
    try:
        with Signals(of_process=True):
            longest = 0.0
            for job in iter(waiting.get, None):
                if until is not None and time.time() + _RESERVE * longest >= until:
                    results.put(Outcome(job))
                    continue
                begun = job
                outcome = _made(job)
                begun = None
                longest = max(longest, outcome.seconds or 0.0)
                results.put(outcome)
    except KeyboardInterrupt as stopped:
        if begun is not None:  # a method says what is left of its video
            print(f"{begun.path}: stopped: {str(stopped) or 'nothing was finished'}", file=sys.stderr, flush=True)


def _made(job: Job) -> Outcome:
    started = time.monotonic()
    try:
        (_refer if job.variant.is_reference else _sample)(job)
    except (PAVDMError, OSError) as error:
        return Outcome(job, error=f"{job.path}: {error}")
    except Exception as error:  # of torch or a library: one video must not end the rendering of the others
        traceback.print_exc()
        return Outcome(job, error=f"{job.path}: {type(error).__name__}: {error}")
    return Outcome(job, time.monotonic() - started)


class _Silent:
    """Progress that nobody watches: what is done is told video by video."""

    draws = False

    def __init__(self, *_: object) -> None: ...

    def found(self, *_: object) -> None: ...

    def chunk(self, *_: object) -> None: ...

    def close(self) -> None: ...


def _sample(job: Job) -> None:
    begun, before = exists(parts_folder(job.path)), time.process_time()
    render_command(config_of(job), overwrite=False, progress=_Silent)
    # Of a video that was gone on with, nobody knows what its beginning cost.
    spent = None if begun else time.process_time() - before
    with atomic_write(cost_path(job.path), "w") as file:
        json.dump({"cpu_seconds": spent, "cpu": cpu_model(), "seconds_of_video": job.frames / FPS}, file)


def cost_path(video: str) -> str:
    return str(Path(video).with_suffix(".cost.json"))


def _refer(job: Job) -> None:
    """A scene as the world draws it, or as the codec gives it back."""
    scene = scene_of(job.number, job.digits)
    checkpoint = Checkpoint.open("embedded")
    frames = render(scene, 0, job.frames)
    if job.variant.name == "codec":
        frames = checkpoint.codec.decoder().decode(checkpoint.codec.encode(torch.from_numpy(frames))).numpy()
    Path(job.path).parent.mkdir(parents=True, exist_ok=True)
    export_to_video(frames, job.path, FPS)
    spec, size = checkpoint.codec_spec, checkpoint.defaults.latent_chunk_size
    extra = {"chunk_frames": [spec.frames_in_chunk(size, first) for first in (True, False)]}
    facts = {"method": job.variant.name}
    sidecar = Sidecar(
        facts, scene_prompt(scene), None, job.seed, job.frames, float(FPS), SIZE, SIZE, cpu_model(), 1,
        identity=reference_identity(job), extra=extra,
    )  # fmt: skip
    sidecar.write(job.path)


def tell(outcome: Outcome) -> None:
    """One line on stderr for what was made or failed."""
    if outcome.error is not None:
        print(outcome.error, file=sys.stderr, flush=True)
    elif outcome.seconds is not None:
        print(f"{outcome.job.path}: {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
