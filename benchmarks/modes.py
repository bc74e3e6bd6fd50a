"""What modes causal and displaced do to the embedded model's videos, beside mode window on the same noise.

    python benchmarks/modes.py [--quick] [--json] [--videos N] [--seconds S] [--model FOLDER] [--plot FILE.png]

Displaced runs with a re-sync every 1, 5, 10, 25 and 50 steps and never, growing windows displaced like all others. Per
setting: relative L2 of the velocity per tenth of the noise level (against the whole window on the same latents, at one
row in seven, which meets all phases of a shift); PSNR of the latents against window's, with window's own range as peak;
deviation of the latents in the last second over that in the first; digit and colour read back in the first and last
five seconds. PSNR falls to that of two unrelated videos wherever paths part, however good both are.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from common import machine, machine_line, parser
from embedded import CHUNK_FRAMES, EDGE_CHUNKS, FPS, opened, reader
from torch import Tensor

from pavdm_dist.digits.prompts import parse_prompt
from pavdm_dist.digits.scores import score_chunks, summarise
from pavdm_dist.digits.world import sample_scene, scene_prompt
from pavdm_dist.method.denoiser import ModelDenoiser, StreamDenoiser
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import Mode, PlanRow
from pavdm_dist.method.stream import Stream
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream
from pavdm_dist.request.video_request import VideoRequest

PERIODS: tuple[int | None, ...] = (1, 5, 10, 25, 50, None)
COMPARED_EVERY = 7


@dataclass(frozen=True)
class Job:
    """One video in one setting."""

    setting: str
    number: int
    model: str
    frames: int
    mode: Mode
    displaced: Displaced


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="embedded", help="model folder (the embedded one)")
    options.add_argument("--videos", type=int, help="prompts and seeds (3; 1 with --quick)")
    options.add_argument("--seconds", type=float, help="length (60; 10 with --quick), at least 10")
    options.add_argument("--plot", help="picture of the velocities' errors")
    options.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    args = options.parse_args()
    frames = round((args.seconds or (10 if args.quick else 60)) * FPS)
    numbers = range(args.videos or (1 if args.quick else 3))
    periods = (1, 10, None) if args.quick else PERIODS
    settings: dict[str, tuple[Mode, Displaced]] = {"window": ("window", Displaced()), "causal": ("causal", Displaced())}
    for every in periods:
        name = "displaced, never" if every is None else f"displaced, every {every}"
        settings[name] = ("displaced", Displaced(every, exact_growing=False))
    jobs = [Job(name, i, args.model, frames, *setting) for name, setting in settings.items() for i in numbers]
    with multiprocessing.get_context("spawn").Pool(min(args.workers, len(jobs))) as pool:
        done = dict(zip(((j.setting, j.number) for j in jobs), pool.map(run, jobs, chunksize=1), strict=True))
    rows = [_row(name, [done[name, i] for i in numbers], [done["window", i] for i in numbers]) for name in settings]
    report = {
        "machine": machine(),
        "model": str(args.model),
        "videos": len(numbers),
        "seconds": frames / FPS,
        "rows": rows,
    }
    if args.plot:
        plot(rows, args.plot)
    print(json.dumps(report) if args.json else _table(report))


class Compared:
    """A stream's denoiser that also runs the whole window now and then, and adds up how far the two are apart."""

    def __init__(self, job: Job, stream: Stream) -> None:
        backbone = opened(job.model).backbone
        self._denoise, self._exact = StreamDenoiser(backbone, stream), ModelDenoiser(backbone, stream)
        self._size, self._active = stream.plan.latent_chunk_size, job.mode != "window"
        self.sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def __call__(self, x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        """The stream's own velocity."""
        velocity = self._denoise(x, levels, row, branch)
        if self._active and row.index % COMPARED_EVERY == 0:
            exact = self._exact(x, levels, row, branch)
            for position in range(len(row.context), len(row.window)):
                part = slice(position * self._size, (position + 1) * self._size)
                sums = self.sums[min(9, int(levels[0, part.start] * 10))]
                sums[0] += float((velocity[:, :, part] - exact[:, :, part]).square().sum())
                sums[1] += float(exact[:, :, part].square().sum())
        return velocity


def run(job: Job) -> dict[str, Any]:
    """Latents, errors and scores of one video."""
    torch.set_num_threads(1)
    checkpoint = opened(job.model)
    prompt = scene_prompt(sample_scene(np.random.default_rng((53, job.number)), "heldout"))
    params = replace(SamplingParams.resolve(checkpoint), mode=job.mode, displaced=job.displaced)
    stream = build_stream(VideoRequest(prompt, job.number, job.frames), 0, params, checkpoint)
    denoise, decoder = Compared(job, stream), checkpoint.codec.decoder()
    latents, frames = [], []
    for chunk in sample(stream.window(), denoise, stream.guidance_scale):
        latents.append(chunk.latents)
        frames.append(decoder.decode(chunk.latents))
    shown = torch.cat(frames)[: job.frames].numpy()
    scores = score_chunks(reader(), shown, parse_prompt(prompt), FPS, CHUNK_FRAMES)
    parts = {"whole": scores, "first_5s": scores[:EDGE_CHUNKS], "last_5s": scores[-EDGE_CHUNKS:]}
    return {
        "latents": torch.cat(latents, dim=1).numpy(),
        "velocity_error": dict(denoise.sums),
        "scores": {name: [asdict(score) for score in part] for name, part in parts.items()},
    }


def _row(name: str, videos: list[dict[str, Any]], window: list[dict[str, Any]]) -> dict[str, Any]:
    from pavdm_dist.digits.scores import ChunkScore

    errors: list[float | None] = []
    for level in range(10):
        pairs = [video["velocity_error"].get(level, (0.0, 0.0)) for video in videos]
        total = sum(pair[1] for pair in pairs)
        errors.append(round(math.sqrt(sum(pair[0] for pair in pairs) / total), 5) if total else None)
    psnr = [_psnr(a["latents"], b["latents"]) for a, b in zip(videos, window, strict=True)]
    second = round(FPS / 4)
    drift = [float(v["latents"][:, -second:].std() / v["latents"][:, 1 : 1 + second].std()) for v in videos]
    row: dict[str, Any] = {
        "setting": name,
        "velocity_error_by_level": errors if name != "window" else [0.0] * 10,
        "latent_psnr": None if name == "window" else _rounded(psnr),
        "deviation_last_over_first_second": _rounded(drift),
    }
    for part in ("first_5s", "last_5s", "whole"):
        means = summarise(ChunkScore(**score) for video in videos for score in video["scores"][part])
        kept = ("digit", "colour", "speed_ratio")
        row[part] = {key: None if means[key] is None else round(means[key] or 0.0, 3) for key in kept}
    return row


def _psnr(found: np.ndarray, expected: np.ndarray) -> float:
    error = float(np.square(found - expected).mean())
    return math.inf if error == 0 else 20 * math.log10(float(np.ptp(expected))) - 10 * math.log10(error)


def _rounded(values: list[float]) -> float | None:
    mean = sum(values) / len(values)
    return round(mean, 3) if math.isfinite(mean) else None


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Error of the velocity over the noise level, a line per setting (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    middles = [(level + 0.5) / 10 for level in range(10)]
    for row in rows:
        if row["setting"] not in ("window", "displaced, every 1"):
            errors = [math.nan if e is None else e for e in row["velocity_error_by_level"]]
            axes.plot(middles, errors, marker="o", label=row["setting"])
    axes.set(xlabel="noise level", ylabel="relative L2 of the velocity, against the whole window", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _table(report: dict[str, Any]) -> str:
    lines = [
        machine_line(report["machine"]),
        f"{report['videos']} videos of {report['seconds']:g} s, {report['model']}",
    ]
    for row in report["rows"]:
        lines += ["", *(f"  {key:34} {value}" for key, value in row.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
