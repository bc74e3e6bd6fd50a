"""Where an unfinished video can be gone on with: one safetensors file that is replaced in one move.

The file before is kept, too: one that is torn or not ours is told by its checksum, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pavdm_dist.errors import ConfigError
from pavdm_dist.io import storage
from pavdm_dist.io.latents import LatentsHash
from pavdm_dist.values.fields import Within, json_value, made, show

STATE, PREVIOUS = "state.safetensors", "state.previous.safetensors"
STATE_NAMES = re.compile(rf"{re.escape(STATE)}|{re.escape(PREVIOUS)}")
# Before the names of clean latents among a point's tensors. Files that hold some are of a version of their own, so that
# a program which knows nothing of them refuses the file instead of going on without.
CLEAN = "clean."
_PLAIN, _WITH_CLEAN = 2, 3
_Chunks = Annotated[int, Within(0)]

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """Where a sampler goes on, as plain data.

    Attributes:
        tensors: by name; any shapes and types. Names that begin with :data:`CLEAN` make the file one of version 3.
        facts: JSON-compatible.
        warm: latents ``[C, n, h, w]`` that a decoder must have seen before the next chunk; None = none.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    warm: Tensor | None = None


@dataclass(frozen=True)
class RecordingState:
    """All that is needed to go on with an unfinished video, beside its segments.

    Attributes:
        identity: what must be equal for that (JSON-compatible).
        next_chunk: the first chunk that ``point`` has not sampled.
        closed_chunks: chunks in complete segments when this was written.
        latents_hash: state of the latents' checksum before ``next_chunk``, hexadecimal.
        chunk_seconds: of every chunk before ``next_chunk``; the one part that grows, by four bytes a chunk.
        complete: every chunk of the video is in a segment.
        point: None = from the beginning, or nothing is left to sample.
        warm: latents ``[C, n, h, w]`` to warm a decoder on before it decodes ``pending``, or else ``next_chunk``.
        pending: clean latents ``[C, c, h, w]`` of the chunks before ``next_chunk`` that are in no complete segment.
        replaces: whether a file was in the output's place when it was begun, to be replaced; None = not known.
    """

    identity: Mapping[str, Any]
    next_chunk: int = 0
    closed_chunks: int = 0
    latents_hash: str | None = None
    chunk_seconds: Sequence[float] = ()
    complete: bool = False
    point: Point | None = None
    warm: Tensor | None = None
    pending: Mapping[int, Tensor] = field(default_factory=dict)
    replaces: bool | None = None

    @property
    def first_to_decode(self) -> int:
        """The chunk that a decoder goes on with: the first pending one, or else ``next_chunk``."""
        return min(self.pending, default=self.next_chunk)


@dataclass(frozen=True)
class _Facts:
    """What a state's file holds beside tensors."""

    version: int
    identity: dict[str, Any]
    next_chunk: _Chunks
    closed_chunks: _Chunks
    latents_hash: str | None
    complete: bool
    point: dict[str, Any] | None
    replaces: bool | None = None


class Ledger:
    """What has been taken of a video, and the newest state that it can be gone on with from.

    Args:
        state: where it begins.
        closed_chunks: chunks in complete segments; may be more than ``state`` knows of.
    """

    def __init__(self, state: RecordingState, closed_chunks: int) -> None:
        self._identity, self._complete, self._replaces = state.identity, state.complete, state.replaces
        self._closed = closed_chunks
        self._hash = LatentsHash(None if state.latents_hash is None else bytes.fromhex(state.latents_hash))
        self.chunk_seconds = array("f", state.chunk_seconds)
        self._newest = self._usable = _Place(state.next_chunk, state.point, self._hash.state)
        # Clean latents of the open segment, and what a decoder is warmed on before them. Where that is not known (no
        # point came with the chunk before), points inside the segment are of no use until it is closed. Here it is: a
        # resume that decodes from an earlier chunk on passes the end of the last closed segment first.
        self._open = {index: part for index, part in state.pending.items() if index >= closed_chunks}
        self._warm = state.warm
        self._warm_known = True

    @property
    def num_chunks(self) -> int:
        """Chunks taken, whether or not a state can go on behind them."""
        return len(self.chunk_seconds)

    @property
    def next_chunk(self) -> int:
        """The first chunk that must be sampled again after :attr:`state`."""
        return self._usable.next_chunk

    @property
    def latents_sha256(self) -> str:
        """Checksum of the latents of all chunks taken."""
        return self._hash.hexdigest()

    def take(self, index: int, latents: Tensor, seconds: float, point: Point | None, closed_chunks: int) -> None:
        """Takes a chunk, new or replayed.

        Args:
            index: at most ``num_chunks``.
            latents: of it, ``[C, c, h, w]``.
            seconds: that it took.
            point: where a sampler goes on after it.
            closed_chunks: chunks in complete segments now.
        """
        if index >= self._closed:
            self._open[index] = latents
        if index == self.num_chunks:
            self._hash.update(latents)
            self.chunk_seconds.append(seconds)
            if point is not None:
                self._newest = _Place(index + 1, point, self._hash.state)
        # An interruption may come between any two lines: what is closed comes first, so that no state would hold
        # latents of one segment and what precedes another.
        if closed_chunks > self._closed:
            self._closed = closed_chunks
            self._open.clear()
        if index + 1 == closed_chunks:
            before = self._newest.point if self._newest.next_chunk == closed_chunks else None
            self._warm, self._warm_known = None if before is None else before.warm, before is not None
        if self._warm_known or self._newest.next_chunk <= closed_chunks:
            self._usable = self._newest

    def grown(self, point: Point) -> None:
        """Takes where a sampler goes on before the first chunk; without effect once there is one."""
        if not self.num_chunks:
            self._newest = self._usable = _Place(0, point, self._hash.state)

    def complete(self) -> None:
        """Says that all chunks of the video have been taken and are in complete segments."""
        self._complete, self._closed = True, self.num_chunks
        self._usable = _Place(self.num_chunks, None, self._hash.state)

    @property
    def state(self) -> RecordingState:
        """The newest state."""
        place, end = self._usable, self._usable.next_chunk
        pending = {index: latents for index, latents in self._open.items() if self._closed <= index < end}
        return RecordingState(
            identity=self._identity,
            next_chunk=end,
            closed_chunks=self._closed,
            latents_hash=place.latents_hash.hex(),
            chunk_seconds=self.chunk_seconds[:end],
            complete=self._complete,
            replaces=self._replaces,
            point=place.point,
            warm=self._warm if pending else place.point.warm if place.point else None,
            pending=pending,
        )


class BegunOtherwiseError(ConfigError):
    """An unfinished video was begun with something else than it is to go on with.

    Args:
        begun: with what, in words.
        advice: what a command can do about it, as the end of the sentence.
        names: of the facts that differ, as :func:`~pavdm_dist.io.differences.differing` has them.
    """

    def __init__(self, begun: str, advice: str = "", names: Iterable[str] = ()) -> None:
        super().__init__(f"{begun}{advice}")
        self.begun, self.advice, self.names = begun, advice, frozenset(names)


class _OtherVersion(BegunOtherwiseError):
    """A state that another version of this program has written."""


class _Place(NamedTuple):
    """A point, the chunk that it goes on with, and the checksum of all latents before that."""

    next_chunk: int
    point: Point | None
    latents_hash: bytes


def write_state(folder: str | Path, state: RecordingState, check: Callable[[], None] = lambda: None) -> None:
    """Replaces the state in a folder; the one that was there becomes the one before.

    Args:
        folder: of the states.
        state: to write; its tensors do not change any more.
        check: see :func:`~pavdm_dist.io.storage.replace_bytes`.
    """
    from safetensors.torch import save

    tensors = {f"latents.{index}": latents for index, latents in state.pending.items()}
    if state.warm is not None:
        tensors["warm"] = state.warm
    if state.point is not None:
        tensors |= {f"point.{name}": tensor for name, tensor in state.point.tensors.items()}
    tensors["chunk_seconds"] = torch.from_numpy(np.array(state.chunk_seconds, dtype=np.float32))
    tensors = _apart(tensors)
    facts = {
        "version": _version(state),
        "identity": state.identity,
        "next_chunk": state.next_chunk,
        "closed_chunks": state.closed_chunks,
        "latents_hash": state.latents_hash,
        "complete": state.complete,
        "replaces": state.replaces,
        "point": None if state.point is None else dict(state.point.facts),
    }
    text = json.dumps(facts)
    content = save(tensors, {"state": text, "sha256": _checksum(text, tensors)})
    storage.replace_bytes(storage.join(folder, STATE), content, storage.join(folder, PREVIOUS), check)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in the same memory, as the format wants them; copies of the rest alone, for
    keys and values are gigabytes."""
    found, taken = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        held = tensor.detach().to("cpu").contiguous()
        memory = held.untyped_storage().data_ptr()
        found[name] = held.clone() if memory in taken else held
        taken.add(memory)
    return found


def read_state(folder: str | Path, mend: bool = False) -> RecordingState | None:
    """The newest state in a folder that is whole; None when there is none.

    Args:
        folder: the parts.
        mend: a torn state is removed when the one before is whole, so that the next one does not push that out; only
            for who may write there.

    Raises:
        ConfigError: it is of another version.
    """
    for name in (STATE, PREVIOUS):
        path = storage.join(folder, name)
        if not storage.exists(path):
            continue
        try:
            found = _read(path)
            if mend and name == PREVIOUS:
                storage.remove(storage.join(folder, STATE))
            return found
        except _OtherVersion:
            raise
        except (
            SafetensorError,
            RuntimeError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # or it went meanwhile
            logger.warning("%s is torn or not a state of this program (%s)", path, error)
    return None


def _read(path: str) -> RecordingState:
    with storage.local_copy(path) as file, safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        # Copies: what is opened is mapped, and the file may be replaced.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    text = metadata["state"]
    _check_version(json_value(text), path)
    if _checksum(text, tensors) != metadata["sha256"]:
        raise ValueError("its checksum differs")
    facts = made(_Facts, json_value(text), path)
    point = None
    if facts.point is not None:
        prefix = "point."
        of_point = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        point = Point(of_point, facts.point)
    pending = {int(name.rpartition(".")[2]): tensors[name] for name in tensors if name.startswith("latents.")}
    known = {name: value for name, value in vars(facts).items() if name not in ("version", "point")}
    seconds = array("f", tensors["chunk_seconds"].numpy().tobytes())
    return RecordingState(
        **known, chunk_seconds=seconds, point=point, warm=tensors.get("warm"), pending=dict(sorted(pending.items()))
    )


def _version(state: RecordingState) -> int:
    names = () if state.point is None else state.point.tensors
    return _WITH_CLEAN if any(name.startswith(CLEAN) for name in names) else _PLAIN


def _check_version(facts: Any, path: str) -> None:
    """Before anything else is asked of a state: another version may have other facts, and another checksum."""
    version = facts["version"]
    if type(version) is int and version not in (_PLAIN, _WITH_CLEAN):
        by: Any = facts
        for name in ("identity", "versions", "pavdm_dist"):
            by = by.get(name) if isinstance(by, Mapping) else None
        writer = f"pavdm_dist {show(by)}" if isinstance(by, str) else "another pavdm_dist"
        raise _OtherVersion(
            f"{path} is a state of version {version}, written by {writer}; this one goes on with versions"
            f" {_PLAIN} and {_WITH_CLEAN}",
            ": take the one that wrote it, or pass --overwrite to start anew",
            ["versions.pavdm_dist"],
        )


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():  # an empty one may have strides that cannot be viewed
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
