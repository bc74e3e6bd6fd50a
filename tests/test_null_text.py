"""The learned text of no prompt where as much of it is read as the prompt beside it has: in sampling, on stages and in
training, as Open-Sora's programs mask both branches by the prompt's tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driving import CUTS, driven, equal
from helpers import TINY, reference_chunks, tiny_checkpoint, tiny_model, tiny_stream
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Finished
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.io.shipped import configs_root
from pavdm_dist.method.sampler import UNCONDITIONAL
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Conditioning, NewPrompt, Stream
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.catalog import backbone_shape
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.train.model import Text, TextToVideo


def text(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, TINY.caption_channels, generator=torch.Generator().manual_seed(seed))


PROMPTS, NULL = [(0, text(3, 1)), (2, text(5, 2))], text(4, 3)


def stream(mode: Mode = "window", num_chunks: int = 12, null_as_long: bool = True) -> Stream:
    conditioning = Conditioning.build(PROMPTS, NULL, null_as_long)
    return replace(tiny_stream(num_chunks=num_chunks, mode=mode), conditioning=conditioning)


def test_every_chunk_has_as_much_as_its_prompt() -> None:
    conditioning = Conditioning.build(PROMPTS, NULL, null_as_long=True).with_prompt(6, text(1, 4))

    def null_of(chunk: int, of: Conditioning = conditioning) -> Tensor:
        return of.texts[of.key(chunk, UNCONDITIONAL)]

    assert [len(null_of(chunk)) for chunk in (-1, 0, 1, 2, 5, 6, 9)] == [3, 3, 3, 4, 4, 1, 1], (
        "and never more than it has"
    )
    assert torch.equal(null_of(1), NULL[:3]) and null_of(2) is NULL
    later = conditioning.since(6)
    assert torch.equal(null_of(9, later), NULL[:1]) and len(later.texts) == 3, "a prompt, all of the null text, a part"
    again = later.with_prompt(9, text(2, 5))
    assert torch.equal(null_of(9, again), NULL[:2])
    row = replace(tiny_stream(num_chunks=12).plan, num_chunks=None).row(14)
    gone = conditioning.expired(row)
    assert row.window[0] >= 2 and gone == {conditioning.key(0, 0), conditioning.key(0, UNCONDITIONAL)}


def test_it_is_the_cut_text_that_is_read() -> None:
    one = replace(stream(), conditioning=Conditioning.build(PROMPTS[:1], NULL, null_as_long=True))
    cut = replace(stream(), conditioning=Conditioning.build(PROMPTS[:1], NULL[:3]))
    whole = replace(stream(), conditioning=Conditioning.build(PROMPTS[:1], NULL))
    found, by_hand, otherwise = (reference_chunks(tiny_model(), which) for which in (one, cut, whole))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(found, by_hand, strict=True))
    assert not torch.equal(found[0].latents, otherwise[0].latents)


@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
def test_stages_and_prompts_told_while_they_run(mode: Mode) -> None:
    running, new = stream(mode), NewPrompt(8, "new", text(2, 9))

    def at(driver: Driver, finished: Finished) -> None:
        if finished.clean.index == 1:
            driver.set_prompt(running.id, new)

    known = replace(running, conditioning=running.conditioning.with_prompt(8, new.text))
    assert equal(driven(running, CUTS[1], at), reference_chunks(tiny_model(), known))


def test_models_of_open_sora_read_so_and_those_trained_here_do_not(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    assert not Checkpoint.open("embedded").shape.spec.null_text_as_long
    assert backbone_shape(configs_root() / "model" / "stdit3-xl" / "transformer").spec.null_text_as_long

    def sampled() -> Tensor:
        checkpoint = Checkpoint.open(folder)
        with PAVDMPipeline(checkpoint) as pipeline:
            settings = {"num_frames": 8, "guidance_scale": 4.0, "output_type": "latent", "seed": 2}
            return torch.as_tensor(pipeline("a red three", **settings).frames[0])

    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    here = sampled()
    file.write_text(json.dumps(config | {"null_text_as_long": True}))
    as_long = sampled()
    public = {name: value for name, value in config.items() if name not in ("_class_name", "null_text_as_long")}
    file.write_text(json.dumps(public))
    assert Checkpoint.open(folder).shape.spec.null_text_as_long, "the public file has neither name"
    assert torch.equal(sampled(), as_long) and not torch.equal(here, as_long)


def test_a_video_that_was_begun_with_all_of_it_is_another(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    said = []
    alone, other = {"guidance_scale": 1.0}, {"negative_prompt": "a blue seven"}
    for as_long, settings in ((False, {}), (True, {}), (True, alone), (True, other)):
        file = folder / "transformer" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"null_text_as_long": as_long}))
        output = tmp_path / f"{len(said)}.mp4"
        config = SampleConfig("a red three", model=str(folder), output=str(output), num_frames=8)
        for name, value in {"guidance_scale": 4.0, **settings}.items():
            setattr(config, name, value)
        render_command(config, overwrite=False, progress=ChunkProgress)
        said.append(read_sidecar(output)["identity"].get("null_text"))
    assert said == [None, "as long", None, None]


@pytest.mark.parametrize("known", [True, False])
def test_training_drops_words_and_not_rows(known: bool) -> None:
    model = TextToVideo(tiny_model(config=replace(TINY, null_text_as_long=True)), None)
    embeddings, mask = torch.stack([text(4, 1), text(4, 2)]), torch.arange(4) < torch.tensor([2, 4])[:, None]
    given = Text(["a", "b"], embeddings, mask)
    if not known:
        object.__setattr__(given, "lengths", None)  # as where the mask lies on a GPU from the first
    tokens, read = model._tokens(torch.zeros(2, TINY.in_channels, 1, 4, 6), given, [True, False])
    assert read is not None and read.sum(1).tolist() == [2, 4]
    null = model.transformer.null_text()
    assert null is not None and torch.equal(tokens[0, :2], null[:2]) and torch.equal(tokens[1, :4], embeddings[1])
    x, levels, info = torch.randn(2, TINY.in_channels, 3, 4, 6), torch.rand(2, 3), FrameInfo(32, 48, 24)
    dropped = model(x, levels, given, [True, False], info, None)
    alone = Text(["a"], null[None, :2].detach(), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(dropped[:1], model(x[:1], levels[:1], alone, [False], info, None), atol=1e-5, rtol=1e-4)
