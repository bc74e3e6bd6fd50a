"""Stages over real links, each loop in a thread of this process: any kind of link gives the in-process bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import reference_chunks, tiny_model, tiny_stream
from linked import BY_HAND, CPU, alone, entries, groups, in_threads, linked, sampled, staged

from pavdm_dist.engine.events import EpochDone, Shift
from pavdm_dist.engine.gpu_links import NcclLink
from pavdm_dist.engine.messages import ACTIVATION, HEADER_BYTES, Header, Layout
from pavdm_dist.engine.stage import Stage
from pavdm_dist.engine.transport import Buffer, Buffers, Link, TorchLink, warm_up
from pavdm_dist.errors import EngineError
from pavdm_dist.method.schedule import Mode


def plain(group: Any, peer: int) -> Link:
    return TorchLink(group, peer, CPU, timeout_s=20, calls=BY_HAND)


def late(group: Any, peer: int) -> Link:
    """The link of GPUs, over what this machine has: receives are posted behind a unit, headers compared by tensors."""
    return NcclLink(group, peer, CPU, timeout_s=20, calls=BY_HAND)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(plain, "causal"), (late, "window"), (late, "causal"), (late, "displaced"), (staged(CPU), "window")],
)
def test_any_link_gives_the_same_bits(kind: Callable[[Any, int], Link], mode: Mode) -> None:
    model = tiny_model()
    streams = [tiny_stream(0, seed=1, mode=mode), tiny_stream(1, seed=2, guidance_scale=1.0, num_chunks=2, mode=mode)]
    streams[0] = replace(streams[0], chunks_per_unit=1 if mode == "window" else 2)
    in_process = [reference_chunks(model, stream) for stream in streams]
    for cuts in ([(0, 1), (1, 4)], [(0, 2), (2, 3), (3, 4)]):
        told, reports = sampled([Stage(model, blocks) for blocks in cuts], linked(len(cuts), kind), streams)
        for stream, expected in zip(streams, in_process, strict=True):
            shifts = [event for event in told if isinstance(event, Shift) and event.stream == stream.id]
            found = [clean.latents for event in shifts for clean in event.clean]
            assert len(found) == len(expected)
            assert all(torch.equal(one, other.latents) for one, other in zip(found, expected, strict=True))
        assert [event.epoch for event in told if isinstance(event, EpochDone)] == list(range(len(entries(streams))))
        assert len({report.units for report in reports}) == 1
        assert all(span.ready <= span.start <= span.end for report in reports for span in report.trace)


@pytest.mark.parametrize("rows", [
    {"partitions": 3}, {"window_chunks": 6, "lookahead": True}, {"block_chunks": 3, "context_chunks": 2},
], ids=str)  # fmt: skip
def test_calls_and_blocks_over_links_that_post_late(rows: dict) -> None:
    """Several units of a row in mode window, several chunks that become clean at one row."""
    model, stream = tiny_model(), tiny_stream(num_chunks=7, **rows)
    told, _ = sampled([Stage(model, blocks) for blocks in [(0, 2), (2, 3), (3, 4)]], linked(3, late), [stream])
    found = [clean for event in told if isinstance(event, Shift) for clean in event.clean]
    assert [clean.index for clean in found] == list(range(7))
    expected = reference_chunks(model, stream)
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(found, expected, strict=True))


def test_one_stage_sends_to_itself() -> None:
    model, stream = tiny_model(), tiny_stream()
    told, _ = sampled([Stage(model, (0, 4))], [alone()], [stream])
    found = [clean.latents for event in told if isinstance(event, Shift) for clean in event.clean]
    assert all(torch.equal(a, b.latents) for a, b in zip(found, reference_chunks(model, stream), strict=True))


LAYOUT = Layout(((2, 3),), torch.float32)


def header(order: int) -> Header:
    return Header(1, ACTIVATION, order, 0, 0, 0, 0, LAYOUT.numel)


@pytest.mark.parametrize("announced", [True, False])
def test_a_message_that_is_another_is_noticed_on_the_device(announced: bool) -> None:
    ends = groups(2, "pair", dist.HashStore())
    sender, receiver = NcclLink(ends[0], 1, CPU, calls=BY_HAND), NcclLink(ends[1], 0, CPU, calls=BY_HAND)
    in_threads(2, lambda rank: warm_up((sender, receiver)[rank], 1, sender=rank == 0))
    assert sender.bytes_sent == 0 and receiver.verdict() is None
    payload = torch.randn(2, 3)
    for sent, expected, differs in ((5, 5, False), (6, 7, True), (8, 8, False)):
        if announced:
            sender.announce([header(sent)])
            receiver.announce([header(expected)])
        receiver.post(LAYOUT)
        sender.send(header(sent), [payload], LAYOUT)
        (found,) = receiver.receive(header(expected), LAYOUT)
        assert torch.equal(found, payload)
        verdict = receiver.verdict()
        assert verdict is not None and bool(int(verdict)) == differs
    assert not receiver._stamps and not sender._stamps
    sender.close()


def test_such_a_message_ends_the_loop() -> None:
    links = linked(2, late, timedelta(seconds=2))
    links[0].downstream._stamp = lambda header: torch.zeros(HEADER_BYTES, dtype=torch.uint8)  # type: ignore[union-attr]
    stages = [Stage(tiny_model(), blocks) for blocks in ((0, 2), (2, 4))]
    with pytest.raises(EngineError, match=r"link out of order: a message of epoch 0 was another than expected"):
        sampled(stages, links, [tiny_stream(num_chunks=1)])


def test_buffers_are_used_again_and_bounded() -> None:
    buffers = Buffers(CPU, pinned=False, most=2)
    small, large = buffers.take(10), buffers.take(1000)
    assert (small.num_bytes, large.num_bytes) == (10, 1000)
    buffers.give(small)
    buffers.give(large)
    assert buffers.take(9) is small and buffers.take(9) is large
    for buffer in (small, large, Buffer(torch.empty(500, dtype=torch.uint8))):
        buffers.give(buffer)
    assert sorted(buffer.num_bytes for buffer in buffers._free) == [500, 1000], "the smallest goes"
