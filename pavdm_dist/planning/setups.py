"""What a way to use the devices gives: work, time and memory of one kind of video on any number of stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.codecs.costs import frames_memory
from pavdm_dist.config import ClusterConfig
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.models.base import Costs
from pavdm_dist.planning.chart import draw_chart
from pavdm_dist.planning.costs import chunk_reads, estimated_costs, estimated_decode, with_codec
from pavdm_dist.planning.forecast import RowShape, UnitTime, makespan, rows_of, work
from pavdm_dist.planning.memory import StageMemory, decoder_bytes
from pavdm_dist.planning.partition import partition, units_per_chunk
from pavdm_dist.planning.simulator import Machine, bars, simulate
from pavdm_dist.request.sampling import SamplingParams

GIB = 2**30
MAX_VIDEOS_IN_FLIGHT = 8
# Units times stages that are simulated at most (some seconds), and units of a stage that are drawn.
SIMULATED, DRAWN = 60_000, 150
# A set-up must be so much faster than a simpler one to be chosen.
WORTH = 1.05


@dataclass(frozen=True)
class Setup:
    """One way to use the devices.

    Attributes:
        mode, replicas, num_stages, streams: of it; ``streams`` videos are in flight in each replica.
        layers_per_stage: blocks of each stage.
        memory_gib: predicted peak of each stage: weights, kept keys and values, activations; of the last one with what
            ``decoder=shared`` takes there.
        seconds: until all videos are sampled and decoded.
        seconds_per_video: from a video's admission to its last chunk, with its neighbours in flight.
        utilisation: of the stages of all replicas, 0..1; of what has no video left, too.
        device_hours: of all devices in use.
        decoder_devices: devices of a replica that only decode.
        decode_seconds: of a chunk on a decoder beside the stages; 0 without one.
        decoder_memory_gib: predicted peak of a decoder beside the stages: of its device, or of main memory on CPUs; 0
            without one.
        chunks_per_unit: noisy chunks of a micro-batch, in modes whose micro-batch is no whole window.
    """

    mode: Mode
    replicas: int
    num_stages: int
    streams: int
    layers_per_stage: tuple[int, ...]
    memory_gib: tuple[float, ...]
    seconds: float
    seconds_per_video: float
    utilisation: float
    device_hours: float
    decoder_devices: int = 0
    decode_seconds: float = 0.0
    decoder_memory_gib: float = 0.0
    chunks_per_unit: int = 1

    @property
    def devices(self) -> int:
        return self.replicas * (self.num_stages + self.decoder_devices)

    @property
    def peak_gib(self) -> float:
        """Of the device that needs most memory."""
        return max(*self.memory_gib, self.decoder_memory_gib if self.decoder_devices else 0.0)


class Workload:
    """Work and memory of one kind of video on any number of stages."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        params: SamplingParams,
        plan: WindowPlan,
        dtype: torch.dtype = torch.float32,
        decoder: str | None = None,
        decoder_dtype: torch.dtype = torch.float32,
        decoder_tile: int | None = None,
        preview: str | None = None,
    ) -> None:
        self.params, self.plan, self.dtype, self.decoder = params, plan, dtype, decoder
        self.decoder_devices = int(decoder == "cuda")
        self.branches = num_branches(params.guidance_scale)
        self.model = checkpoint.shape
        self.cells = checkpoint.codec_spec.latent_size(params.height, params.width)
        self.size = params.latent_chunk_size
        self.full = params.widest
        maker = FrameMaker(checkpoint.vae, decoder_tile, preview)
        self.decode_flop = estimated_decode(maker, self.size, self.cells)
        self.memory = StageMemory(self.model, dtype, self.branches, self.size, self.full, self.cells, params.cached)
        self._decoding = None
        if decoder is not None:
            on_gpu = decoder != "cpu"
            self._decoding = frames_memory(maker, *self.cells, decoder_dtype, on_gpu)

    def setup(self, mode: Mode, stages: int, cluster: ClusterConfig, together: int = 1) -> Setup:
        """The set-up with so many stages and as many replicas as the devices and videos allow.

        Args:
            mode: of it.
            stages: of each replica.
            cluster: what there is.
            together: noisy chunks of a micro-batch.
        """
        devices = stages + self.decoder_devices
        replicas = max(1, min((cluster.devices or 1) // devices, cluster.videos))
        videos = math.ceil(cluster.videos / replicas)
        ranges = partition(self.costs(mode, together if mode != "window" else self.full, together), stages)
        rows = rows_of(self.plan, mode, self.params.displaced, together)
        unit = self.units(mode, ranges, cluster, together)
        decode, fitting = self.decode_seconds(cluster), self._fitting(mode, ranges, videos, cluster, together)
        streams = self._streams(rows, unit, decode, fitting, videos)
        seconds = makespan(rows, self.branches, streams, videos, unit, decode)
        return Setup(
            mode=mode,
            replicas=replicas,
            num_stages=stages,
            streams=streams,
            layers_per_stage=tuple(last - first for first, last in ranges),
            memory_gib=tuple(size / GIB for size in self.stage_bytes(mode, ranges, streams, together)),
            seconds=seconds,
            seconds_per_video=makespan(rows, self.branches, streams, streams, unit, decode),
            utilisation=work(rows, self.branches, cluster.videos, unit) / (replicas * stages * seconds),
            device_hours=replicas * devices * seconds / 3600,
            decoder_devices=self.decoder_devices,
            decode_seconds=decode,
            decoder_memory_gib=0.0 if self.decoder == "shared" else self.decoder_bytes(streams) / GIB,
            chunks_per_unit=together,
        )

    def stage_bytes(
        self, mode: Mode, ranges: Sequence[tuple[int, int]], streams: int, together: int = 1
    ) -> list[float]:
        """Of every stage at its peak; of the last one with the decoder that shares its device."""
        stages = [self.memory.bytes(mode, blocks, streams, together) for blocks in ranges]
        if self.decoder == "shared":
            stages[-1] += self.decoder_bytes(streams)
        return stages

    def decoder_bytes(self, streams: int) -> int:
        """Of the decoder at its peak; 0 without one."""
        if self._decoding is None:
            return 0
        return decoder_bytes(self._decoding, self.size, streams, on_cpu=self.decoder == "cpu")

    def decode_seconds(self, cluster: ClusterConfig) -> float:
        """Of a chunk on a decoder beside the stages; 0 without one."""
        rate = {"cpu": cluster.decoder_tflops, "cuda": cluster.tflops}.get(self.decoder or "")
        return self.decode_flop / (rate * 1e12) if rate is not None else 0.0

    def units(
        self, mode: Mode, ranges: Sequence[tuple[int, int]], cluster: ClusterConfig, together: int = 1
    ) -> Callable[[int], UnitTime]:
        """Seconds of a micro-batch by the chunks it holds."""
        rate, latency = cluster.tflops * 1e12, cluster.link_latency_ms / 1000
        tokens = self.size * self.model.grid(self.size, *self.cells).tokens_per_frame
        link = self.dtype.itemsize * tokens * self.model.spec.hidden_size / (cluster.link_gib_per_s * GIB)
        # Each clean chunk has calls of its own, which a unit's size does not tell from a small window's.
        clean = self.branches if self.params.cached else 0

        def unit(chunks: int) -> UnitTime:
            costs = self.costs(mode, chunks, together, clean)
            stages = tuple(
                costs.stage(*blocks) / rate + (blocks[1] - blocks[0]) * cluster.block_overhead_ms / 1000
                for blocks in ranges
            )
            return UnitTime(stages, chunks * link, latency)

        return unit

    def costs(self, mode: Mode, chunks: int, together: int = 1, more: int = 0) -> Costs:
        """FLOP of a unit of so many chunks; decoding on the last stage is spread over the units of a full window, and
        ``more`` for each finished chunk."""
        alone = mode != "window" and chunks <= together
        read = chunk_reads(mode, self.params.window_chunks, self.params.context_chunks, self.size) if alone else None
        if self.params.cached:
            read = self.params.span * self.size
        costs = estimated_costs(self.model, chunks * self.size, self.cells, read)
        if self.decoder != "shared":
            return costs
        params = replace(self.params, mode=mode if alone else "window", chunks_per_unit=together if alone else 1)
        return with_codec(costs, self.decode_flop / (units_per_chunk(params) + more))

    def draw(self, setup: Setup, cluster: ClusterConfig) -> float:
        """Simulates one replica with its videos in flight and draws the beginning; returns its utilisation."""
        per_chunk = self.plan.steps_per_shift * self.branches * setup.streams * setup.num_stages
        per_chunk *= self.params.calls_per_row if setup.mode == "window" else self.params.window_chunks
        short = replace(self.plan, num_chunks=min(self.plan.num_chunks or 1, max(1, SIMULATED // per_chunk)))
        ends = [sum(setup.layers_per_stage[:i]) for i in range(setup.num_stages + 1)]
        together = setup.chunks_per_unit
        unit = self.units(setup.mode, list(pairwise(ends)), cluster, together)
        one = unit(1)
        machine = Machine(
            tuple(one.stages),
            link_latency_s=one.latency,
            link_chunk_s=one.link,
            unit_seconds={
                (stage, chunks): seconds
                for chunks in range(1, self.full + 1)
                for stage, seconds in enumerate(unit(chunks).stages)
            },
            decode_seconds=setup.decode_seconds,
        )
        streams = setup.streams
        displaced = self.params.displaced
        found = simulate([short] * streams, setup.mode, self.branches, streams, machine, displaced, together)
        if cluster.chart is not None:
            title = f"{setup.mode}, {setup.num_stages} stages, {streams} in flight, seconds"
            drawn = sorted(bars(found), key=lambda bar: bar.end)[: DRAWN * setup.num_stages]
            draw_chart(cluster.chart, setup.num_stages, drawn, title, decoder=setup.decode_seconds > 0)
        return round(found.utilisation, 4)

    def _fitting(
        self, mode: Mode, ranges: Sequence[tuple[int, int]], videos: int, cluster: ClusterConfig, together: int
    ) -> int:
        """Videos in flight that memory holds, at least one; on one device one keeps it busy."""
        most = 1 if len(ranges) == 1 else min(videos, MAX_VIDEOS_IN_FLIGHT)
        while most > 1 and self._peak(mode, ranges, most, together) > cluster.memory_gib * GIB:
            most -= 1
        return most

    def _peak(self, mode: Mode, ranges: Sequence[tuple[int, int]], streams: int, together: int) -> float:
        own = self.decoder_bytes(streams) if self.decoder_devices else 0
        return max(*self.stage_bytes(mode, ranges, streams, together), own)

    def _streams(
        self, rows: Sequence[RowShape], unit: Callable[[int], UnitTime], decode: float, most: int, videos: int
    ) -> int:
        """Fewest videos in flight that are about as fast as any number up to ``most``."""
        seconds = {n: makespan(rows, self.branches, n, videos, unit, decode) for n in range(1, most + 1)}
        return next(n for n in seconds if seconds[n] <= min(seconds.values()) * WORTH)
