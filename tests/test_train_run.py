"""The training loop at a tiny size: it resumes bit for bit, compiles nothing, and writes a model that samples."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training import TINY, start, tiny_codec, write_clips

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.digits.batches import INFO, DigitBatches, still_batch
from pavdm_dist.digits.cache import LatentClips, cache_clips
from pavdm_dist.digits.provider import WORLD_PROMPTS, digit_data
from pavdm_dist.digits.settings import VOCABULARY, WORLD_SETTINGS, DigitWorld
from pavdm_dist.digits.world import render, sample_scene
from pavdm_dist.errors import CheckpointError, ConfigError, EngineError
from pavdm_dist.io.shipped import EMBEDDED
from pavdm_dist.train.average import Average
from pavdm_dist.train.export import Parts, check_target
from pavdm_dist.train.identity import check_same, identity_of
from pavdm_dist.train.model import Text, filled
from pavdm_dist.train.objective import Objective, WindowKind
from pavdm_dist.train.ranks import join_world
from pavdm_dist.train.train_run import train_slice
from pavdm_dist.train.train_settings import LowRankConfig, TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config


def settings(folder: Path, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*TINY, f"run_dir={folder / 'run'}", *overrides])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> LatentClips:
    return LatentClips(write_clips(tmp_path_factory.mktemp("clips"), 6))


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "vae"
    tiny_codec(folder)
    return folder


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = {f"average.{name}": part for name, (_, part) in trainer.average.parts.items()}
    return {**trainer.engine.module.state_dict(), **parts}


def test_five_and_five_steps_are_ten_to_the_bit(tmp_path: Path, clips: LatentClips) -> None:
    whole = start(settings(tmp_path), clips)
    losses = [whole.train_step()["loss"] for _ in range(10)]
    first = start(settings(tmp_path), clips)
    halves = [first.train_step()["loss"] for _ in range(5)]
    first.save()
    second = start(settings(tmp_path, "resume=must"), clips)
    assert second.step == 5
    halves += [second.train_step()["loss"] for _ in range(5)]
    assert halves == losses
    expected = everything(whole)
    assert all(torch.equal(value, expected[name]) for name, value in everything(second).items())


def test_training_lowers_the_loss(tmp_path: Path, clips: LatentClips) -> None:
    trainer = start(settings(tmp_path, "optimizer.total_steps=60"), clips)
    losses = [trainer.train_step()["loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])


def test_stills_come_first_then_windows(tmp_path: Path, clips: LatentClips) -> None:
    trainer = start(settings(tmp_path, "data.still_steps=3", "data.still_batch_size=5"), clips)
    frames = [trainer.train_step()["frames"] for _ in range(6)]
    assert frames[:3] == [1, 1, 1] and min(frames[3:]) >= 2


def test_stills_can_go_on_among_the_windows(tmp_path: Path, clips: LatentClips) -> None:
    trainer = start(settings(tmp_path, "data.still_share=0.4"), clips)
    frames = [trainer.train_step()["frames"] for _ in range(40)]
    assert 8 <= frames.count(1) <= 24
    again = start(settings(tmp_path, "data.still_share=0.4"), clips)
    assert [again.train_step()["frames"] for _ in range(10)] == frames[:10]


def test_stills_are_single_latents_of_their_prompts_at_levels_of_their_own(clips: LatentClips) -> None:
    objective = Objective(prompt_dropout=0.3)
    batch = still_batch(clips, objective, 2000, (1, 2))
    clean = batch.x + batch.levels[:, None, :, None, None] * batch.target
    for sample, prompt in zip(clean[:20, :, 0], batch.text.prompts, strict=False):
        of_prompt = [latents for latents, text in zip(clips.latents, clips.prompts, strict=True) if text == prompt]
        assert min((latents.float() - sample[:, None]).abs().amax((0, 2, 3)).min() for latents in of_prompt) < 1e-5
    assert len(set(batch.levels.flatten().tolist())) > 1990
    assert batch.levels.mean() == pytest.approx(0.5, abs=0.03) and 0 <= batch.levels.min() < batch.levels.max() <= 1
    assert np.mean(batch.dropped) == pytest.approx(0.3, abs=0.04)
    again = still_batch(clips, objective, 2000, (1, 2))
    assert torch.equal(batch.x, again.x) and batch.text == again.text
    assert not torch.equal(batch.x, still_batch(clips, objective, 2000, (1, 3)).x)


def test_a_torn_checkpoint_is_never_the_latest(tmp_path: Path, clips: LatentClips) -> None:
    trainer = start(settings(tmp_path), clips)
    trainer.train_step()
    trainer.save()
    trainer.train_step()

    def torn(root: Path, tag: str, _: int) -> None:
        (root / tag).mkdir(exist_ok=True)
        raise KeyboardInterrupt

    whole, trainer.engine.save = trainer.engine.save, torn
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    trainer.engine.save = whole
    assert start(settings(tmp_path), clips).step == 1
    for _ in range(3):
        trainer.train_step()
        trainer.save()
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step*")) == ["step0000004", "step0000005"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resume=never"], "resume=never"),
        (["model.text_depth=2"], r"model\.text_depth=1, this run has 2"),
        (["objective.shift_scale=0.5"], r"objective\.shift_scale=0\.4, this run has 0\.5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    tmp_path: Path, clips: LatentClips, overrides: list[str], message: str
) -> None:
    start(settings(tmp_path), clips).save()
    with pytest.raises(ConfigError, match=message):
        start(settings(tmp_path, *overrides), clips)


def test_another_world_is_refused(tmp_path: Path, clips: LatentClips, monkeypatch: pytest.MonkeyPatch) -> None:
    from pavdm_dist.digits import settings as worlds

    start(settings(tmp_path), clips).save()
    with pytest.raises(ConfigError, match=r"world\.most_digits=2, this run has 3"):
        start(settings(tmp_path), clips, world=DigitWorld(most_digits=3))
    monkeypatch.setattr(worlds, "FPS", 12)
    with pytest.raises(ConfigError, match=r"world\.fps=24, this run has 12"):
        start(settings(tmp_path), clips)


def test_resume_must_refuses_an_empty_folder(tmp_path: Path, clips: LatentClips) -> None:
    with pytest.raises(ConfigError, match="resume=must"):
        start(settings(tmp_path, "resume=must"), clips)


def test_the_average_is_the_exact_recursion() -> None:
    module = torch.nn.Linear(2, 2)
    average, expected = Average(module, 0.5), module.weight.detach().clone()
    for step in range(1, 8):
        with torch.no_grad():
            module.weight.normal_()
        average.update(module)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
        torch.testing.assert_close(average.parts["weight"][1].view(2, 2), expected)


def test_a_dropped_prompt_is_the_null_text_and_padding_is_not_read(tmp_path: Path, clips: LatentClips) -> None:
    trainer = start(settings(tmp_path, "optimizer.total_steps=100"), clips)
    for _ in range(8):
        trainer.train_step()
    model = filled(trainer.config, 4, VOCABULARY, trainer.whole_weights())
    x, levels = torch.randn(1, 4, 4, 4, 4).expand(2, -1, -1, -1, -1), torch.full((2, 4), 0.5)
    short, long = "a red three drifting up", "a blue seven bouncing fast, a cyan one bouncing"
    with torch.no_grad():
        one = model(x[:1], levels[:1], Text([short]), [False], INFO, None)
        two = model(x, levels, Text([short, long]), [False, False], INFO, None)
        dropped = model(x, levels, Text([short, long]), [True, True], INFO, None)
        null = model.transformer(x[:1], levels[:1], model.transformer.null_text()[None], INFO)
    torch.testing.assert_close(two[:1], one, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(two[0], two[1], atol=1e-3)
    assert torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped[:1], null, atol=1e-5, rtol=1e-4)


def test_clips_are_cached_in_slices_and_are_what_the_codec_encodes(
    tmp_path: Path, codec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not cache_clips(codec, tmp_path / "c", 33, 3, max_seconds=-1)
    assert cache_clips(codec, tmp_path / "c", 32, 3, max_seconds=60)
    clips = LatentClips(tmp_path / "c")
    assert clips.latents.shape == (32, 4, 3, 8, 8)
    frames = render(sample_scene(np.random.default_rng((3, 5))), 0, 9)
    expected = WanCodec.from_pretrained(codec).encode(torch.from_numpy(frames))
    torch.testing.assert_close(clips.latents[5].float(), expected, atol=5e-3, rtol=5e-3)
    assert {word for prompt in clips.prompts for word in prompt.replace(",", " ,").split()} <= set(VOCABULARY)
    part, prompts = clips.batch(np.random.default_rng(1), 4, 1, 2)
    again, _ = clips.batch(np.random.default_rng(1), 4, 1, 2)
    assert part.shape == (4, 4, 2, 8, 8) and len(prompts) == 4 and torch.equal(part, again)
    monkeypatch.setattr("pavdm_dist.digits.cache._whole_clip_encoder", lambda *_: pytest.fail("nothing is missing"))
    assert cache_clips(codec, tmp_path / "c", 32, 3, max_seconds=60)
    with pytest.raises(ConfigError, match=r"c was made with another num_latents: 3 there, 5 in this run; use another"):
        cache_clips(codec, tmp_path / "c", 32, 5, max_seconds=60)
    other = DigitWorld(size=32, cell=2, most_digits=1)
    with pytest.raises(ConfigError, match=r"another world: size 64 there, 32 in this run, .*digits null there, 1 in"):
        cache_clips(codec, tmp_path / "c", 32, 3, 60, other)


@pytest.mark.parametrize("damage", ["cut short", "empty", "no prompts", "no latents"])
def test_clips_that_are_damaged_are_named_and_made_again(
    damage: str, tmp_path: Path, codec: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pavdm_dist.digits.cache.SHARD_CLIPS", 2)
    assert cache_clips(codec, tmp_path, 4, 2, max_seconds=60)
    shards = [tmp_path / f"clips-0000{number}.safetensors" for number in range(2)]
    whole = [shard.read_bytes() for shard in shards]
    if damage in ("cut short", "empty"):
        shards[1].write_bytes(whole[1][: len(whole[1]) // 2 if damage == "cut short" else 0])
    else:
        tensors = load_file(shards[1])
        about = {"prompts": json.dumps(["a red three drifting up"] * 2)}
        save_file(*(({}, shards[1], about) if damage == "no latents" else (tensors, shards[1])))
    with pytest.raises(ConfigError, match=r"clips-00001\.safetensors is damaged \(.+\): delete it; run again"):
        LatentClips(tmp_path)
    assert cache_clips(codec, tmp_path, 4, 2, max_seconds=60)
    assert f"{shards[1]} is made again: it is damaged (" in caplog.text and str(shards[0]) not in caplog.text
    assert [shard.read_bytes() for shard in shards] == whole
    assert len(LatentClips(tmp_path).prompts) == 4


@pytest.mark.parametrize("left", ["", "{", "[]"])
def test_clips_of_which_nothing_is_known_are_one_sentence(left: str, tmp_path: Path, codec: Path) -> None:
    (tmp_path / "identity.json").write_text(left)
    with pytest.raises(ConfigError, match=r"not known: .*identity\.json is not valid JSON.*; delete that folder"):
        cache_clips(codec, tmp_path, 32, 3, max_seconds=60)


def test_no_more_clips_are_read_than_asked_for(tmp_path: Path) -> None:
    """Whole shards are cached, and a run before may have asked for more."""
    folder = write_clips(tmp_path, 8)
    shutil.copy(folder / "clips-00000.safetensors", folder / "clips-00001.safetensors")
    every, first = LatentClips(folder), LatentClips(folder, clips=10)
    assert (every.there, len(every.prompts), first.there, len(first.prompts)) == (16, 16, 16, 10)
    assert torch.equal(first.latents, every.latents[:10]) and first.prompts == every.prompts[:10]
    config = settings(tmp_path, "data.clips=10")

    def identity(clips: LatentClips) -> dict[str, Any]:
        made = identity_of(config, DigitBatches(clips, config.objective, config.data, config.seed))
        return json.loads(json.dumps(made))

    now = identity(first)
    check_same("run", now, now)
    # Checkpoints that do not say it are of all there was: others are told apart, the same go on.
    older = identity(every)
    del older["data"]["clips_used"], older["older"]
    with pytest.raises(ConfigError, match=r"run was trained with data\.clips_used=16, this run has 10$"):
        check_same("run", older, now)
    check_same("run", older, identity(every))
    # Those that do go on where the folder has grown since.
    check_same("run", {**now, "older": {"data": {"clips_used": 10}}}, now)


def test_the_command_trains_on_as_many_shards_as_asked_for(tmp_path: Path, codec: Path) -> None:
    def clips(count: int) -> LatentClips:
        config = settings(tmp_path, f"codec.folder={codec}", f"data.clips={count}", "data.num_latents=8")
        made = digit_data(config, join_world(60), time.monotonic() + 100)
        assert made is not None and isinstance(made[0], DigitBatches)
        return made[0].clips

    # A checkpoint of before, whose run trained on the whole shard, goes on.
    assert (len(clips(10).latents), clips(10).there) == (32, 32)
    assert clips(33).there == 64
    fewer = clips(10)
    assert len(fewer.prompts) == len(fewer.latents) == 32 and fewer.there == 64, "not on what another run asked for"


def test_command_trains_and_exports_a_model_that_opens(tmp_path: Path, codec: Path) -> None:
    most = "objective.mixture=[{share: 1}, {share: 3, window_chunks: 2, num_inference_steps: 4}]"
    config = settings(tmp_path, f"codec.folder={codec}", "optimizer.total_steps=2", "max_seconds=100", most)
    train_slice(config, digit_data)
    opened = Checkpoint.open(tmp_path / "run/model")
    assert opened.defaults.window_chunks == 2 and opened.defaults.num_inference_steps == 4
    assert opened.text_encoder.unknown_words("a red three") == []
    index = json.loads((tmp_path / "run/model/model_index.json").read_text())
    shipped = json.loads((EMBEDDED / "model_index.json").read_text())
    assert index["training"] == {**shipped["training"], "steps": 2} and index.keys() == shipped.keys()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["loss"] == pytest.approx(2, rel=0.7)
    start(replace(config, resume="must"), LatentClips(tmp_path / "run/clips"), codec, WORLD_PROMPTS[:2]).sheet()
    assert (tmp_path / "run/sheets/step0000002.png").exists()


def test_who_gets_no_signals_is_asked_before_every_step(tmp_path: Path, codec: Path, clips: LatentClips) -> None:
    config = settings(tmp_path, "max_seconds=100")
    batches = DigitBatches(clips, config.objective, config.data, config.seed)
    parts = Parts(codec, None, INFO, (), VOCABULARY, WORLD_SETTINGS)
    answers = iter([False, False, True])
    train_slice(config, lambda *_: (batches, parts), asked=lambda: next(answers))
    assert [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()] == [1, 2]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step0000002"
    assert Checkpoint.open(tmp_path / "run/model").backbone.config.depth == 1


def test_a_slice_that_ends_with_the_data_trains_nothing(tmp_path: Path) -> None:
    train_slice(settings(tmp_path), lambda config, world, end: None)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path: Path, codec: Path, clips: LatentClips) -> None:
    (tmp_path / "models" / "other").mkdir(parents=True)
    for target, message in ((tmp_path / "models", "holds other and no model"), (codec / "config.json", "is a file")):
        with pytest.raises(ConfigError, match=f"export={target}: .*{message}"):
            train_slice(settings(tmp_path, f"export={target}"), digit_data)
        with pytest.raises(EngineError, match=f"{message}.*; the checkpoint is kept, run again to export it"):
            start(settings(tmp_path), clips, codec).export(target)
    assert (tmp_path / "models" / "other").is_dir()
    (tmp_path / "link").symlink_to(tmp_path / "models")
    with pytest.raises(EngineError, match=f"export={tmp_path / 'link'}: is a link to .*models; name the folder itself"):
        start(settings(tmp_path), clips, codec).export(tmp_path / "link")


def test_an_export_never_replaces_what_the_run_reads(tmp_path: Path, codec: Path, clips: LatentClips) -> None:
    base, run_dir = tmp_path / "base", tmp_path / "run"
    start(settings(tmp_path / "first"), clips, codec).export(base)
    index, size = (base / "model_index.json").read_bytes(), len(list(base.rglob("*")))
    (tmp_path / "linked").symlink_to(base)
    for field, place, target, relation in (
        ("model.pretrained", base, base, "is"),
        ("model.pretrained", tmp_path / "linked", base, "is"),
        ("model.pretrained", base, tmp_path, "holds"),
        ("model.pretrained", base, base / "lora", "lies in"),
        ("data.model", base, base, "is"),
        ("codec.folder", base / "vae", base, "holds"),
        ("data.folder", base, base, "is"),
        ("data.text_cache", base, base, "is"),
        ("run_dir", base / "run", base, "holds"),
        ("run_dir", base, base, "is"),
    ):
        place = f"[{place}]" if field == "data.folder" else place
        config = settings(tmp_path, f"{field}={place}", f"export={target}")
        with pytest.raises(ConfigError, match=rf"export={target}: {relation} {field}={base}"):
            train_slice(config, digit_data)
    assert (base / "model_index.json").read_bytes() == index
    (base / "notes").touch()
    with pytest.raises(ConfigError, match=r"base: holds notes, which is no part of the model and would be gone; name"):
        train_slice(settings(tmp_path, f"export={base}"), digit_data)
    (base / "notes").unlink()
    # Where the run's own folder holds the base, and no export is named.
    run_dir.mkdir()
    base.rename(run_dir / "model")
    with pytest.raises(ConfigError, match=r"run/model: is model\.pretrained="):
        train_slice(settings(tmp_path, f"model.pretrained={run_dir / 'model'}", "model.lora.rank=2"), digit_data)
    assert (run_dir / "model/model_index.json").read_bytes() == index
    assert len(list((run_dir / "model").rglob("*"))) == size


def test_an_export_replaces_its_own_kind_alone(tmp_path: Path, codec: Path, clips: LatentClips) -> None:
    start(settings(tmp_path / "first"), clips, codec).export(tmp_path / "whole")
    for name, header in (("lora", {"steps": "3"}), ("published", {"format": "pt"}), ("loras", {"steps": "3"})):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / name / "pytorch_lora_weights.safetensors", header)
    (tmp_path / "loras" / "other.safetensors").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    whole = settings(tmp_path)
    low = replace(whole, model=replace(whole.model, lora=LowRankConfig(rank=2)))
    for config, name, message in (
        (low, "whole", "holds a whole model, this run makes a LoRA"),
        (whole, "lora", "holds a LoRA, this run makes a whole model"),
        (whole, "foreign", "holds a model that no training run has written"),
        (low, "published", "holds a LoRA that no training run has written"),
        (low, "loras", r"holds other\.safetensors, which is no part of the LoRA and would be gone"),
    ):
        with pytest.raises(ConfigError, match=f"export={tmp_path / name}: {message}; name a"):
            check_target(config, tmp_path / name)
    check_target(whole, tmp_path / "whole")
    check_target(low, tmp_path / "lora")


def test_an_export_removes_nothing_but_its_own(tmp_path: Path, codec: Path, clips: LatentClips) -> None:
    trainer, run_dir = start(settings(tmp_path), clips, codec), tmp_path / "run"
    trainer.export(run_dir / "model")
    for backup in ("model.old", "model.partial"):
        (run_dir / backup).mkdir()
        (run_dir / backup / "weights").touch()
    (run_dir / ".model.0123abcd.tmp" / "model").mkdir(parents=True)  # left by a kill
    (run_dir / "model" / "mark").touch()
    with pytest.raises(EngineError, match=r"model: holds mark, .*would be gone; name another; the checkpoint is kept"):
        trainer.export(run_dir / "model")
    (run_dir / "model" / "mark").rename(run_dir / "model" / ".DS_Store")
    trainer.export(run_dir / "model")
    assert sorted(path.name for path in run_dir.iterdir() if "model" in path.name) == [
        "model", "model.old", "model.partial",
    ]  # fmt: skip
    assert (run_dir / "model.old" / "weights").exists() and (run_dir / "model.partial" / "weights").exists()
    assert not (run_dir / "model" / ".DS_Store").exists() and Checkpoint.open(run_dir / "model")


def test_a_sheet_never_ends_a_run(
    tmp_path: Path, clips: LatentClips, codec: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pavdm_dist.train import sheets

    trainer = start(settings(tmp_path, "sheet_every_seconds=1e-9"), clips, tmp_path / "no codec", WORLD_PROMPTS[:1])
    assert trainer.run(time.monotonic() + 100)
    assert "no contact sheet at step 1" in caplog.text
    path, weights = tmp_path / "sheet.png", trainer.whole_weights()
    about = (trainer.config, weights, 4, replace(trainer.parts, vae=codec), path)
    sheets.draw_sheet(*about, seconds=0)
    assert "the contact sheet has 0 of 1 prompts" in caplog.text and not path.exists()
    monkeypatch.setattr(Trainer, "sheet", lambda _: pytest.fail("0 is none"))
    start(settings(tmp_path / "none", "sheet_every_seconds=0"), clips).run(time.monotonic() + 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [("lose", "lacks tensor"), ("cut", r"is \[3\], the model needs"), ("add", "is not part")],
)
def test_a_model_to_start_from_that_does_not_fit_is_named(
    tmp_path: Path, clips: LatentClips, codec: Path, change: str, message: str
) -> None:
    trainer = start(settings(tmp_path), clips, codec)
    trainer.export(tmp_path / "model")
    file = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    if change == "lose":
        del tensors["t_block.1.bias"]
    elif change == "cut":
        tensors["t_block.1.bias"] = tensors["t_block.1.bias"][:3].clone()
    else:
        tensors["more"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"model.pretrained=.*{message}"):
        start(settings(tmp_path / "next", f"model.pretrained={tmp_path / 'model'}"), clips, codec)


PROBE = """
import sys
from training import start
from pavdm_dist.values.merging import load_config
from pavdm_dist.train.train_settings import LowRankConfig, TrainConfig
from pavdm_dist.digits.cache import LatentClips
start(load_config(TrainConfig, None, sys.argv[2:]), LatentClips(sys.argv[1])).train_step()
print("ray" in sys.modules)
"""


@pytest.mark.timeout(120)
def test_nothing_is_compiled_and_ray_stays_out(tmp_path: Path, clips: LatentClips) -> None:
    save_file({"latents": clips.latents}, tmp_path / "clips-0.safetensors", {"prompts": json.dumps(clips.prompts)})
    built = tmp_path / "extensions"
    built.mkdir()
    command = [sys.executable, "-c", PROBE, str(tmp_path), *TINY, f"run_dir={tmp_path}"]
    path = ":".join(entry for entry in sys.path if entry)
    environment = {"PATH": "/nonexistent", "TORCH_EXTENSIONS_DIR": str(built), "PYTHONPATH": path, "CC": "", "CXX": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "False"
    assert list(built.iterdir()) == []


def test_a_moved_base_and_settings_that_are_new_do_not_end_a_run(
    tmp_path: Path, clips: LatentClips, codec: Path
) -> None:
    start(settings(tmp_path / "first"), clips, codec).export(tmp_path / "base")
    begun = settings(tmp_path, f"model.pretrained={tmp_path / 'base'}")
    start(begun, clips, codec).save()
    (tmp_path / "base").rename(tmp_path / "moved")
    moved = settings(tmp_path, f"model.pretrained={tmp_path / 'moved'}", "resume=must")
    assert start(moved, clips, codec).step == 0
    # As an older version wrote it: without some settings, and with the path.
    manifest = next((tmp_path / "run" / "checkpoints").glob("step*")) / "complete.json"
    values = json.loads(manifest.read_text())
    del values["identity"]["objective"]["mixture"], values["identity"]["model"]
    values["identity"]["model"] = {"pretrained": "/elsewhere"}
    manifest.write_text(json.dumps(values))
    assert start(moved, clips, codec).step == 0
    with pytest.raises(ConfigError, match=r"objective\.mixture=\[\], this run has"):
        start(replace(moved, objective=replace(moved.objective, mixture=[WindowKind()])), clips, codec)
