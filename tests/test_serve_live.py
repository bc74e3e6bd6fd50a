"""The live stream of a video that has its input in front: every picture once, whenever somebody begins to watch."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.serve import live as module
from pavdm_dist.serve.live import live, segments

CHUNKS, FRAMES, INPUT = 4, 5, 7


def _packets(file: str | io.BytesIO) -> list[tuple[int, bytes]]:
    with av.open(file) as container:
        stream = container.streams.video[0]
        found = [packet for packet in container.demux(stream) if packet.size]
        return [(round(packet.pts * packet.time_base * stream.average_rate), bytes(packet)) for packet in found]


async def _watched(output: Path, grow: Callable[[], bool], pieces: int) -> bytes:
    """What a viewer gets of a video that grows by a call of ``grow`` after so many pieces, till that gives False."""
    over, data, count = False, b"", 0
    stream = live(str(output), lambda: over)
    waits = asyncio.ensure_future(anext(stream, b""))
    while True:
        done, _ = await asyncio.wait([waits], timeout=0.05)
        if not done or (count and count % pieces == 0):
            over = over or not grow()
        if not done:
            continue
        if not (piece := waits.result()):
            return data
        data, count = data + piece, count + 1
        waits = asyncio.ensure_future(anext(stream, b""))


@pytest.mark.parametrize("pieces", [1, 2, 100])
@pytest.mark.parametrize("input_frames", [0, INPUT])
def test_every_picture_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, input_frames: int
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    rng, output = np.random.default_rng(0), tmp_path / "video.mp4"
    frames = rng.integers(0, 255, (INPUT + CHUNKS * FRAMES, 32, 48, 3), dtype=np.uint8)
    writer = SegmentWriter(output, 24, 32, 48, chunks_per_segment=1)
    steps = iter(range(-1 if input_frames else 0, CHUNKS + 1))

    def grow() -> bool:
        step = next(steps)
        if step < 0:
            writer.write_input(iter(frames[:INPUT]))
        elif step < CHUNKS:
            writer.write_chunk(step, frames[INPUT + step * FRAMES :][:FRAMES])
        else:
            writer.finish()
        return step < CHUNKS

    seen = asyncio.run(_watched(output, grow, pieces))
    assert len(_packets(str(output))) == input_frames + CHUNKS * FRAMES
    assert _packets(io.BytesIO(seen)) == _packets(str(output))


def test_the_input_is_a_segment_of_its_own_that_is_asked_for_once(tmp_path: Path) -> None:
    output = tmp_path / "video.mp4"
    writer = SegmentWriter(output, 24, 32, 48, chunks_per_segment=1)
    writer.write_input([np.zeros((32, 48, 3), np.uint8)])
    assert [(behind, Path(path).name) for behind, path in segments(str(output))] == [(0, "input.mp4")]
    assert segments(str(output), 0) == []
    writer.write_chunk(0, np.zeros((2, 32, 48, 3), np.uint8))
    assert [behind for behind, _ in segments(str(output))] == [0, 1]
    assert [behind for behind, _ in segments(str(output), 0)] == [1]
