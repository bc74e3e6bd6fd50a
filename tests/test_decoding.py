"""What a gang makes of its decode actor: how long it may take, and what is said when it is lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from gangs import MeanCodec, MeanDecoder
from threaded import Threads, futures_for_references
from torch import Tensor

from pavdm_dist.codecs.catalog import FrameMaker
from pavdm_dist.engine import actors
from pavdm_dist.engine.actors import DecodeActor
from pavdm_dist.engine.decoding import Decoding
from pavdm_dist.engine.events import Decoded, DecoderLost
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.source import Source

LIMIT_S = 0.5


class Slow(MeanDecoder):
    """Takes its time over every latent; tells who else wants to know."""

    def __init__(self, seconds: float, began: Callable[[], None]) -> None:
        super().__init__()
        self._seconds, self._began = seconds, began

    def decode(self, latents: Tensor) -> Tensor:
        frames = []
        for latent in latents.split(1, dim=1):
            self._began()
            time.sleep(self._seconds)
            frames.append(super().decode(latent))
        return torch.cat(frames)


@dataclass(frozen=True)
class Maker(FrameMaker):
    """Frames of a decoder that is this slow."""

    vae: Source = field(default_factory=lambda: Source("none"))
    seconds: float = 0.0
    began: Callable[[], None] = lambda: None

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        codec = MeanCodec()
        codec.decoder = lambda: Slow(self.seconds, self.began)  # type: ignore[method-assign]
        return codec


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[DecodeActor], Decoding]]:
    """Makes what a gang has of an actor, without a cluster."""

    futures_for_references(monkeypatch)
    monkeypatch.setattr(actors, "_node", lambda: "10.0.0.7")
    made = list[Threads]()

    def decoding(actor: DecodeActor) -> Decoding:
        made.append(Threads(actor))
        return Decoding(made[-1], LIMIT_S, 60)

    yield decoding
    for actor in made:
        for pool in actor.pools.values():
            pool.shutdown(wait=True, cancel_futures=True)


def _latents(count: int) -> Tensor:
    return torch.arange(4 * count, dtype=torch.float32).view(4, count, 1, 1)


def _collected(decoding: Decoding) -> list[Decoded | DecoderLost]:
    while not (found := decoding.collect()):
        time.sleep(0.01)
    return found


def test_a_decoder_may_warm_for_longer_than_a_latent_may_take(
    in_threads: Callable[[DecodeActor], Decoding],
) -> None:
    decoding, latents = in_threads(DecodeActor(Maker(seconds=0.15), 1, "cpu")), _latents(10)
    began = time.monotonic()
    decoding.open(0, latents[:, :8])
    decoding.decode(0, CleanChunk(4, latents[:, 8:]))
    (found,) = _collected(decoding)
    assert time.monotonic() - began > 8 * 0.15 > 2 * LIMIT_S, "it was warmed for longer than the limit"
    assert isinstance(found, Decoded) and found.error is None and found.frames is not None
    whole = MeanDecoder()
    whole.warm(latents[:, :8])
    assert torch.equal(found.frames, whole.decode(latents[:, 8:]))


def test_a_video_that_is_dropped_while_its_decoder_warms_keeps_nobody_waiting(
    in_threads: Callable[[DecodeActor], Decoding],
) -> None:
    actor = DecodeActor(Maker(seconds=0.05), 1, "cpu")
    decoding = in_threads(actor)
    decoding.open(0, _latents(100))
    decoding.forget(0)
    decoding.open(0, None)
    decoding.decode(0, CleanChunk(0, _latents(2)))
    (found,) = _collected(decoding)
    assert isinstance(found, Decoded) and found.frames is not None and actor.progress() < 10
    assert torch.equal(found.frames, MeanDecoder().decode(_latents(2))), "by a decoder of its own"
    decoding.forget(0)
    assert not decoding._warming and not actor._dropped


def test_a_decoder_that_stands_still_at_one_latent_is_lost(in_threads: Callable[[DecodeActor], Decoding]) -> None:
    goes_on = threading.Event()
    decoding = in_threads(DecodeActor(Maker(began=lambda: bool(goes_on.wait(30)) and None), 1, "cpu"))
    decoding.open(0, _latents(3))
    decoding.decode(0, CleanChunk(0, _latents(2)))
    (found,) = _collected(decoding)
    goes_on.set()
    assert isinstance(found, DecoderLost) and f"decoded nothing for {LIMIT_S:g} s (link_timeout_s)" in found.cause
    assert found.cause.startswith(f"the decode actor (node 10.0.0.7, pid {os.getpid()}) is frozen")
    assert found.place is not None and found.place.pid == os.getpid() and found.place.log, "so that its log is found"


def test_a_decoder_is_warmed_no_further_once_its_video_is_dropped() -> None:
    seen = list[int]()

    def began() -> None:
        seen.append(len(seen))
        if len(seen) == 3:
            actor.drop(0)

    actor = DecodeActor(Maker(began=began), 1, "cpu")
    actor.open(0, _latents(8))
    assert len(seen) == actor.progress() == 3 and actor.decode(0, _latents(2)) is None
    actor.close(0)
    actor.open(1, _latents(2))
    assert isinstance(actor.decode(1, _latents(2)), np.ndarray), "others go on"
