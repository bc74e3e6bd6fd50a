"""Where a video goes on from: the end that it was told, and settings under which a point means nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint

from pavdm_dist import PAVDMPipeline, VideoRequest
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.resume import ResumePoint
from pavdm_dist.request.outputs import VideoChunk

PROMPT = "a red three"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> PAVDMPipeline:
    return PAVDMPipeline.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("model")), device="cpu")


def chunks(pipeline: PAVDMPipeline, frames: int | None, stop: int | None = None, **more: Any) -> list[VideoChunk]:
    resume, params = more.pop("resume", None), pipeline.params(guidance_scale=1.0, **more)
    found = []
    for chunk in pipeline.iter_chunks([VideoRequest(PROMPT, 0, frames, resume=resume)], params):
        found.append(chunk)
        if chunk.index == stop:
            pipeline.stop(0)
        assert len(found) < 20, "it has no end"
    return found


def test_an_endless_video_that_was_told_to_end_ends_from_every_point(pipeline: PAVDMPipeline) -> None:
    whole = chunks(pipeline, None, stop=2)
    assert [chunk.last for chunk in whole] == [False] * (len(whole) - 1) + [True] and len(whole) > 4
    for number, chunk in enumerate(whole[3:], 4):  # the point of chunk 2 is of before
        rest = chunks(pipeline, None, resume=chunk.resume)
        assert [one.index for one in rest] == list(range(number, len(whole)))
        assert all(torch.equal(one.latents, whole[one.index].latents) for one in rest)
        assert not rest or rest[-1].last


def test_a_video_becomes_longer_from_a_point_before_its_end_was_seen_and_from_no_other(pipeline: PAVDMPipeline) -> None:
    whole, short = chunks(pipeline, 61), chunks(pipeline, 37)
    seen = 3  # behind chunk 2, chunk 5 would be born
    for chunk in short[:seen]:
        rest = chunks(pipeline, 61, resume=chunk.resume)
        assert all(torch.equal(one.latents, whole[one.index].latents) for one in rest) and rest[-1].index == 7
    for chunk in short[seen:]:
        with pytest.raises(ConfigError, match=r"of a video of 5 chunks, where one of 8 chunks has other chunks"):
            chunks(pipeline, 61, resume=chunk.resume)
    with pytest.raises(ConfigError, match=r"of a video of 8 chunks, where one of 1 chunks has other chunks"):
        chunks(pipeline, 1, resume=whole[-2].resume)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"window_chunks": 6}, r"was begun with window_chunks=3 \(now 6\)"),
        ({"num_inference_steps": 12}, r"was begun with num_inference_steps=6 \(now 12\)"),
        ({"latent_chunk_size": 1}, r"was begun with latent_chunk_size=2 \(now 1\)"),
        ({"height": 64}, r"was begun with height=\d+ \(now 64\)"),
        ({"mode": "displaced"}, r"was begun with mode=window \(now displaced\)"),
        ({"step": "renoise"}, r"was begun with step=euler \(now renoise\)"),
        ({"time_shift": 3.0, "fps": 12.0}, r"was begun with time_shift=\S+ \(now 3\.0\), fps=\S+ \(now 12\.0\)"),
        ({"context_noise": 0.5}, r"was begun with context_noise=0\.0 \(now 0\.5\)"),
    ],
)
def test_other_settings_are_refused(pipeline: PAVDMPipeline, changed: dict[str, Any], said: str) -> None:
    point = chunks(pipeline, 37)[1].resume
    with pytest.raises(ConfigError, match=rf"resume: .*{said}; give the same again"):
        chunks(pipeline, 37, resume=point, **changed)


def test_another_seed_is_refused_and_latents_of_another_size(pipeline: PAVDMPipeline) -> None:
    point = chunks(pipeline, 37)[1].resume
    assert point is not None
    with pytest.raises(ConfigError, match=r"resume: the video was begun with seed=0 \(now 1\)"):
        list(pipeline.iter_chunks([VideoRequest(PROMPT, 1, 37, resume=point)], pipeline.params(guidance_scale=1.0)))
    with pytest.raises(ConfigError, match=r"its latents are \[\d+, 2, \d+, \d+\], those of height=64"):
        chunks(pipeline, 37, resume=replace(point, settings={}), height=64)


def test_a_video_without_an_end_goes_on_from_where_one_with_an_end_has_not_seen_it(pipeline: PAVDMPipeline) -> None:
    short, endless = chunks(pipeline, 37), chunks(pipeline, None, stop=5)
    seen = 3  # behind chunk 2, chunk 5 would be born
    rest = chunks(pipeline, None, resume=short[seen - 1].resume, stop=5)
    assert [one.index for one in rest] == list(range(seen, len(endless)))
    assert all(torch.equal(one.latents, endless[one.index].latents) for one in rest)
    with pytest.raises(ConfigError, match=r"of a video of 5 chunks, where one without an end has other chunks"):
        chunks(pipeline, None, resume=short[seen].resume)


def test_rows_that_are_exact_by_the_length_of_a_video_are_asked_for(pipeline: PAVDMPipeline) -> None:
    """With a shorter one, row 3 would have been of a window that drains."""
    settings = {"mode": "displaced", "num_inference_steps": 9, "window_chunks": 3}
    params = pipeline.params(guidance_scale=1.0, **settings)
    grown: list[ResumePoint] = []
    run = pipeline.iter_chunks([VideoRequest(PROMPT, 0, 61)], params, on_grown=lambda _, point: grown.append(point))
    assert next(run).index == 0
    run.close()  # type: ignore[attr-defined]
    point = next(point for point in grown if point.snapshot.row == 3)
    with pytest.raises(ConfigError, match=r"8 chunks, where one of 2 chunks has .* other exact rows behind it"):
        chunks(pipeline, 13, resume=point, **settings)
    assert [chunk.index for chunk in chunks(pipeline, 53, resume=point, **settings)] == list(range(7))
