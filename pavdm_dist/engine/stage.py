"""A stage: a contiguous range of a backbone's blocks, as a plain object that knows neither Ray nor links.

The first stage embeds latents, the last one guides, takes the step to the next level and owns the window's latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pavdm_dist.engine.graphs import Graphs
from pavdm_dist.engine.messages import Layout
from pavdm_dist.engine.order import Unit
from pavdm_dist.engine.readback import Copies, Readback
from pavdm_dist.method.denoiser import change_of, memories_of, unit_context
from pavdm_dist.method.microbatches import WHOLE
from pavdm_dist.method.recovery import own_row
from pavdm_dist.method.sampler import guide
from pavdm_dist.method.saved_keys import left_tensors
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.stream import NewPrompt, Stream
from pavdm_dist.method.window import CleanChunk, Window, WindowSnapshot, first_not_finite, row_levels
from pavdm_dist.models.base import Activation, Backbone, BlockContext, Grid
from pavdm_dist.models.devices import to_device
from pavdm_dist.models.kv_cache import Memory
from pavdm_dist.models.text_cache import TextBank


class ShiftEnd:
    """What the last stage hands out at the end of a shift; it is on its way from the device until somebody asks.

    Args:
        row: the next one.
        chunks: held by the window.
        clean: the chunks that became clean.
        copies: latents of ``chunks``, then of ``clean``.
        change: of an adaptive stream.
    """

    def __init__(
        self, row: int, chunks: Sequence[int], clean: Sequence[int], copies: Copies, change: float | None
    ) -> None:
        self._row, self._chunks, self._clean, self._copies, self.change = row, chunks, clean, copies, change

    @property
    def snapshot(self) -> WindowSnapshot:
        return WindowSnapshot(self._row, dict(zip(self._chunks, self._copies.take(), strict=False)))

    @property
    def clean(self) -> tuple[CleanChunk, ...]:
        latents = self._copies.take()[len(self._chunks) :]
        return tuple(CleanChunk(chunk, held) for chunk, held in zip(self._clean, latents, strict=True))

    @property
    def not_finite(self) -> int | None:
        return first_not_finite(self.snapshot.latents, self.clean)


@dataclass(frozen=True)
class RowDone:
    """What the last stage has after a micro-batch whose branches are all there.

    Attributes:
        latents: its input at the next row, ``[1, C, F, h, w]`` float32; None where there is none.
        end: at the end of a shift, what is handed out; waited for by those below.
        snapshot: at the end of a shift, the state after the row, in main memory; the driver, which knows what adaptive
            re-sync has decided, completes it.
        clean: at the end of a shift, the chunks that became clean, in main memory.
        not_finite: at the end of a shift, a chunk with values that are not finite.
        change: at the end of a shift of an adaptive stream, by how much its keys changed.
    """

    latents: Tensor | None
    end: ShiftEnd | None = None

    @property
    def snapshot(self) -> WindowSnapshot | None:
        return None if self.end is None else self.end.snapshot

    @property
    def clean(self) -> tuple[CleanChunk, ...]:
        return () if self.end is None else self.end.clean

    @property
    def not_finite(self) -> int | None:
        return None if self.end is None else self.end.not_finite

    @property
    def change(self) -> float | None:
        return None if self.end is None else self.end.change


class Stage:
    """Runs blocks ``blocks[0] .. blocks[1] - 1`` of ``model`` for any number of streams.

    Args:
        model: a backbone of which at least this stage's tensors are loaded.
        blocks: the range.
        device: where it computes.
        dtype: what the model was loaded as, and what travels between stages; latents are float32 always.
        graphs: micro-batches of full windows run as CUDA graphs where they can (:mod:`pavdm_dist.engine.graphs`).
    """

    def __init__(
        self,
        model: Backbone,
        blocks: tuple[int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        graphs: bool = False,
    ) -> None:
        self.model, self.blocks, self.device = model, blocks, torch.device(device)
        self.first = blocks[0] == 0
        self.last = blocks[1] == model.spec.num_blocks
        self.dtype = dtype
        self._texts = TextBank(model.project_text, self.device)
        self._streams: dict[int, Stream] = {}
        self._windows: dict[int, Window] = {}
        self._inputs: dict[int, dict[int, Tensor]] = {}
        self._velocities: dict[int, list[Tensor]] = {}
        self._memories: dict[int, list[Memory | None]] = {}
        self._levels: dict[tuple[int, int], Tensor] = {}  # of rows that come, or are under way
        self._readback = Readback(self.device)
        self._graphs = Graphs(self._run_blocks) if graphs else None

    def prepare(self, stream: Stream) -> None:
        """Takes a stream in before its first unit; computes nothing with the model."""
        if self.last:
            self._windows[stream.id] = stream.window(self.device)
            self._velocities[stream.id] = []
        if self.first:
            window = self._windows.get(stream.id) or stream.window(self.device)
            row = stream.plan.row(stream.first_row)
            again = {chunk: window.input(chunk, own_row(stream.plan, chunk)) for chunk in stream.replayed}
            self._inputs[stream.id] = again | {chunk: window.input(chunk, row) for chunk in row.window}
        self._memories[stream.id] = memories_of(stream, self.model, range(*self.blocks), self.device)
        self._texts.add(stream.id, stream.conditioning.texts)  # last: what is refused before leaves none here
        self._streams[stream.id] = stream

    def make_ready(self) -> None:
        """Before any link is used: what is loaded at its first use otherwise."""
        if self._graphs is not None:
            self._graphs.make_ready()

    def begin(self, units: Sequence[Unit]) -> None:
        """An epoch's units come next, or after the one that is under way: what they read that follows from the order
        alone is put on the device at once."""
        if not (self.first or self.last):
            return
        rows = {(unit.stream, unit.row): None for unit in units if unit.stream in self._streams}
        parts = [self._row_levels(*row) for row in rows]
        if parts:
            uploaded = to_device(torch.cat(parts, dim=1), self.device)
            self._levels.update(zip(rows, uploaded.split([part.shape[1] for part in parts], dim=1), strict=True))

    def leave(self, stream: int) -> None:
        """Forgets all that is held of a stream; harmless where it has ended by itself or never came."""
        if stream in self._streams:
            self._texts.release(stream, self._streams.pop(stream).conditioning.texts)
        for table in (self._windows, self._inputs, self._velocities, self._memories):
            table.pop(stream, None)
        self._forget_levels(stream)
        if self._graphs is not None:
            self._graphs.leave(stream)

    def stop(self, stream: int, plan: WindowPlan) -> None:
        """Gives an endless stream its end: ``plan`` is its own up to the row that comes next."""
        self._streams[stream] = replace(self._streams[stream], plan=plan)
        if stream in self._windows:
            self._windows[stream].plan = plan

    def change(self, stream: int, new: NewPrompt) -> None:
        """Gives a stream another prompt, for chunks that are not born yet."""
        before, changed = self._streams[stream], self._streams[stream].changed(new)
        read = changed.conditioning.since(new.oldest)
        self._streams[stream] = replace(changed, conditioning=read)
        self._texts.add(stream, read.texts)
        self._texts.release(stream, before.conditioning.texts.keys() - read.texts.keys())

    def feed(self, stream: int, row: int, chunk: int, latents: Tensor) -> None:
        """First stage: latents ``[1, C, F, h, w]`` for ``row`` of a stream, which micro-batch ``chunk`` sent back.

        They are copied: the message that they came in is used again.
        """
        own = self._streams[stream]
        chunks = own.batches.returned(own.plan.row(row - 1), chunk)
        parts = latents.clone().split(own.plan.latent_chunk_size, dim=2)
        self._inputs[stream].update(zip(chunks, parts, strict=True))

    @torch.inference_mode()
    def run(self, unit: Unit, incoming: Activation | None) -> Activation | RowDone | None:
        """One unit.

        Args:
            unit: which one.
            incoming: what the previous stage sent; None on the first stage.

        Returns:
            The activation for the next stage; on the last stage a :class:`RowDone` after the last branch of what is
            updated, else None.
        """
        stream = self._streams[unit.stream]
        row = stream.plan.row(unit.row)
        context = self._context(stream, row, unit)
        levels = self._unit_levels(stream, row, unit) if self.first or self.last else None
        if incoming is None:
            assert levels is not None
            incoming = self.model.embed(self._input(unit, stream, row), levels, stream.info)
        if self._graphs is None:
            activation = self._run_blocks(incoming, context)
        else:
            activation = self._graphs.run(unit.stream, unit.branch, incoming, context)
        if not self.last or unit.context:
            self._forget(unit)
            return None if self.last else activation
        window = self._windows[unit.stream]
        x = window.joined(row, stream.batches.held(row, unit.chunk))
        assert levels is not None
        velocity = self.model.to_velocity(self.model.head(activation, context.grid), x, levels)
        self._velocities[unit.stream].append(velocity)
        return self._update(unit, stream, row) if unit.closes else None

    def newly_left(self, unit: Unit) -> Callable[[], dict[str, Tensor]] | None:
        """After a stream's last unit of a shift in which a clean chunk left keys and values: what gives those of this
        stage, once they are in main memory.

        None otherwise, and where nothing of it is kept for going on; all stages agree on that, whether or not their
        blocks keep any.
        """
        stream = self._streams.get(unit.stream)
        if stream is None or stream.plan.context == "joint" or unit.chunk != WHOLE or not unit.closes:
            return None
        if stream.recovery.by != "keys":
            return None
        if not (stream.plan.closes_shift(unit.row) and stream.plan.row(unit.row).context):
            return None
        left = left_tensors(self._memories[unit.stream])
        copies = self._readback(list(left.values()))
        return lambda: dict(zip(left, copies.take(), strict=True))

    def activation_layout(self, unit: Unit) -> Layout:
        """Shapes of the activation that crosses a stage boundary for a unit."""
        stream = self._streams[unit.stream]
        grid = self._grid(stream, len(stream.batches.held(stream.plan.row(unit.row), unit.chunk)))
        return Layout(self.model.activation_shapes(grid), self.dtype)

    def latents_layout(self, stream_id: int, row: int, chunk: int) -> Layout:
        """Shape of the latents that come back to the first stage as input of ``row``, from micro-batch ``chunk``."""
        stream = self._streams[stream_id]
        channels, height, width = stream.latent_shape
        back = stream.batches.returned(stream.plan.row(row - 1), chunk)
        return Layout(((1, channels, len(back) * stream.plan.latent_chunk_size, height, width),), torch.float32)

    def _run_blocks(self, activation: Activation, context: BlockContext) -> Activation:
        for index in range(*self.blocks):
            activation = self.model.block(index, activation, context)
        return activation

    def _context(self, stream: Stream, row: PlanRow, unit: Unit) -> BlockContext:
        memory = self._memories[unit.stream][unit.branch]
        return unit_context(self.model, stream, row, unit.chunk, unit.branch, self._texts, memory)

    def _unit_levels(self, stream: Stream, row: PlanRow, unit: Unit) -> Tensor:
        size, slots = stream.plan.latent_chunk_size, stream.batches.slots(row, unit.chunk)
        levels = self._levels.get((stream.id, row.index))
        if levels is None:
            levels = to_device(self._row_levels(stream.id, row.index), self.device)
        if unit.closes and stream.batches.ends_row(row, unit.chunk):
            self._forget_levels(stream.id, row.index)
        return levels[:, slots.start * size : slots.stop * size]

    def _forget_levels(self, stream: int, last: float = math.inf) -> None:
        """Those of a stream's rows up to the last one that has ended."""
        for key in [(owner, row) for owner, row in self._levels if owner == stream and row <= last]:
            del self._levels[key]

    def _row_levels(self, stream_id: int, index: int) -> Tensor:
        """``[1, F]``, in main memory."""
        stream = self._streams[stream_id]
        size = stream.plan.latent_chunk_size
        return row_levels(stream.plan.row(index), stream.schedule.levels, size, stream.held)[None]

    def _input(self, unit: Unit, stream: Stream, row: PlanRow) -> Tensor:
        """First stage: latents of the unit. Noisy ones are used for one row only, the context's stay for a shift."""
        inputs, batches = self._inputs[unit.stream], stream.batches
        chunks, moved = batches.held(row, unit.chunk), batches.moved(row, unit.chunk)
        for chunk in row.born:
            if chunk in chunks and chunk not in inputs:
                inputs[chunk] = stream.noise(chunk, self.device).unsqueeze(0)
        latents = torch.cat([inputs[chunk] for chunk in chunks], dim=2)
        if unit.closes:
            for gone in [k for k in inputs if k < row.window[0] or k in moved]:
                del inputs[gone]
        return latents

    def _update(self, unit: Unit, stream: Stream, row: PlanRow) -> RowDone:
        """Last stage: guidance and the step of the unit's chunks; after a row's last unit, its end."""
        window = self._windows[unit.stream]
        velocity = guide(self._velocities[unit.stream], stream.guidance_scale)
        self._velocities[unit.stream] = []
        batches, latents, end = stream.batches, None, None
        window.step(row, batches.moved(row, unit.chunk), velocity)
        if batches.ends_row(row, unit.chunk):
            clean = window.close(row)
            if stream.plan.closes_shift(row.index):
                end = self._shift_end(unit, stream, window, clean)
        if unit.feeds:
            following = stream.plan.row(unit.row + 1)
            latents = window.joined(following, batches.returned(row, unit.chunk))
        self._forget(unit)
        return RowDone(latents, end)

    def _shift_end(self, unit: Unit, stream: Stream, window: Window, clean: Sequence[CleanChunk]) -> ShiftEnd:
        latents, change = window.latents, None
        copies = self._readback([*latents.values(), *(chunk.latents for chunk in clean)])
        if stream.batches.adaptive:
            change = change_of(self._memories[unit.stream])
        return ShiftEnd(window.row, list(latents), [chunk.index for chunk in clean], copies, change)

    def _grid(self, stream: Stream, chunks: int) -> Grid:
        _, height, width = stream.latent_shape
        return self.model.grid(chunks * stream.plan.latent_chunk_size, height, width)

    def _forget(self, unit: Unit) -> None:
        if unit.ends_stream and unit.closes:
            self.leave(unit.stream)
