"""A video with cached context goes on bit for bit where its keys and values are saved, and is refused where not."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from staircase import CUTS, FORCING, MODEL, OTHER, ROLLING, latents_of, video
from torch import Tensor

from pavdm_dist.commands.points import resume_point, saved_point
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Finished, Grown, Shift
from pavdm_dist.engine.inline import InlineEngine
from pavdm_dist.engine.local import LocalGang
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.ray_engine import RayEngine
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.state import RecordingState, read_state, write_state
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.recovery import Recovery
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk, WindowSnapshot


def staged(stream: Stream, cut: list[tuple[int, int]]) -> list[Finished | Grown]:
    driver, outputs = Driver(LocalGang([Stage(MODEL, blocks) for blocks in cut])), list[Finished | Grown]()
    driver.submit(stream)
    while not driver.idle:
        for output in driver.step(0.0):
            assert isinstance(output, Finished | Grown)
            outputs.append(output)
    return outputs


class Frames:
    """A codec whose frames are nobody's concern."""

    def receptive_latents(self) -> int:
        return 0

    def decoder(self) -> Frames:
        return self

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(1)


def inline(stream: Stream) -> tuple[list[Finished], list[ResumePoint]]:
    grown: list[ResumePoint] = []
    finished = InlineEngine(MODEL, Frames()).run([stream], lambda number, point: grown.append(point))  # type: ignore[arg-type]
    return list(finished), grown


@pytest.mark.parametrize("plan", [ROLLING, FORCING, OTHER], ids=("rolling", "forcing", "other"))
def test_a_run_goes_on_from_every_shift_on_any_cut(plan: WindowPlan) -> None:
    stream = video(plan, 10)
    expected = latents_of(stream)
    outputs = staged(stream, CUTS[2])
    points = [output.resume for output in outputs]
    alone, grown = inline(stream)
    assert len(points) == len(alone) + len(grown)
    for number, (point, other) in enumerate(zip(points, [*grown, *(one.resume for one in alone)], strict=True)):
        assert point is not None and other is not None
        assert point.snapshot.left.keys() == other.snapshot.left.keys()
        assert all(torch.equal(value, other.snapshot.left[name]) for name, value in point.snapshot.left.items())
        if number % 3:  # all of them would take long
            continue
        resumed = replace(stream, resume=point)
        found = [output.clean for output in staged(resumed, CUTS[number % 4]) if isinstance(output, Finished)]
        assert [clean.index for clean in found] == list(range(10 - len(found), 10))
        assert all(torch.equal(clean.latents, expected[clean.index]) for clean in found)
        found = [output.clean for output in inline(resumed)[0]]
        assert all(torch.equal(clean.latents, expected[clean.index]) for clean in found)


@pytest.mark.parametrize("after", [2, 9, 14])
def test_another_gang_goes_on_at_the_last_shift(after: int) -> None:
    """Of another number of stages; it begins where the lost one was, not at the beginning."""
    stream = video(ROLLING, 10)
    driver, outputs = Driver(LocalGang([Stage(MODEL, blocks) for blocks in CUTS[1]])), list[Finished | Grown]()
    driver.submit(stream)
    while len(outputs) < after:
        outputs += driver.step(0.0)  # type: ignore[arg-type]
    stages = [Stage(MODEL, blocks) for blocks in CUTS[2]]
    driver.adopt(LocalGang(stages))
    while not driver.idle:
        outputs += driver.step(0.0)  # type: ignore[arg-type]
        if stages[0]._streams:
            assert stages[0]._streams[0].first_row >= after
    found = [output.clean for output in outputs if isinstance(output, Finished)]
    assert all(torch.equal(one.latents, two) for one, two in zip(found, latents_of(stream), strict=True))


def test_going_on_from_latents_alone_is_refused() -> None:
    stream = video(ROLLING, 10)
    point = staged(stream, CUTS[0])[9].resume
    assert point is not None and point.snapshot.left
    bare = replace(stream, resume=replace(point, snapshot=replace(point.snapshot, left={})))
    words = r"keys and values that chunk 0 left .* are not saved for block 0, nor are clean latents .*; begin it anew"
    with pytest.raises(ConfigError, match=words):
        StreamDenoiser(MODEL, bare)
    with pytest.raises(ConfigError, match=words.replace("block 0", "block 1")):
        Stage(MODEL, (1, 4)).prepare(bare)


def test_what_is_saved_is_bounded() -> None:
    sizes = [len(output.resume.snapshot.left) for output in staged(video(FORCING, 12), CUTS[0]) if output.resume]
    assert sizes[-5:-1] == [2 * 4 * 6] * 4 and max(sizes) == 2 * 4 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_keys_survive_files_and_wires(dtype: torch.dtype, tmp_path: Path) -> None:
    left = {"0.3.1.k": torch.randn(1, 2, 5, 4).to(dtype).transpose(1, 2), "0.3.1.v": torch.randn(1, 2, 5, 4).to(dtype)}
    snapshot = WindowSnapshot(7, {3: torch.randn(4, 3, 2, 2)}, left=left)
    shift = pickle.loads(pickle.dumps(Shift(0, snapshot, (CleanChunk(3, torch.ones(1)),))))
    write_state(tmp_path, RecordingState({}, point=saved_point(ResumePoint(snapshot))))

    class Recording:
        state = read_state(tmp_path)
        assert state is not None
        point, pending, warm = state.point, state.pending, state.warm

    read = resume_point(Recording)  # type: ignore[arg-type]
    assert read is not None and read.snapshot.latents.keys() == {3}
    for found in (shift.snapshot.left, read.snapshot.left):
        assert found.keys() == left.keys()
        assert all(torch.equal(found[name], value) and found[name].dtype == dtype for name, value in left.items())


@pytest.mark.slow
def test_actors_give_the_same_points(ray_cluster: None, tmp_path: Path) -> None:
    """Each saves what its own blocks left; the driver has all of it."""
    MODEL.save_pretrained(tmp_path)
    plans = ((ROLLING, Recovery()), (FORCING, Recovery()), (ROLLING, Recovery("replay", 4)))
    streams = [video(plan, 8, number, recovery=recovery) for number, (plan, recovery) in enumerate(plans)]
    finished: list[Finished] = []
    with RayEngine(str(tmp_path), CUTS[1], EngineOptions(2, cpus_per_stage=0)) as engine:
        finished += engine.run(streams, 2)
        points = {one.stream: one.resume for one in finished if one.clean.index == 4}
        again = list(engine.run([replace(stream, resume=points[stream.id]) for stream in streams], 3))
    assert [[one.clean.index for one in again if one.stream == stream.id] for stream in streams] == [[5, 6, 7]] * 3
    for stream in streams:
        expected = [output for output in staged(stream, CUTS[0]) if isinstance(output, Finished)]
        found = [one for one in finished + again if one.stream == stream.id]
        for one in found:
            same = expected[one.clean.index]
            assert torch.equal(one.clean.latents, same.clean.latents) and one.resume and same.resume
            assert one.resume.snapshot.left.keys() == same.resume.snapshot.left.keys()
            for name, value in one.resume.snapshot.left.items():
                assert torch.equal(value, same.resume.snapshot.left[name])
            clean, expected_clean = one.resume.snapshot.clean, same.resume.snapshot.clean
            assert clean.keys() == expected_clean.keys() and bool(clean) == (
                stream.id == 2 and one.clean.index in range(1, 7)
            )
            assert all(torch.equal(latents, expected_clean[chunk]) for chunk, latents in clean.items())
