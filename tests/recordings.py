"""A sampler, a decoder and ways to record them, with which tests kill recordings and compare what comes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from pavdm_dist.io.latents import latents_sha256, read_latents
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.io.recording import Recording
from pavdm_dist.io.state import Point

HEIGHT, WIDTH, RATE, CHUNKS, LATENTS = 32, 48, 24, 7, 2
IDENTITY = {"prompt": "a red three", "seed": 3, "sampling": {"num_inference_steps": 6, "levels": [1, 0.5]}}
FACTS = {"config": {}, "prompt": "a red three", "negative_prompt": None, "seed": 3, "device": "cpu", "threads": 1}


class Sampler:
    """Chunks that follow from one another, as those of a window do."""

    def __init__(self, point: Point | None) -> None:
        self.chunk = 0 if point is None else point.facts["chunk"]
        self.x = torch.linspace(-1, 1, 2 * LATENTS * 2 * 3).reshape(2, LATENTS, 2, 3)
        if point is not None:
            self.x = point.tensors["x"]

    def __next__(self) -> Tensor:
        self.x = torch.sin(3 * self.x + self.chunk)
        self.chunk += 1
        return self.x


class Decoder:
    """Four frames a latent, one for the first, that show the two latents before it as well."""

    def __init__(self, warm: Tensor | None) -> None:
        self.seen: list[Tensor] = [] if warm is None else list(warm.unbind(1))

    def __call__(self, latents: Tensor) -> np.ndarray:
        frames = []
        for latent in latents.unbind(1):
            count = 4 if self.seen else 1
            self.seen = [*self.seen[-2:], latent]
            shown = sum((0.5**age * 60 * seen[0] for age, seen in enumerate(reversed(self.seen))), torch.tensor(128.0))
            picture = shown.clamp(0, 255).to(torch.uint8).repeat_interleave(16, 0).repeat_interleave(16, 1)
            frames += [torch.stack([picture + step, picture, 255 - picture], dim=-1).numpy() for step in range(count)]
        return np.stack(frames)


class Clock:
    """Seconds that pass by ``step`` at every look."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@dataclass(frozen=True)
class Way:
    """A way to record: chunks in a segment, every how many chunks a sampler gives a point (0 = never), the clock."""

    group: int = 2
    points: int = 1
    step: float = 0.0

    def open(self, output: Path | str, **options: Any) -> Recording:
        settings = {"identity": IDENTITY, "chunks_per_segment": self.group, "save_latents": True} | options
        size = {"fps": RATE, "height": HEIGHT, "width": WIDTH}
        return Recording.open(output, **size, **settings, clock=Clock(self.step))

    def go_on(self, made: Recording, until: int = CHUNKS) -> None:
        """Does what a driver does with a recording, up to chunk ``until``, which is not made."""
        decode, following = Decoder(made.warm), Sampler(made.point)
        for index, latents in made.pending.items():
            if index < until:
                made.write(index, decode(latents), latents)
        for index in range(made.next_chunk, until):
            latents = next(following)
            point = None
            if self.points and (index + 1) % self.points == 0:
                warm = torch.cat([seen.unsqueeze(1) for seen in [*decode.seen, *latents.unbind(1)]][-3:], dim=1)
                point = Point({"x": latents}, {"chunk": index + 1}, warm)
            made.write(index, decode(latents), latents, point)


def packets(path: Path | str) -> list[tuple[int, int, bytes]]:
    """Times and bytes of a file's packets."""
    with av.open(str(path)) as container:
        assert container.streams.video[0].time_base is not None
        return [(packet.pts, packet.duration, bytes(packet)) for packet in container.demux(video=0) if packet.size]


def result(output: Path) -> tuple[Any, ...]:
    """All of a complete video that must be the same however it came about."""
    assert not Path(f"{output}.parts").exists()
    sidecar = read_sidecar(output)
    latents = read_latents(output.with_suffix(".safetensors"))
    assert sidecar["latents_sha256"] == latents_sha256(latents)
    assert len(sidecar["chunk_seconds"]) == CHUNKS
    return packets(output), latents.numpy().tobytes(), sidecar["latents_sha256"], sidecar["num_frames"]


def kill(made: Recording) -> None:
    """What is left in memory is gone, nothing was tidied up."""
    segments = made._segments
    segments._encoder = None  # the file it was writing stays, unfinished
    with suppress(Killed):
        made._saver.wait()  # its thread is this process'
    made._lock.release()


def undisturbed_runs(folders: pytest.TempPathFactory) -> Callable[[int], tuple[Any, ...]]:
    """By chunks in a segment, the result of a run without interruption."""
    results: dict[int, tuple[Any, ...]] = {}

    def of(group: int) -> tuple[Any, ...]:
        if group not in results:
            output = folders.mktemp("undisturbed") / "v.mp4"
            made = Way(group).open(output)
            Way(group).go_on(made)
            done = made.finish(FACTS, {"seed": 3})
            results[group] = result(output)
            assert done.num_frames == results[group][3] == 5 + 8 * (CHUNKS - 1)
            assert done.latents_sha256 == results[group][2]
        return results[group]

    return of


class Killed(BaseException):
    """Stands for the end of a process."""


def child(output: str, way: Way, then: str) -> subprocess.Popen[str]:
    """Another process that records; ``then`` is what it does with ``made``, ``way`` and this module, ``t``."""
    script = f"""
import os, signal, sys, time
import recordings as t
from pavdm_dist.io.latents import LatentsWriter
way = t.Way({way.group}, {way.points}, {way.step})
made = way.open({output!r}, **({{"resume": True}} if os.path.exists({output + ".parts"!r}) else {{}}))
print("open", flush=True)
{then}
"""
    folders = os.pathsep.join(str(Path(__file__).parent / folder) for folder in (".", ".."))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": folders},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process
