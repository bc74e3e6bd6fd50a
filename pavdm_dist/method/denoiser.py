"""A backbone as a denoiser, and what it conditions on: shared by the in-process sampler and the stages."""

from __future__ import annotations

import torch
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.calls import calls_of
from pavdm_dist.method.microbatches import WHOLE
from pavdm_dist.method.recovery import mixing_layers, own_row, replayed
from pavdm_dist.method.saved_keys import newly_left, put_back
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.base import Activation, Backbone, BlockContext
from pavdm_dist.models.clean_memory import CleanMemory
from pavdm_dist.models.devices import to_device
from pavdm_dist.models.kv_cache import ChunkMemory, DisplacedMemory, Memory
from pavdm_dist.models.text_cache import TextBank, TextRun


class ModelDenoiser:
    """Runs all blocks of a backbone for one stream (the sampler's :class:`~pavdm_dist.method.sampler.Denoiser`).

    Args:
        backbone: the whole model.
        stream: what is sampled.
        texts: its texts, when several streams share them.
        causal: mask by chunks: a chunk attends to itself and to cleaner ones. What :class:`StreamDenoiser` computes
            chunk by chunk, in one forward over the whole window.
    """

    def __init__(self, backbone: Backbone, stream: Stream, texts: TextBank | None = None, causal: bool = False) -> None:
        self._backbone, self._stream = backbone, stream
        self._chunk_causal = stream.plan.latent_chunk_size if causal else None
        self._texts = texts or TextBank(backbone.project_text)
        self._texts.add(stream.id, stream.conditioning.texts)

    @torch.inference_mode()
    def __call__(self, x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        """``x [1, C, F, h, w]``, ``levels [1, F]`` -> velocity ``[1, C, F, h, w]``, float32."""
        model = self._backbone
        grid = model.grid(x.shape[2], x.shape[3], x.shape[4])
        texts = text_runs(self._texts, self._stream, row, branch, row.window)
        context = BlockContext(grid, texts, self._chunk_causal, text_cache=self._texts.cache)
        levels = to_device(levels, x.device)
        activation = model.embed(x, levels, self._stream.info)
        for index in range(model.spec.num_blocks):
            activation = model.block(index, activation, context)
        return model.to_velocity(model.head(activation, grid), x, levels)


class StreamDenoiser:
    """Runs a stream's micro-batches one after the other, in its mode; the stages run the very same ones.

    In mode causal it equals :class:`ModelDenoiser` with ``causal=True`` up to rounding, without running the clean
    context at every row; in mode window it equals the one without.

    Args:
        backbone: the whole model.
        stream: what is sampled.
        texts: its texts, when several streams share them.
        device: that the model is on.

    Attributes:
        batches: how rows are cut; the stream's own unless set.
    """

    def __init__(
        self,
        backbone: Backbone,
        stream: Stream,
        texts: TextBank | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._backbone, self._stream, self._device = backbone, stream, device
        self._again = stream.replayed
        self.batches = stream.batches
        self._memories = memories_of(stream, backbone, device=device)
        self._texts = texts or TextBank(backbone.project_text)
        self._texts.add(stream.id, stream.conditioning.texts)

    def follow(self, stream: Stream) -> None:
        """Goes on with the same stream under other prompts."""
        gone = self._stream.conditioning.texts.keys() - stream.conditioning.texts.keys()
        self._stream = stream
        self._texts.add(stream.id, stream.conditioning.texts)
        self._texts.release(stream.id, gone)

    def newly_left(self) -> dict[str, Tensor]:
        """What clean chunks left since the last call, see :func:`~pavdm_dist.method.saved_keys.newly_left`; nothing
        where it is not kept."""
        return newly_left(self._memories) if self._stream.recovery.by == "keys" else {}

    @torch.inference_mode()
    def __call__(self, x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        """``x [1, C, F, h, w]``, ``levels [1, F]`` -> velocity ``[1, C, F, h, w]``, float32; 0 for a clean chunk."""
        if self._again:
            self._run_again()
        model, levels = self._backbone, to_device(levels, x.device)
        velocity = torch.zeros_like(x)
        for chunk, is_context in self.batches.parts(row.index):
            size = self._stream.plan.latent_chunk_size
            slots = self.batches.slots(row, chunk)
            frames = slice(slots.start * size, slots.stop * size)
            part, part_levels = x[:, :, frames].contiguous(), levels[:, frames]
            activation, context = self._through(part, part_levels, row, chunk, branch)
            if not is_context:
                # What a partition's call only looks at is written again by the call that moves it, which comes later.
                velocity[:, :, frames] = model.to_velocity(model.head(activation, context.grid), part, part_levels)
        if branch == self._stream.branches - 1 and self.batches.adaptive and self.batches.plan.closes_shift(row.index):
            self.batches = self.batches.reported(row.index, change_of(self._memories))
        return velocity

    def _through(
        self, x: Tensor, levels: Tensor, row: PlanRow, chunk: int, branch: int
    ) -> tuple[Activation, BlockContext]:
        """A micro-batch of a row behind all blocks, and what these have read."""
        context = unit_context(self._backbone, self._stream, row, chunk, branch, self._texts, self._memories[branch])
        activation = self._backbone.embed(x, levels, self._stream.info)
        for index in range(self._backbone.spec.num_blocks):
            activation = self._backbone.block(index, activation, context)
        return activation, context

    def _run_again(self) -> None:
        """Calls of clean chunks before the first row: what they leave is read from there on."""
        chunks, self._again = self._again, ()
        window, size = self._stream.window(self._device), self._stream.plan.latent_chunk_size
        for chunk in chunks:
            row = own_row(self._stream.plan, chunk)
            levels = to_device(window.levels(row)[None, :size], self._device)
            for branch in range(self._stream.branches):
                self._through(window.input(chunk, row), levels, row, chunk, branch)


def memories_of(
    stream: Stream, backbone: Backbone, blocks: range | None = None, device: torch.device | str = "cpu"
) -> list[Memory | None]:
    """What the chunks of a stream leave for each other, per guidance branch; None in mode window without a cache.

    Args:
        stream: whose; where it goes on, its memories hold what they held.
        backbone: what it is for.
        blocks: those that are run here; None = all.
        device: of what is held.

    Raises:
        ConfigError: it goes on without what is needed for that.
    """
    plan, spec = stream.plan, backbone.spec
    if plan.context == "cached":
        sizes = plan.latent_chunk_size, plan.context_chunks, plan.anchor_chunks
        memories: list[Memory | None] = [CleanMemory(*sizes) for _ in range(stream.branches)]
        saved = {} if stream.resume is None else stream.resume.snapshot.left
        grid = backbone.grid(plan.latent_chunk_size, *stream.latent_shape[1:])
        mixing = [block for block in blocks or range(spec.num_blocks) if backbone.kv_values(grid, block)]
        if stream.replayed:
            _check_replayed(stream, mixing_layers(backbone, stream.latent_shape))
        else:
            put_back(memories, saved, plan.kept(stream.first_row), mixing, device)
        return memories
    if stream.mode == "window":
        return [None] * stream.branches
    size = stream.plan.latent_chunk_size
    frames = size * (stream.plan.window_chunks + stream.plan.context_chunks)
    if stream.mode == "causal":
        return [ChunkMemory(frames) for _ in range(stream.branches)]
    # The last block is on the last stage, however many there are; one branch tells.
    probe = spec.num_blocks - 1 if stream.batches.adaptive else None
    return [DisplacedMemory(frames, size, probe if branch == 0 else None) for branch in range(stream.branches)]


def _check_replayed(stream: Stream, layers: int) -> None:
    """Refuses a video that goes on without all the clean latents that make its keys and values again.

    Raises:
        ConfigError: naming the first chunk whose latents are missing.
    """
    for chunk in replayed(stream.plan, stream.first_row, layers):
        if chunk not in stream.replayed:
            raise ConfigError(
                f"the video cannot go on from its latents alone: neither keys and values of context=cached are saved"
                f" nor the clean latents of chunk {chunk}, whose call would be run again for them; begin it anew"
            )


def change_of(memories: list[Memory | None]) -> float:
    """Relative change of the first branch's keys since it was last asked for."""
    first = memories[0]
    return first.take_change() if isinstance(first, DisplacedMemory) else 0.0


def unit_context(
    backbone: Backbone,
    stream: Stream,
    row: PlanRow,
    chunk: int,
    branch: int,
    texts: TextBank,
    memory: Memory | None,
) -> BlockContext:
    """What blocks read for one micro-batch of a row, named by ``chunk``; tells the ``memory`` that it begins."""
    plan, size = stream.plan, stream.plan.latent_chunk_size
    _, height, width = stream.latent_shape
    only = None if chunk == WHOLE else chunk
    slots = stream.batches.slots(row, chunk)
    # The call of a partition is a window of its own to the model.
    own, first = row.window[slots], 0 if plan.is_partitioned else slots.start
    if plan.context == "cached":
        read = plan.reads(row, only)
        if row.index < stream.first_row:  # run again, where not all of its past is
            read = tuple(chunk for chunk in read if chunk in stream.replayed)
        window, first = read + own, len(read)
    else:
        window = row.window
    if memory is not None:
        memory.begin(window, only)
    runs = text_runs(texts, stream, row, branch, own)
    return BlockContext(
        backbone.grid(size * len(own), height, width),
        runs,
        text_cache=texts.cache,
        first_frame=first * size,
        memory=memory,
        steady=len(runs) == 1 and len(own) in steady_sizes(plan, chunk == WHOLE, stream.chunks_per_unit),
        chunk_frames=size if memory is not None and only is not None and len(own) > 1 else None,
    )


def steady_sizes(plan: WindowPlan, whole: bool, chunks_per_unit: int = 1) -> tuple[int, ...]:
    """Chunks of the micro-batches of a full window: for these sizes blocks are compiled, where they are.

    Others, while a window grows or drains, are rare. By size alone, so that bits depend on nothing else.

    Args:
        plan: of the stream.
        whole: of micro-batches that are whole windows.
        chunks_per_unit: of the others.
    """
    if whole:
        return (plan.window_chunks + (plan.context_chunks if plan.context == "joint" else 0),)
    if plan.is_partitioned:
        full = tuple(range(plan.window_chunks))
        calls = calls_of(full, plan.context_chunks, plan.window_chunks, plan.partitions, plan.lookahead)
        return tuple({call.sees.stop - call.sees.start for call in calls})
    rest = plan.window_chunks % chunks_per_unit
    clean = plan.context == "cached" or plan.context_chunks > 0
    return (chunks_per_unit, *([rest] if rest else []), *([1] if clean else []))


def text_runs(texts: TextBank, stream: Stream, row: PlanRow, branch: int, chunks: tuple[int, ...]) -> list[TextRun]:
    """Runs of equal text over the latent frames of some of a row's chunks.

    Also forgets what the stream no longer reads.
    """
    keys = [stream.conditioning.key(chunk, branch) for chunk in chunks]
    runs = texts.runs(keys, stream.plan.latent_chunk_size)
    texts.release(stream.id, stream.conditioning.expired(row))
    return runs
