"""Which replicas, stages, videos in flight and mode suit a kind of video on given devices, told from shapes alone.

Costs are FLOP over the devices' sustained rate, times are the pipeline's closed form
(:mod:`pavdm_dist.planning.forecast`); the beginning of the chosen set-up is then run through the simulator. A decoder
is one more station behind the stages, or work of the last one.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.config import ClusterConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.planning.chart import check_chart
from pavdm_dist.planning.setups import WORTH, Setup, Workload
from pavdm_dist.planning.simulator import MAX_STAGES
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.values.fields import fault


def choose(
    checkpoint: Checkpoint,
    params: SamplingParams,
    plan: WindowPlan,
    cluster: ClusterConfig,
    dtype: torch.dtype = torch.float32,
    decoder: str | None = None,
    decoder_dtype: torch.dtype = torch.float32,
    preview: str | None = None,
) -> tuple[Setup, list[Setup], str]:
    """The best set-up, the best of each mode and stage count, and why in a sentence.

    Args:
        checkpoint: for its shapes.
        params: settings of the videos; mode displaced is considered only when they name it.
        plan: of one video.
        cluster: devices, and how many videos there are.
        dtype: of weights and activations.
        decoder: where finished chunks are decoded, as of :class:`~pavdm_dist.engine.options.EngineOptions`; None leaves
            decoding out.
        decoder_dtype: what it computes in.
        preview: what makes frames instead of the codec, as of :class:`~pavdm_dist.codecs.catalog.FrameMaker`.

    Raises:
        ConfigError: impossible values, or nothing fits into memory.
    """
    _check(cluster)
    return _chosen(Workload(checkpoint, params, plan, dtype, decoder, decoder_dtype, preview=preview), cluster)


def report(
    checkpoint: Checkpoint,
    params: SamplingParams,
    plan: WindowPlan,
    cluster: ClusterConfig,
    dtype: torch.dtype = torch.float32,
    decoder: str | None = None,
    decoder_dtype: torch.dtype = torch.float32,
    decoder_tile: int | None = None,
    preview: str | None = None,
) -> dict[str, Any]:
    """What ``pavdm plan`` says about the cluster; draws the chart of the chosen set-up's first chunks."""
    _check(cluster)
    workload = Workload(checkpoint, params, plan, dtype, decoder, decoder_dtype, decoder_tile, preview)
    best, setups, why = _chosen(workload, cluster)
    choice = _row(best, cluster)
    choice["simulated_utilisation"] = workload.draw(best, cluster)
    choice["decode_tflop_per_chunk"] = float(f"{workload.decode_flop / 1e12:.4g}")
    return {"choice": choice, "why": why, "considered": [_row(setup, cluster) for setup in setups]}


def _chosen(workload: Workload, cluster: ClusterConfig) -> tuple[Setup, list[Setup], str]:
    params, spec = workload.params, workload.model.spec
    modes: list[Mode] = ["window"] if params.mode == "window" else [params.mode]
    in_chunks = params.calls_per_row == 1 and workload.plan.block_chunks == 1
    if params.mode == "window" and in_chunks and spec.causal_trained and params.context_chunks <= 1:
        modes.append("causal")
    if workload.decoder_devices >= (cluster.devices or 1):
        raise ConfigError(
            f"cluster.devices={cluster.devices}: decoder=cuda needs one beside the stages'; use 2 or more"
        )
    limit = min((cluster.devices or 1) - workload.decoder_devices, MAX_STAGES, spec.num_blocks)
    sizes = {mode: _sizes(mode, workload, cluster) for mode in modes}
    setups = [
        [workload.setup(mode, stages, cluster, size) for size in sizes[mode]]
        for mode in modes
        for stages in range(1, limit + 1)
    ]
    fits = [[setup for setup in alike if setup.peak_gib <= cluster.memory_gib] for alike in setups]
    fitting = [min(alike, key=lambda setup: setup.seconds) for alike in fits if alike]
    if not fitting:
        least = min(setup.peak_gib for alike in setups for setup in alike)
        raise ConfigError(
            f"cluster.memory_gib={cluster.memory_gib:g}: the leanest set-up on {cluster.devices} devices needs"
            f" {least:.3g} GiB on one of them"
        )
    best = fitting[0]
    for setup in fitting[1:]:
        if setup.seconds * WORTH < best.seconds:
            best = setup
    return best, fitting, _why(best, fitting, cluster) + _decoder(best, workload, cluster)


def _sizes(mode: Mode, workload: Workload, cluster: ClusterConfig) -> list[int]:
    """Noisy chunks of a micro-batch that are considered, the smallest first."""
    if mode == "window" or not cluster.block_overhead_ms:
        return [1 if mode == "window" else workload.params.chunks_per_unit]
    return list(range(1, workload.params.window_chunks + 1))


def _check(cluster: ClusterConfig) -> None:
    found = fault(ClusterConfig, "cluster", cluster)
    if found is not None:
        raise ConfigError(found)
    if cluster.chart is not None:
        check_chart(cluster.chart, "cluster.chart")


def _why(best: Setup, setups: list[Setup], cluster: ClusterConfig) -> str:
    if best.num_stages == 1:
        if best.replicas == 1 and len({setup.num_stages for setup in setups}) > 1:
            return "one stage does it as fast as several would"
        if best.replicas == 1 and best.decoder_devices:
            return "one device samples and one decodes; more stages would need more devices"
        if best.devices == cluster.devices == 1:
            return "the model fits one device"
        return "the model fits one device, so plain replicas do the most work: every pipeline idles at its ends"
    alone = [setup for setup in setups if setup.num_stages == 1]
    if not alone:
        return f"the model does not fit one device; {best.num_stages} stages hold it"
    fastest = min(setup.seconds for setup in alone)
    return (
        f"{cluster.videos} video(s) leave devices idle as replicas; {best.num_stages} stages are"
        f" {fastest / best.seconds:.2f} times as fast"
    )


def _decoder(best: Setup, workload: Workload, cluster: ClusterConfig) -> str:
    """A remark where the decoder sets the pace, or may well do so."""
    if workload.decoder == "cpu" and cluster.decoder_tflops is None and workload.decode_flop:
        return (
            f"; decoding on CPUs is not in these times, {workload.decode_flop / 1e12:.3g} TFLOP a chunk:"
            " cluster.decoder_tflops says what they sustain"
        )
    chunks = (workload.plan.num_chunks or 0) * math.ceil(cluster.videos / best.replicas)
    if chunks * best.decode_seconds < best.seconds / WORTH:
        return ""
    return f"; the decoder sets the pace, {best.decode_seconds:.3g} s a chunk: give it more (decoder, decoder_tflops)"


def _row(setup: Setup, cluster: ClusterConfig) -> dict[str, Any]:
    row = asdict(setup)
    row["layers_per_stage"] = list(setup.layers_per_stage)
    row["memory_gib"] = [float(f"{value:.3g}") for value in setup.memory_gib]
    row["decoder_memory_gib"] = float(f"{setup.decoder_memory_gib:.3g}")
    for name in ("seconds", "seconds_per_video", "utilisation", "device_hours", "decode_seconds"):
        row[name] = float(f"{row[name]:.4g}")
    row["cost"] = round(setup.device_hours * cluster.price_per_device_hour, 4)
    return row
