"""A whole checkpoint with Open-Sora's VAE, whose chunks are groups of 17 frames, from a command to files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint

from pavdm_dist.codecs.opensora import OpenSoraCodec, OpenSoraConfig, OpenSoraModules
from pavdm_dist.commands.plan import plan_report
from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.latents import read_latents
from pavdm_dist.io.video import export_to_video, read_clip
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.request.video_request import VideoRequest

PICTURES = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TIME = {"filters": 8, "num_res_blocks": 1, "num_groups": 4}
PROMPT = "a red three"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    shutil.rmtree(folder / "vae")
    config = OpenSoraConfig(vae_2d=PICTURES, vae_temporal=TIME)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        OpenSoraCodec(OpenSoraModules(config), config).save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["opensora", "VideoAutoencoderPipeline"]
    index["sampling"] |= {"latent_chunk_size": 5, "guidance_scale": 1.0}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_chunks_of_17_frames_from_a_command_and_again_after_an_interruption(model: Path, tmp_path: Path) -> None:
    config = SampleConfig(PROMPT, model=str(model), num_frames=60, save_latents=True, chunks_per_segment=1)
    whole, left = replace(config, output=str(tmp_path / "w.mp4")), replace(config, output=str(tmp_path / "l.mp4"))

    class Stops(ChunkProgress):
        def chunk(self, video: int, index: int, frames: int) -> None:
            if index == 2:
                raise KeyboardInterrupt

    (made,) = render_command(whole, overwrite=False, progress=ChunkProgress)["videos"]
    with pytest.raises(KeyboardInterrupt):
        render_command(left, overwrite=False, progress=Stops)
    (again,) = render_command(left, overwrite=False, progress=ChunkProgress)["videos"]
    assert made["num_frames"] == again["num_frames"] == 60 and made["latents_sha256"] == again["latents_sha256"]
    assert read_latents(tmp_path / "w.safetensors").shape == (4, 20, 4, 6)  # 4 chunks of 17 frames hold 60
    assert np.array_equal(read_clip(str(tmp_path / "w.mp4")), read_clip(str(tmp_path / "l.mp4")))


def test_a_clip_is_whole_groups(model: Path, tmp_path: Path) -> None:
    ramp = np.linspace(0, 200, 80)[:, None, None, None] + np.zeros((80, 32, 48, 3))
    export_to_video(ramp.astype(np.uint8), str(tmp_path / "c.mp4"), 24)
    config = SampleConfig(PROMPT, model=str(model), num_frames=17, output=str(tmp_path / "v.mp4"), start="clip")
    config.video, config.include_input = str(tmp_path / "c.mp4"), True
    (made,) = render_command(config, overwrite=False, progress=ChunkProgress)["videos"]
    # Of 80 frames 68 are four groups: one is context and two are made anew; the first and the context come before.
    assert made["num_frames"] == 34 + 17
    clip = torch.zeros(60, 32, 48, 3, dtype=torch.uint8)
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        chunks = pipeline.iter_chunks([VideoRequest(PROMPT, 0, 17, clip=clip)], pipeline.params(start="clip"))
        with pytest.raises(
            MediaError, match="a clip of 60 frames is no whole number of the video codec's groups; use 51"
        ):
            next(chunks)


def test_chunks_that_are_no_groups_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"latent_chunk_size=2: .* groups of 5 latents; nearest legal: 5"):
        plan_report(SampleConfig(PROMPT, model=str(model), latent_chunk_size=2))


def test_a_plan_counts_groups(model: Path) -> None:
    report = plan_report(SampleConfig(PROMPT, model=str(model), num_frames=60))
    assert report["chunks"] == 4 and report["window_latents"] == 20


def test_a_picture_begins_a_group(model: Path) -> None:
    picture = np.full((32, 48, 3), 90, np.uint8)
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        (latents,) = pipeline(PROMPT, num_frames=17, image=picture, output_type="latent").frames
        expected = pipeline.checkpoint.codec.encode(torch.from_numpy(picture)[None])
    assert torch.equal(torch.as_tensor(latents)[:, :1], expected)
