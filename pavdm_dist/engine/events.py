"""What the parts of the engine tell each other, as records: gangs to the driver, the driver to whoever consumes.

Everything here lives in main memory and can be pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.engine.order import Unit
from pavdm_dist.errors import EngineError, PAVDMError
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.window import CleanChunk, WindowSnapshot

# --- from a gang to the driver -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """All stages, and the decoder if there is one, have taken a stream in; ``error`` says why they could not."""

    stream: int
    error: PAVDMError | None = None


@dataclass(frozen=True)
class EpochDone:
    """The last stage has finished an epoch, and with it every other stage."""

    epoch: int


@dataclass(frozen=True)
class KeysChanged:
    """A shift of an adaptive stream ended with ``row``; its keys changed by so much (relative L2)."""

    stream: int
    row: int
    change: float


@dataclass(frozen=True)
class Left:
    """Keys and values that clean chunks left on one stage in a shift; a gang adds them to the last stage's ``Shift``.

    Attributes:
        stream: id.
        row: the last one of the shift.
        left: see :mod:`pavdm_dist.method.saved_keys`.
    """

    stream: int
    row: int
    left: Mapping[str, Tensor]

    def __reduce__(self) -> tuple[Any, ...]:
        return _left, (self.stream, self.row, _as_arrays(self.left))


@dataclass(frozen=True)
class Shift:
    """The end of a shift of one stream.

    Attributes:
        stream: id.
        snapshot: the state before the next row, without what adaptive re-sync has decided, which the driver knows.
        clean: the chunks that became clean; none while the first window grows, and where the plan discards them.
        not_finite: a chunk with values that are not finite; nothing of the stream is of use any more.
    """

    stream: int
    snapshot: WindowSnapshot
    clean: tuple[CleanChunk, ...] = ()
    not_finite: int | None = None

    def with_left(self, parts: Iterable[Left]) -> Shift:
        """With what clean chunks left on other stages."""
        left = dict(self.snapshot.left)
        for part in parts:
            left |= part.left
        return replace(self, snapshot=replace(self.snapshot, left=left))

    def __reduce__(self) -> tuple[Any, ...]:
        """As arrays, which are pickled in a tenth of the time: a stage holds the interpreter meanwhile."""
        row, latents, exact_rows = self.snapshot.row, self.snapshot.latents, self.snapshot.exact_rows
        arrays = {index: held.numpy() for index, held in latents.items()}
        clean = [(chunk.index, chunk.latents.numpy()) for chunk in self.clean]
        left = _as_arrays(self.snapshot.left)
        return _shift, (self.stream, row, arrays, exact_rows, clean, self.not_finite, left)


# Bytes, shape and type: numpy has no bfloat16.
_Array = tuple[np.ndarray, tuple[int, ...], torch.dtype]


def _left(stream: int, row: int, arrays: dict[str, _Array]) -> Left:
    return Left(stream, row, _as_tensors(arrays))


def _as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, _Array]:
    return {
        name: (tensor.contiguous().flatten().view(torch.uint8).numpy(), tuple(tensor.shape), tensor.dtype)
        for name, tensor in tensors.items()
    }


def _as_tensors(arrays: dict[str, _Array]) -> dict[str, Tensor]:
    return {name: torch.tensor(array).view(dtype).view(shape) for name, (array, shape, dtype) in arrays.items()}


def _shift(
    stream: int,
    row: int,
    arrays: dict[int, np.ndarray],
    exact_rows: frozenset[int],
    clean: list[tuple[int, np.ndarray]],
    not_finite: int | None,
    left: dict[str, _Array],
) -> Shift:
    # Copies: what arrives may be mapped memory that is read only, and may go.
    snapshot = WindowSnapshot(
        row, {index: torch.tensor(array) for index, array in arrays.items()}, exact_rows, _as_tensors(left)
    )
    chunks = tuple(CleanChunk(index, torch.tensor(array)) for index, array in clean)
    return Shift(stream, snapshot, chunks, not_finite)


@dataclass(frozen=True)
class Decoded:
    """Frames of a stream's oldest undecoded chunk, uint8 ``[t, H, W, 3]``; or why there are none."""

    stream: int
    chunk: int
    frames: Tensor | None
    error: PAVDMError | None = None


@dataclass(frozen=True)
class Place:
    """Where an actor runs: address of its machine, process number, the file there that its errors go to, its device."""

    node: str
    pid: int
    log: str = ""
    device: str = ""

    def __str__(self) -> str:
        return f"node {self.node}, pid {self.pid}"


@dataclass(frozen=True)
class DecoderLost:
    """The decode actor died or stands still; the stages are well. What was with it is lost."""

    cause: str
    place: Place | None = None


Event = Prepared | EpochDone | KeysChanged | Shift | Decoded | DecoderLost


# What logs call the decode actor, where they have a stage's rank.
DECODER_STAGE = "decoder"


class GangLost(EngineError):
    """A gang cannot go on: an actor died, is silent, or a fault ended its loop.

    Attributes:
        rank: the stage; None for the decode actor.
        stage: the same for logs, where the decode actor is ``decoder``; None where it is not known who it was.
        place: of the actor, None where it is not known.
        cause: in words.
        is_fault: an exception inside a stage, which may well come again; not a death, a silence or an echo of one.
    """

    def __init__(
        self,
        message: str,
        rank: int | None = None,
        place: Place | None = None,
        cause: str = "",
        is_fault: bool = False,
        stage: int | str | None = None,
    ) -> None:
        super().__init__(message)
        self.rank, self.place, self.cause, self.is_fault = rank, place, cause, is_fault
        self.stage = rank if stage is None else stage


# --- from the driver to a consumer ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A clean chunk of a stream.

    Attributes:
        stream: id.
        clean: index and latents.
        frames: uint8 ``[t, H, W, 3]``; None in an engine without a decoder.
        last: nothing of the stream follows.
        resume: where the stream goes on behind this chunk, bit for bit; None where it could not: in mode displaced
            between exact rows; of chunks that become clean together, for all but the last; with cached context of
            which nothing is kept, but where nothing of it is read.
        resyncs: rows that adaptive re-sync has made exact so far.
    """

    stream: int
    clean: CleanChunk
    frames: Tensor | None
    last: bool
    resume: ResumePoint | None
    resyncs: tuple[int, ...] = field(default=())

    @property
    def num_bytes(self) -> int:
        """What it holds in memory; of its resume point see :attr:`ResumePoint.num_bytes`."""
        point = 0 if self.resume is None else self.resume.num_bytes
        return self.clean.latents.nbytes + (0 if self.frames is None else self.frames.nbytes) + point


@dataclass(frozen=True)
class Grown:
    """A shift that finished no chunk, from which the stream goes on: its first window is growing."""

    stream: int
    resume: ResumePoint

    @property
    def num_bytes(self) -> int:
        """What it holds in memory."""
        return self.resume.num_bytes


@dataclass(frozen=True)
class AtWork:
    """Where a stream is while it is made, for who watches.

    Attributes:
        awaited: what comes next, in words: which chunk, and who has it, stages or decoder, with how many are behind it
            there; the row where this process samples alone.
        row: the row that comes next, as far as is known here: behind the last shift that was told of, or the last row
            in the process that samples.
        decoding: chunks that are clean, and whose frames are still to come. None are told of where this process samples
            alone, as it does nothing else while it decodes.
        stages: the unit that each stage has finished last, of whatever stream; None before its first, or where it did
            not answer. No entries where this process samples alone.
    """

    awaited: str
    row: int
    decoding: tuple[int, ...] = ()
    stages: tuple[Unit | None, ...] = ()


@dataclass(frozen=True)
class Failed:
    """A stream that ends without its remaining chunks; the others go on."""

    stream: int
    error: PAVDMError
    num_bytes: ClassVar[int] = 0


Output = Finished | Grown | Failed
