"""A whole checkpoint in the layout of Wan's and SkyReels' public ones, from its folder to an mp4."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretrained import text_encoder
from wan_models import SHAPE, SKYREELS, tiny_wan

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.io.latents import read_latents
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.models.skyreels_v2 import SkyReelsV2
from pavdm_dist.models.wan import Wan, WanConfig

VAE = Path(__file__).parent / "data" / "wan_vae"
SAMPLING = {
    "num_inference_steps": 6, "window_chunks": 3, "latent_chunk_size": 2, "context_chunks": 1, "guidance_scale": 2.0,
    "height": 32, "width": 64, "fps": 16, "time_shift": 3.0,
}  # fmt: skip
KINDS = {
    "WanPipeline": ("WanTransformer3DModel", "2.2", {"base_dim": 5, "decoder_base_dim": 8}),
    "SkyReelsV2DiffusionForcingPipeline": ("SkyReelsV2Transformer3DModel", "2.1", {"base_dim": 4}),
}


def checkpoint(folder: Path, pipeline: str) -> Path:
    """As diffusers writes it, with UMT5; only ``sampling`` in ``model_index.json`` is this package's."""
    from diffusers import AutoencoderKLWan

    transformer, layout, narrow = KINDS[pipeline]
    config = {**json.loads((VAE / f"{layout}.json").read_text()), **narrow}
    channels = {"in_channels": config["z_dim"], "out_channels": config["z_dim"]}
    model: Wan | SkyReelsV2 = tiny_wan(config=WanConfig(**{**SHAPE, **channels}), std=0.1)
    if pipeline.startswith("SkyReels"):
        model = tiny_wan(config=replace(SKYREELS, **channels), std=0.1)
    model.save_pretrained(folder / "transformer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan.from_config({name: value for name, value in config.items() if name != "clip_output"})
    vae.save_pretrained(folder / "vae")
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    text_encoder(folder, "umt5")
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "sampling": SAMPLING,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow  # starts the text encoder's process
@pytest.mark.parametrize("pipeline", KINDS)
def test_from_a_public_layout_to_an_mp4(pipeline: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = checkpoint(tmp_path / "model", pipeline)
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 220
    Image.fromarray(picture).save(tmp_path / "p.png")
    config = SampleConfig(
        model=str(folder), output=str(tmp_path / "v.mp4"), num_frames=37, save_latents=True, chunks_per_segment=1,
        timed_prompts={"0s": "a red three", "1s": "a blue seven"}, image=str(tmp_path / "p.png"), context_noise=0.02,
        text_dtype="float32", text_cache=str(tmp_path / "text"), decoder_tile=64 if "Wan" in pipeline else 32,
    )  # fmt: skip
    validate_sample(config)
    (made,) = render_command(config, overwrite=False, progress=ChunkProgress)["videos"]
    assert made["num_frames"] == 37
    latents = read_latents(tmp_path / "v.safetensors")
    codec = Checkpoint.open(folder).codec
    stride = codec.spec.spatial_stride
    assert latents.shape == (codec.spec.latent_channels, 10, 32 // stride, 64 // stride)
    assert read_sidecar(tmp_path / "v.mp4")["identity"]["prompt_schedule"] == [[3, "a blue seven"]]

    class Stops(ChunkProgress):
        def chunk(self, video: int, index: int, frames: int) -> None:
            if index == 2:
                raise KeyboardInterrupt

    # Again, interrupted, on a machine without the encoder's weights.
    for file in (folder / "text_encoder").glob("*.safetensors"):
        file.unlink()
    again = replace(config, output=str(tmp_path / "a.mp4"))
    with pytest.raises(KeyboardInterrupt):
        render_command(again, overwrite=False, progress=Stops)
    (found,) = render_command(again, overwrite=False, progress=ChunkProgress)["videos"]
    assert found["latents_sha256"] == made["latents_sha256"]
