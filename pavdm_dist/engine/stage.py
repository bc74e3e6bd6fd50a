"""A stage: a contiguous range of a backbone's blocks, as a plain object that knows neither Ray nor links.

The first stage embeds latents, the last one guides, takes the Euler step and owns the window's latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pavdm_dist.denoiser import TextBank
from pavdm_dist.engine.messages import Layout
from pavdm_dist.engine.order import Unit
from pavdm_dist.models.base import Activation, Backbone, BlockContext, Grid
from pavdm_dist.sampler import guide
from pavdm_dist.stream import Stream
from pavdm_dist.window import CleanChunk, Window, WindowSnapshot, row_levels


@dataclass(frozen=True)
class RowDone:
    """What the last stage has after a row.

    Attributes:
        latents: input of the next row, ``[1, C, F, h, w]`` float32; None after the stream's last row.
        clean: the chunk that became clean, if any.
        snapshot: state after the row, taken whenever a chunk became clean (a shift).
    """

    latents: Tensor | None
    clean: CleanChunk | None
    snapshot: WindowSnapshot | None


class Stage:
    """Runs blocks ``blocks[0] .. blocks[1] - 1`` of ``model`` for any number of streams.

    Args:
        model: a backbone of which at least this stage's tensors are loaded.
        blocks: the range.
        device: where it computes.
    """

    def __init__(self, model: Backbone, blocks: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.model, self.blocks, self.device = model, blocks, torch.device(device)
        self.first = blocks[0] == 0
        self.last = blocks[1] == model.spec.num_blocks
        self.dtype = next(p.dtype for p in model.parameters() if not p.is_meta)  # type: ignore[attr-defined]
        self._texts = TextBank(model, self.device)
        self._streams: dict[int, Stream] = {}
        self._windows: dict[int, Window] = {}
        self._inputs: dict[int, Tensor] = {}
        self._velocities: dict[int, list[Tensor]] = {}

    def prepare(self, stream: Stream) -> None:
        """Takes a stream in before its first unit; computes nothing with the model."""
        self._texts.add(stream)
        if self.last:
            self._windows[stream.id] = stream.window(self.device)
            self._velocities[stream.id] = []
        if self.first:
            window = self._windows.get(stream.id) or stream.window(self.device)
            self._inputs[stream.id] = window.inputs(stream.plan.row(stream.first_row))[0]
        self._streams[stream.id] = stream

    def feed(self, stream: int, latents: Tensor) -> None:
        """First stage: the latents ``[1, C, F, h, w]`` of the stream's next row."""
        self._inputs[stream] = latents

    @torch.inference_mode()
    def run(self, unit: Unit, incoming: Activation | None) -> Activation | RowDone | None:
        """One unit.

        Args:
            unit: which one.
            incoming: what the previous stage sent; None on the first stage.

        Returns:
            The activation for the next stage; on the last stage a :class:`RowDone` when the unit closes its
            row, else None.
        """
        stream = self._streams[unit.stream]
        row = stream.plan.row(unit.row)
        grid = self._grid(stream, len(row.window))
        text = self._texts.runs(stream, row, unit.branch)
        context = BlockContext(grid, text, text_cache=self._texts.cache)
        levels = row_levels(row, stream.schedule.levels, stream.plan.latent_chunk_size)[None].to(self.device)
        if incoming is None:
            incoming = self.model.embed(self._inputs[unit.stream], levels, stream.info)
        activation = incoming
        for index in range(*self.blocks):
            activation = self.model.block(index, activation, context)
        if not self.last:
            self._forget(unit)
            return activation
        x, _ = self._windows[unit.stream].inputs(row)
        velocity = self.model.to_velocity(self.model.head(activation, grid), x, levels)
        self._velocities[unit.stream].append(velocity)
        if not unit.closes_row:
            return None
        return self._close_row(unit, stream)

    def activation_layout(self, unit: Unit) -> Layout:
        """Shapes of the activation that crosses a stage boundary for a unit."""
        stream = self._streams[unit.stream]
        grid = self._grid(stream, len(stream.plan.row(unit.row).window))
        dim = self.model.spec.hidden_size
        shapes = ((1, grid.frames, grid.tokens_per_frame, dim), (1, grid.frames, 6 * dim), (1, grid.frames, dim))
        return Layout(shapes, self.dtype)

    def latents_layout(self, unit: Unit) -> Layout:
        """Shape of the latents that go back to the first stage after a unit: the *next* row's input."""
        stream = self._streams[unit.stream]
        chunks = len(stream.plan.row(unit.row + 1).window)
        channels, height, width = stream.latent_shape
        return Layout(((1, channels, chunks * stream.plan.latent_chunk_size, height, width),), torch.float32)

    def _close_row(self, unit: Unit, stream: Stream) -> RowDone:
        window = self._windows[unit.stream]
        velocity = guide(self._velocities[unit.stream], stream.guidance_scale)
        self._velocities[unit.stream] = []
        clean = window.update(stream.plan.row(unit.row), velocity)
        latents = None
        if not unit.ends_stream:
            latents = window.inputs(stream.plan.row(unit.row + 1))[0]
        snapshot = window.snapshot() if clean is not None else None
        self._forget(unit)
        return RowDone(latents, clean, snapshot)

    def _grid(self, stream: Stream, chunks: int) -> Grid:
        _, height, width = stream.latent_shape
        return self.model.grid(chunks * stream.plan.latent_chunk_size, height, width)

    def _forget(self, unit: Unit) -> None:
        if unit.ends_stream and unit.closes_row:
            self._texts.remove(self._streams.pop(unit.stream))
            for table in (self._windows, self._inputs, self._velocities):
                table.pop(unit.stream, None)
