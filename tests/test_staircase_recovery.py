"""What a video with cached context goes on from: clean latents whose calls are run again, or nothing; the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TINY, tiny_model
from staircase import FORCING, OTHER, ROLLING, video
from test_staircase_resume import Frames
from torch import Tensor
from wan_models import WAN, random, tiny_wan

from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Finished, Grown
from pavdm_dist.engine.inline import InlineEngine
from pavdm_dist.engine.local import LocalGang
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError
from pavdm_dist.method import denoiser
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.recovery import Recovery, own_row, replayed
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import WindowPlan
from pavdm_dist.method.stream import Conditioning, NewPrompt, Stream
from pavdm_dist.models.base import Backbone
from pavdm_dist.models.clean_memory import CleanMemory

MODEL = tiny_wan(config=replace(WAN, num_layers=2))
REPLAY, NONE = Recovery("replay", 2), Recovery("none")
CUTS = [[(0, 2)], [(0, 1), (1, 2)]]
CHUNKS = 17  # more than two blocks reach back from the end: 6 x 2 chunks, and those of the window
SHORT = replace(FORCING, num_inference_steps=2)


def gang(blocks: list[tuple[int, int]], model: Backbone = MODEL) -> LocalGang:
    return LocalGang([Stage(model, part) for part in blocks])


def outputs_of(driver: Driver, until: int | None = None) -> list[Finished | Grown]:
    outputs = list[Finished | Grown]()
    while not driver.idle and (until is None or len(outputs) < until):
        outputs += driver.step(0.0)  # type: ignore[arg-type]
    return outputs


def staged(stream: Stream, blocks: list[tuple[int, int]], model: Backbone = MODEL) -> list[Finished | Grown]:
    driver = Driver(gang(blocks, model))
    driver.submit(stream)
    return outputs_of(driver)


def inline(stream: Stream) -> list[Finished]:
    return list(InlineEngine(MODEL, Frames()).run([stream]))  # type: ignore[arg-type]


def latents_of(stream: Stream, model: Backbone = MODEL) -> list[Tensor]:
    return [clean.latents for clean in sample(stream.window(), StreamDenoiser(model, stream))]


def clean_of(outputs: Any) -> dict[int, Tensor]:
    return {one.clean.index: one.clean.latents for one in outputs if isinstance(one, Finished)}


def alike(found: dict[int, Tensor], expected: list[Tensor]) -> bool:
    return bool(found) and all(torch.equal(latents, expected[index]) for index, latents in found.items())


def test_how_far_back_calls_are_run_again() -> None:
    plan = replace(ROLLING, num_chunks=40)
    row = own_row(plan, 30)
    assert row.context == (30,) and own_row(plan, 0).index == 5
    assert replayed(plan, row.index, 2) == (0, *range(18, 30)) and replayed(plan, row.index, 1) == (0, *range(24, 30))
    assert replayed(plan, row.index, 30) == tuple(range(30))
    assert replayed(plan, 5, 2) == () and replayed(plan, 6, 2) == (0,) and replayed(plan, plan.num_rows, 2) == ()
    assert plan.kept(row.index) == replayed(plan, row.index, 1)
    with pytest.raises(ConfigError, match="recovery='all': must be keys, replay or none"):
        Recovery("all")  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [ROLLING, SHORT, OTHER], ids=("rolling", "forcing", "other"))
def test_calls_that_are_run_again_give_the_same_bits(plan: WindowPlan) -> None:
    """From points at the beginning and of all kinds behind it, on stages and in one process; points are bounded."""
    stream = video(plan, CHUNKS, recovery=REPLAY)
    expected = latents_of(stream)
    outputs = staged(stream, CUTS[1])
    assert alike(clean_of(outputs), expected)
    points = [output.resume for output in outputs]
    assert all(point is not None and not point.snapshot.left for point in points)
    most = plan.anchor_chunks + 2 * plan.context_chunks
    sizes = [len(point.snapshot.clean) for point in points if point is not None]
    assert max(sizes) == min(most, CHUNKS - 2) and sizes[-1] == 0
    of_inline = [one.resume for one in inline(stream)]
    for one, other in zip(of_inline, points[len(points) - CHUNKS :], strict=True):
        assert one is not None and other is not None and one.snapshot.clean.keys() == other.snapshot.clean.keys()
    for number in (len(points) - CHUNKS + 1, len(points) - 9, len(points) - 2):
        resumed = replace(stream, resume=points[number])
        cut = CUTS[number % 2]
        found = staged(resumed, cut)
        assert alike(clean_of(found), expected) and (number % 2 or alike(clean_of(inline(resumed)), expected))
        again, before = found[0].resume, points[number + 1]  # as if nothing had happened
        assert again is not None and before is not None
        assert again.snapshot.clean.keys() == before.snapshot.clean.keys()


def point_at(stream: Stream, chunk: int) -> ResumePoint:
    point = next(
        one.resume for one in staged(stream, CUTS[0]) if isinstance(one, Finished) and one.clean.index == chunk
    )
    assert point is not None
    return point


def test_as_many_calls_as_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave to the bit what is saved otherwise. One chunk less is refused, and what it would leave is wrong."""
    stream = video(ROLLING, 19, recovery=REPLAY)
    point, saved = point_at(stream, 14), point_at(video(ROLLING, 19), 14).snapshot.left
    assert sorted(point.snapshot.clean) == [0, *range(2, 14)] and not point.snapshot.left

    def right(clean: dict[int, Tensor]) -> list[str]:
        resumed = replace(stream, resume=replace(point, snapshot=replace(point.snapshot, clean=clean)))
        made = StreamDenoiser(MODEL, resumed)
        with torch.inference_mode():
            made._run_again()
        memory = made._memories[0]
        assert isinstance(memory, CleanMemory)
        left = {f"0.{at}.{block}": pair for (at, block), pair in memory.state().items()}
        return [name for name, tensor in saved.items() if torch.equal(left[name[:-2]][name[-1] == "v"], tensor)]

    assert right(dict(point.snapshot.clean)) == list(saved) and len(saved) == 2 * 2 * 7
    few = {chunk: latents for chunk, latents in point.snapshot.clean.items() if chunk != 2}
    bare = replace(stream, resume=replace(point, snapshot=replace(point.snapshot, clean=few)))
    said = "cannot go on from its latents alone: .* clean latents of chunk 2, .* begin it anew"
    with pytest.raises(ConfigError, match=said):
        StreamDenoiser(MODEL, bare)
    with pytest.raises(ConfigError, match=said):
        Stage(MODEL, (1, 2)).prepare(bare)
    monkeypatch.setattr(denoiser, "_check_replayed", lambda *_: None)
    assert set(saved) - set(right(few)) == {"0.8.1.k", "0.8.1.v"}, "the oldest, in the block that reaches furthest"


def test_a_lost_gang_of_each_kind() -> None:
    """Another gang goes on from the last shift, or begins anew; what was given out is not given out again."""
    expected = latents_of(video(ROLLING, CHUNKS))
    for recovery, first in ((REPLAY, 14), (NONE, 5), (Recovery(), 14)):
        stream = video(ROLLING, CHUNKS, recovery=recovery)
        driver = Driver(gang(CUTS[1]))
        driver.submit(stream)
        before = outputs_of(driver, 14)
        stages = [Stage(MODEL, blocks) for blocks in CUTS[0]]
        driver.adopt(LocalGang(stages))
        driver.step(0.0)
        assert stages[0]._streams[0].first_row == first
        after = outputs_of(driver)
        assert not clean_of(before).keys() & clean_of(after).keys()
        assert alike(clean_of(before) | clean_of(after), expected) and len(clean_of(before) | clean_of(after)) == CHUNKS


@pytest.mark.parametrize("recovery", [REPLAY, Recovery()], ids=("replay", "keys"))
@pytest.mark.parametrize("lost", [False, True])
def test_a_prompt_told_before_the_first_row_leaves_the_texts_of_calls_that_are_run_again(
    recovery: Recovery, lost: bool
) -> None:
    """Of chunks before the window, under an earlier prompt; after a resume, and where another gang took over."""
    texts = [random(length, 12, seed=length) for length in (3, 5, 6)]
    conditioning = Conditioning.build([(0, texts[0]), (9, texts[1])], None)
    stream = replace(video(ROLLING, 24, recovery=recovery), conditioning=conditioning)
    new = NewPrompt(19, "new", texts[2])
    expected = latents_of(replace(stream, conditioning=conditioning.with_prompt(19, texts[2])))
    driver = Driver(gang(CUTS[1]))
    if lost:
        driver.submit(stream)
        before = outputs_of(driver, 15)
        driver.adopt(gang(CUTS[1]))
    else:
        before = []
        driver.submit(replace(stream, resume=point_at(stream, 11)))
    driver.set_prompt(0, new)
    found = clean_of(before) | clean_of(outputs_of(driver))
    assert alike(found, expected) and max(found) == 23

    def told(engine: InlineEngine) -> Iterator[Stream]:
        engine.set_prompt(0, new)
        yield replace(stream, resume=point_at(stream, 11))

    alone = InlineEngine(MODEL, Frames())  # type: ignore[arg-type]
    assert alike(clean_of(alone.run(told(alone))), expected)


def test_nothing_is_kept_where_nothing_is_wanted() -> None:
    stream = video(SHORT, 9, recovery=NONE)
    outputs = staged(stream, CUTS[1])
    assert alike(clean_of(outputs), latents_of(stream))
    points = [one.resume for one in outputs if isinstance(one, Finished)]
    assert points[0] is not None and not points[0].snapshot.left, "before the first chunk's own call nothing is needed"
    assert points[1:-1] == [None] * 7
    assert [one.resume is None for one in inline(stream)] == [point is None for point in points]


def test_keys_are_kept_again_after_calls_were_run_again() -> None:
    """A video may be gone on with in another way than it was begun."""
    stream = video(ROLLING, CHUNKS, recovery=REPLAY)
    point, expected = point_at(stream, 9), latents_of(stream)
    outputs = staged(replace(stream, resume=point, recovery=Recovery()), CUTS[1])
    kept = outputs[0].resume
    assert kept is not None and not kept.snapshot.clean and len(kept.snapshot.left) == 2 * 2 * 7
    assert alike(clean_of(outputs), expected)
    assert alike(clean_of(staged(replace(stream, resume=kept, recovery=Recovery()), CUTS[0])), expected)
    assert alike(clean_of(staged(replace(stream, resume=kept, recovery=NONE), CUTS[0])), expected)


def test_blocks_that_leave_nothing_reach_nowhere() -> None:
    """Of a model with attention over the frames of a place, every other block leaves keys."""
    model = tiny_model()
    grid = model.grid(1, 4, 4)
    layers = sum(model.kv_values(grid, block) > 0 for block in range(model.spec.num_blocks))
    assert 0 < layers < model.spec.num_blocks
    texts = {"a": random(3, TINY.caption_channels)}
    stream = replace(
        video(OTHER, 14, recovery=Recovery("replay", layers)), conditioning=Conditioning(texts, ((0, "a"),))
    )
    expected = latents_of(stream, model)
    blocks = model.spec.num_blocks
    outputs = staged(stream, [(0, 1), (1, blocks)], model)
    point = next(one.resume for one in outputs if isinstance(one, Finished) and one.clean.index == 11)
    assert point is not None and point.snapshot.clean
    found = staged(replace(stream, resume=point), [(0, 2), (2, blocks)], model)
    assert alike(clean_of(found), expected) and len(clean_of(found)) == 2
