"""Worlds other than the shipped one, scenes drawn on a device, batches made there, and one command for all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import needs
from training import TINY, tiny_codec, write_clips
from wan_models import trainable_folder

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.train import dry_run_command, train_command, training_data
from pavdm_dist.digits import batches
from pavdm_dist.digits.batches import still_batch, window_batch
from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.digits.clip_vae import paint_clips
from pavdm_dist.digits.judge import Judge
from pavdm_dist.digits.painting import Painter
from pavdm_dist.digits.prompts import parse_prompt
from pavdm_dist.digits.scores import score_chunks, summarise
from pavdm_dist.digits.settings import FPS, SHIPPED, DigitWorld
from pavdm_dist.digits.world import Scene, render_pair, sample_scene, scene_prompt
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.shipped import EMBEDDED
from pavdm_dist.train.objective import Objective
from pavdm_dist.train.ranks import join_world
from pavdm_dist.train.train_run import train_slice
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.zero import ZeroEngine
from pavdm_dist.values.merging import load_config

needs("draws handwritten digits", "sklearn")

CONFIGS = Path(__file__).parents[1] / "configs" / "train"
LARGE = DigitWorld(128, 5.25, 3, 1.0, speeds=(16.0, 36.0, 72.0))


def scenes(world: DigitWorld, count: int, digits: int | None = None) -> list[Scene]:
    rng = np.random.default_rng(5)
    return [sample_scene(rng, "heldout", digits, world) for _ in range(count)]


# --- the world is settings --------------------------------------------------------------------------------------------


def test_the_default_world_is_what_the_shipped_model_says_it_was_trained_on() -> None:
    stored = json.loads((EMBEDDED / "model_index.json").read_text())["training"]["world"]
    assert json.loads(json.dumps(DigitWorld().settings)) == stored
    assert DigitWorld.of(TrainConfig().world) == SHIPPED


def test_the_recipe_for_a_gpu_describes_these_worlds() -> None:
    small = load_config(TrainConfig, CONFIGS / "embedded-gpu.yaml", [])
    large = load_config(TrainConfig, CONFIGS / "embedded-gpu-128.yaml", [])
    assert DigitWorld.of(small.world) == replace(SHIPPED, digit_weights=(1.0, 3.0))
    assert DigitWorld.of(large.world) == replace(LARGE, digit_weights=(1.0, 2.0, 3.0))
    longest = ", ".join(["a red three drifting fast up and to the left"] * 3)
    assert LARGE.longest_prompt == len(longest.replace(",", " ,").split()) == large.model.model_max_length
    for config in (small, large):
        assert not config.compile and config.zero.precision == "autocast" and not config.launch.ray_workers
        assert config.max_seconds + config.quality.max_seconds <= 480


def test_what_cannot_be_drawn_or_read_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    for word, message in (
        ("world.size=100", r"world.size=100: must be a multiple of 8"),
        ("objective.window_chunks=7", r"window_chunks=7 does not divide"),
        ("objective.mixture=[{share: 0}]", r"objective.mixture\[0\].share=0.*: must be above 0"),
        ("model.hidden_size=161", r"model: hidden_size=161 must be an even multiple of num_heads=5"),
        ("model.depth=0", r"model.depth=0: must be 1 or more"),
        ("data.num_latents=3", r"latent_chunk_size=5: clips of digits \(data.num_latents\) have 3 latents; use chunks"),
        ("objective.time_shift=0", r"objective.time_shift=0.0: must be a finite number above 0"),
        ("objective={full_share: 1, growing_share: 0}", r"full_share=1.0 .* 7 chunks only, clips of digits .* 20 lat"),
        ("data.clips=0", r"data.clips=0: must be 1 or more"),
        ("codec.batch_size=0", r"codec.batch_size=0: must be 1 or more"),
        ("model.num_heads=0", r"model.num_heads=0: must be 1 or more"),
        ("model.hidden_size=0", r"model.hidden_size=0: must be 1 or more"),
        ("model.caption_channels=0", r"model.caption_channels=0: must be 1 or more"),
        ("model.patch_size=[1, 0, 2]", r"model.patch_size=\[1, 0, 2\]: must be 1 or more each, such as \[1, 2, 2\]"),
        ("seed=99999999999999999999999", r"seed=9+: must be 0 to 18446744073709551615"),
        ("codec.z_dim=0", r"codec.z_dim=0: must be 1 or more"),
        ("data.batch_size=-8", r"data.batch_size=-8 does not divide among 1 processes: use 1$"),
        ("validation.every_steps=5", r"validation.every_steps=5: no clips are held out"),
        ("sampling={nonsense: 3}", r"sampling.nonsense"),
        ("sampling={guidance_scale: high}", r"sampling.guidance_scale"),
        ("world.most_digits=3", r"model.model_max_length=24: .*most_digits=3 have up to 32 words and commas; use 32"),
    ):
        length = ["data.num_latents=20"] * ("full_share" in word)
        words = [word, *length, "max_seconds=0", f"run_dir={tmp_path / 'run'}", "world.digit_weights=[]"]
        config = load_config(TrainConfig, CONFIGS / "embedded-gpu.yaml", words)
        with pytest.raises(ConfigError, match=message):
            train_command(config, [])
        with pytest.raises(ConfigError, match=message):
            dry_run_command(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("codec.base_dim=-4", r"codec.base_dim=-4: must be 1 or more"),
        ("codec.decoder_base_dim=0", r"codec.decoder_base_dim=0: must be 1 or more"),
        ("codec.dim_mult=[1, 2]", r"codec.dim_mult=\[1, 2\]: must be three numbers from 1 on, such as \[1, 4, 4\]"),
        ("codec.dim_mult=[]", r"codec.dim_mult=\[\]: must be three"),
        ("codec.dim_mult=[1, 4, 0]", r"codec.dim_mult=\[1, 4, 0\]: must be three"),
    ],
)
def test_a_codec_that_cannot_be_trained_is_refused_before_anything_is_started(
    word: str, message: str, tmp_path: Path
) -> None:
    config = load_config(TrainConfig, None, [word, "max_seconds=0", f"run_dir={tmp_path / 'run'}"])
    for refuse in (lambda: train_command(config, []), lambda: dry_run_command(config)):
        with pytest.raises(ConfigError, match=message):
            refuse()
    assert not (tmp_path / "run").exists()


def test_a_model_that_reads_a_frozen_encoders_texts_does_not_train_on_digits(tmp_path: Path) -> None:
    model = trainable_folder(tmp_path / "model")
    (model / "text_encoder" / "config.json").write_text('{"architectures": ["UMT5EncoderModel"], "d_model": 12}')
    config = load_config(TrainConfig, None, [f"model.pretrained={model}", f"run_dir={tmp_path / 'run'}"])
    for refuse in (lambda: train_command(config, []), lambda: dry_run_command(config)):
        with pytest.raises(ConfigError, match=r"model\.pretrained=.*: reads texts that .*; name data\.folder$"):
            refuse()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 100}, "world.size=100: must be a multiple of 8 from 32 to 1024, such as 96"),
        ({"cell": 6.0}, r"world.cell=6.0: must be 1 to 5.333, a twelfth of world.size=64"),
        ({"most_digits": 8}, "world.most_digits=8: must be 1 to 7"),
        ({"clearest_fraction": 0.0}, "world.clearest_fraction=0.0: must be above 0, at most 1"),
        ({"colours": ("red", "mauve")}, r"world.colours=\['red', 'mauve'\]: must be some of \['red', 'green'"),
        ({"digit_weights": (1.0,)}, r"world.digit_weights=\[1.0\]: must be 2 numbers from 0 on"),
        ({"speeds": (1.0, 2.0)}, "world.speeds=.* must be three numbers above 0"),
    ],
)
def test_impossible_worlds_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(SHIPPED, **changes)  # type: ignore[arg-type]


def test_scenes_of_many_digits_can_be_drawn_more_often() -> None:
    world = replace(SHIPPED, digit_weights=(1.0, 3.0))
    rng = np.random.default_rng(0)
    counts = [len(sample_scene(rng, world=world).digits) for _ in range(400)]
    assert np.mean(np.array(counts) == 2) == pytest.approx(0.75, abs=0.06)
    assert world.settings["digit_weights"] == [1.0, 3.0] and "digit_weights" not in SHIPPED.settings


def test_the_judge_of_a_larger_world_reads_what_was_drawn() -> None:
    judge, scores = Judge(1, 0, LARGE), []
    assert {len(scene.digits) for scene in scenes(LARGE, 20)} == {1, 2, 3}
    for scene in scenes(LARGE, 8, 3):
        prompt = scene_prompt(scene)
        assert set(prompt.replace(",", " ,").split()) <= set(LARGE.vocabulary)
        frames, _ = render_pair(scene, 0, 13)
        assert frames.shape == (13, 128, 128, 3)
        scores += score_chunks(judge, frames, parse_prompt(prompt, LARGE), FPS, 13)
    found = summarise(scores)
    assert found["digit"] is not None and found["digit"] > 0.9
    assert found["count"] is not None and found["count"] > 0.9
    assert found["speed_ratio"] == pytest.approx(1, abs=0.15)


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [SHIPPED, LARGE])
def test_a_painter_draws_what_the_world_does(world: DigitWorld) -> None:
    drawn = scenes(world, 6)
    starts = [0, 7, 100, 1001, 33, 5]
    frames, masks = Painter(world).paint(drawn, starts, 3)
    for scene, start, own, mask in zip(drawn, starts, frames, masks, strict=True):
        expected, covered = render_pair(scene, start, 3)
        assert np.abs(own.numpy().astype(int) - expected).max() <= 1
        assert (mask.numpy() != covered).mean() < 1e-3


def test_painted_crops_lie_on_digits_and_follow_the_generator() -> None:
    painter = Painter(SHIPPED)
    x, mask = paint_clips(painter, np.random.default_rng(4), "train", 12, 5, 32, 2, 4)
    again, _ = paint_clips(painter, np.random.default_rng(4), "train", 12, 5, 32, 2, 4)
    assert x.shape == (12, 3, 5, 32, 32) and mask.shape == (12, 1, 5, 32, 32) and torch.equal(x, again)
    assert (mask[:, 0, 2].mean(dim=(1, 2)) > 0.02).float().mean() > 0.9
    whole, _ = paint_clips(painter, np.random.default_rng(4), "train", 2, 5)
    assert whole.shape == (2, 3, 5, 64, 64)


def test_a_batch_of_a_device_is_that_of_the_cpu_but_for_its_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = LatentClips(write_clips(tmp_path, 6))
    objective = Objective(num_inference_steps=6, window_chunks=3, latent_chunk_size=2, prompt_dropout=0.5)
    makers = [
        lambda: still_batch(clips, objective, 8, (3, 1)),
        *(lambda seed=seed: window_batch(clips, objective, 4, (3, seed)) for seed in range(2, 8)),
    ]
    expected = [make() for make in makers]
    whole = batches._random

    def of_a_device(*given: object) -> object:
        """With a generator of noise of its own, as a GPU has."""
        rng, generator, _ = whole(*given)  # type: ignore[arg-type]
        return rng, generator, torch.Generator().manual_seed(99)

    monkeypatch.setattr(batches, "_random", of_a_device)
    for make, cpu in zip(makers, expected, strict=True):
        own = make()
        assert torch.equal(own.levels, cpu.levels) and own.text == cpu.text and own.dropped == cpu.dropped
        assert (own.context, own.chunk_causal, own.kind) == (cpu.context, cpu.chunk_causal, cpu.kind)
        assert not torch.equal(own.target, cpu.target)
        clean = [(b.x + b.levels[:, None, :, None, None] * b.target)[:, :, b.context :] for b in (own, cpu)]
        torch.testing.assert_close(*clean, atol=1e-5, rtol=0)


def test_a_step_that_waits_for_nothing_is_the_same_step() -> None:
    join_world(60)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 0},
    }
    found = []
    for waits in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        engine = ZeroEngine(model, torch.optim.AdamW(model.parameters(), 0.1), settings, waits)
        norms = []
        for _ in range(3):
            engine.backward(engine.forward(torch.ones(2, 4)).square().sum())
            norms.append(engine.step())
        assert all(isinstance(norm, float if waits else torch.Tensor) for norm in norms)
        found.append((model.weight.detach().clone(), [float(norm) for norm in norms if norm is not None]))
        engine.destroy()
    assert found[0][1][0] > 0.1, "nothing was clipped"
    assert found[0][1] == pytest.approx(found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0])


# --- one command ------------------------------------------------------------------------------------------------------


def test_one_command_caches_trains_exports_and_says_how_good_it_is(tmp_path: Path) -> None:
    tiny_codec(tmp_path / "vae")
    words = [
        *TINY, f"run_dir={tmp_path / 'run'}", f"codec.folder={tmp_path / 'vae'}", "compile=false",
        "world.size=32", "world.cell=2", "data.num_latents=4", "data.still_steps=1", "data.still_batch_size=4",
        "optimizer.total_steps=3", "quality.prompts=1", "quality.stills=3", "quality.video_seconds=0.2",
        "objective.window_chunks=1", "objective.num_inference_steps=2", "objective.context_chunks=0",
        "objective.growing_share=0.75",
    ]  # fmt: skip
    config = load_config(TrainConfig, CONFIGS / "embedded-gpu.yaml", words)
    train_slice(config, training_data)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert lines[0]["frames"] == 1
    quality = lines[-1]["quality"]
    assert set(quality) == {"1 digit", "2 digits"}
    for values in quality.values():
        assert values["videos"] == 1 and values["worst"] == values["video"] and 0 <= values["stills"] <= 1
        parse_prompt(values["worst_prompt"])
    model = Checkpoint.open(str(tmp_path / "run" / "model"))
    assert (model.defaults.height, model.defaults.width) == (32, 32)
    stored = json.loads((tmp_path / "run" / "model" / "model_index.json").read_text())["training"]
    assert stored["steps"] == 3 and stored["world"]["size"] == 32
    other = load_config(TrainConfig, CONFIGS / "embedded-gpu.yaml", [*words, "world.cell=2.5"])
    with pytest.raises(ConfigError, match="made with another world"):
        train_slice(other, training_data)
