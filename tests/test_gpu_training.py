"""Training on a CUDA device (`-m gpu`; one process): as on the CPU, under every stage, and without waiting for it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import TINY, start, tiny_codec, write_clips
from wan_models import WAN, trainable_folder

from pavdm_dist.digits.batches import DigitBatches
from pavdm_dist.digits.cache import LatentClips, cache_clips
from pavdm_dist.digits.codec_training import CodecTrainer, CodecTraining
from pavdm_dist.digits.quality import quality
from pavdm_dist.digits.settings import SHIPPED, DigitWorld
from pavdm_dist.io.shipped import EMBEDDED
from pavdm_dist.train.train_settings import QualityConfig, TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config

pytestmark = pytest.mark.gpu
SHARD_ALL = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


@pytest.fixture(scope="module", autouse=True)
def _plain_products() -> None:
    assert torch.cuda.is_available(), "run these where there is a GPU"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> LatentClips:
    return LatentClips(write_clips(tmp_path_factory.mktemp("clips"), 6))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = trainable_folder(tmp_path_factory.mktemp("model") / "wan", replace(WAN, text_len=16))
    return f"model.pretrained={folder}"


def trainer_of(run_dir: Path, clips: LatentClips, *more: str) -> Trainer:
    words = [*TINY, "optimizer.name=adamw", SHARD_ALL, f"run_dir={run_dir}", *more]
    return start(load_config(TrainConfig, None, words), clips)


def losses(run_dir: Path, clips: LatentClips, *more: str) -> list[float]:
    trainer = trainer_of(run_dir, clips, *more)
    found = [trainer.train_step()["loss"] for _ in range(4)]
    trainer.engine.destroy()
    return found


@pytest.mark.parametrize("what", ["stdit3", "wan", "low rank"])
def test_every_stage_and_type_trains_alike(what: str, wan: str, tmp_path: Path, clips: LatentClips) -> None:
    more = {"stdit3": [], "wan": [wan], "low rank": [wan, "model.lora.rank=2"]}[what]
    exact = losses(tmp_path / "plain", clips, *more)
    for stage in (1, 2, 3):
        assert losses(tmp_path / f"{stage}", clips, *more, f"zero.stage={stage}") == pytest.approx(exact, abs=1e-4)
        half = [f"zero.stage={stage}", "zero.precision=bfloat16"]
        assert losses(tmp_path / f"half {stage}", clips, *more, *half) == pytest.approx(exact, rel=0.05)
    for number, extra in enumerate((["compile=true"], ["zero.recompute=every:2"], ["zero.recompute=budget:0.001"])):
        assert losses(tmp_path / f"more {number}", clips, *more, *extra, "zero.stage=1") == pytest.approx(
            exact, rel=1e-3
        )
    offloaded = ["zero.stage=3", "zero.offload=all"]
    assert losses(tmp_path / "offloaded", clips, *more, *offloaded) == pytest.approx(exact, abs=1e-4)


def test_one_kernel_updates_the_weights(tmp_path: Path, clips: LatentClips) -> None:
    trainer = trainer_of(tmp_path, clips, "zero.stage=1")
    assert trainer.engine.optimizer.optimizer.defaults["fused"] is True
    trainer.engine.destroy()


def test_batches_are_made_on_the_device_and_nobody_waits(tmp_path: Path) -> None:
    """What is drawn on the host is as on the CPU; a first round may wait for kernels to be loaded."""
    folder = write_clips(tmp_path, 6)
    config = load_config(TrainConfig, None, [*TINY, "data.still_steps=2", "data.still_batch_size=16"])
    there, here = (
        DigitBatches(LatentClips(folder, device), config.objective, config.data, config.seed)
        for device in ("cuda", "cpu")
    )
    for step in range(6):
        there.batch(step, 0, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [there.batch(step, 0, 1) for step in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, own in enumerate(made):
        cpu = here.batch(step, 0, 1)
        assert own.x.is_cuda and own.levels.is_cuda
        assert torch.equal(own.levels.cpu(), cpu.levels) and own.text == cpu.text and own.dropped == cpu.dropped
        assert (own.context, own.chunk_causal, own.kind) == (cpu.context, cpu.chunk_causal, cpu.kind)
        clean = [(b.x + b.levels[:, None, :, None, None] * b.target)[:, :, b.context :].cpu() for b in (own, cpu)]
        torch.testing.assert_close(*clean, atol=1e-4, rtol=0)
        again = there.batch(step, 0, 1)
        assert torch.equal(own.x, again.x), "noise is a function of (seed, step)"


def test_a_step_of_the_embedded_recipe_waits_for_nothing(tmp_path: Path) -> None:
    """Muon at stage 0 with autocast; DeepSpeed's own calls are its own."""
    clips = LatentClips(write_clips(tmp_path, 6), "cuda")
    words = [word for word in TINY if not word.startswith("optimizer.name")]
    trainer = start(load_config(TrainConfig, None, [*words, f"run_dir={tmp_path}", "zero.precision=autocast"]), clips)
    for _ in range(4):
        trainer.train_step()
    loaded = trainer.load()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train_step(loaded)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = {warning.filename for warning in caught if "synchroniz" in str(warning.message)}
    assert not [place for place in places if "pavdm_dist" in place], places
    trainer.engine.destroy()


def test_the_codec_is_trained_on_the_device(tmp_path: Path) -> None:
    config = CodecTraining(
        z_dim=4, base_dim=4, decoder_base_dim=4, dim_mult=(1, 1, 1), crop=16, batch_size=4, num_frames=5
    )
    trainer = CodecTrainer(config, device="cuda")
    losses = [trainer.step()["reconstruction"] for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    trainer.save(tmp_path)
    again = CodecTrainer(config, device="cuda")
    again.load(tmp_path)
    assert again.steps == 30 and all(value.is_cuda for value in again.average.values())
    world, device = DigitWorld(size=32, cell=2.0), torch.device("cuda")
    tiny_codec(tmp_path / "vae")
    for kind in ("cuda", "cpu"):
        assert cache_clips(tmp_path / "vae", tmp_path / kind, 32, 3, 100, world, kind)
    own, cpu = LatentClips(tmp_path / "cuda", device), LatentClips(tmp_path / "cpu")
    assert own.prompts == cpu.prompts
    torch.testing.assert_close(own.latents.cpu().float(), cpu.latents.float(), atol=0.05, rtol=0.05)


def test_the_shipped_model_is_judged_on_the_device() -> None:
    found = quality(EMBEDDED, SHIPPED, QualityConfig(prompts=2, stills=32, video_seconds=1), "cuda")
    assert found["1 digit"]["stills"] > 0.7 and found["2 digits"]["stills"] > 0.4
    assert all(values["videos"] == 2 for values in found.values())


def test_what_a_step_shows_is_not_waited_for(tmp_path: Path, clips: LatentClips) -> None:
    """This package's part of it: what synchronises inside DeepSpeed is its own."""
    trainer = trainer_of(tmp_path, clips, "zero.stage=1", "zero.precision=bfloat16")
    for _ in range(3):
        trainer.train_step()
    loaded = trainer.load()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train_step(loaded)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [Path(warning.filename).name for warning in caught if "synchroniz" in str(warning.message)]
    assert not {"steps.py", "average.py", "processes.py"} & set(places), places
    trainer.engine.destroy()
