"""Training on prepared video: the data, its order, several buckets and processes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from training import launch
from videos import numbered, shipped_videos, write_video

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.train import training_data
from pavdm_dist.data.dataset import CachedClips
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.batch import Batch
from pavdm_dist.train.objective import Objective
from pavdm_dist.train.prepared import VideoBatches, video_data
from pavdm_dist.train.ranks import World
from pavdm_dist.train.train_run import train_slice
from pavdm_dist.train.train_settings import DataConfig, TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config

BUCKETS = ["32x48x8@24", "32x32x3@12", "32x32x1@24"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Real videos of a package, a short one and a picture of one frame, prepared."""
    videos = tmp_path_factory.mktemp("videos")
    write_video(videos / "short.mp4", numbered(40, 48, 48), 24)
    write_video(videos / "picture.mp4", numbered(1, 48, 48), 24)
    entries = [{"path": str(path), "caption": "a red three"} for path in shipped_videos().values()]
    entries += [{"path": str(videos / f"{name}.mp4"), "caption": "a blue seven"} for name in ("short", "picture")]
    index = videos / "index.jsonl"
    index.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    output = tmp_path_factory.mktemp("data") / "set"
    report = prepare_command(PrepareConfig([str(index)], str(output), str(model), BUCKETS))
    assert min(report["clips"].values()) >= 1, report
    return output


def settings(folder: Path, model: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "threads=1", f"data.folder={folder}", f"data.model={model}", "data.batch_size=2",
        "model.depth=1", "model.hidden_size=16", "model.num_heads=2",
        f"model.caption_channels={Checkpoint.open(model).shape.spec.text_dim}",
        "objective.num_inference_steps=6", "objective.window_chunks=3", "objective.latent_chunk_size=2",
        "objective.time_shift=null", "optimizer.name=adamw", "optimizer.total_steps=6", "optimizer.warmup_steps=2",
        "log_every_steps=1", f"run_dir={run_dir}", *more,
    ]  # fmt: skip


def batches_of(folder: Path, model: Path, **data: Any) -> VideoBatches:
    source = Checkpoint.open(model)
    objective = Objective(6, 3, 2, time_shift=None)
    channels = source.codec_spec.latent_channels
    return VideoBatches(CachedClips(folder, source), objective, DataConfig(batch_size=4, **data), 0, channels)


def same(one: Batch, other: Batch) -> bool:
    tensors = ((one.x, other.x), (one.target, other.target), (one.levels, other.levels))
    return all(torch.equal(a, b) for a, b in tensors) and one.ids == other.ids and one.dropped == other.dropped


def test_a_process_reads_its_share_of_the_same_batch(folder: Path, model: Path) -> None:
    batches = batches_of(folder, model, prefetch=0)
    for step in range(6):
        whole = batches.batch(step, 0, 1)
        for rank in range(2):
            assert same(batches.batch(step, rank, 2), whole.part(slice(rank, None, 2)))


def test_loading_ahead_changes_nothing_and_may_jump(folder: Path, model: Path) -> None:
    ahead, plain = batches_of(folder, model, prefetch=3), batches_of(folder, model, prefetch=0)
    for step in (0, 1, 2, 7, 8, 3):
        assert same(ahead.batch(step, 0, 1), plain.batch(step, 0, 1))
    ahead.close()


def test_a_round_meets_every_bucket_with_its_size_rate_shift_and_captions(folder: Path, model: Path) -> None:
    batches = batches_of(folder, model, prefetch=0, batch_sizes={"32x32x1@24": 6})
    seen: dict[str, Batch] = {}
    for step in range(40):
        batch = batches.batch(step, 0, 1)
        info = batch.info
        seen[f"{info.height}x{info.width}@{info.fps:g} {'picture' if batch.x.shape[2] == 1 else ''}".strip()] = batch
    assert {name.split()[0] for name in seen} == {"32x48@24", "32x32@12", "32x32@24"}
    picture = seen["32x32@24 picture"]
    assert picture.x.shape[0] == 6 and picture.context == 0 and picture.chunk_causal is None
    assert len(set(picture.levels.flatten().tolist())) == 6, "a level of its own each"
    for batch in seen.values():
        assert batch.text.embeddings is not None and batch.text.mask is not None
        assert batch.text.embeddings.shape[:2] == batch.text.mask.shape and len(batch.ids) == batch.x.shape[0]
        assert all(text.startswith("a ") for text in batch.text.prompts)
    # The resolution-dependent time shift: the same step left is another level at another size.
    ratios = {batches._kinds[n][0][1].time_shift for n in range(3)}
    assert len(ratios) == 2


def test_pixels_give_the_batches_of_cached_latents(folder: Path, model: Path, tmp_path: Path) -> None:
    def first(*more: str) -> Batch:
        config = load_config(TrainConfig, None, settings(folder, model, tmp_path, *more))
        batches, _ = video_data(config)
        try:
            return batches.batch(0, 0, 1)
        finally:
            batches.close()

    cached, pixels = first(), first("data.pixels=true")
    assert cached.ids == pixels.ids and torch.equal(cached.levels, pixels.levels)
    torch.testing.assert_close(cached.x, pixels.x, atol=5e-3, rtol=5e-3)


PROGRAM = """
import sys
from pavdm_dist.commands.train import training_data
from pavdm_dist.values.merging import load_config
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.train_run import train_slice
from pavdm_dist.train.trainer import Trainer
step = Trainer.train_step
def counted(trainer, *given):
    found = step(trainer, *given)
    if trainer.step == int(sys.argv[1]):
        trainer.stop()
    return found
Trainer.train_step = counted
for resume in ("never", "must"):
    train_slice(load_config(TrainConfig, None, [*sys.argv[2:], f"resume={resume}"]), training_data)
"""


@pytest.mark.timeout(240)
def test_two_processes_with_a_pause_train_as_one_and_export_a_model(folder: Path, model: Path, tmp_path: Path) -> None:
    more = settings(folder, model, tmp_path / "one", "sheet_every_seconds=1e-9")
    train_slice(load_config(TrainConfig, None, more), training_data)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "one/log.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and (tmp_path / "one/sheets/step0000006.png").exists()
    exported = Checkpoint.open(tmp_path / "one/model")
    assert exported.defaults.time_shift is None and exported.text_encoder.encode("a red three").shape[0] == 3

    launch(["-c", PROGRAM, "3", *settings(folder, model, tmp_path / "two", "zero.stage=2")])
    lines = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-5)


def test_another_data_set_seed_or_codec_is_not_gone_on_with(folder: Path, model: Path, tmp_path: Path) -> None:
    def begin(*more: str) -> Trainer:
        config = load_config(TrainConfig, None, settings(folder, model, tmp_path, *more))
        batches, parts = video_data(config)
        batches.identity["data_set"] |= changed
        return Trainer(config, batches, parts)

    changed: dict[str, str] = {}
    trainer = begin()
    trainer.train_step()
    trainer.save()
    trainer.batches.close()
    with pytest.raises(ConfigError, match=r"run\.seed=0, this run has 7"):
        begin("seed=7")
    for name in ("clips", "codec", "text_encoder"):
        changed = {name: "other"}
        with pytest.raises(ConfigError, match=rf"data_set\.{name}=\w+, this run has other"):
            begin()
    changed = {}
    assert begin().step == 1


def test_a_pretrained_model_is_finetuned(folder: Path, model: Path, tmp_path: Path) -> None:
    more = [f"model.pretrained={model}", "optimizer.lr=0", "optimizer.total_steps=1"]
    config = load_config(TrainConfig, None, settings(folder, model, tmp_path, *more))
    batches, parts = video_data(config)
    trainer = Trainer(config, batches, parts)
    trainer.train_step()
    trainer.export(tmp_path / "out")
    batches.close()
    before, after = Checkpoint.open(model).backbone, Checkpoint.open(tmp_path / "out").backbone
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    assert after.config.causal_trained


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["data.batch_sizes={64x64x8@24: 2}"],
            r"data\.batch_sizes={64x64x8@24: 2}: the data has the buckets 32x48x8@24",
        ),
        (
            ["objective.latent_chunk_size=4"],
            r"latent_chunk_size=4: clips of bucket 32x32x3@12 have 3 latents",
        ),
        (
            ["objective.full_share=1", "objective.growing_share=0"],
            r"full_share=1\.0 asks for windows of 4 chunks only, clips of bucket 32x32x3@12 have 3 .* 8 latents or",
        ),
        (
            ["objective.mixture=[{latent_chunk_size: 1}, {latent_chunk_size: 4}]"],
            r"latent_chunk_size=4: clips of bucket 32x32x3@12 have 3 latents; use chunks of at most 3, or longer clips",
        ),
        (["model.caption_channels=48"], r"model\.caption_channels=48: the text encoder of .* gives"),
        (["data.model=embedded", "model.caption_channels=96"], r"was prepared with codec"),
        (["data.folder=nowhere"], "nowhere"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    folder: Path, model: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        video_data(load_config(TrainConfig, None, settings(folder, model, tmp_path, *more)))


def test_pictures_that_do_not_divide_among_the_processes_of_a_window_are_refused_at_the_start(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    words = settings(folder, model, tmp_path, "sequence_parallel=2", "data.batch_size=3", "data.prefetch=0")
    config = load_config(TrainConfig, None, words)
    with pytest.raises(
        ConfigError, match=r"^data\.batch_sizes={32x32x1@24: 3} with sequence_parallel=2: pictures .* use 2 or 4"
    ):
        video_data(config, World(0, 2))
    config.data.batch_sizes = {"32x32x1@24": 4}
    video_data(config, World(0, 2))


def test_a_shard_that_is_missing_is_named_at_the_start(folder: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / "bucket-1-00000.safetensors").unlink()
    words = settings(tmp_path / "set", model, tmp_path / "run")
    said = rf"^data\.folder={tmp_path}/set: 1 of \d shards are missing, the first is bucket-1-00000\.safetensors; run"
    with pytest.raises(ConfigError, match=said):
        video_data(load_config(TrainConfig, None, words))


def test_cached_text_and_latents_train_in_bfloat16(folder: Path, model: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        more = ["zero.stage=1", f"zero.precision={precision}"]
        config = load_config(TrainConfig, None, settings(folder, model, tmp_path / precision, *more))
        batches, parts = video_data(config)
        trainer = Trainer(config, batches, parts)
        losses[precision] = [trainer.train_step()["loss"] for _ in range(3)]
        batches.close()
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
