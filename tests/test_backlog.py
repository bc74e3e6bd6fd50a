"""What waits for the decoder or the consumer is counted as what it holds, keys and values among it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import torch
from staircase import CUTS, FORCING, MODEL, ROLLING, latents_of, video

from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Decoded, Failed, Finished, Grown, Output
from pavdm_dist.engine.local import LocalGang
from pavdm_dist.engine.runs import Run, Switch
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import VideoError
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.saved_keys import chunks_in
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk

CHUNKS = 24


class Undecoded(LocalGang):
    """Keeps chunks until it is told to give frames for them."""

    def __init__(self) -> None:
        super().__init__([Stage(MODEL, blocks) for blocks in CUTS[1]])
        self.decodes, self.held = True, deque[Decoded]()
        self.frames_per_latent = 0  # only points are counted

    def decode(self, stream: int, clean: CleanChunk) -> None:
        self.held.append(Decoded(stream, clean.index, torch.zeros(1, dtype=torch.uint8)))

    def give(self) -> None:
        self._events.extend(self.held)
        self.held.clear()


def _keys(points: Iterable[ResumePoint | None]) -> dict[int, int]:
    """Bytes of keys and values by tensor, each once."""
    return {id(part): part.nbytes for point in points if point is not None for part in point.snapshot.left.values()}


def test_keys_of_chunks_that_wait_for_the_decoder_stop_the_stages() -> None:
    stream = video(replace(FORCING, context_chunks=2), CHUNKS)
    expected = latents_of(stream)
    a_chunk = _bytes_left_by_one(stream)
    driver = Driver(gang := Undecoded(), 1, backlog_bytes=4 * a_chunk)
    driver.submit(stream)
    for _ in range(300):
        driver.step(0.0)
    flight = driver._flights[0]
    waiting = len(flight.undecoded)
    assert 4 <= waiting <= 12, "what fits, and what had been handed out"
    points = [point for _, point in flight.undecoded]
    newest = _keys(points[-1:])
    extra = sum(size for tensor, size in _keys(points).items() if tensor not in newest)
    assert 0 < extra <= flight.undecoded_bytes <= extra + 3 * a_chunk
    outputs = list[Output]()
    for _ in range(2000):
        gang.give()
        outputs += driver.step(0.0)
        if driver.idle:
            break
    chunks = [output.clean.latents for output in outputs if isinstance(output, Finished)]
    assert len(chunks) == CHUNKS and all(map(torch.equal, chunks, expected))
    # Every tensor once, however many points have it in common.
    given = [output.resume for output in outputs if isinstance(output, Finished)]
    assert sum(_keys(given).values()) == sum(point.left_bytes for point in given if point is not None)


def _bytes_left_by_one(stream: Stream) -> int:
    driver = Driver(Undecoded())
    driver.submit(stream)
    while not (left := driver._flights[stream.id]._left):
        driver.step(0.0)
    return sum(part.nbytes for part in left.values()) // len(chunks_in(left))


def test_what_waits_for_the_consumer_is_counted_whatever_it_is() -> None:
    driver = Driver(LocalGang([Stage(MODEL, (0, 4))]))
    driver.submit(video(ROLLING, 8))
    outputs = list[Output]()
    while not driver.idle:
        outputs += driver.step(0.0)
    assert {type(output) for output in outputs} == {Grown, Finished}
    run = Run(iter(()), 1, Switch())
    run.open, run.exhausted = {0}, True
    with run._switch:
        run.take([*outputs, Failed(0, VideoError("no"))], set())
    assert run.held_bytes == sum(output.num_bytes for output in outputs) > 0
    first = outputs[0]
    assert isinstance(first, Grown) and run.next() is first
    assert run.held_bytes == sum(output.num_bytes for output in outputs[1:])
    while run.next() is not None:
        pass
    assert run.held_bytes == 0
