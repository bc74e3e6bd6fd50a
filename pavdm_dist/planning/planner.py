"""Which replicas, stages, videos in flight and mode suit a job on given devices; from shapes alone, no weights.

Costs are FLOP over the devices' sustained rate, times are the pipeline's closed form
(:mod:`pavdm_dist.planning.forecast`); the beginning of the chosen set-up is then run through the simulator. A decoder
is one more station behind the stages, or work of the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.config import ClusterConfig
from pavdm_dist.engine.transport import OUTSTANDING
from pavdm_dist.errors import ConfigError
from pavdm_dist.fields import fault
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.models.base import Costs
from pavdm_dist.planning.chart import draw_chart
from pavdm_dist.planning.costs import estimated_costs, estimated_decode, with_codec
from pavdm_dist.planning.forecast import RowShape, UnitTime, makespan, rows_of, work
from pavdm_dist.planning.partition import partition, units_per_chunk
from pavdm_dist.planning.simulate import MAX_STAGES, Machine, bars, simulate
from pavdm_dist.request import SamplingParams

GIB = 2**30
# Hidden states under way at a time: two received ahead, and those being sent.
MESSAGES = 2 + OUTSTANDING
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
        memory_gib: predicted peak of each stage: weights, kept keys and values, activations; without the decoder's.
        seconds: until all videos are sampled and decoded.
        seconds_per_video: from a video's admission to its last chunk, with its neighbours in flight.
        utilisation: of the devices in use.
        device_hours: of all devices in use.
        decoder_devices: devices of a replica that only decode.
        decode_seconds: of a chunk on a decoder beside the stages; 0 without one.
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

    @property
    def devices(self) -> int:
        return self.replicas * (self.num_stages + self.decoder_devices)


def choose(
    checkpoint: Checkpoint,
    params: SamplingParams,
    plan: WindowPlan,
    cluster: ClusterConfig,
    dtype: torch.dtype = torch.float32,
    decoder: str | None = None,
) -> tuple[Setup, list[Setup], str]:
    """The best set-up, the best of each mode and stage count, and why in a sentence.

    Args:
        checkpoint: for its shapes.
        params: settings of the job; mode displaced is considered only when they name it.
        plan: of one video.
        cluster: devices and job mix.
        dtype: of weights and activations.
        decoder: where finished chunks are decoded, as of :class:`~pavdm_dist.engine.options.EngineOptions`; None leaves
            decoding out.

    Raises:
        ConfigError: impossible values, or nothing fits into memory.
    """
    _check(cluster)
    modes: list[Mode] = ["window"] if params.mode == "window" else [params.mode]
    if params.mode == "window" and checkpoint.shape.spec.causal_trained and params.context_chunks <= 1:
        modes.append("causal")
    job = _Job(checkpoint, params, plan, dtype, decoder)
    if job.decoder_devices >= (cluster.devices or 1):
        raise ConfigError(
            f"cluster.devices={cluster.devices}: decoder=cuda needs one beside the stages'; use 2 or more"
        )
    limit = min((cluster.devices or 1) - job.decoder_devices, MAX_STAGES, checkpoint.shape.spec.num_blocks)
    setups = [job.setup(mode, stages, cluster) for mode in modes for stages in range(1, limit + 1)]
    fitting = [setup for setup in setups if max(setup.memory_gib) <= cluster.memory_gib]
    if not fitting:
        least = min(max(setup.memory_gib) for setup in setups)
        raise ConfigError(
            f"cluster.memory_gib={cluster.memory_gib:g}: the leanest set-up on {cluster.devices} devices needs"
            f" {least:.3g} GiB on one of them"
        )
    best = fitting[0]
    for setup in fitting[1:]:
        if setup.seconds * WORTH < best.seconds:
            best = setup
    return best, fitting, _why(best, fitting, cluster) + _slow_decoder(best, plan, cluster)


def report(
    checkpoint: Checkpoint,
    params: SamplingParams,
    plan: WindowPlan,
    cluster: ClusterConfig,
    dtype: torch.dtype = torch.float32,
    decoder: str | None = None,
) -> dict[str, Any]:
    """What ``pavdm plan`` says about the cluster; draws the chart of the chosen set-up's first chunks."""
    best, setups, why = choose(checkpoint, params, plan, cluster, dtype, decoder)
    choice = _row(best, cluster)
    job = _Job(checkpoint, params, plan, dtype, decoder)
    choice["simulated_utilisation"] = job.draw(best, cluster)
    choice["decode_tflop_per_chunk"] = float(f"{job.decode_flop / 1e12:.4g}")
    return {"choice": choice, "why": why, "considered": [_row(setup, cluster) for setup in setups]}


class _Job:
    """Work and memory of one kind of video on any number of stages."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        params: SamplingParams,
        plan: WindowPlan,
        dtype: torch.dtype = torch.float32,
        decoder: str | None = None,
    ) -> None:
        self.params, self.plan, self.dtype, self.decoder = params, plan, dtype, decoder
        self.decoder_devices = int(decoder == "cuda")
        self.branches = num_branches(params.guidance_scale)
        self.model = checkpoint.shape
        self.cells = checkpoint.codec_spec.latent_size(params.height, params.width)
        self.size = params.latent_chunk_size
        self.full = params.window_chunks + params.context_chunks
        self.decode_flop = estimated_decode(checkpoint, self.size, self.cells)

    def setup(self, mode: Mode, stages: int, cluster: ClusterConfig) -> Setup:
        """The set-up with so many stages and as many replicas as the devices and videos allow."""
        devices = stages + self.decoder_devices
        replicas = max(1, min((cluster.devices or 1) // devices, cluster.videos))
        videos = math.ceil(cluster.videos / replicas)
        ranges = partition(self.costs(mode, 1 if mode != "window" else self.full), stages)
        rows, unit = rows_of(self.plan, mode, self.params.displaced), self.units(mode, ranges, cluster)
        decode, fitting = self.decode_seconds(cluster), self._fitting(mode, ranges, videos, cluster)
        streams = self._streams(rows, unit, decode, fitting, videos)
        seconds = makespan(rows, self.branches, streams, videos, unit, decode)
        return Setup(
            mode=mode,
            replicas=replicas,
            num_stages=stages,
            streams=streams,
            layers_per_stage=tuple(last - first for first, last in ranges),
            memory_gib=tuple(self.memory(mode, blocks, streams) / GIB for blocks in ranges),
            seconds=seconds,
            seconds_per_video=makespan(rows, self.branches, streams, streams, unit, decode),
            utilisation=work(rows, self.branches, videos, unit) / (stages * seconds),
            device_hours=replicas * devices * seconds / 3600,
            decoder_devices=self.decoder_devices,
            decode_seconds=decode,
        )

    def decode_seconds(self, cluster: ClusterConfig) -> float:
        """Of a chunk on a decoder beside the stages; 0 without one."""
        rate = {"cpu": cluster.decoder_tflops, "cuda": cluster.tflops}.get(self.decoder or "")
        return self.decode_flop / (rate * 1e12) if rate is not None else 0.0

    def units(self, mode: Mode, ranges: Sequence[tuple[int, int]], cluster: ClusterConfig) -> Callable[[int], UnitTime]:
        """Seconds of a micro-batch by the chunks it holds."""
        rate, latency = cluster.tflops * 1e12, cluster.link_latency_ms / 1000
        tokens = self.size * self.model.grid(self.size, *self.cells).tokens_per_frame
        link = self.dtype.itemsize * tokens * self.model.spec.hidden_size / (cluster.link_gib_per_s * GIB)

        def unit(chunks: int) -> UnitTime:
            costs = self.costs(mode, chunks)
            stages = tuple(costs.stage(*blocks) / rate for blocks in ranges)
            return UnitTime(stages, chunks * link, latency)

        return unit

    def costs(self, mode: Mode, chunks: int) -> Costs:
        """FLOP of a unit of so many chunks; decoding on the last stage is spread over the units of a full window."""
        costs = estimated_costs(self.model, chunks * self.size, self.cells)
        if self.decoder != "shared":
            return costs
        whole: Mode = "window" if mode == "window" or chunks > 1 else mode
        return with_codec(costs, self.decode_flop / units_per_chunk(replace(self.params, mode=whole)))

    def memory(self, mode: Mode, blocks: tuple[int, int], streams: int) -> float:
        """Bytes of one stage at its peak: weights, kept keys and values, activations, messages under way."""
        first, last = blocks[0] == 0, blocks[1] == self.model.spec.num_blocks
        want = self.model.keys(*blocks, first=first, last=last)
        size = self.dtype.itemsize
        weights = sum(
            value.numel() * (4 if self.model.keeps_float32(name) else size)
            for name, value in self.model.state_dict().items()
            if want(name)
        )
        dim, tokens = self.model.spec.hidden_size, self.model.grid(self.size, *self.cells).tokens_per_frame
        chunk = self.size * tokens * dim
        text = 2 * self.branches * streams * self.model.spec.text_len * dim * (blocks[1] - blocks[0])
        copies = self.model.spec.activation_copies
        whole = copies * self.full * chunk
        if mode == "window":
            return weights + size * (text + whole + MESSAGES * self.full * chunk)
        window = self.model.grid(self.full * self.size, *self.cells)
        kept = streams * self.branches * sum(self.model.kv_values(window, block) for block in range(*blocks))
        if mode == "causal":
            return weights + size * (text + kept + (copies + MESSAGES) * chunk)
        kept = kept * 3 // 2  # mode displaced keeps keys twice: as they are and turned to their place
        return weights + size * (text + kept + whole + MESSAGES * self.full * chunk)

    def draw(self, setup: Setup, cluster: ClusterConfig) -> float:
        """Simulates one replica with its videos in flight and draws the beginning; returns its utilisation."""
        per_chunk = self.plan.steps_per_shift * self.branches * setup.streams * setup.num_stages
        per_chunk *= 1 if setup.mode == "window" else self.params.window_chunks
        short = replace(self.plan, num_chunks=min(self.plan.num_chunks or 1, max(1, SIMULATED // per_chunk)))
        ends = [sum(setup.layers_per_stage[:i]) for i in range(setup.num_stages + 1)]
        unit = self.units(setup.mode, list(pairwise(ends)), cluster)
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
        found = simulate([short] * streams, setup.mode, self.branches, streams, machine, self.params.displaced)
        if cluster.chart is not None:
            title = f"{setup.mode}, {setup.num_stages} stages, {streams} in flight, seconds"
            drawn = sorted(bars(found), key=lambda bar: bar.end)[: DRAWN * setup.num_stages]
            draw_chart(cluster.chart, setup.num_stages, drawn, title, decoder=setup.decode_seconds > 0)
        return round(found.utilisation, 4)

    def _fitting(self, mode: Mode, ranges: Sequence[tuple[int, int]], videos: int, cluster: ClusterConfig) -> int:
        """Videos in flight that memory holds, at least one; on one device one keeps it busy."""
        most = 1 if len(ranges) == 1 else min(videos, MAX_VIDEOS_IN_FLIGHT)
        while most > 1 and max(self.memory(mode, blocks, most) for blocks in ranges) > cluster.memory_gib * GIB:
            most -= 1
        return most

    def _streams(
        self, rows: Sequence[RowShape], unit: Callable[[int], UnitTime], decode: float, most: int, videos: int
    ) -> int:
        """Fewest videos in flight that are about as fast as any number up to ``most``."""
        seconds = {n: makespan(rows, self.branches, n, videos, unit, decode) for n in range(1, most + 1)}
        return next(n for n in seconds if seconds[n] <= min(seconds.values()) * WORTH)


def _check(cluster: ClusterConfig) -> None:
    found = fault(ClusterConfig, "cluster", cluster)
    if found is not None:
        raise ConfigError(found)
    if cluster.chart is not None and not cluster.chart.endswith(".png"):
        raise ConfigError(f"cluster.chart={cluster.chart}: must end in .png")


def _why(best: Setup, setups: list[Setup], cluster: ClusterConfig) -> str:
    if best.num_stages == 1:
        if best.replicas == 1 and cluster.devices != 1:
            return "one device does it as fast as several would"
        return "the model fits one device, so plain replicas do the most work: every pipeline idles at its ends"
    alone = [setup for setup in setups if setup.num_stages == 1]
    if not alone:
        return f"the model does not fit one device; {best.num_stages} stages hold it"
    fastest = min(setup.seconds for setup in alone)
    return (
        f"{cluster.videos} video(s) leave devices idle as replicas; {best.num_stages} stages are"
        f" {fastest / best.seconds:.2f} times as fast"
    )


def _slow_decoder(best: Setup, plan: WindowPlan, cluster: ClusterConfig) -> str:
    """A remark where the decoder sets the pace."""
    chunks = (plan.num_chunks or 0) * math.ceil(cluster.videos / best.replicas)
    if chunks * best.decode_seconds < best.seconds / WORTH:
        return ""
    return f"; the decoder sets the pace, {best.decode_seconds:.3g} s a chunk: give it more (decoder, decoder_tflops)"


def _row(setup: Setup, cluster: ClusterConfig) -> dict[str, Any]:
    row = asdict(setup)
    row["layers_per_stage"] = list(setup.layers_per_stage)
    row["memory_gib"] = [float(f"{value:.3g}") for value in setup.memory_gib]
    for name in ("seconds", "seconds_per_video", "utilisation", "device_hours", "decode_seconds"):
        row[name] = float(f"{row[name]:.4g}")
    row["cost"] = round(setup.device_hours * cluster.price_per_device_hour, 4)
    return row
