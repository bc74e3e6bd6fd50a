"""The decode actor as a gang sees it: what is with it, in order, and whether it still works."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.engine.blame import ANSWER_S, DECODER, Actor, control_results, last_line, video_error
from pavdm_dist.engine.events import DECODER_STAGE, Decoded, DecoderLost, GangLost, Place
from pavdm_dist.engine.lines import Speaker
from pavdm_dist.engine.spans import DecodeSpan
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
        start_s: longest time until it is up.

        trace: remember what was handed over, for :meth:`spans`.

    Attributes:
        facts: reference to what the actor says of itself, once it is up.
    """

    def __init__(self, actor: Any, limit_s: float, start_s: float, trace: bool = False) -> None:
        self.actor, self._limit, self._start, self._born = actor, limit_s, start_s, time.monotonic()
        self._is_up = False
        self.facts = actor.facts.remote()
        self._keys: dict[int, int] = {}
        self._warming: dict[int, Any] = {}  # by key; ready once a decoder has been warmed
        self._opened = 0
        self._chunks: deque[_Chunk] = deque()
        self._decoded = 0  # latents, when it was last asked
        self._handed: dict[int, list[tuple[int, int]]] | None = {} if trace else None

    def open(self, stream: int, warm: Tensor | None) -> None:
        """A decoder for a stream; an earlier one of the same id has been forgotten."""
        self._keys[stream] = self._opened
        opening = self.actor.open.remote(self._opened, warm)
        if warm is not None:
            self._warming[self._opened] = opening
        self._opened += 1

    def decode(self, stream: int, clean: CleanChunk) -> None:
        """Queues a stream's next chunk."""
        key = self._keys[stream]
        frames = self.actor.decode.remote(key, clean.latents)
        self._chunks.append(_Chunk(key, stream, clean.index, frames, time.monotonic()))
        if self._handed is not None:
            self._handed.setdefault(key, []).append((stream, clean.index))

    def forget(self, stream: int) -> None:
        """Drops a stream's decoder and what waits for it."""
        import ray

        key = self._keys.pop(stream, None)
        if key is None:
            return
        warming = self._warming.pop(key, None)
        is_warming = warming is not None and not ray.wait([warming], timeout=0)[0]
        if is_warming or any(chunk.key == key for chunk in self._chunks):
            self._control("drop", key)
            self._chunks = deque(chunk for chunk in self._chunks if chunk.key != key)
        self.actor.close.remote(key)

    @property
    def named(self) -> Actor:
        """The actor, for people."""
        return Actor(DECODER, place=self.place)

    @property
    def place(self) -> Place | None:
        """Where the actor is; None until it is up, and where it never was."""
        import ray

        try:
            return ray.get(self.facts, timeout=0)[2]
        except ray.exceptions.RayError:
            return None

    def gone(self, cause: str) -> GangLost:
        """The loss where its machine is gone."""
        said = "the machine of the decode actor is gone"
        return GangLost(said, place=self.place, cause=cause, stage=DECODER_STAGE)

    @property
    def speaker(self) -> Speaker:
        """The actor, as who listens to what it logs knows it."""
        streams = {key: stream for stream, key in self._keys.items()}
        return Speaker(DECODER, DECODER_STAGE, lambda: self._control("said"), streams.get)

    def excuse(self) -> None:
        """Time up to now is not the actor's: who waits for it stood still."""
        self._born = now = time.monotonic()
        for chunk in list(self._chunks)[:1]:
            chunk.since = now

    @property
    def awaited(self) -> list[Any]:
        """References that are ready when :meth:`collect` has something."""
        return [chunk.frames for chunk in list(self._chunks)[:1]]

    def collect(self) -> list[Decoded | DecoderLost]:
        """What has been decoded, or that nothing will be any more; never waits."""
        import ray

        try:
            return self._collect()
        except (ray.exceptions.RayError, TimeoutError) as error:
            what = "is frozen" if isinstance(error, TimeoutError) else "died"
            actor = self.named
            return [DecoderLost(f"{actor} {what}: {last_line(error)}", actor.place)]

    def _collect(self) -> list[Decoded | DecoderLost]:
        import ray

        found: list[Decoded | DecoderLost] = []
        while self._chunks and ray.wait([self._chunks[0].frames], timeout=0)[0]:
            chunk = self._chunks.popleft()
            if self._chunks:
                self._chunks[0].since = time.monotonic()
            try:
                # The store's array is read-only, and room in the store is scarce.
                frames = torch.from_numpy(ray.get(chunk.frames).copy())
                found.append(Decoded(chunk.stream, chunk.chunk, frames))
            except ray.exceptions.RayTaskError as error:
                what = f"chunk {chunk.chunk} could not be decoded"
                reason = video_error(error, what, chunk.stream, DECODER_STAGE)
                found.append(Decoded(chunk.stream, chunk.chunk, None, reason))
        if self._chunks:
            self._check()
        return found

    def _check(self) -> None:
        """A chunk may take long; a latent may not, once the actor is up."""
        import ray

        now = time.monotonic()
        if not self._is_up:
            self._is_up, self._chunks[0].since = bool(ray.wait([self.facts], timeout=0)[0]), now
            if not self._is_up and now - self._born > self._start:
                raise TimeoutError(f"it did not come up within {self._start:g} s (start_timeout_s)")
        if now - self._chunks[0].since <= self._limit:
            return
        try:
            decoded = ray.get(self._control("progress"), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            decoded = self._decoded
        if decoded == self._decoded:
            raise TimeoutError(f"it has decoded nothing for {self._limit:g} s (link_timeout_s)")
        self._decoded, self._chunks[0].since = decoded, now

    def spans(self) -> list[DecodeSpan]:
        """When each chunk of a traced run was decoded.

        Raises:
            GangLost: the decoder does not say.
        """
        spans, taken = list[DecodeSpan](), {key: iter(chunks) for key, chunks in (self._handed or {}).items()}
        (times,) = control_results([self._control("times")], self._limit, [self.named], "tell what it did")
        for key, start, end in times:
            spans.append(DecodeSpan(*next(taken[key]), start, end))
        return spans

    def _control(self, method: str, *arguments: Any) -> Any:
        return getattr(self.actor, method).options(concurrency_group="control").remote(*arguments)
