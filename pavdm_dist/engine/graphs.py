"""Micro-batches of a full window as CUDA graphs: what was launched kernel by kernel is launched again by one call.

A chunk of STDiT3-XL is 1,260 kernels, which take a GPU 18 ms and a slow host 60 to launch. The kernels are the same,
and so are their bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.errors import first_line
from pavdm_dist.models.base import Activation, BlockContext
from pavdm_dist.models.kv_cache import ChunkMemory

logger = logging.getLogger(__name__)

# Of a micro-batch's tokens, bytes. Above, kernels take longer than their launches, and what a graph keeps for what is
# between its blocks, many times as much, is missed elsewhere.
LARGEST = 64 * 2**20

Blocks = Callable[[Activation, BlockContext], Activation]
Call = Callable[[], None]


@dataclass
class _Slot:
    """A place of a stream's windows: which text it has, and from the second time on its graph, with what that reads."""

    text: str
    replay: Call | None = None
    read: Any = None


class Graphs:
    """Runs a stage's blocks; from the second time on that a micro-batch has a place and a text, by a graph.

    A graph reads the very tensors that it was captured with. So there are graphs only where these stay what they are
    from row to row: the texts' keys and values, which a slot's graph keeps alive, rotary angles, which are never given
    up, and in mode causal what chunks leave for each other, which lies at a place of its own
    (:class:`~pavdm_dist.models.kv_cache.ChunkMemory`). The first run makes them all.

    Args:
        blocks: runs them one kernel after the other; changes nothing of an activation but its tokens.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self._capture = blocks, Capture()
        self._slots: dict[int, dict[tuple[int, int, int], _Slot]] = {}
        self._buffers: dict[tuple[torch.Size, ...], tuple[Activation, Tensor]] = {}
        self._works = True

    def make_ready(self) -> None:
        """Loads what the first capture needs, before any link is used."""
        try:
            self._capture.make_ready()
        except RuntimeError as error:
            self._give_up(error)

    def run(self, stream: int, branch: int, activation: Activation, context: BlockContext) -> Activation:
        """All blocks of the stage on a micro-batch of a stream and guidance branch."""
        if not (self._works and _stays(activation, context)):
            return self._blocks(activation, context)
        place, text = (branch, context.first_frame, context.grid.frames), str(context.text[0].key)
        slots = self._slots.setdefault(stream, {})
        slot = slots.get(place)
        if slot is None or slot.text != text:
            slots[place] = _Slot(text)
            return self._blocks(activation, context)
        if slot.replay is not None:
            _, out = self._filled(activation)
            slot.replay()
        else:
            try:  # a graph's first run may ask for memory, too
                given, out = self._filled(activation)
                self._capture_in(slot, given, out, context)
            except RuntimeError as error:  # of memory, above all
                self._give_up(error)
                return self._blocks(activation, context)
        # The next graph writes there again, maybe before this one's result has been sent.
        return Activation(out.clone(), activation.modulation, activation.time)

    def leave(self, stream: int) -> None:
        """Forgets a stream's graphs."""
        self._slots.pop(stream, None)
        if not self._slots:
            self._buffers.clear()

    def _give_up(self, error: RuntimeError) -> None:
        """With all memory that graphs had."""
        logger.warning("no CUDA graphs from here on, kernels are launched one by one: %s", first_line(error))
        self._works = False
        self._slots.clear()
        self._buffers.clear()
        self._capture.close()

    def _filled(self, activation: Activation) -> tuple[Activation, Tensor]:
        """Where all graphs of a size find their input, which is put there, and where they leave their result."""
        sizes = tuple(tensor.shape for tensor in _tensors(activation))
        if sizes not in self._buffers:
            own = Activation(*(torch.empty_like(tensor) for tensor in _tensors(activation)))
            self._buffers[sizes] = own, torch.empty_like(activation.hidden)
        given, out = self._buffers[sizes]
        for kept, new in zip(_tensors(given), _tensors(activation), strict=True):
            kept.copy_(new)
        return given, out

    def _capture_in(self, slot: _Slot, given: Activation, out: Tensor, context: BlockContext) -> None:
        """Makes the slot's graph and runs it."""
        replay = self._capture(lambda: _copy(self._blocks(given, context).hidden, out))
        assert context.text_cache is not None
        texts = [context.text_cache.held(str(run.key)) for run in context.text]
        slot.replay, slot.read = replay, (texts, context.memory, given, out)
        replay()


class Capture:
    """CUDA graphs that run one after the other: they share the memory of what is between a call's input and result."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._anchor: Call | None = None

    def make_ready(self) -> None:
        """What all captures share."""
        if self._stream is not None:
            return
        # One stream for all: on each the libraries have working memory of their own.
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        # Torch gives a pool up with its last graph, and fails when it is asked for again: streams end, this stays.
        nothing = torch.zeros(2, device="cuda")
        self._anchor = self._graph(self._stream, lambda: _copy(nothing[:1], nothing[1:]))

    def __call__(self, call: Call) -> Call:
        """Notes what a call launches, which reads and writes tensors that stay; nothing of it is computed now."""
        self.make_ready()
        assert self._stream is not None
        return self._graph(self._stream, call)

    def close(self) -> None:
        """Gives the shared memory up."""
        self._anchor = self._pool = self._stream = None

    def _graph(self, own: torch.cuda.Stream, call: Call) -> Call:
        graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        own.wait_stream(outer)
        with torch.cuda.stream(own):
            # Other threads, which decode and send, may go on with what is not allowed here meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        outer.wait_stream(own)
        return graph.replay


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def _stays(activation: Activation, context: BlockContext) -> bool:
    """Whether all that a micro-batch reads stays where it is, and is small enough to be worth it."""
    return (
        context.steady
        and activation.hidden.nbytes <= LARGEST
        and context.text_cache is not None
        and all(run.key is not None for run in context.text)
        and (context.memory is None or isinstance(context.memory, ChunkMemory))
    )


def _tensors(activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    return activation.hidden, activation.modulation, activation.time
