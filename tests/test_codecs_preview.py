"""Previews: tiny decoders in the layout of TAEHV's files, and colours without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint
from previews import WIDTHS, tensors, tiny_decoder
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.codecs.catalog import FrameMaker, codec_spec
from pavdm_dist.codecs.costs import Allocated, decode_memory, frames_flop, frames_memory
from pavdm_dist.codecs.latent_rgb import LatentRGB
from pavdm_dist.codecs.tiny import TinyDecoder
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.models.source import Source
from pavdm_dist.planning.memory import decoder_bytes

SPECS = {"taew2_1": CodecSpec(16, 8), "taew2_2": CodecSpec(48, 16)}


def reference(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """All latents ``[C, n, h, w]`` at once, layer by layer as the layout says -> ``[t, 3, H, W]`` in [0, 1]."""
    w = {name.removeprefix("decoder."): tensor for name, tensor in weights.items()}
    x = torch.tanh(latents.permute(1, 0, 2, 3) / 3) * 3
    x = F.relu(F.conv2d(x, w["1.weight"], w["1.bias"], padding=1))
    for first, grow in ((3, 7), (9, 13), (15, 19)):
        for block in range(first, first + 3):
            past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            h = torch.cat([x, past], 1)
            for layer in (0, 2, 4):
                h = F.conv2d(h, w[f"{block}.conv.{layer}.weight"], w[f"{block}.conv.{layer}.bias"], padding=1)
                h = F.relu(h) if layer < 4 else h
            x = F.relu(h + x)
        x = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), w[f"{grow}.conv.weight"])
        x = x.reshape(-1, w[f"{grow + 1}.weight"].shape[1], *x.shape[2:])
        x = F.conv2d(x, w[f"{grow + 1}.weight"], padding=1)
    x = F.conv2d(F.relu(x), w["22.weight"], w["22.bias"], padding=1)
    return F.pixel_shuffle(x, round((x.shape[1] / 3) ** 0.5)).clamp(0, 1)[3:]


def noise(spec: CodecSpec, count: int) -> Tensor:
    return torch.randn(spec.latent_channels, count, 2, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "suffix"), [("taew2_1", ".pth"), ("taew2_2", ".safetensors")])
def test_a_tiny_decoder_streams_what_it_decodes_whole(tmp_path: Path, name: str, suffix: str) -> None:
    spec, weights, file = SPECS[name], tensors(SPECS[name]), tmp_path / f"{name}{suffix}"
    if suffix == ".pth":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    tiny = TinyDecoder(file, spec)
    latents = noise(spec, 14)
    frames = tiny.decoder().decode(latents)
    assert frames.shape == (spec.frames_in_chunk(14, first=True), 2 * spec.spatial_stride, 3 * spec.spatial_stride, 3)
    expected = reference(weights, latents).permute(0, 2, 3, 1) * 255
    assert (frames.float() - expected).abs().max() < 0.6
    assert frames.float().std() > 1
    one, other = tiny.decoder(), tiny.decoder()
    parts = [one.decode(latents[:, :1]), one.decode(latents[:, 1:5])]
    other.decode(latents[:, 3:7])
    assert torch.equal(torch.cat([*parts, one.decode(latents[:, 5:])]), frames)
    count = tiny.receptive_latents()
    assert count == 8
    resumed = tiny.decoder()
    resumed.warm(latents[:, 12 - count : 12])
    assert torch.equal(resumed.decode(latents[:, 12:]), frames[-8:])
    short = tiny.decoder()
    short.warm(latents[:, 9:12])
    assert not torch.equal(short.decode(latents[:, 12:]), frames[-8:])


def test_a_file_for_a_higher_rate_gives_every_second_frame_of_its_first_stage(tmp_path: Path) -> None:
    spec = SPECS["taew2_1"]
    fast = tensors(spec, doubles=(2, 2, 2))
    save_file(fast, tmp_path / "fast.safetensors")
    slow = {**fast, "decoder.7.conv.weight": fast["decoder.7.conv.weight"][-WIDTHS[0] :].contiguous()}
    save_file(slow, tmp_path / "slow.safetensors")
    one, other = (TinyDecoder(tmp_path / f"{name}.safetensors", spec) for name in ("fast", "slow"))
    assert torch.equal(one.decoder().decode(noise(spec, 3)), other.decoder().decode(noise(spec, 3)))


def test_files_that_cannot_be_previews(tmp_path: Path) -> None:
    spec = SPECS["taew2_1"]
    with pytest.raises(CheckpointError, match=r"preview_decoder=\S+: no such file"):
        TinyDecoder(tmp_path / "none.pth", spec)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="is no readable file of weights"):
        TinyDecoder(broken, spec)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is no TAEHV decoder"):
        TinyDecoder(tmp_path / "other.safetensors", spec)
    save_file(tensors(SPECS["taew2_2"]), tmp_path / "2_2.safetensors")
    with pytest.raises(CheckpointError, match="has 48 latent channels, the model's codec 16"):
        TinyDecoder(tmp_path / "2_2.safetensors", spec)
    lacking = tensors(spec)
    del lacking["decoder.9.conv.2.bias"]
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor \S+ is missing"):
        TinyDecoder(tmp_path / "lacking.safetensors", spec)


def test_previews_take_what_is_predicted(tmp_path: Path) -> None:
    """Work and memory of a tiny decoder, told from its file as from shapes; colours take neither on a GPU."""
    model = tiny_checkpoint(tmp_path)
    vae, file = Source.of(model).part("vae"), str(tiny_decoder(model))
    maker, spec, size, streams, cells = FrameMaker(vae, preview=file), codec_spec(vae), 5, 2, (6, 10)
    predicted, tiny = frames_memory(maker, *cells), TinyDecoder(file, spec)
    decoders, latents = [tiny.decoder() for _ in range(streams)], torch.zeros(spec.latent_channels, size, *cells)
    with Allocated() as allocated:
        for decoder in (*decoders, *decoders, *decoders):
            decoder.decode(latents)
    assert predicted.frames * size == decoders[0].decode(latents).nbytes
    whole = decoder_bytes(predicted, size, streams, on_cpu=True) - predicted.weights
    assert whole == pytest.approx(allocated.peak, rel=0.1)
    assert predicted.weights == sum(value.nbytes for value in tiny.net.parameters())
    with FlopCounterMode(display=False) as counter:
        tiny.decoder().decode(latents)
    assert size * frames_flop(maker, *cells) == counter.get_total_flops()
    colours = FrameMaker(vae, preview="rgb")
    assert frames_flop(colours, *cells) == 0
    assert decoder_bytes(frames_memory(colours, *cells), size, streams, on_cpu=False) == 0
    assert frames_memory(colours, *cells).frames == predicted.frames
    assert frames_memory(FrameMaker(vae), *cells) == decode_memory(vae, *cells)


def test_colours_are_fitted_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vae = Source.of(tiny_checkpoint(tmp_path / "model")).part("vae")
    maker = FrameMaker(vae, preview="rgb")
    maker.check()
    first = maker.load()
    assert isinstance(first, LatentRGB)
    (vae.folder() / "._model.safetensors").write_bytes(bytes(4096))  # a Mac's, of a file on a share
    monkeypatch.setattr(LatentRGB, "fitted", classmethod(lambda *_: pytest.fail("it was kept")))
    again = maker.load()
    assert isinstance(again, LatentRGB)
    assert torch.allclose(again.weight, first.weight) and torch.allclose(again.bias, first.bias)


def test_colours_are_near_what_the_codec_decodes() -> None:
    codec = WanCodec.from_pretrained(Source.of(shipped_models()["embedded"]).part("vae"))
    rgb = LatentRGB.fitted(codec)
    clip = torch.zeros(17, 64, 64, 3, dtype=torch.uint8)
    for number, frame in enumerate(clip):  # a blue disc that moves over a red slope
        rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        frame[..., 0] = 4 * columns
        frame[(rows - 20 - number).square() + (columns - 30).square() < 150] = torch.tensor([20, 40, 230]).byte()
    latents = codec.encode(clip)
    decoder = rgb.decoder()
    frames = torch.cat([decoder.decode(part) for part in latents.split([2, 3], dim=1)])
    whole = codec.decoder().decode(latents)
    assert frames.shape == whole.shape and frames.dtype == torch.uint8
    pair = torch.stack([frames.float().flatten(), whole.float().flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.8
    warm = rgb.decoder()
    warm.warm(latents[:, :4])
    assert torch.equal(warm.decode(latents[:, 4:]), frames[-4:])
    assert decoder.decode(torch.full_like(latents[:, :1], torch.nan)).shape == (4, 64, 64, 3)


def test_previews_have_no_tiles(tmp_path: Path) -> None:
    vae = Source.of(tiny_checkpoint(tmp_path)).part("vae")
    with pytest.raises(ConfigError, match="decoder_tile=64: preview_decoder=rgb has no tiles"):
        FrameMaker(vae, tile=64, preview="rgb").check()
