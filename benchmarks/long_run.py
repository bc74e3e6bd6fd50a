"""Memory and CPU time per chunk over a run of hundreds of chunks: sampling, decoding, hashing, files on disk.

    python benchmarks/long_run.py [--quick] [--json] [--chunks N] [--no-files]

A tiny untrained model and codec, since only the trend matters. The window stays full to the last chunk, the first 24
chunks are the warm-up (allocator, caches, growing window). Resident and private memory are read from the kernel after
every chunk (Linux); a fixed product of matrices is timed beside every chunk, so that a machine that slows down is not
taken for a program that does: ``ratio_to_probe`` is the ratio with that drift divided out.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import endless_stream, machine, machine_line, parser, random_model

from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.method.denoiser import ModelDenoiser
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.models.stdit3 import STDiT3Config

WARM_UP, GROUP = 24, 12
MODEL = STDiT3Config(
    depth=2, hidden_size=64, num_heads=4, in_channels=4, caption_channels=12, model_max_length=5, pred_sigma=False
)
PLAN = WindowPlan(num_inference_steps=6, window_chunks=3, latent_chunk_size=2)
LATENT_SIZE = (8, 12)
# As the tests' tiny codec: eight pixels a latent, four frames a latent.
STRIDE, FPS = 8, 24


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--chunks", type=int, help="length of the run (360; 60 with --quick), at least 48")
    options.add_argument("--no-files", action="store_true", help="decode and hash only, no mp4 segments")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    chunks = arguments.chunks or (60 if arguments.quick else 360)
    if chunks < WARM_UP + 2 * GROUP:
        raise SystemExit(f"--chunks {chunks}: at least {WARM_UP + 2 * GROUP}")
    with tempfile.TemporaryDirectory() as folder:
        report = run(chunks, None if arguments.no_files else Path(folder))
    print(json.dumps(report) if arguments.json else table(report))


def run(chunks: int, folder: Path | None) -> dict[str, Any]:
    """Renders ``chunks`` chunks and says what each cost.

    Args:
        chunks: length; the plan itself is endless, so the window does not drain at the end.
        folder: where the mp4 grows; None decodes and hashes only.
    """
    model = random_model(MODEL)
    stream = endless_stream(model, PLAN, *LATENT_SIZE)
    decoder = _codec().decoder()
    height, width = (STRIDE * size for size in LATENT_SIZE)
    writer = None if folder is None else SegmentWriter(folder / "long.mp4", FPS, height, width)
    latents, after_warm_up, pixels = hashlib.sha256(), "", hashlib.sha256()
    frames_made = 0
    # Written to in place: a list that grows by a record a chunk would itself be the leak that is looked for.
    cpu_s, probe_s = torch.full((2, chunks), -1.0, dtype=torch.float64)
    resident_kb, private_kb = torch.full((2, chunks), -1, dtype=torch.int64)
    finished = sample(stream.window(), ModelDenoiser(model, stream), stream.guidance_scale)
    before = time.process_time()
    for clean in islice(finished, chunks):
        frames = decoder.decode(clean.latents)
        latents.update(clean.latents.numpy().tobytes())
        pixels.update(frames.numpy().tobytes())
        frames_made += len(frames)
        if writer is not None:
            writer.write_chunk(clean.index, frames)
        cpu_s[clean.index] = time.process_time() - before
        if clean.index + 1 == WARM_UP:
            after_warm_up = latents.hexdigest()
        probe_s[clean.index] = _probe()
        resident_kb[clean.index], private_kb[clean.index] = _memory()
        before = time.process_time()
    on_disk = None if writer is None else writer.finish()
    return {
        "machine": machine(),
        "shape": {
            "depth": MODEL.depth,
            "hidden_size": MODEL.hidden_size,
            "latents": list(stream.latent_shape),
            "chunk_latents": PLAN.latent_chunk_size,
            "window_chunks": PLAN.window_chunks,
            "num_inference_steps": PLAN.num_inference_steps,
        },
        "chunks": chunks,
        "frames": frames_made,
        "frames_on_disk": on_disk,
        "latents_sha256": latents.hexdigest(),
        "latents_sha256_after_24": after_warm_up,
        "frames_sha256": pixels.hexdigest(),
        "resident": trend(resident_kb.tolist()),
        "private": trend(private_kb.tolist()),
        "cpu": cpu_report(cpu_s.tolist(), probe_s.tolist()),
    }


def trend(memory: list[int]) -> dict[str, Any]:
    """Memory after the last chunk against after chunk 24, and a straight line through all chunks from 24 on.

    Args:
        memory: kB after every chunk.

    Returns:
        Kilobytes, ``end_over_after_24``, ``slope_kb_per_chunk`` with its standard error (as if chunks were
        independent; memory comes and goes in steps, so the true error is larger), ``noise_kb`` (standard deviation
        around the line), ``highest_first_at_chunk`` (1-based) and ``eighths_kb``, medians of eight equal parts from
        chunk 24 on: a leak rises from each to the next.
    """
    tail = torch.tensor(memory[WARM_UP - 1 :], dtype=torch.float64)
    x = torch.arange(len(tail), dtype=torch.float64)
    x = x - x.mean()
    slope = float((x * tail).sum() / x.square().sum())
    around = tail - tail.mean() - slope * x
    noise = float((around.square().sum() / (len(tail) - 2)).sqrt())
    highest = max(memory)
    return {
        "after_24_kb": memory[WARM_UP - 1],
        "end_kb": memory[-1],
        "end_over_after_24": memory[-1] / memory[WARM_UP - 1],
        "slope_kb_per_chunk": slope,
        "slope_error_kb_per_chunk": noise / float(x.square().sum().sqrt()),
        "noise_kb": noise,
        "highest_kb": highest,
        "highest_first_at_chunk": memory.index(highest) + 1,
        "eighths_kb": [int(part.median()) for part in tail.tensor_split(8)],
    }


def cpu_report(cpu_s: list[float], probe_s: list[float]) -> dict[str, float]:
    """Median CPU time of the last 12 chunks against chunks 13 to 24, and the same of the fixed probe."""

    def early_and_late(values: list[float]) -> tuple[float, float]:
        return statistics.median(values[WARM_UP - GROUP : WARM_UP]), statistics.median(values[-GROUP:])

    seconds, probe = early_and_late(cpu_s), early_and_late(probe_s)
    settled = cpu_s[WARM_UP - GROUP :]
    groups = [statistics.median(settled[i : i + GROUP]) for i in range(0, len(settled) - GROUP + 1, GROUP)]
    return {
        "chunks_13_to_24_s": seconds[0],
        "last_12_s": seconds[1],
        "ratio": seconds[1] / seconds[0],
        "probe_ratio": probe[1] / probe[0],
        "ratio_to_probe": seconds[1] / seconds[0] / (probe[1] / probe[0]),
        "lowest_12_s": min(groups),
        "highest_12_s": max(groups),
    }


def _codec() -> WanCodec:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    channels = MODEL.in_channels
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=STRIDE,
    )  # fmt: skip
    return WanCodec(vae)


def _probe() -> float:
    """CPU seconds of a fixed piece of work."""
    matrix = torch.full((256, 256), 0.01)
    before = time.process_time()
    for _ in range(20):
        matrix = matrix @ matrix
    return time.process_time() - before


def _memory() -> tuple[int, int]:
    """Resident and private (not shared with another process) memory of this process, kB."""
    resident = private = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        if name == "Rss:":
            resident = int(value)
        elif name in ("Private_Clean:", "Private_Dirty:"):
            private += int(value)
    return resident, private


def table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), str(report["shape"]), ""]
    lines += [f"{report['chunks']} chunks, {report['frames']} frames, {report['frames_on_disk']} of them on disk"]
    for name in ("resident", "private"):
        m = report[name]
        lines.append(
            f"{name} memory: {m['after_24_kb']} kB after chunk 24, {m['end_kb']} kB at the end "
            f"(ratio {m['end_over_after_24']:.4f}); slope {m['slope_kb_per_chunk']:+.2f} +- "
            f"{m['slope_error_kb_per_chunk']:.2f} kB a chunk, noise {m['noise_kb']:.0f} kB; "
            f"highest {m['highest_kb']} kB, first at chunk {m['highest_first_at_chunk']}; "
            f"medians of eighths {m['eighths_kb']}"
        )
    cpu = report["cpu"]
    lines.append(
        f"CPU time a chunk: {1000 * cpu['chunks_13_to_24_s']:.2f} ms in chunks 13-24, {1000 * cpu['last_12_s']:.2f} ms "
        f"in the last 12 (ratio {cpu['ratio']:.3f}; fixed probe {cpu['probe_ratio']:.3f}, with that divided out "
        f"{cpu['ratio_to_probe']:.3f}); medians of 12 between {1000 * cpu['lowest_12_s']:.2f} and "
        f"{1000 * cpu['highest_12_s']:.2f} ms"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
