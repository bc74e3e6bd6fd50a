"""Codecs and what a video is told on a CUDA device (`-m gpu`; no Ray is needed)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint, tiny_model, tiny_stream

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.stage import Stage
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import Mode
from pavdm_dist.models.loading import convert
from pavdm_dist.models.text_cache import TextBank
from pavdm_dist.pipeline import PAVDMPipeline

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert torch.cuda.is_available(), "run these where there is a GPU"
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_tiles_remember_waits_in_main_memory(model: Path, dtype: torch.dtype) -> None:
    vae = Checkpoint.open(model).vae
    codec, whole = WanCodec.from_pretrained(vae, CUDA, dtype, tile=32), WanCodec.from_pretrained(vae, tile=32)
    latents = torch.randn(4, 6, 7, 9, generator=torch.Generator().manual_seed(0))
    frames = codec.decoder().decode(latents)
    decoder = codec.decoder()
    parts = [decoder.decode(part) for part in latents.split([1, 3, 2], dim=1)]
    assert torch.equal(torch.cat(parts), frames)
    assert {entry.device.type for entry in decoder._kept()} == {"cpu"}
    assert (frames.float() - whole.decoder().decode(latents).float()).abs().mean() < 2


@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
def test_pictures_and_noised_context_are_the_same_on_any_cut(mode: Mode) -> None:
    model = tiny_model()
    convert(model, torch.float32, CUDA, model.keeps_float32)
    image = torch.randn(4, 1, 4, 6, generator=torch.Generator().manual_seed(7))
    stream = replace(tiny_stream(mode=mode), image=image, context_noise=0.1)
    denoise = StreamDenoiser(model, stream, TextBank(model.project_text, CUDA))
    expected = list(sample(stream.window(CUDA), denoise, stream.guidance_scale))
    assert torch.equal(expected[0].latents[:, :1].cpu(), image)
    for cuts in ([(0, 4)], [(0, 1), (1, 4)]):
        found = list(LocalEngine([Stage(model, blocks, CUDA) for blocks in cuts]).run([stream]))
        assert all(torch.equal(a.latents, b.latents.cpu()) for (_, a), b in zip(found, expected, strict=True))


def test_pictures_and_clips_are_encoded_where_frames_are_decoded(model: Path) -> None:
    clip = np.zeros((45, 32, 48, 3), np.uint8)
    with PAVDMPipeline.from_pretrained(model, device="cuda", decoder_tile=32) as pipeline:
        assert pipeline.checkpoint.codec.spec.latent_channels == 4
        assert pipeline.checkpoint.codec_device.startswith("cuda")
        for told in ({"image": clip[0]}, {"video": clip, "start": "clip"}):
            (frames,) = pipeline("a red three", num_frames=9, output_type="np", **told).frames
            assert frames.shape == (9, 32, 48, 3)
