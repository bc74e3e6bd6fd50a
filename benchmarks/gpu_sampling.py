"""The parts of `gpu.py` that sample: by the stage loop that users run, with links of its own kind."""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import kernels_of
from gpu_shapes import Case, random_backbone

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import linked

from pavdm_dist.engine.events import Shift
from pavdm_dist.engine.feed import EpochFeed
from pavdm_dist.engine.loop import Links, StageLoop
from pavdm_dist.engine.order import LogEntry, is_active, join_of
from pavdm_dist.engine.rehearsal import rehearsal, rehearse
from pavdm_dist.engine.spans import RunReport
from pavdm_dist.engine.stage import Stage
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.base import Backbone
from pavdm_dist.models.compiling import keep_on_disk

LINK_TIMEOUT_S = 300
EPOCHS = 2  # of four rows each, in which units of a full window are timed: a shift ends in them


@dataclass
class Runner:
    """One stage, or several in threads of this process, that sample streams of a case.

    Args:
        case, device: what, and where.
        compiled: blocks are compiled.
    """

    case: Case
    device: torch.device
    compiled: bool
    model: Backbone = field(init=False)

    def __post_init__(self) -> None:
        self.model = random_backbone(self.case, self.device)
        if self.compiled:
            keep_on_disk()
            self.model.compile_repeated_blocks()

    def stage(self, stream: Stream, blocks: tuple[int, int] | None = None) -> tuple[Stage, dict[str, Any]]:
        """A stage that has rehearsed, and what that took and found."""
        own = blocks or (0, self.model.spec.num_blocks)
        graphs = self.compiled and self.device.type == "cuda"  # as the actors of users' runs
        stage = Stage(self.model, own, self.device, torch.bfloat16, graphs)
        more = {"mode": stream.mode, "displaced": stream.displaced, "chunks_per_unit": stream.chunks_per_unit}
        found = rehearse(
            stage, rehearsal(self.model, stream.plan, stream.latent_shape, stream.info, **more), self.compiled
        )
        return stage, {"seconds": found.seconds, "relative_error": found.relative_error, "kernels": dict(found.kernels)}


def run(
    stage: Stage, links: Links, stream: Stream, epochs: int | None, tell: Callable[[Any], None] = lambda event: None
) -> RunReport:
    """The loop of a stage over a stream, to its end or for so many epochs."""
    join = join_of(stream, 0)
    stage.prepare(stream)
    feed, count = EpochFeed(), 0
    while is_active(join, count) and count != epochs:
        feed.seal(count, LogEntry((join,) if count == 0 else ()))
        count += 1
    feed.stop(count)
    report = StageLoop(stage, links, feed, 1, tell, trace=True).run()
    stage.leave(stream.id)
    return report


def units(runner: Runner, mode: Mode, chunks_per_unit: int, peak: float) -> dict[str, Any]:
    """Micro-batches of a full window: seconds by what they hold, launches and waits of a unit, share of the peak."""
    case, model = runner.case, runner.model
    stream = case.full(model, mode, chunks_per_unit)
    stage, rehearsed = runner.stage(stream)
    # The first run is for kernels to be loaded, and shows what the second must compute again.
    told = [list[Any](), list[Any]()]
    reports = [run(stage, linked.alone(), stream, EPOCHS, events.append) for events in told]
    report, shifts = reports[1], [_held(events) for events in told]
    seconds, flop = defaultdict[int, list[float]](list), dict[int, float]()
    for span in report.trace:
        held = len(stream.batches.held(stream.plan.row(span.unit.row), span.unit.chunk))
        seconds[held].append(span.end - span.start)
        costs = model.costs(model.grid(held * case.plan.latent_chunk_size, *case.cells), model.spec.text_len)
        flop[held] = costs.stage(0, len(costs.blocks))
    wall = (report.trace[-1].end - report.trace[0].start) / len(report.trace)
    found = {
        "by_chunks": {
            held: {"seconds": statistics.median(times), "tflops": flop[held] / statistics.median(times) / 1e12}
            for held, times in sorted(seconds.items())
        },
        "seconds_a_unit": wall,
        "same_bits_again": all(map(torch.equal, *shifts)),
        "rehearsal": rehearsed,
        "share_of_peak": max(flop[held] / statistics.median(times) for held, times in seconds.items()) / (peak * 1e12),
    }
    return {**found, **(_profiled(stage, stream) if runner.device.type == "cuda" else {})}


def _held(events: list[Any]) -> list[torch.Tensor]:
    """What the window holds at the ends of its shifts."""
    return [latents for event in events if isinstance(event, Shift) for latents in event.snapshot.latents.values()]


def _profiled(stage: Stage, stream: Stream) -> dict[str, Any]:
    """Kernels' time and launches of one unit, and waits for the device in all of a run, whose ends wait a few times."""
    reports = list[RunReport]()
    return kernels_of(lambda: reports.append(run(stage, linked.alone(), stream, 1)), lambda: reports[0].units)


def whole(runner: Runner, mode: Mode, latents: int, chunks_per_unit: int, peak: float) -> dict[str, Any]:
    """Seconds of a whole video without decoding, the window's growing and draining included."""
    case, model = runner.case, runner.model
    stream = case.stream(model, mode, -(-latents // case.plan.latent_chunk_size), chunks_per_unit)
    stage, _ = runner.stage(stream)
    run(stage, linked.alone(), stream, 2)
    _settle(runner.device)
    began = time.perf_counter()
    run(stage, linked.alone(), stream, None)
    _settle(runner.device)
    seconds = time.perf_counter() - began
    flop = 0.0
    for row in stream.plan.rows():
        for chunk, _ in stream.batches.parts(row.index):
            frames = len(stream.batches.held(row, chunk)) * case.plan.latent_chunk_size
            costs = model.costs(model.grid(frames, *case.cells), model.spec.text_len)
            flop += stream.branches * costs.stage(0, len(costs.blocks))
    return {"seconds": seconds, "pflop": flop / 1e15, "share_of_peak": flop / seconds / (peak * 1e12)}


def staged(runner: Runner, mode: Mode, latents: int, chunks_per_unit: int) -> dict[str, Any]:
    """Two stages on this one device over gloo, whose messages pass through main memory; equal bits are checked."""
    case, model, middle = runner.case, runner.model, runner.model.spec.num_blocks // 2
    stream = case.stream(model, mode, -(-latents // case.plan.latent_chunk_size), chunks_per_unit)
    one, _ = runner.stage(stream)
    expected, found = list[Any](), list[Any]()
    run(one, linked.alone(), stream, None, expected.append)
    stages = [runner.stage(stream, blocks)[0] for blocks in ((0, middle), (middle, model.spec.num_blocks))]
    links = linked.linked(2, linked.staged(runner.device, LINK_TIMEOUT_S), timedelta(seconds=LINK_TIMEOUT_S))

    def loop(rank: int) -> None:
        run(stages[rank], links[rank], stream, None, found.append if rank else lambda event: None)

    began = time.perf_counter()
    linked.in_threads(2, loop, None)
    _settle(runner.device)
    seconds = time.perf_counter() - began
    pairs = zip(_clean(expected), _clean(found), strict=True)
    return {"seconds": seconds, "same_bits": all(torch.equal(a, b) for a, b in pairs)}


def _clean(events: list[Any]) -> list[torch.Tensor]:
    return [chunk.latents for event in events if isinstance(event, Shift) for chunk in event.clean]


def decoded(case: Case, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of decoding a chunk in bfloat16, random weights, with nothing beside it."""
    from pavdm_dist.codecs.wan import WanCodec
    from pavdm_dist.io.shipped import shipped_models
    from pavdm_dist.models.source import Source

    assert case.codec is not None
    source = Source(str(shipped_models()[case.codec]), component="vae")
    codec = WanCodec.on_meta(source, torch.bfloat16)
    vae = codec.vae.to_empty(device=device)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    codec = WanCodec(vae)
    decoder, size, times = codec.decoder(), case.plan.latent_chunk_size, list[float]()
    latents = torch.randn(codec.spec.latent_channels, size, *case.cells)
    frames = 0
    for _ in range(repeats + 2):
        _settle(device)
        began = time.perf_counter()
        frames = decoder.decode(latents).shape[0]
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])
    return {"seconds_a_chunk": seconds, "video_seconds_per_second": frames / case.fps / seconds}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
