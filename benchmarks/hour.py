"""An hour of video by `pavdm sample`, killed on the way and given again: memory over time, and whether all is there.

    python benchmarks/hour.py [--quick] [--json] [--minutes M] [--stages P] [--kills N]

86,400 frames of 16x16 pixels at 24 fps from a tiny untrained model with its codec, so that what the length costs shows
beside what a frame costs. The command is killed (SIGKILL) N times at equal distances and given again each time. While
it runs, private memory of its process, and of its actors, is read four times a second (Linux). Compared are:

* the checksum of all latents, with that of the sampler's loop in this process, which neither decodes nor writes;
* frames and timestamps of the mp4: as many as asked for, frame i at i / 24 s;
* packets of the segments round every place where a command went on, with those of the same latents, decoded and encoded
  here without an interruption.

Per command and process: megabytes, as medians of the eighths of its life behind the warm-up (a fifth, 2 s or more).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import torch
from common import machine, machine_line, parser

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import hear_signals, tiny_checkpoint

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.io.encode import EncoderOptions, VideoEncoder
from pavdm_dist.io.latents import LatentsHash, read_latents
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.sampler import sample
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream
from pavdm_dist.request.video_request import VideoRequest
from pavdm_dist.values.rates import as_rate

PROMPT, FPS, SIDE, CHUNK, GROUP = "a red three drifting up", 24, 16, 8, 6
SAMPLING: dict[str, Any] = {
    "height": SIDE, "width": SIDE, "num_inference_steps": 3, "window_chunks": 3, "latent_chunk_size": CHUNK,
    "guidance_scale": 1.0,
}  # fmt: skip
EVERY_S, LEAST_WARM_UP_S = 0.25, 2.0


@dataclass
class Life:
    """One command from its start to its end.

    Attributes:
        times: when a chunk was given, by chunk.
        memory: by process, (seconds since its start, kB).
    """

    times: dict[int, float] = field(default_factory=dict)
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    went_on_at: int = 0
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, help="length of the video (60; 1 with --quick)")
    options.add_argument("--stages", type=int, default=0, help="num_stages of the command (0)")
    options.add_argument("--kills", type=int, default=2, help="how often it is killed (2)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    frames = round(60 * FPS * (arguments.minutes or (1 if arguments.quick else 60)))
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), frames, arguments.stages, arguments.kills)
    print(json.dumps(report) if arguments.json else table(report))


def run(folder: Path, frames: int, stages: int, kills: int) -> dict[str, Any]:
    """Renders, kills, renders on and compares; every command's own account."""
    model, output = tiny_checkpoint(folder / "model"), folder / "hour.mp4"
    chunks = -(-(frames + 3) // (4 * CHUNK))
    words = {"model": model, "output": output, "num_frames": frames, "fps": FPS, "num_stages": stages, **SAMPLING}
    words |= {"save_latents": "true", "chunks_per_segment": GROUP, "cpus_per_stage": 0.5} if stages else {
        "save_latents": "true", "chunks_per_segment": GROUP,
    }  # fmt: skip
    command = [sys.executable, "-m", "pavdm_dist", "sample", PROMPT, *(f"{k}={v}" for k, v in words.items())]
    parts, largest = Path(f"{output}.parts"), {}
    lives = []
    for kill in range(1, kills + 2):
        lives.append(_lived(command, chunks * kill // (kills + 1) if kill <= kills else None))
        if kill <= kills:
            largest = {path.name: path.stat().st_size for path in parts.iterdir() if "segment-" not in path.name}
            largest = {name: size for name, size in largest.items() if "latents-" not in name}
    started = time.monotonic()
    reference = _reference(model, frames, chunks)
    reference_s = time.monotonic() - started
    sidecar = read_sidecar(output)
    packets = _packets(output)
    return {
        "machine": machine(),
        "num_stages": stages,
        "frames": frames,
        "chunks": chunks,
        "seconds": round(sum(life.seconds for life in lives), 1),
        "reference_seconds": round(reference_s, 1),
        "frames_on_disk": len(packets),
        "without_gap": [(p[0], p[1]) for p in packets] == [(i, i) for i in range(frames)],
        "chunk_seconds": len(sidecar["chunk_seconds"]),
        "equal_latents": sidecar["latents_sha256"] == reference,
        "equal_packets": _equal_packets(model, output, packets, [life.went_on_at for life in lives[1:]]),
        "files_at_last_kill": largest,
        "lives": [_account(life) for life in lives],
    }


def _lived(command: list[str], until: int | None) -> Life:
    """Runs the command; kills it when it has given chunk ``until``."""
    life, started = Life(), time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals)
    over = threading.Event()
    watching = threading.Thread(target=_watch, args=(process.pid, life, started, over))
    watching.start()
    assert process.stderr is not None
    for line in process.stderr:
        if "INFO chunk" in line:
            index = int(line.split("INFO chunk")[1].split(":")[0])
            life.times[index] = time.monotonic() - started
            if index == until:
                process.kill()
                break
        else:
            life.said = [*life.said[-20:], line]
            if "goes on at chunk" in line:
                life.went_on_at = int(line.split()[-1])
    process.stderr.close()
    status = process.wait()
    life.seconds = time.monotonic() - started
    over.set()
    watching.join()
    if status != (0 if until is None else -9):
        raise SystemExit(f"pavdm sample ended with {status}:\n{''.join(life.said)}")
    return life


def _watch(pid: int, life: Life, started: float, over: threading.Event) -> None:
    while not over.wait(EVERY_S):
        for name, kb in _memory(pid).items():
            life.memory.setdefault(name, []).append((time.monotonic() - started, kb))


def _memory(pid: int) -> dict[str, int]:
    """Private kB of a process and of the actors below it, by name."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                names[int(folder.name)] = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
                parents[int(folder.name)] = int(stat[1])
            except OSError:  # it is gone
                continue
    found = {}
    for one, name in names.items():
        above = one
        while above not in (pid, 0, 1):
            above = parents.get(above, 0)
        if above == pid and (one == pid or "Actor" in name):
            try:
                status = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
                label = "driver" if one == pid else f"{name.removeprefix('ray::').split('.')[0].split(':')[0]} {one}"
                found[label] = int(status["RssAnon"].split()[0])
            except (OSError, KeyError):
                continue
    return found


def _account(life: Life) -> dict[str, Any]:
    times = list(life.times.values())
    warm = times[0] + max(LEAST_WARM_UP_S, (times[-1] - times[0]) / 5)
    eighth = max(1, (len(times) - len(times) // 5) // 8)
    pace = [b - a for a, b in pairwise(times)]
    memory = {}
    for name, samples in life.memory.items():
        settled = [kb for at, kb in samples if warm <= at <= times[-1]]
        if len(settled) >= 8:
            size = len(settled) // 8
            eighths = [round(statistics.median(settled[i * size : (i + 1) * size]) / 1024, 2) for i in range(8)]
            memory[name] = eighths
    return {
        "went_on_at": life.went_on_at,
        "chunks": len(times),
        "seconds": round(life.seconds, 1),
        "until_first_chunk_s": round(times[0], 1),
        "after_last_chunk_s": round(life.seconds - times[-1], 1),
        "chunk_ms_early_late": [
            round(1000 * statistics.median(part), 2) for part in (pace[len(pace) // 5 :][:eighth], pace[-eighth:])
        ],
        "memory_mb": memory,
    }


def _reference(model: Path, frames: int, chunks: int) -> str:
    """Checksum of the latents that the sampler's loop gives, undisturbed."""
    checkpoint = Checkpoint.open(str(model))
    params = SamplingParams.resolve(checkpoint, fps=FPS, **SAMPLING)
    stream = build_stream(VideoRequest(PROMPT, 0, frames), 0, params, checkpoint)
    assert stream.plan.num_chunks == chunks
    digest = LatentsHash()
    for clean in sample(stream.window(), StreamDenoiser(checkpoint.backbone, stream), stream.guidance_scale):
        digest.update(clean.latents)
    return digest.hexdigest()


def _equal_packets(model: Path, output: Path, packets: list[tuple[int, int, bytes]], places: list[int]) -> bool:
    """Whether the segments before, at and behind every place are those of the latents, decoded without a break."""
    latents, codec = read_latents(output.with_suffix(".safetensors")), WanCodec.from_pretrained(model / "vae")
    keep, size = codec.receptive_latents(), CHUNK * GROUP
    for place in places:
        decoder, first = codec.decoder(), max(0, place // GROUP - 1)
        warm = latents[:, max(0, first * size - keep) : first * size]
        if warm.shape[1]:
            decoder.warm(warm)
        for group in range(first, first + 3):
            part = latents[:, group * size : (group + 1) * size]
            if not part.shape[1]:
                break
            path = output.with_name("again.mp4")
            encoder = VideoEncoder(path, as_rate(FPS), SIDE, SIDE, EncoderOptions())
            for frame in decoder.decode(part).numpy():
                encoder.write(frame)
            encoder.close()
            again = [data for _, _, data in _packets(path)]
            at = max(0, 4 * group * size - 3)
            there = [data for _, _, data in packets[at : at + len(again)]]
            if there != again[: len(there)] or len(there) < min(len(again), len(packets) - at):
                return False
    return True


def _packets(path: Path) -> list[tuple[int, int, bytes]]:
    """Presentation and decoding time, in frames, and bytes of every packet."""
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        unit = 1 / (stream.time_base * FPS)
        return [(int(p.pts / unit), int(p.dts / unit), bytes(p)) for p in container.demux(stream) if p.size]


def table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), ""]
    lines += [f"{name}: {value}" for name, value in report.items() if name not in ("machine", "lives")]
    for life in report["lives"]:
        lines += ["", *(f"  {name}: {value}" for name, value in life.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
