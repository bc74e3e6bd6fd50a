"""Decoding in a thread beside sampling gives what decoding in between gives, and what was finished is not lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint

from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.engine import inline
from pavdm_dist.engine.beside import Beside
from pavdm_dist.engine.inline import InlineEngine
from pavdm_dist.errors import VideoError
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.request.video_request import VideoRequest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def made(model: Path, overlaps: bool) -> list:
    with PAVDMPipeline.from_pretrained(model, device="cpu") as pipeline:
        engine = pipeline._engines.inline(pipeline._load)
        assert isinstance(engine, InlineEngine) and not engine._overlaps, "a CPU has nothing to spare"
        engine._overlaps = overlaps
        requests = [VideoRequest("a red three", seed, 29) for seed in (3, 4)]
        return list(pipeline.iter_chunks(requests, pipeline.params()))


def test_the_decoder_s_memory_is_measured_before_the_first_video_is_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; a server does it before its first client comes."""
    real, asked = WanCodec._probe, list[str]()

    def probe(codec: WanCodec) -> int:
        asked.append("probe")
        return real(codec)

    def requests() -> Iterator[VideoRequest]:
        for seed in (3, 4):
            asked.append("request")
            yield VideoRequest("a red three", seed, 5)

    monkeypatch.setattr(WanCodec, "_probe", probe)
    with PAVDMPipeline.from_pretrained(model, device="cpu") as pipeline:
        list(pipeline.iter_chunks(requests(), pipeline.params()))
    assert asked == ["probe", "request", "request"]


def test_frames_and_resume_points_are_the_same(model: Path) -> None:
    for one, other in zip(made(model, True), made(model, False), strict=True):
        assert (one.video, one.index, one.last) == (other.video, other.index, other.last)
        assert torch.equal(one.frames, other.frames) and torch.equal(one.latents, other.latents)
        assert one.resume.snapshot.row == other.resume.snapshot.row
        for chunk, latents in one.resume.snapshot.latents.items():
            assert torch.equal(latents, other.resume.snapshot.latents[chunk])


def test_what_was_finished_comes_before_the_end_of_a_broken_video(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = inline.sample

    def broken(*given: object, **more: object) -> object:
        chunks = real(*given, **more)  # type: ignore[arg-type]
        yield next(chunks)
        raise VideoError("chunk 1 holds values that are not finite")

    monkeypatch.setattr(inline, "sample", broken)
    with PAVDMPipeline.from_pretrained(model, device="cpu") as pipeline:
        pipeline._engines.inline(pipeline._load)._overlaps = True
        chunks = pipeline.iter_chunks([VideoRequest("a red three", 3, 29)], pipeline.params())
        assert next(chunks).index == 0
        with pytest.raises(VideoError, match="not finite"):
            next(chunks)


def test_sampling_goes_on_while_a_chunk_is_decoded() -> None:
    begun, goes_on = threading.Event(), threading.Event()

    class Decoder:
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            begun.set()
            assert goes_on.wait(10)
            return latents + 1

    with Beside(Decoder(), torch.device("cpu"), 1) as beside:  # type: ignore[arg-type]
        frames = beside.decode(torch.zeros(2))
        assert begun.wait(10), "nobody asked for the frames yet"
        goes_on.set()
        assert torch.equal(frames(), torch.ones(2))
