"""Which replicas, stages, videos in flight and mode suit a job on given devices; from shapes alone, no weights.

Costs are FLOP over the devices' sustained rate, utilisation is the pipeline's closed form times the balance of the
stages; the chosen set-up is then run through the simulator, with links.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from pavdm_dist.chart import draw_chart
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.config import ClusterConfig
from pavdm_dist.engine.partition import Costs, estimate_costs, partition
from pavdm_dist.errors import ConfigError
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.requests import SamplingParams
from pavdm_dist.sampler import num_branches
from pavdm_dist.schedule import Mode, WindowPlan
from pavdm_dist.simulate import MAX_STAGES, Machine, bars, simulate
from pavdm_dist.units import MicroBatches

GIB = 2**30
BYTES = 4  # stages compute in float32
# Tokens-by-width buffers alive at once inside a block: input, modulated copy, queries, keys and values, their normed
# and turned copies, attention's output, and the MLP's fourfold inner width twice (before and after GELU).
ACTIVATION_COPIES = 16
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
        layers_per_stage: half-blocks.
        memory_gib: predicted peak of each stage: weights, kept keys and values, activations.
        seconds: until all videos are sampled.
        seconds_per_video: from a video's admission to its last chunk, with its neighbours in flight.
        utilisation: of the devices in use.
        device_hours: of all devices in use.
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

    @property
    def devices(self) -> int:
        return self.replicas * self.num_stages


def choose(
    checkpoint: Checkpoint, params: SamplingParams, plan: WindowPlan, cluster: ClusterConfig
) -> tuple[Setup, list[Setup], str]:
    """The best set-up, the best of each mode and stage count, and why in a sentence.

    Args:
        checkpoint: for its shapes.
        params: settings of the job; mode displaced is considered only when they name it.
        plan: of one video.
        cluster: devices and job mix.

    Raises:
        ConfigError: impossible values, or nothing fits into memory.
    """
    _check(cluster)
    modes: list[Mode] = ["window"] if params.mode == "window" else [params.mode]
    if params.mode == "window" and checkpoint.transformer_config.causal_trained and params.context_chunks <= 1:
        modes.append("causal")
    job = _Job(checkpoint, params, plan)
    limit = min(cluster.devices or 1, MAX_STAGES, 2 * checkpoint.transformer_config.depth)
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
    return best, fitting, _why(best, fitting, cluster)


def report(checkpoint: Checkpoint, params: SamplingParams, plan: WindowPlan, cluster: ClusterConfig) -> dict[str, Any]:
    """What ``pavdm plan`` says about the cluster; draws the chart of the chosen set-up's first chunks."""
    best, setups, why = choose(checkpoint, params, plan, cluster)
    choice = _row(best, cluster)
    choice["simulated_utilisation"] = _Job(checkpoint, params, plan).draw(best, cluster)
    return {"choice": choice, "why": why, "considered": [_row(setup, cluster) for setup in setups]}


class _Job:
    """Work and memory of one kind of video on any number of stages."""

    def __init__(self, checkpoint: Checkpoint, params: SamplingParams, plan: WindowPlan) -> None:
        self.params, self.plan = params, plan
        self.branches = num_branches(params.guidance_scale)
        with torch.device("meta"):
            self.model = STDiT3(checkpoint.transformer_config)
        self.cells = checkpoint.codec_spec.latent_size(params.height, params.width)
        self.size = params.latent_chunk_size
        self.full = params.window_chunks + params.context_chunks

    def setup(self, mode: Mode, stages: int, cluster: ClusterConfig) -> Setup:
        """The set-up with so many stages and as many replicas as the devices and videos allow."""
        devices = cluster.devices or 1
        replicas = max(1, min(devices // stages, cluster.videos))
        per_replica = math.ceil(cluster.videos / replicas)
        costs = self.costs(1 if mode != "window" else self.full)
        ranges = partition(costs, stages)
        streams = self._streams(mode, stages, ranges, per_replica, cluster)
        balance = costs.stage(0, len(costs.blocks)) / (stages * max(costs.stage(*blocks) for blocks in ranges))
        units = self.branches * streams * (1 if mode == "window" else self.params.window_chunks)
        filled = min(1.0, units / (self.branches + stages - 1))
        rate = stages * balance * filled * cluster.tflops * 1e12
        work = self.branches * sum(self._flop(chunks) * count for chunks, count in self._units(mode).items())
        seconds = per_replica * work / rate
        used = replicas * stages
        return Setup(
            mode=mode,
            replicas=replicas,
            num_stages=stages,
            streams=streams,
            layers_per_stage=tuple(last - first for first, last in ranges),
            memory_gib=tuple(self.memory(mode, blocks, streams) / GIB for blocks in ranges),
            seconds=seconds,
            seconds_per_video=seconds * streams / per_replica,
            utilisation=balance * filled,
            device_hours=used * seconds / 3600,
        )

    def costs(self, chunks: int) -> Costs:
        """FLOP of a unit of so many chunks."""
        grid = self.model.grid(chunks * self.size, *self.cells)
        return estimate_costs(self.model.spec, grid, self.model.spec.text_len)

    def memory(self, mode: Mode, blocks: tuple[int, int], streams: int) -> float:
        """Bytes of one stage at its peak: weights, kept keys and values, activations, messages under way."""
        first, last = blocks[0] == 0, blocks[1] == self.model.spec.num_blocks
        want = self.model.keys(*blocks, first=first, last=last)
        weights = sum(value.numel() for name, value in self.model.state_dict().items() if want(name))
        dim, tokens = self.model.spec.hidden_size, self.model.grid(self.size, *self.cells).tokens_per_frame
        unit_frames = self.size * (self.full if mode == "window" else 1)
        text = 2 * self.branches * streams * self.model.spec.text_len * dim * (blocks[1] - blocks[0])
        kept = 0
        if mode != "window":
            temporal = sum(index % 2 for index in range(*blocks))
            # Mode displaced keeps keys twice: as they are and turned to their place.
            copies = 3 if mode == "displaced" else 2
            kept = copies * streams * self.branches * self.full * self.size * tokens * dim * temporal
        hidden = unit_frames * tokens * dim
        return BYTES * (weights + text + kept + (ACTIVATION_COPIES + 4) * hidden)

    def draw(self, setup: Setup, cluster: ClusterConfig) -> float:
        """Simulates one replica with its videos in flight and draws the beginning; returns its utilisation."""
        per_chunk = self.plan.steps_per_shift * self.branches * setup.streams * setup.num_stages
        per_chunk *= 1 if setup.mode == "window" else self.params.window_chunks
        short = replace(self.plan, num_chunks=min(self.plan.num_chunks or 1, max(1, SIMULATED // per_chunk)))
        ends = [sum(setup.layers_per_stage[:i]) for i in range(setup.num_stages + 1)]
        costs = self.costs(1)
        seconds = tuple(costs.stage(a, b) / (cluster.tflops * 1e12) for a, b in pairwise(ends))
        hidden = self.size * self.model.grid(self.size, *self.cells).tokens_per_frame * self.model.spec.hidden_size
        machine = Machine(
            seconds,
            link_latency_s=cluster.link_latency_ms / 1000,
            link_chunk_s=BYTES * hidden / (cluster.link_gib_per_s * GIB),
            unit_seconds={
                (stage, chunks): self.costs(chunks).stage(a, b) / (cluster.tflops * 1e12)
                for chunks in range(1, self.full + 1)
                for stage, (a, b) in enumerate(pairwise(ends))
            },
        )
        streams = setup.streams
        found = simulate([short] * streams, setup.mode, self.branches, streams, machine, self.params.displaced)
        if cluster.chart is not None:
            title = f"{setup.mode}, {setup.num_stages} stages, {streams} in flight, seconds"
            draw_chart(cluster.chart, setup.num_stages, bars(found)[: DRAWN * setup.num_stages], title)
        return round(found.utilisation, 4)

    def _streams(
        self, mode: Mode, stages: int, ranges: Sequence[tuple[int, int]], videos: int, cluster: ClusterConfig
    ) -> int:
        """Videos in flight that fill the pipeline, as far as there are videos and memory."""
        per_video = self.branches * (1 if mode == "window" else self.params.window_chunks)
        needed = math.ceil((self.branches + stages - 1) / per_video)
        # Another one hides the ends of short videos.
        wanted = max(1, min(needed if mode == "window" else needed + 1, videos, MAX_VIDEOS_IN_FLIGHT))
        if stages == 1:
            wanted = 1
        while wanted > 1 and max(self.memory(mode, blocks, wanted) for blocks in ranges) > cluster.memory_gib * GIB:
            wanted -= 1
        return wanted

    def _units(self, mode: Mode) -> dict[int, int]:
        """Micro-batches of one branch of a whole video by the chunks they hold."""
        batches, counts = MicroBatches(self.plan, mode, 0, self.params.displaced), dict[int, int]()
        for row in self.plan.rows():
            parts = batches.parts(row.index)
            held = 1 if len(parts) > 1 or parts[0][0] in row.window else len(row.window)
            counts[held] = counts.get(held, 0) + len(parts)
        return counts

    def _flop(self, chunks: int) -> float:
        costs = self.costs(chunks)
        return costs.stage(0, len(costs.blocks))


def _check(cluster: ClusterConfig) -> None:
    for name in ("devices", "videos"):
        if getattr(cluster, name) < 1:
            raise ConfigError(f"cluster.{name}={getattr(cluster, name)}: at least 1")
    for name in ("memory_gib", "tflops", "link_gib_per_s"):
        if not getattr(cluster, name) > 0:
            raise ConfigError(f"cluster.{name}={getattr(cluster, name):g}: must be above 0")
    for name in ("link_latency_ms", "price_per_device_hour"):
        if getattr(cluster, name) < 0:
            raise ConfigError(f"cluster.{name}={getattr(cluster, name):g}: must be 0 or more")
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


def _row(setup: Setup, cluster: ClusterConfig) -> dict[str, Any]:
    row = asdict(setup)
    row["layers_per_stage"] = list(setup.layers_per_stage)
    row["memory_gib"] = [float(f"{value:.3g}") for value in setup.memory_gib]
    for name in ("seconds", "seconds_per_video", "utilisation", "device_hours"):
        row[name] = float(f"{row[name]:.4g}")
    row["cost"] = round(setup.device_hours * cluster.price_per_device_hour, 4)
    return row
