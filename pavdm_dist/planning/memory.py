"""What fits where: bytes that a stage and a decoder hold at their peak, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pavdm_dist.codecs.costs import DecodeMemory
from pavdm_dist.engine.transport import OUTSTANDING
from pavdm_dist.method.recovery import Recovers, mixing_layers
from pavdm_dist.method.sampler import num_branches
from pavdm_dist.method.schedule import Mode
from pavdm_dist.models.base import Backbone
from pavdm_dist.request.sampling import SamplingParams

# Hidden states under way at a time: two received ahead, and those being sent.
MESSAGES = 2 + OUTSTANDING


@dataclass(frozen=True)
class StageMemory:
    """Memory of stages that sample one kind of video.

    Attributes:
        model: the backbone's shape.
        dtype: of weights and activations.
        branches: guidance branches.
        size: latents of a chunk.
        full: chunks of a full window, context included.
        cells: latent height and width.
        cached: clean chunks whose keys and values are kept beside.
    """

    model: Backbone
    dtype: torch.dtype
    branches: int
    size: int
    full: int
    cells: tuple[int, int]
    cached: int = 0

    def bytes(self, mode: Mode, blocks: tuple[int, int], streams: int, chunks_per_unit: int = 1) -> float:
        """One stage's at its peak: weights, kept keys and values, activations, messages under way."""
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
            left = self.model.grid(self.cached * self.size, *self.cells)
            kept = streams * self.branches * sum(self.model.kv_values(left, block) for block in range(*blocks))
            read = 3 * self.cached * chunk  # for a call, put together: keys, keys turned to their places, values
            return weights + size * (text + kept + read + whole + MESSAGES * self.full * chunk)
        window = self.model.grid(self.full * self.size, *self.cells)
        kept = streams * self.branches * sum(self.model.kv_values(window, block) for block in range(*blocks))
        if mode == "causal":
            return weights + size * (text + kept + (copies + MESSAGES) * chunk * chunks_per_unit)
        kept = kept * 3 // 2  # mode displaced keeps keys twice: as they are and turned to their place
        return weights + size * (text + kept + whole + MESSAGES * self.full * chunk)


@dataclass(frozen=True)
class Kept:
    """What going on with one video of cached context takes, in main memory and in its state file.

    Attributes:
        bytes: that are kept of a long video.
        bytes_per_shift: that leave the stages beside its latents.
        calls: clean chunks' calls, of each guidance branch, that are run again first.
    """

    bytes: int
    bytes_per_shift: int
    calls: int


def kept_for_recovery(
    by: Recovers, params: SamplingParams, model: Backbone, latent_shape: tuple[int, int, int], dtype: torch.dtype
) -> Kept:
    """What :class:`~pavdm_dist.method.recovery.Recovery` costs.

    Args:
        by: what is kept.
        params: of the video.
        model: the backbone's shape.
        latent_shape: ``(C, h, w)``.
        dtype: of keys and values.
    """
    if by == "none":
        return Kept(0, 0, 0)
    size = params.latent_chunk_size
    if by == "replay":
        calls = params.anchor_chunks + params.context_chunks * mixing_layers(model, latent_shape)
        return Kept(calls * 4 * latent_shape[0] * size * latent_shape[1] * latent_shape[2], 0, calls)
    grid = model.grid(size, *latent_shape[1:])
    pairs = sum(model.kv_values(grid, block) for block in range(model.spec.num_blocks))
    chunk = num_branches(params.guidance_scale) * dtype.itemsize * pairs
    return Kept((params.anchor_chunks + params.context_chunks) * chunk, chunk, 0)


def decoder_bytes(decoding: DecodeMemory, size: int, streams: int, on_cpu: bool) -> int:
    """A decode actor's at its peak, on the device it computes on: weights, every stream's cache, a latent at work.

    On a GPU each latent's frames leave for main memory at once; on a CPU those of the chunk so far are there, too, and
    at the end once more in one piece.

    Args:
        decoding: what the codec needs for the planned size.
        size: latents of a chunk.
        streams: videos in flight.
        on_cpu: it computes on CPUs.
    """
    busy = decoding.working
    if on_cpu:
        busy = max(busy + (size - 1) * decoding.frames, 2 * size * decoding.frames)
    return decoding.weights + streams * decoding.cache + busy
