"""What it costs that nothing is lost: snapshots, state and checksums as a share of the time that a video takes.

    python benchmarks/state_cost.py [--quick] [--json] [--chunks N] [--rounds N]

Whole `pavdm sample` runs in this process (`num_stages=0`) with the functions in question timed, waiting for the disk
included: the embedded model at its own size, and the tests' tiny untrained model, of which rows take milliseconds.

* ``snapshot``: copies of window and context at every shift, and whether all latents are finite;
* ``ledger``: the latents' checksum, and what is kept of every chunk;
* ``state``: putting the state together when a segment closes, and waiting for the one before to be on the disk.

Their sum is ``share`` (goal: 1 %); ``cpu_share`` is the same of CPU time, without waiting for the disk, which others
may keep busy. ``beside`` is what a thread takes to write states while the sampler works, fsyncs included; ``files`` is
making segments, their latents and the playlist durable.
On P stages snapshots are the last one's, whose time per shift is about a P-th: ``snapshot`` is to be taken P times.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import machine, machine_line, parser

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import tiny_checkpoint

from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig
from pavdm_dist.io import saver, storage
from pavdm_dist.io.recording import Recording
from pavdm_dist.io.state import Ledger
from pavdm_dist.method.window import Window

TIMED: tuple[tuple[str, Any, str], ...] = (
    ("snapshot", Window, "snapshot"),
    ("snapshot", Window, "not_finite"),
    ("ledger", Ledger, "take"),
    ("state", Recording, "_save"),
    ("beside", saver, "write_state"),
    ("files", storage, "commit"),
)
PROMPT, GROUP = "a red three drifting up", 6


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--chunks", type=int, help="length of each video (60; 12 with --quick)")
    options.add_argument("--rounds", type=int, help="runs of each (3; 1 with --quick)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    chunks, rounds = arguments.chunks or (12 if arguments.quick else 60), arguments.rounds or (3, 1)[arguments.quick]
    with tempfile.TemporaryDirectory() as folder:
        tiny = str(tiny_checkpoint(Path(folder) / "model"))
        models = {"embedded": "embedded", "tiny": tiny}
        for model in models.values():  # imports, and what is made once
            run(model, 2, Path(folder))
        found = {name: [run(model, chunks, Path(folder)) for _ in range(rounds)] for name, model in models.items()}
    report = {"machine": machine(), "chunks": chunks, "models": {name: summary(runs) for name, runs in found.items()}}
    print(json.dumps(report) if arguments.json else table(report))


def run(model: str, chunks: int, folder: Path) -> dict[str, float]:
    """Milliseconds a chunk: of all, and by what is timed; of CPU time under names that begin with ``cpu``."""
    size = 5 if model == "embedded" else 2
    config = SampleConfig(
        prompt=PROMPT, model=model, output=str(folder / "cost.mp4"), num_frames=4 * size * chunks - 3,
        chunks_per_segment=GROUP, save_latents=True, device="cpu",
    )  # fmt: skip
    with timed() as seconds:
        started, busy = time.perf_counter(), time.thread_time()
        render_command(config, True, ChunkProgress)
        seconds["run"], seconds["cpu run"] = time.perf_counter() - started, time.thread_time() - busy
    names = ("run", "snapshot", "ledger", "state", "beside", "files")
    return {name: 1000 * seconds[name] / chunks for name in (*names, *(f"cpu {name}" for name in names))}


@contextmanager
def timed() -> Iterator[defaultdict[str, float]]:
    """Seconds by name; what happens inside another timed function counts there only."""
    seconds = defaultdict[str, float](float)
    inside: set[int] = set()  # threads

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            thread = threading.get_ident()
            if thread in inside:
                return function(*arguments, **named)
            inside.add(thread)
            started, busy = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                inside.discard(thread)
                seconds[name] += time.perf_counter() - started
                seconds[f"cpu {name}"] += time.thread_time() - busy

        return call

    patches = [mock.patch.object(owner, part, wrapped(name, getattr(owner, part))) for name, owner, part in TIMED]
    for patch in patches:
        patch.start()
    try:
        yield seconds
    finally:
        for patch in patches:
            patch.stop()


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, and the shares' ranges."""
    shares, of_cpu = (
        [sum(one[f"{kind}{name}"] for name in ("snapshot", "ledger", "state")) / one[f"{kind}run"] for one in runs]
        for kind in ("", "cpu ")
    )
    return {
        "ms_per_chunk": {name: round(statistics.median(one[name] for one in runs), 3) for name in runs[0]},
        "share": round(statistics.median(shares), 5),
        "cpu_share": round(statistics.median(of_cpu), 5),
        "share_range": [round(min(shares), 5), round(max(shares), 5)],
        "share_of_files": round(statistics.median(one["files"] / one["run"] for one in runs), 5),
    }


def table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), f"{report['chunks']} chunks", ""]
    for name, found in report["models"].items():
        share = f"share {found['share']:.4f} {found['share_range']}, of CPU time {found['cpu_share']:.4f}"
        lines.append(f"{name}: {share}, files {found['share_of_files']:.4f}")
        lines.append(f"  ms a chunk: {found['ms_per_chunk']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
