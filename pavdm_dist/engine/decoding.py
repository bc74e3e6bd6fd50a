"""The decode actor as a gang sees it: what is with it, in order, and whether it still works."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.engine.blame import ANSWER_S, video_error
from pavdm_dist.engine.events import Decoded, GangLost, Place
from pavdm_dist.method.window import CleanChunk


@dataclass
class _Chunk:
    """A chunk that is with the decoder; ``key`` names its stream's decoder there."""

    key: int
    stream: int
    chunk: int
    frames: Any
    since: float


class Decoding:
    """Chunks on their way through a decode actor, oldest first.

    Args:
        actor: a :class:`~pavdm_dist.engine.actors.DecodeActor`.
        limit_s: longest time for a latent.

    Attributes:
        place: of the actor, once it is up.
    """

    def __init__(self, actor: Any, limit_s: float) -> None:
        self.actor, self._limit = actor, limit_s
        self.place: Place | None = None
        self._keys: dict[int, int] = {}
        self._opened = 0
        self._chunks: deque[_Chunk] = deque()
        self._decoded = 0  # latents, when it was last asked

    def open(self, stream: int, warm: Tensor | None) -> None:
        """A decoder for a stream; an earlier one of the same id has been forgotten."""
        self._keys[stream] = self._opened
        self.actor.open.remote(self._opened, warm)
        self._opened += 1

    def decode(self, stream: int, clean: CleanChunk) -> None:
        """Queues a stream's next chunk."""
        key = self._keys[stream]
        frames = self.actor.decode.remote(key, clean.latents)
        self._chunks.append(_Chunk(key, stream, clean.index, frames, time.monotonic()))

    def forget(self, stream: int) -> None:
        """Drops a stream's decoder and what waits for it."""
        key = self._keys.pop(stream, None)
        if key is None:
            return
        if any(chunk.key == key for chunk in self._chunks):
            self._control("drop", key)
            self._chunks = deque(chunk for chunk in self._chunks if chunk.key != key)
        self.actor.close.remote(key)

    @property
    def awaited(self) -> list[Any]:
        """References that are ready when :meth:`collect` has something."""
        return [chunk.frames for chunk in list(self._chunks)[:1]]

    def collect(self) -> list[Decoded]:
        """What has been decoded; never waits.

        Raises:
            GangLost: the actor is frozen.
            ray.exceptions.RayError: it died.
        """
        import ray

        found = []
        while self._chunks and ray.wait([self._chunks[0].frames], timeout=0)[0]:
            chunk = self._chunks.popleft()
            if self._chunks:
                self._chunks[0].since = time.monotonic()
            try:
                # The store's array is read-only, and room in the store is scarce.
                frames = torch.from_numpy(ray.get(chunk.frames).copy())
                found.append(Decoded(chunk.stream, chunk.chunk, frames))
            except ray.exceptions.RayTaskError as error:
                reason = video_error(error, f"chunk {chunk.chunk} could not be decoded")
                found.append(Decoded(chunk.stream, chunk.chunk, None, reason))
        if self._chunks and time.monotonic() - self._chunks[0].since > self._limit:
            self._check()
        return found

    def _check(self) -> None:
        """A chunk may take long; a latent may not."""
        import ray

        try:
            decoded = ray.get(self._control("progress"), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            decoded = self._decoded
        if decoded == self._decoded:
            cause = f"it has decoded nothing for {self._limit:g} s (link_timeout_s)"
            node = None if self.place is None else self.place.node
            raise GangLost(f"the decode actor ({self.place}) is frozen: {cause}", None, node, cause)
        self._decoded, self._chunks[0].since = decoded, time.monotonic()

    def _control(self, method: str, *arguments: Any) -> Any:
        return getattr(self.actor, method).options(concurrency_group="control").remote(*arguments)
