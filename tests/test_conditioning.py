"""What a video is told besides its prompts: a picture to begin with, noised context, words behind prompts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from driving import CUTS, driven, equal
from helpers import reference_chunks, tiny_checkpoint, tiny_model, tiny_stream
from PIL import Image

from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.image import read_image
from pavdm_dist.io.latents import read_latents
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CONTEXT, chunk_noise
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.values.merging import load_config

MODES: tuple[Mode, ...] = ("window", "causal", "displaced")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


# --- a picture to begin with -------------------------------------------------------------------------------------


def pictured(mode: Mode = "window", **plan: int) -> Stream:
    image = torch.randn(4, 1, 4, 6, generator=torch.Generator().manual_seed(7))
    return replace(tiny_stream(mode=mode, **plan), image=image)


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_stays_what_it_is_on_any_number_of_stages(mode: Mode) -> None:
    stream = pictured(mode)
    expected = reference_chunks(tiny_model(), stream)
    assert stream.image is not None
    assert torch.equal(expected[0].latents[:, :1], stream.image)
    assert equal(driven(stream, CUTS[1]), expected)
    without = reference_chunks(tiny_model(), replace(stream, image=None))
    assert not any(torch.equal(a.latents, b.latents) for a, b in zip(expected[:2], without[:2], strict=True))
    window = stream.window()
    levels = window.levels(stream.plan.row(0))
    assert levels.tolist() == [0.0, *[stream.schedule.levels[-1]] * 1]
    x, _ = window.inputs(stream.plan.row(0))
    assert torch.equal(x[0, :, :1], stream.image)


@pytest.mark.parametrize("mode", ["window", "causal"])
def test_a_pictured_video_goes_on_where_it_was_left(mode: Mode) -> None:
    stream = pictured(mode, num_chunks=5)
    found = driven(stream, CUTS[0])
    for finished in found[:3]:
        assert finished.resume is not None
        rest = driven(replace(stream, resume=finished.resume), CUTS[1])
        assert equal(rest, [other.clean for other in found[finished.clean.index + 1 :]])


def test_a_picture_in_files_and_from_python(model: Path, tmp_path: Path) -> None:
    picture = np.zeros((80, 60, 3), np.uint8)
    picture[:40] = 200
    Image.fromarray(picture).save(tmp_path / "p.png")
    fitted = read_image(tmp_path / "p.png", 32, 48)
    assert fitted.shape == (32, 48, 3) and fitted.dtype == np.uint8
    assert np.array_equal(fitted, read_image(picture, 32, 48))
    assert np.array_equal(fitted, read_image(Image.fromarray(picture), 32, 48))
    assert fitted[0].mean() == 200 and fitted[-1].mean() == 0
    config = SampleConfig("a red three", model=str(model), output=str(tmp_path / "v.mp4"), num_frames=9)
    config.image, config.save_latents = str(tmp_path / "p.png"), True
    validate_sample(config)
    render_command(config, overwrite=False, progress=ChunkProgress)
    latents = read_latents(tmp_path / "v.safetensors")
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        (other,) = pipeline("a red three", num_frames=9, output_type="latent", image=tmp_path / "p.png").frames
        assert torch.equal(torch.as_tensor(other), latents)
        assert torch.equal(latents[:, :1], pipeline.checkpoint.codec.encode(torch.from_numpy(fitted)[None]))
        with pytest.raises(ConfigError, match="start=chunk begins with a clip"):
            pipeline(
                "a red three", num_frames=9, image=picture, start="chunk", video=np.zeros((9, 32, 48, 3), np.uint8)
            )
    identity = read_sidecar(tmp_path / "v.mp4")["identity"]
    assert len(identity["image"]) == 64


def test_pictures_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"image=\S+p.png: is no readable picture"):
        read_image(tmp_path / "p.png", 32, 48)
    with pytest.raises(MediaError, match=r"image=\S+none.png: is no readable picture"):
        read_image(tmp_path / "none.png", 32, 48)
    with pytest.raises(ConfigError, match="must be a file, a PIL image or uint8"):
        read_image(np.zeros((4, 4)), 32, 48)
    for words, message in (
        (["prompt=x", f"image={tmp_path}/none.png"], "no such file"),
        (
            ["prompt=x", f"image={tmp_path}/p.png", "start=clip", f"video={tmp_path}/p.png"],
            "start=clip begins with a clip",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            validate_sample(load_config(SampleConfig, None, words))


# --- context that is noised again --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_noised_context_is_the_same_on_any_number_of_stages(mode: Mode) -> None:
    plain = tiny_stream(num_chunks=5, mode=mode)
    stream = replace(plain, context_noise=0.1)
    expected = reference_chunks(tiny_model(), stream)
    assert equal(driven(stream, CUTS[1]), expected)
    without = reference_chunks(tiny_model(), plain)
    # Chunk 0 is clean before there is any context.
    same = [torch.equal(a.latents, b.latents) for a, b in zip(expected, without, strict=True)]
    assert same == [True, False, False, False, False]


def test_what_is_noised_is_what_the_model_is_told() -> None:
    stream = replace(tiny_stream(start="chunk"), context_noise=0.25)
    window, row = stream.window(), stream.plan.row(0)
    x, levels = window.inputs(row)
    again = chunk_noise(stream.seed, -1, (4, 2, 4, 6), CONTEXT)
    assert torch.equal(x[0, :, :2], 0.75 * stream.given[-1] + 0.25 * again)
    assert levels[0, :2].tolist() == [0.25, 0.25]
    assert not torch.equal(again, chunk_noise(stream.seed, -1, (4, 2, 4, 6)))
    # What is kept, and what a resume goes on from, is clean.
    assert torch.equal(window.snapshot().latents[-1], stream.given[-1])


def test_noised_context_goes_on_where_it_was_left() -> None:
    stream = replace(tiny_stream(num_chunks=5), context_noise=0.1)
    found = driven(stream, CUTS[0])
    assert found[1].resume is not None
    assert equal(driven(replace(stream, resume=found[1].resume), CUTS[1]), [other.clean for other in found[2:]])


def test_noise_without_context_is_refused(model: Path) -> None:
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        assert pipeline.params(context_noise=0.02).context_noise == 0.02
        with pytest.raises(ConfigError, match="context_chunks=0 leaves no context"):
            pipeline.params(context_noise=0.02, context_chunks=0)
    with pytest.raises(ConfigError, match=r"context_noise=1\.0: must be 0 to 0\.9"):
        load_config(SampleConfig, None, ["context_noise=1"])


# --- words behind a prompt, and previews -------------------------------------------------------------------------


def test_a_suffix_of_the_checkpoint_is_said_once(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["sampling"]["prompt_suffix"] = "drifting up"
    (folder / "model_index.json").write_text(json.dumps(index))
    settings = {"num_frames": 5, "output_type": "latent"}
    with PAVDMPipeline.from_pretrained(folder) as pipeline:
        (said,) = pipeline("a three", **settings).frames
        (twice,) = pipeline("a three drifting up", **settings).frames
        (without,) = pipeline("a three", prompt_suffix=" ", **settings).frames
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        (plain,) = pipeline("a three drifting up", **settings).frames
    assert np.array_equal(said, plain) and np.array_equal(twice, plain) and not np.array_equal(without, plain)


def test_a_preview_changes_frames_and_no_latents(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = SampleConfig("a red three", model=str(model), num_frames=12, save_latents=True, chunks_per_segment=1)
    found = []
    for name, preview in (("real", None), ("preview", "rgb")):
        one = replace(config, output=str(tmp_path / f"{name}.mp4"), preview_decoder=preview)
        found.append(render_command(one, overwrite=False, progress=ChunkProgress)["videos"][0])
    assert found[0]["latents_sha256"] == found[1]["latents_sha256"] and found[0]["num_frames"] == found[1]["num_frames"]
    with pytest.raises(ConfigError, match=r"was made with preview_decoder=\"rgb\" \(now absent\)"):
        render_command(replace(config, output=str(tmp_path / "preview.mp4")), overwrite=False, progress=ChunkProgress)
