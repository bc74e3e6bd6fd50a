"""Training on the device under test (one process): as on the CPU, under every stage, and without waiting for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices_under_test import nobody_waits, waits
from training import TINY, start, tiny_codec, write_clips
from wan_models import WAN, trainable_folder

from pavdm_dist.digits.batches import DigitBatches
from pavdm_dist.digits.cache import LatentClips, cache_clips
from pavdm_dist.digits.codec_training import CodecTrainer, CodecTraining
from pavdm_dist.digits.quality import quality
from pavdm_dist.digits.settings import SHIPPED, DigitWorld
from pavdm_dist.io.shipped import EMBEDDED
from pavdm_dist.train.ranks import join_world
from pavdm_dist.train.train_settings import QualityConfig, TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config

pytestmark = pytest.mark.gpu
SHARD_ALL = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


@pytest.fixture(autouse=True)
def _the_trainer_takes_it(device: torch.device) -> None:
    """Trainers compute where their process can: on the device under test."""
    assert join_world().device.type == device.type


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


@pytest.fixture
def more(what: str, wan: str) -> list[str]:
    """The settings of a model."""
    return {"stdit3": [], "wan": [wan], "low rank": [wan, "model.lora.rank=2"]}[what]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["stdit3", "wan", "low rank"])
def test_every_stage_and_type_trains_alike(more: list[str], tmp_path: Path, clips: LatentClips) -> None:
    exact = losses(tmp_path / "plain", clips, *more)
    for stage in (1, 2, 3):
        assert losses(tmp_path / f"{stage}", clips, *more, f"zero.stage={stage}") == pytest.approx(exact, abs=1e-4)
        half = [f"zero.stage={stage}", "zero.precision=bfloat16"]
        assert losses(tmp_path / f"half {stage}", clips, *more, *half) == pytest.approx(exact, rel=0.05)


@pytest.mark.slow  # torch makes its kernels
@pytest.mark.parametrize("what", ["stdit3", "wan", "low rank"])
def test_compiled_recomputed_and_offloaded_all_train_alike(more: list[str], tmp_path: Path, clips: LatentClips) -> None:
    exact = losses(tmp_path / "plain", clips, *more)
    for number, extra in enumerate((["compile=true"], ["zero.recompute=every:2"], ["zero.recompute=budget:0.001"])):
        assert losses(tmp_path / f"more {number}", clips, *more, *extra, "zero.stage=1") == pytest.approx(
            exact, rel=1e-3
        )
    offloaded = ["zero.stage=3", "zero.offload=all"]
    assert losses(tmp_path / "offloaded", clips, *more, *offloaded) == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_one_kernel_updates_the_weights_wherever_moments_lie(offload: str, tmp_path: Path, clips: LatentClips) -> None:
    trainer = trainer_of(tmp_path, clips, "zero.stage=2", f"zero.offload={offload}")
    assert trainer.engine.optimizer.optimizer.defaults["fused"] is True
    trainer.train_step()
    trainer.engine.destroy()


def test_batches_are_made_on_the_device_and_nobody_waits(tmp_path: Path, device: torch.device) -> None:
    """What is drawn on the host is as on the CPU; a first round may wait for kernels to be loaded."""
    folder = write_clips(tmp_path, 6)
    config = load_config(TrainConfig, None, [*TINY, "data.still_steps=2", "data.still_batch_size=16"])
    there, here = (
        DigitBatches(LatentClips(folder, place), config.objective, config.data, config.seed)
        for place in (device, "cpu")
    )
    for step in range(6):
        there.batch(step, 0, 1)
    with nobody_waits(device):
        made = [there.batch(step, 0, 1) for step in range(6)]
    for step, own in enumerate(made):
        cpu = here.batch(step, 0, 1)
        assert own.x.device.type == own.levels.device.type == device.type
        assert torch.equal(own.levels.cpu(), cpu.levels) and own.text == cpu.text and own.dropped == cpu.dropped
        assert (own.context, own.chunk_causal, own.kind) == (cpu.context, cpu.chunk_causal, cpu.kind)
        clean = [(b.x + b.levels[:, None, :, None, None] * b.target)[:, :, b.context :].cpu() for b in (own, cpu)]
        torch.testing.assert_close(*clean, atol=1e-4, rtol=0)
        again = there.batch(step, 0, 1)
        assert torch.equal(own.x, again.x), "noise is a function of (seed, step)"


def test_a_step_of_the_embedded_recipe_waits_for_nothing(tmp_path: Path, device: torch.device) -> None:
    """Muon at stage 0 with autocast; DeepSpeed's own calls are its own."""
    clips = LatentClips(write_clips(tmp_path, 6), device)
    words = [word for word in TINY if not word.startswith("optimizer.name")]
    trainer = start(load_config(TrainConfig, None, [*words, f"run_dir={tmp_path}", "zero.precision=autocast"]), clips)
    for _ in range(4):
        trainer.train_step()
    loaded = trainer.load()
    with waits(device) as places:
        trainer.train_step(loaded)
    assert not [place for place in places if "pavdm_dist" in place], places
    trainer.engine.destroy()


@pytest.mark.slow
def test_the_codec_is_trained_on_the_device(tmp_path: Path, device: torch.device) -> None:
    config = CodecTraining(
        z_dim=4, base_dim=4, decoder_base_dim=4, dim_mult=(1, 1, 1), crop=16, batch_size=4, num_frames=5
    )
    trainer = CodecTrainer(config, device=device.type)
    losses = [trainer.step()["reconstruction"] for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    trainer.save(tmp_path)
    again = CodecTrainer(config, device=device.type)
    again.load(tmp_path)
    assert again.steps == 30 and all(value.device.type == device.type for value in again.average.values())
    world = DigitWorld(size=32, cell=2.0)
    tiny_codec(tmp_path / "vae")
    for name, kind in (("own", device.type), ("cpu", "cpu")):
        assert cache_clips(tmp_path / "vae", tmp_path / name, 32, 3, 100, world, kind)
    own, cpu = LatentClips(tmp_path / "own", device), LatentClips(tmp_path / "cpu")
    assert own.prompts == cpu.prompts
    torch.testing.assert_close(own.latents.cpu().float(), cpu.latents.float(), atol=0.05, rtol=0.05)


@pytest.mark.slow
def test_the_shipped_model_is_judged_on_the_device(device: torch.device) -> None:
    settings = QualityConfig(prompts=2, stills=32, video_seconds=1, max_seconds=3600)  # on any machine, all of it
    found = quality(EMBEDDED, SHIPPED, settings, device.type)
    assert found["1 digit"]["stills"] > 0.7 and found["2 digits"]["stills"] > 0.4
    assert all(values["videos"] == 2 for values in found.values())


def test_what_a_step_shows_is_not_waited_for(tmp_path: Path, clips: LatentClips, device: torch.device) -> None:
    """This package's part of it: what synchronises inside DeepSpeed is its own."""
    trainer = trainer_of(tmp_path, clips, "zero.stage=1", "zero.precision=bfloat16")
    for _ in range(3):
        trainer.train_step()
    loaded = trainer.load()
    with waits(device) as places:
        trainer.train_step(loaded)
    assert not {"steps.py", "average.py", "ranks.py"} & {Path(place).name for place in places}, places
    trainer.engine.destroy()
