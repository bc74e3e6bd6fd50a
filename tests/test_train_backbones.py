"""Training of public backbones, all weights or low-rank changes: it resumes, and what comes out samples."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import TINY, plain_torch, start, tiny_codec, write_clips
from videos import numbered, write_video
from wan_models import INFO, SKYREELS, WAN, random, staircase, trainable_folder

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.source import Adapter, Source
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.model import Text, build, shape_of
from pavdm_dist.train.prepared import video_data
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config

CONFIGS = {"wan": replace(WAN, text_len=16), "skyreels": replace(SKYREELS, text_len=16)}
STAGE = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
SAMPLING = {"num_inference_steps": 6, "window_chunks": 3, "latent_chunk_size": 2, "seed": 0}
LOW_RANK = ["model.lora.rank=2", "model.lora.alpha=3"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> LatentClips:
    return LatentClips(write_clips(tmp_path_factory.mktemp("clips"), 6))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: trainable_folder(root / name, config) for name, config in CONFIGS.items()}


def settings(model: Path, run_dir: Path, *more: str) -> list[str]:
    given = [f"model.pretrained={model}", "optimizer.name=adamw", "optimizer.lr=0.002", f"run_dir={run_dir}"]
    return [*TINY, *given, STAGE, *more]


def trainer_of(model: Path, run_dir: Path, clips: LatentClips, *more: str) -> Trainer:
    return start(load_config(TrainConfig, None, settings(model, run_dir, *more)), clips, model / "vae")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("more", [[], LOW_RANK], ids=["all weights", "low rank"])
def test_training_lowers_the_loss(
    name: str, more: list[str], models: dict[str, Path], tmp_path: Path, clips: LatentClips
) -> None:
    trainer = trainer_of(models[name], tmp_path, clips, *more, "optimizer.total_steps=50", "optimizer.lr=0.01")
    before = {name: value.detach().clone() for name, value in trainer.engine.module.named_parameters()}
    losses = [trainer.train_step()["loss"] for _ in range(50)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])
    moved = {name for name, value in trainer.engine.module.named_parameters() if not torch.equal(before[name], value)}
    if more:
        assert moved and all(".lora_" in name for name in moved), "the base stays as it is"
    else:
        assert any("attn1.to_q" in name for name in moved) and any("scale_shift_table" in name for name in moved)


# Every stage on two processes: tests/test_zero.py.
RESUMED = [([], 1), (LOW_RANK, 0)]
SLOW = [([], 0), ([], 2), ([], 3), (LOW_RANK, 1), (LOW_RANK, 2), (LOW_RANK, 3)]


@pytest.mark.parametrize(("more", "stage"), [*RESUMED, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_every_stage_trains_as_plain_torch_and_resumes_to_the_bit(
    more: list[str], stage: int, models: dict[str, Path], tmp_path: Path, clips: LatentClips
) -> None:
    chosen = [*more, f"zero.stage={stage}"]
    words = settings(models["skyreels"], tmp_path / "run", *more)
    plain = plain_torch(clips, [word for word in words if word != STAGE], 6)
    whole = trainer_of(models["skyreels"], tmp_path / "whole", clips, *chosen)
    losses = [whole.train_step()["loss"] for _ in range(6)]
    assert losses == pytest.approx(plain["loss"], abs=1e-5)
    found = whole.whole_weights(averaged=False)
    for name, value in plain["weights"].items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0)
    whole.engine.destroy()
    first = trainer_of(models["skyreels"], tmp_path / "run", clips, *chosen)
    halves = [first.train_step()["loss"] for _ in range(3)]
    first.save()
    first.engine.destroy()
    second = trainer_of(models["skyreels"], tmp_path / "run", clips, *chosen, "resume=must")
    assert [*halves, *(second.train_step()["loss"] for _ in range(3))] == losses
    averages = second.whole_weights()
    second.engine.destroy()
    assert averages.keys() == found.keys()


def test_a_trained_model_says_what_it_met_and_samples(
    models: dict[str, Path], tmp_path: Path, clips: LatentClips
) -> None:
    assert Checkpoint.open(models["skyreels"]).level_support == "accepts"  # its pipeline has one level a window
    trainer = trainer_of(models["skyreels"], tmp_path, clips, "export_dtype=bfloat16", "sampling={fps: 16}")
    trainer.train_step()
    trainer.export(tmp_path / "out")
    opened, weights = Checkpoint.open(tmp_path / "out"), trainer.whole_weights()
    assert opened.level_support == "staircase-trained" and opened.shape.spec.causal_trained
    assert opened.defaults.fps == 16 and opened.defaults.guidance_scale == 5 and opened.defaults.window_chunks == 3
    stored = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    for name, value in stored.items():
        exact = opened.shape.keeps_float32(name)
        assert value.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert torch.equal(value.float(), weights[f"transformer.{name}"].to(value.dtype).float())
    with PAVDMPipeline(opened) as pipeline:
        frames = pipeline(["a red three"], num_frames=5, height=16, width=16).frames
    assert np.asarray(frames[0]).shape[1:] == (16, 16, 3)


def test_changes_are_read_by_the_sampler_and_by_diffusers(
    models: dict[str, Path], tmp_path: Path, clips: LatentClips
) -> None:
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    trainer = trainer_of(models["wan"], tmp_path, clips, *LOW_RANK, "export_dtype=float32", "optimizer.lr=0.05")
    for _ in range(3):
        trainer.train_step()
    trainer.export(tmp_path / "lora")
    trainer.export(tmp_path / "lora")  # an earlier one is replaced
    (file,) = (tmp_path / "lora").iterdir()
    base = Source.of(models["wan"]).part("transformer")
    changed = load_backbone(replace(base, adapters=(Adapter(Source.of(tmp_path / "lora")),)))
    plain = load_backbone(base)
    x, levels, text = random(1, 4, 4, 4, 4), staircase(4), random(1, 7, 12)
    with torch.no_grad():
        merged, without = (model(x, levels, text, INFO) for model in (changed, plain))
        filled_in = trainer.whole_weights()
        live = trainer.engine.module.transformer
        live.load_state_dict({name.removeprefix("transformer."): value for name, value in filled_in.items()}, False)
        torch.testing.assert_close(live(x, levels, text, INFO), merged, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(merged, without, atol=1e-3)
    theirs, metadata = WanLoraLoaderMixin.lora_state_dict(tmp_path / "lora", return_lora_metadata=True)
    assert theirs.keys() == load_file(file).keys()
    assert metadata["transformer.r"] == 2 and metadata["transformer.lora_alpha"] == 3
    assert "blocks.0.attn1.to_q" in metadata["transformer.target_modules"]
    frames = {}
    for scale in (0.0, 1.0):
        checkpoint = Checkpoint.open(models["wan"], lora=[Adapter(Source.of(tmp_path / "lora"), scale)])
        with PAVDMPipeline(checkpoint) as pipeline:
            frames[scale] = np.asarray(pipeline("a red three", num_frames=5, height=16, width=16, **SAMPLING).frames[0])
    assert not np.array_equal(frames[0.0], frames[1.0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.lora.rank=2", "model.pretrained=null"], "nothing to change; name the model in model.pretrained"),
        (["model.lora.rank=-1"], r"model\.lora\.rank=-1: must be 0 or more"),
        (["model.lora.rank=2", "model.lora.alpha=0"], r"model\.lora\.alpha=0\.0: must be above 0"),
        (["objective.text_share=7"], r"objective\.text_share=7\.0: must be 0 to 1"),
        (["objective.shift_scale=-1"], r"objective\.shift_scale=-1\.0: must be 0 or more"),
        (["objective.context_noise=-3"], r"objective\.context_noise=-3\.0: must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(more: list[str], message: str, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config(TrainConfig, None, settings(models["wan"], tmp_path, *more)), 1)


def test_targets_and_channels_that_do_not_fit_are_named(
    models: dict[str, Path], tmp_path: Path, clips: LatentClips
) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: no linear map is called to_z; there are attn1"):
        trainer_of(models["wan"], tmp_path, clips, *LOW_RANK, "model.lora.targets=[to_z]")
    config = load_config(TrainConfig, None, settings(models["wan"], tmp_path))
    with pytest.raises(ConfigError, match="takes 4 latent channels, the data has 16"):
        shape_of(config, 16)
    (models["wan"] / "transformer" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "weights")
    try:
        with pytest.raises(CheckpointError, match=r"model\.pretrained=.*has no weights"):
            trainer_of(models["wan"], tmp_path, clips)
    finally:
        (tmp_path / "weights").rename(models["wan"] / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    videos = tmp_path_factory.mktemp("videos")
    captions = ["a red three drifting up and to the left", "a blue seven"]
    for number, caption in enumerate(captions):
        write_video(videos / f"{number}.mp4", numbered(40, 48, 48), 24)
        (videos / f"{number}.txt").write_text(caption)
    output = tmp_path_factory.mktemp("data") / "set"
    prepare_command(PrepareConfig([str(videos)], str(output), str(models["wan"]), ["32x32x8@24"], scene_cuts=False))
    return output


def video_settings(prepared: Path, model: Path, run_dir: Path, *more: str) -> TrainConfig:
    return load_config(TrainConfig, None, settings(model, run_dir, f"data.folder={prepared}", *more))


def test_prepared_video_trains_it_with_no_words_for_dropped_prompts(
    prepared: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    config = video_settings(prepared, models["wan"], tmp_path, "objective.prompt_dropout=0.5", "data.prefetch=0")
    batches, parts = video_data(config)
    encoder, seen = Checkpoint.open(models["wan"]).text_encoder, set()
    for step in range(8):
        batch = batches.batch(step, 0, 1)
        assert batch.text.embeddings is not None and batch.text.mask is not None
        for row, (drop, prompt) in enumerate(zip(batch.dropped, batch.text.prompts, strict=True)):
            found = batch.text.embeddings[row][batch.text.mask[row]]
            torch.testing.assert_close(found, encoder.encode("" if drop else prompt), atol=2e-3, rtol=2e-3)
            seen.add(drop)
    assert seen == {True, False}
    trainer = Trainer(config, batches, parts)
    assert np.isfinite(trainer.train_step()["loss"])
    trainer.export(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").exists()
    assert Checkpoint.open(tmp_path / "out").defaults.height == 32
    trainer.sheet()
    assert list((tmp_path / "sheets").glob("*.png"))


def test_captions_that_are_too_long_for_the_model_are_said(
    prepared: Path, models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = tmp_path / "model"
    shutil.copytree(models["wan"], short)
    config = json.loads((short / "transformer" / "config.json").read_text())
    (short / "transformer" / "config.json").write_text(json.dumps({**config, "text_len": 5}))
    chosen = video_settings(prepared, short, tmp_path, "data.prefetch=0", f"data.model={models['wan']}")
    batches, _ = video_data(chosen)
    with caplog.at_level(logging.WARNING):
        found = [batches.batch(step, 0, 1) for step in range(3)]
    assert {batch.text.embeddings.shape[1] for batch in found if batch.text.embeddings is not None} == {5}
    said = [record.getMessage() for record in caplog.records if "the model reads the first 5" in record.getMessage()]
    assert len(said) == 1 and "drifting up and to the left" in said[0]
    model = build(chosen, 4, None)
    with pytest.raises(ConfigError, match="a text of 6 tokens: the model reads 5"):
        model._tokens(found[0].x, Text(["a"], torch.zeros(1, 6, 12), torch.ones(1, 6, dtype=torch.bool)), [False])


def test_clips_whose_size_the_patches_do_not_divide_are_refused(
    prepared: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    odd = tmp_path / "model"
    trainable_folder(odd, replace(CONFIGS["wan"], patch_size=(1, 3, 3)))
    with pytest.raises(ConfigError, match="height=32, width=32: this model's patches cover 24x24 pixels"):
        video_data(video_settings(prepared, odd, tmp_path, f"data.model={models['wan']}"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sharded_building_keeps_tables_exact(precision: str, tmp_path: Path, clips: LatentClips) -> None:
    """Of an STDiT3, which has some: positions and the text of no prompt."""
    codec = tmp_path / "vae"
    tiny_codec(codec)
    first = start(load_config(TrainConfig, None, [*TINY, f"run_dir={tmp_path / 'first'}"]), clips, codec)
    first.train_step()
    first.export(tmp_path / "model")
    stored = Checkpoint.open(tmp_path / "model").backbone
    more = ["optimizer.name=adamw", "zero.stage=3", "zero.init=true", f"zero.precision={precision}", STAGE]
    words = [*TINY, *more, f"model.pretrained={tmp_path / 'model'}", f"run_dir={tmp_path / 'next'}"]
    trainer = start(load_config(TrainConfig, None, words), clips, codec)
    tables = dict(trainer.engine.module.transformer.named_buffers())
    assert tables
    for name, value in tables.items():
        assert value.dtype == torch.float32 and torch.equal(value, stored.state_dict()[name]), name
    trainer.engine.destroy()


def test_sharded_building_starts_from_the_same_weights(
    models: dict[str, Path], tmp_path: Path, clips: LatentClips
) -> None:
    plain = plain_torch(clips, [word for word in settings(models["wan"], tmp_path) if word != STAGE], 3)
    sharded = ["zero.stage=3", "zero.init=true"]
    trainer = trainer_of(models["wan"], tmp_path / "all", clips, *sharded)
    assert [trainer.train_step()["loss"] for _ in range(3)] == pytest.approx(plain["loss"], abs=1e-5)
    trainer.engine.destroy()
    low = trainer_of(models["wan"], tmp_path / "low", clips, *sharded, *LOW_RANK)
    base = load_backbone(Source.of(models["wan"]).part("transformer")).state_dict()
    weights = low.whole_weights(averaged=False)
    assert all(torch.equal(weights[f"transformer.{name}"], value) for name, value in base.items())
    assert all(value.eq(0).all() == ("lora_B" in name) for name, value in weights.items() if ".lora_" in name)
    # Changes that do nothing yet: the first loss is the base's.
    assert low.train_step()["loss"] == pytest.approx(plain["loss"][0], abs=1e-5)
    low.engine.destroy()
