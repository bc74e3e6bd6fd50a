"""What a run would take, without starting it: memory of a process, arithmetic of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.data.buckets import Bucket
from pavdm_dist.data.shards import read_index
from pavdm_dist.models.base import Backbone, BlockContext, FrameInfo
from pavdm_dist.models.text_cache import TextRun
from pavdm_dist.train.checks import check_lengths, check_pictures, check_settings
from pavdm_dist.train.lora_training import add_lora
from pavdm_dist.train.model import shape_of
from pavdm_dist.train.prepared import data_model
from pavdm_dist.train.recompute import Recompute, kept_bytes
from pavdm_dist.train.train_settings import TrainConfig

# Share of a device's peak that a step is taken to reach (docs/training.md).
SHARE = 0.3
# Pixels, high and wide, of a latent cell of the digit world's codec.
_DIGIT_CELL = 8
GIB = 2**30


def forecast(config: TrainConfig, processes: int) -> dict[str, Any]:
    """What one process of ``processes`` holds, and what a step computes of the batch that needs most memory.

    Every bucket has its own batch size; windows are as long as its clips and the objective allow.

    What a block keeps for the backward pass is measured on a block of each kind with few tokens, on this CPU.

    Raises:
        ConfigError, CheckpointError: as the run would.
    """
    check_settings(config, processes)
    channels, batches = _batches(config, processes)
    model = shape_of(config, channels)
    per_token = _bytes_per_token(model, torch.float32 if config.zero.precision == "float32" else torch.bfloat16)
    looks = [_activations(model, config, batch.own(config, processes), per_token) for batch in batches]
    (kept, again), largest = max(zip(looks, batches, strict=True), key=lambda pair: pair[0][0])
    own = largest.own(config, processes)
    state = _states(model, config, processes)
    costs = model.costs(model.grid(own.frames, *own.cells), model.spec.text_len, largest.frames)
    passes = 2 if config.model.lora.rank else 3
    flop = own.samples * config.optimizer.accumulation * costs.stage(0, len(costs.blocks)) * passes
    height, width = own.cells
    found: dict[str, Any] = {
        "data": config.data.described,
        "processes": processes,
        "window": f"{largest.frames} latents of {height}x{width} cells, {own.samples} at a time in a process",
        "memory_gib": {**{name: size / GIB for name, size in state.items()}, "kept for the backward pass": kept / GIB},
        "tflop_per_step": flop / 1e12,
        "recomputed_share": again,
    }
    found["memory_gib"]["together"] = sum(found["memory_gib"].values())
    if config.peak_tflops is not None:
        # Recomputing takes its time, too; it is not counted as reached.
        found[f"seconds_per_step at {SHARE:.0%} of the peak"] = flop / (config.peak_tflops * 1e12 * SHARE)
    return found


@dataclass(frozen=True)
class _Batch:
    """One kind of batch: latent frames of its longest window, cells of a frame, and samples."""

    frames: int
    cells: tuple[int, int]
    samples: int

    def own(self, config: TrainConfig, processes: int) -> _Batch:
        """What one process works off at a time."""
        group = config.sequence_parallel if self.frames > 1 else 1  # single frames cannot be cut
        samples = self.samples // (processes // group) // config.optimizer.accumulation
        return replace(self, frames=-(-self.frames // group), samples=samples)


def _batches(config: TrainConfig, processes: int) -> tuple[int, list[_Batch]]:
    """Channels of the latents, and every kind of batch: of the buckets that hold clips, or of digits."""
    d, m = config.data, config.model
    longest = max(kind.window_latents for _, kind in config.objective.kinds())
    if not d.folder:
        cells = (config.world.size // _DIGIT_CELL,) * 2
        batches = [_Batch(min(longest, d.num_latents), cells, d.batch_size)]
        if d.still_steps or d.still_share:
            batches.append(_Batch(1, cells, d.still_batch_size))
        if m.pretrained is None:
            return config.codec.z_dim, batches
        return Checkpoint.open(m.pretrained).codec_spec.latent_channels, batches
    entries = [entry for folder in d.folder for entry in read_index(folder)["buckets"]]
    # As training does: a bucket without clips gives no batch.
    found = [Bucket.parse(entry["bucket"]) for entry in entries if entry["clips"]]
    check_pictures(config, processes, found)
    check_lengths(config.objective, found)
    spec = data_model(config).codec_spec
    return spec.latent_channels, [
        _Batch(
            min(longest, bucket.num_latents),
            spec.latent_size(bucket.height, bucket.width),
            d.batch_sizes.get(str(bucket), d.batch_size),
        )
        for bucket in found
    ]


def _states(model: Backbone, config: TrainConfig, processes: int) -> dict[str, float]:
    """Bytes of a process for weights, gradients, and masters with moments and average."""
    z = config.zero
    every = sum(value.numel() for value in model.state_dict().values())
    trained = _trained(model, config)
    number = 2 if z.precision == "bfloat16" else 4
    masters = 4 if z.stage else 0  # a copy of its own under every precision
    shards = {"weights": z.stage == 3, "gradients": z.stage >= 2, "optimizer": z.stage >= 1}
    held = {
        "weights": number * every,
        "gradients": (4 if z.gradients == "float32" else number) * trained,
        "optimizer": (masters + 12) * trained,  # and two moments, and the average
    }
    if z.offload != "none":
        held["optimizer"] = 0
    if z.offload == "all":
        held["weights"] = 0
    return {name: size / (processes if shards[name] else 1) for name, size in held.items()}


def _trained(model: Backbone, config: TrainConfig) -> int:
    """Numbers that are trained; a text encoder is left out."""
    assert isinstance(model, nn.Module)
    if config.model.lora.rank:
        with torch.device("meta"):
            add_lora(model, config.model.lora)
        return sum(value.numel() for value in model.parameters() if value.requires_grad)
    return sum(value.numel() for value in model.parameters())


def _activations(model: Backbone, config: TrainConfig, own: _Batch, per_token: dict[str, float]) -> tuple[float, float]:
    """Bytes that blocks keep at once, and the share of blocks that are computed again."""
    kinds, chosen = model.spec.block_kinds, Recompute.parse(config.zero.recompute)
    dtype = torch.float32 if config.zero.precision == "float32" else torch.bfloat16
    tokens = own.samples * own.frames * model.grid(1, *own.cells).tokens_per_frame
    hidden = tokens * model.spec.hidden_size * dtype.itemsize
    sizes = {kind: size * tokens for kind, size in per_token.items()}
    if chosen.budget is not None:
        kept, left = 0, chosen.budget
        for kind in reversed(kinds):
            left -= sizes[kind]
            if left < 0:
                break
            kept += 1
        whole = sum(sizes[kind] for kind in kinds[len(kinds) - kept :])
    else:
        keeping = [kind for index, kind in enumerate(kinds) if not chosen.every or index % chosen.every]
        kept, whole = len(keeping), sum(sizes[kind] for kind in keeping)
    one = max(sizes.values()) if kept < len(kinds) else 0  # one that is being computed again
    return whole + one + len(kinds) * hidden, 1 - kept / len(kinds)


def _bytes_per_token(model: Backbone, dtype: torch.dtype) -> dict[str, float]:
    """What a block of each kind keeps for the backward pass besides its input, per token."""
    short = model.shortened(dtype, "cpu")
    spec = short.spec
    frames, side = 2, 4
    _, ph, pw = spec.patch
    grid = short.grid(frames, side * ph, side * pw)
    x = torch.randn(1, spec.latent_channels, frames, side * ph, side * pw)
    info = FrameInfo(side * ph * 8, side * pw * 8, 24.0)
    text: Tensor = torch.randn(1, 1, spec.text_dim)
    assert isinstance(short, nn.Module)
    short.requires_grad_(True)
    context = BlockContext(grid, [TextRun(0, frames, short.project_text(text))])
    activation = short.embed(x, torch.rand(1, frames), info)
    activation = replace(activation, hidden=activation.hidden.detach())
    count = frames * grid.tokens_per_frame
    return {
        kind: kept_bytes(short.block, index, activation, context) / count for index, kind in enumerate(spec.block_kinds)
    }
