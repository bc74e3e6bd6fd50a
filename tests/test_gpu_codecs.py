"""Codecs and what a video is told on the device under test (no Ray is needed)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from devices_under_test import ONE_QUICK, built
from helpers import tiny_checkpoint, tiny_model, tiny_stream

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.stage import Stage
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import Mode
from pavdm_dist.models.text_cache import TextBank
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.request.outputs import PAVDMPipelineOutput

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_tiles_remember_waits_in_main_memory(model: Path, dtype: torch.dtype, device: torch.device) -> None:
    vae = Checkpoint.open(model).vae
    codec, whole = WanCodec.from_pretrained(vae, device, dtype, tile=32), WanCodec.from_pretrained(vae, tile=32)
    latents = torch.randn(4, 6, 7, 9, generator=torch.Generator().manual_seed(0))
    frames = codec.decoder().decode(latents)
    decoder = codec.decoder()
    parts = [decoder.decode(part) for part in latents.split([1, 3, 2], dim=1)]
    assert torch.equal(torch.cat(parts), frames)
    assert {entry.device.type for entry in decoder._kept()} == {"cpu"}
    assert (frames.float() - whole.decoder().decode(latents).float()).abs().mean() < 2


@pytest.mark.parametrize("mode", ONE_QUICK)
def test_pictures_and_noised_context_are_the_same_on_any_cut(mode: Mode, device: torch.device) -> None:
    model = built(tiny_model, torch.float32, device)
    image = torch.randn(4, 1, 4, 6, generator=torch.Generator().manual_seed(7))
    stream = replace(tiny_stream(mode=mode), image=image, context_noise=0.1)
    denoise = StreamDenoiser(model, stream, TextBank(model.project_text, device), device)
    expected = list(sample(stream.window(device), denoise, stream.guidance_scale))
    assert torch.equal(expected[0].latents[:, :1].cpu(), image)
    for cuts in ([(0, 4)], [(0, 1), (1, 4)]):
        found = list(LocalEngine([Stage(model, blocks, device) for blocks in cuts]).run([stream]))
        assert all(torch.equal(a.latents, b.latents.cpu()) for (_, a), b in zip(found, expected, strict=True))


def test_pictures_and_clips_are_encoded_where_frames_are_decoded(model: Path, device: torch.device) -> None:
    clip = np.zeros((45, 32, 48, 3), np.uint8)
    with PAVDMPipeline.from_pretrained(model, device=device, decoder_tile=32) as pipeline:
        assert pipeline.checkpoint.codec.spec.latent_channels == 4
        assert pipeline.checkpoint.codec_device.startswith(device.type)
        for told in ({"image": clip[0]}, {"video": clip, "start": "clip"}):
            output = pipeline("a red three", num_frames=9, output_type="np", **told)
            assert isinstance(output, PAVDMPipelineOutput)
            (frames,) = output.frames
            assert frames.shape == (9, 32, 48, 3)
