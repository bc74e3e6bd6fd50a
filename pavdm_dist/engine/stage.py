"""A stage: a contiguous range of a backbone's blocks, as a plain object that knows neither Ray nor links.

The first stage embeds latents, the last one guides, takes the step to the next level and owns the window's latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pavdm_dist.engine.messages import Layout
from pavdm_dist.engine.order import Unit
from pavdm_dist.method.denoiser import change_of, memories_of, unit_context
from pavdm_dist.method.microbatches import WHOLE, carried_by, ends_row, moved_by, slots_of
from pavdm_dist.method.sampler import guide
from pavdm_dist.method.saved_keys import newly_left
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.stream import NewPrompt, Stream
from pavdm_dist.method.window import CleanChunk, Window, WindowSnapshot, row_levels
from pavdm_dist.models.base import Activation, Backbone, BlockContext, Grid
from pavdm_dist.models.kv_cache import Memory
from pavdm_dist.models.text_cache import TextBank


@dataclass(frozen=True)
class RowDone:
    """What the last stage has after a micro-batch whose branches are all there.

    Attributes:
        latents: its input at the next row, ``[1, C, F, h, w]`` float32; None where there is none.
        snapshot: at the end of a shift, the state after the row, in main memory; the driver, which knows what adaptive
            re-sync has decided, completes it.
        clean: at the end of a shift, the chunks that became clean, in main memory.
        not_finite: at the end of a shift, a chunk with values that are not finite.
        change: at the end of a shift of an adaptive stream, by how much its keys changed.
    """

    latents: Tensor | None
    snapshot: WindowSnapshot | None = None
    clean: tuple[CleanChunk, ...] = ()
    not_finite: int | None = None
    change: float | None = None


class Stage:
    """Runs blocks ``blocks[0] .. blocks[1] - 1`` of ``model`` for any number of streams.

    Args:
        model: a backbone of which at least this stage's tensors are loaded.
        blocks: the range.
        device: where it computes.
        dtype: what the model was loaded as, and what travels between stages; latents are float32 always.
    """

    def __init__(
        self,
        model: Backbone,
        blocks: tuple[int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
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

    def prepare(self, stream: Stream) -> None:
        """Takes a stream in before its first unit; computes nothing with the model."""
        self._texts.add(stream.id, stream.conditioning.texts)
        if self.last:
            self._windows[stream.id] = stream.window(self.device)
            self._velocities[stream.id] = []
        if self.first:
            window = self._windows.get(stream.id) or stream.window(self.device)
            row = stream.plan.row(stream.first_row)
            self._inputs[stream.id] = {chunk: window.input(chunk, row) for chunk in row.window}
        self._memories[stream.id] = memories_of(stream, self.model, range(*self.blocks), self.device)
        self._streams[stream.id] = stream

    def leave(self, stream: int) -> None:
        """Forgets all that is held of a stream; harmless where it has ended by itself or never came."""
        if stream in self._streams:
            self._texts.release(stream, self._streams.pop(stream).conditioning.texts)
        for table in (self._windows, self._inputs, self._velocities, self._memories):
            table.pop(stream, None)

    def stop(self, stream: int, plan: WindowPlan) -> None:
        """Gives an endless stream its end: ``plan`` is its own up to the row that comes next."""
        self._streams[stream] = replace(self._streams[stream], plan=plan)
        if stream in self._windows:
            self._windows[stream].plan = plan

    def change(self, stream: int, new: NewPrompt) -> None:
        """Gives a stream another prompt, for chunks that are not born yet."""
        changed = self._streams[stream] = self._streams[stream].changed(new)
        self._texts.add(stream, changed.conditioning.texts)

    def feed(self, stream: int, row: int, chunk: int, latents: Tensor) -> None:
        """First stage: latents ``[1, C, F, h, w]`` for ``row`` of a stream, which micro-batch ``chunk`` sent back."""
        plan = self._streams[stream].plan
        chunks = carried_by(plan, plan.row(row - 1), plan.row(row), chunk)
        self._inputs[stream].update(zip(chunks, latents.split(plan.latent_chunk_size, dim=2), strict=True))

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
        levels = self._levels(stream, row, unit)
        if incoming is None:
            incoming = self.model.embed(self._input(unit, stream, row), levels, stream.info)
        activation = incoming
        for index in range(*self.blocks):
            activation = self.model.block(index, activation, context)
        if not self.last or unit.context:
            self._forget(unit)
            return None if self.last else activation
        window = self._windows[unit.stream]
        x = window.joined(row, self._held(stream, row, unit))
        velocity = self.model.to_velocity(self.model.head(activation, context.grid), x, levels)
        self._velocities[unit.stream].append(velocity)
        return self._update(unit, stream, row) if unit.closes else None

    def newly_left(self, unit: Unit) -> dict[str, Tensor] | None:
        """After a stream's last unit of a shift in which a clean chunk left keys and values: those of this stage.

        None otherwise; all stages agree on that, whether or not their blocks keep any.
        """
        stream = self._streams.get(unit.stream)
        if stream is None or stream.plan.context == "joint" or unit.chunk != WHOLE or not unit.closes:
            return None
        if not (stream.plan.closes_shift(unit.row) and stream.plan.row(unit.row).context):
            return None
        return newly_left(self._memories[unit.stream])

    def activation_layout(self, unit: Unit) -> Layout:
        """Shapes of the activation that crosses a stage boundary for a unit."""
        stream = self._streams[unit.stream]
        grid = self._grid(stream, len(self._held(stream, stream.plan.row(unit.row), unit)))
        return Layout(self.model.activation_shapes(grid), self.dtype)

    def latents_layout(self, stream_id: int, row: int, chunk: int) -> Layout:
        """Shape of the latents that come back to the first stage as input of ``row``, from micro-batch ``chunk``."""
        stream = self._streams[stream_id]
        plan, (channels, height, width) = stream.plan, stream.latent_shape
        frames = len(carried_by(plan, plan.row(row - 1), plan.row(row), chunk)) * plan.latent_chunk_size
        return Layout(((1, channels, frames, height, width),), torch.float32)

    def _context(self, stream: Stream, row: PlanRow, unit: Unit) -> BlockContext:
        memory = self._memories[unit.stream][unit.branch]
        return unit_context(self.model, stream, row, unit.chunk, unit.branch, self._texts, memory)

    def _levels(self, stream: Stream, row: PlanRow, unit: Unit) -> Tensor:
        size, slots = stream.plan.latent_chunk_size, slots_of(stream.plan, row, unit.chunk)
        levels = row_levels(row, stream.schedule.levels, size, stream.held)[None]
        return levels[:, slots.start * size : slots.stop * size].to(self.device)

    def _held(self, stream: Stream, row: PlanRow, unit: Unit) -> tuple[int, ...]:
        """The chunks of a unit."""
        return row.window[slots_of(stream.plan, row, unit.chunk)]

    def _input(self, unit: Unit, stream: Stream, row: PlanRow) -> Tensor:
        """First stage: latents of the unit. Noisy ones are used for one row only, the context's stay for a shift."""
        inputs = self._inputs[unit.stream]
        chunks, moved = self._held(stream, row, unit), moved_by(stream.plan, row, unit.chunk)
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
        window.step(row, moved_by(stream.plan, row, unit.chunk), velocity)
        ends = ends_row(stream.plan, row, unit.chunk)
        clean = window.close(row) if ends else ()
        latents, snapshot, not_finite, change = None, None, None, None
        if ends and stream.plan.closes_shift(row.index):
            snapshot, not_finite = window.snapshot(), window.not_finite(clean)
            clean = tuple(CleanChunk(chunk.index, chunk.latents.cpu()) for chunk in clean)
            if stream.batches.adaptive:
                change = change_of(self._memories[unit.stream])
        if unit.feeds:
            following = stream.plan.row(unit.row + 1)
            latents = window.joined(following, carried_by(stream.plan, row, following, unit.chunk))
        self._forget(unit)
        return RowDone(latents, snapshot, clean, not_finite, change)

    def _grid(self, stream: Stream, chunks: int) -> Grid:
        _, height, width = stream.latent_shape
        return self.model.grid(chunks * stream.plan.latent_chunk_size, height, width)

    def _forget(self, unit: Unit) -> None:
        if unit.ends_stream and unit.closes:
            self.leave(unit.stream)
