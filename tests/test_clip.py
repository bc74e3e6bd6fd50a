"""The conditioning film of `pavdm sample`: only its end is read and encoded, and what is lost of it is said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import numbered, numbers, write_video

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.receptive import encoder_receptive_latents
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.commands.clip import open_film
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.video import read_clip
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream, clip_frames_used, input_frames
from pavdm_dist.request.video_request import VideoRequest


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = numbered(80, 16, 16).repeat(6, axis=0)
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", frames)


def params(checkpoint: Checkpoint, **more: object) -> SamplingParams:
    sizes = {"height": 16, "width": 16, "num_inference_steps": 6}
    return SamplingParams.resolve(checkpoint, **{"start": "chunk", **sizes, **more})


def config(film: Path, **more: object) -> SampleConfig:
    return SampleConfig(prompt="a red three", video=str(film), **{"start": "chunk", **more})


def test_an_encoder_s_memory_is_as_long_as_measured(checkpoint: Checkpoint) -> None:
    codec = checkpoint.codec
    count = encoder_receptive_latents(codec)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4 * (count + 6) + 1, 16, 16, 3), np.uint8))
    whole, end = codec.encode(frames), codec.encode(frames[4 * 3 :])
    assert torch.equal(whole[:, 3 + count :], end[:, count:])
    assert not torch.equal(whole[:, 3], end[:, 0])


@pytest.mark.parametrize("more", [{"start": "chunk"}, {"start": "clip"}, {"start": "clip", "context_chunks": 0}])
def test_the_end_of_a_film_gives_the_bits_of_all_of_it(
    checkpoint: Checkpoint, film: Path, more: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = params(checkpoint, **more)
    used = clip_frames_used(chosen, checkpoint)
    clip = open_film(config(film, start=more["start"]), chosen, checkpoint).clip
    assert clip.shape == (used, 16, 16, 3)
    encoded: list[int] = []
    encode = WanCodec.encode
    monkeypatch.setattr(WanCodec, "encode", lambda codec, frames: encoded.append(len(frames)) or encode(codec, frames))
    ended = build_stream(VideoRequest("a red three", 0, 4, clip=clip), 0, chosen, checkpoint)
    whole = torch.from_numpy(read_clip(film, height=16, width=16, fps=24, temporal_stride=4, keep="last"))
    assert torch.equal(whole[-used:], clip)
    long = build_stream(VideoRequest("a red three", 0, 4, clip=whole), 0, chosen, checkpoint)
    assert encoded == [used, used], "a clip that is handed over is not encoded whole either"
    exact = encode(checkpoint.codec, whole)
    assert ended.given.keys() == long.given.keys() and ended.warm is not None and long.warm is not None
    taken = torch.cat([exact[:, -chosen.clip_latents :]], dim=1)
    for stream in (ended, long):
        assert stream.warm is not None
        given = torch.cat([latents for _, latents in sorted(stream.given.items())], dim=1)
        assert torch.equal(given, taken)
        behind = exact.shape[1] - chosen.plan(None).given_clip * chosen.latent_chunk_size
        assert torch.equal(stream.warm, exact[:, behind - checkpoint.codec.receptive_latents() : behind])


def test_all_of_the_film_comes_in_front_when_it_is_asked_for(checkpoint: Checkpoint, film: Path) -> None:
    chosen = params(checkpoint)
    found = open_film(config(film, include_input=True), chosen, checkpoint)
    request = VideoRequest("a red three", 0, 4, clip=found.clip, before=found.before)
    shown = list(input_frames(request, chosen, checkpoint) or ())
    assert len(shown) == 477 and len(found.clip) < 477, "480 frames, of which 4 n + 1 are taken"
    assert numbers(np.stack([np.asarray(frame) for frame in shown])) == [i // 6 for i in range(3, 480)]
    assert len(list(input_frames(request, chosen, checkpoint) or ())) == 477, "again for the next video"


def test_what_is_lost_of_a_film_is_said(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times = [42 * i + 9000 * (i >= 85) for i in range(110)]
    path = write_video(tmp_path / "tall.mkv", numbered(80, 64, 32).repeat(2, axis=0)[:110], 24, times)
    with caplog.at_level(logging.WARNING):
        open_film(config(path), params(checkpoint), checkpoint)
    assert [record.getMessage() for record in caplog.records] == [
        f"video={path} is 64x32 (height x width), the run is 16x16: 50 % of its picture is cut off; set height and"
        " width to its shape to keep it",
        f"video={path}: its timestamps have a gap of 9.04 s; what lies before it is left out",
    ]
    caplog.clear()
    wide = write_video(tmp_path / "wide.mp4", numbered(80, 54, 96))
    with caplog.at_level(logging.WARNING):
        open_film(config(wide), params(checkpoint, height=240, width=424), checkpoint)
    assert not caplog.records, "16:9 is near enough"


def test_too_short_an_end_names_the_gap(checkpoint: Checkpoint, tmp_path: Path) -> None:
    times = [42 * i + 9000 * (i >= 100) for i in range(110)]
    path = write_video(tmp_path / "a.mkv", numbered(80, 16, 16).repeat(2, axis=0)[:110], 24, times)
    with pytest.raises(
        ConfigError, match=r"has 9 usable frames at 24 fps behind a gap of 9\.04 s in its timestamps, st"
    ):
        open_film(config(path), params(checkpoint), checkpoint)


def test_what_renders_the_end_of_a_film_again_is_as_the_page_says(checkpoint: Checkpoint) -> None:
    """`docs/films.md`: of the embedded model 100 frames; with ``start="chunk"``, none."""
    page = (Path(__file__).parents[1] / "docs" / "films.md").read_text()
    film = torch.zeros(300, 1, 1, 3, dtype=torch.uint8)
    again = {}
    for start in ("chunk", "clip"):
        shown = input_frames(
            VideoRequest("a", 0, 8, clip=film), SamplingParams.resolve(checkpoint, start=start), checkpoint
        )
        assert shown is not None
        again[start] = len(film) - len(list(shown))
    chosen = SamplingParams.resolve(checkpoint, start="clip")
    assert again == {"chunk": 0, "clip": 4 * chosen.latent_chunk_size * (chosen.window_chunks - 1)}
    assert f"the first {again['clip']} frames (4.2 s at 24 per second)" in page
    assert f"5 seconds beyond it are `num_frames={again['clip'] + 5 * 24}`" in page
    barred = SamplingParams.resolve(checkpoint, start="clip", method="autoregressive")
    assert barred.plan(None).given_clip == 0
