"""A run goes on with the data, the model and the objective that it began with; what differs is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_checkpoint
from training import TINY, start, write_clips
from wan_models import WAN, trainable_folder

from pavdm_dist.digits.batches import DigitBatches
from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.identity import check_same, identity_of
from pavdm_dist.train.model import levels_met
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> LatentClips:
    return LatentClips(write_clips(tmp_path_factory.mktemp("clips"), 4))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two that differ in their depth."""
    root = tmp_path_factory.mktemp("models")
    shapes = (replace(WAN, text_len=16), replace(WAN, text_len=16, num_layers=2))
    one, other = (trainable_folder(root / str(number), shape) for number, shape in enumerate(shapes))
    return one, other


def identity(clips: LatentClips, *words: str) -> dict[str, Any]:
    """As a checkpoint holds it."""
    config = load_config(TrainConfig, None, [*TINY, *words])
    batches = DigitBatches(clips, config.objective, config.data, config.seed)
    return json.loads(json.dumps(identity_of(config, batches)))


def test_what_a_shape_has_come_to_know_was_as_the_default_is(clips: LatentClips) -> None:
    ours = identity(clips)
    older = json.loads(json.dumps(ours))
    del older["model"]["shape"]["null_text_as_long"], older["older"]
    check_same("run", older, ours)
    older["model"]["shape"]["depth"] = 9
    with pytest.raises(ConfigError, match=r"run was trained with model\.shape\.depth=9, this run has 1$"):
        check_same("run", older, ours)
    ours["model"]["shape"]["null_text_as_long"] = True
    older["model"]["shape"]["depth"] = 1
    with pytest.raises(ConfigError, match=r"model\.shape\.null_text_as_long=False, this run has True$"):
        check_same("run", older, ours)


def test_a_run_that_began_otherwise_is_refused(clips: LatentClips, models: tuple[Path, Path]) -> None:
    nothing = identity(clips)
    one, other = (identity(clips, f"model.pretrained={model}") for model in models)
    for same in (nothing, one, other):
        check_same("run", same, same)
    for theirs, ours, said in (
        (nothing, one, r"run was trained from nothing \(model\.pretrained=null\), this run has model\.pretrained set"),
        (one, nothing, r"run was trained from a model, this run has model\.pretrained=null"),
        (one, other, r"run was trained with model\.from\.config\.num_layers=3, this run has 2$"),
        (nothing, identity(clips, "model.depth=2"), r"run was trained with model\.depth=1, this run has 2$"),
    ):
        with pytest.raises(ConfigError, match=said) as raised:
            check_same("run", theirs, ours)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 200
    # Latents of another codec: nothing in the settings says so.
    narrow = identity(clips)
    narrow["model"]["shape"]["in_channels"] = 3
    with pytest.raises(ConfigError, match=r"with model\.shape\.in_channels=3, this run has 4"):
        check_same("run", narrow, nothing)


def test_a_trainer_refuses_another_start_before_it_reads_weights(
    clips: LatentClips, models: tuple[Path, Path], tmp_path: Path
) -> None:
    words = [*TINY, f"run_dir={tmp_path}"]
    start(load_config(TrainConfig, None, words), clips).save()
    with pytest.raises(ConfigError, match="was trained from nothing"):
        start(load_config(TrainConfig, None, [*words, f"model.pretrained={models[0]}"]), clips)


def test_what_an_older_checkpoint_does_not_say_was_as_the_default_is(
    clips: LatentClips, models: tuple[Path, Path]
) -> None:
    nothing, one = identity(clips), identity(clips, f"model.pretrained={models[0]}")
    old_nothing, old_one = json.loads(json.dumps(nothing)), json.loads(json.dumps(one))
    for old in (old_nothing, old_one):
        del old["model"]["shape"]
    del old_nothing["model"]["from"]
    check_same("run", old_nothing, nothing)
    check_same("run", old_one, one)
    with pytest.raises(ConfigError, match="was trained from nothing"):
        check_same("run", old_nothing, one)
    with pytest.raises(ConfigError, match="was trained from a model"):
        check_same("run", old_one, nothing)
    oldest = {**old_one, "model": {"pretrained": "/elsewhere"}}
    check_same("run", oldest, one)
    with pytest.raises(ConfigError, match="was trained from a model"):
        check_same("run", oldest, nothing)


def test_clips_that_were_trained_on_are_not_held_out_afterwards(clips: LatentClips) -> None:
    before = {"data_set": {"clips": "abc"}, **identity(clips)}
    same, fewer = ({**before, "data_set": {"clips": "abc", "held_out": count}} for count in (0, 2))
    check_same("run", before, same)
    with pytest.raises(ConfigError, match=r"trained with data_set\.held_out=0, this run has 2"):
        check_same("run", before, fewer)


def test_digits_do_not_go_on_with_video(clips: LatentClips) -> None:
    digits = identity(clips)
    video = {**digits, "data_set": {"clips": "abc", "held_out": 0}}
    del video["world"]
    with pytest.raises(ConfigError, match=r"trained with data_set\.clips=None, this run has abc"):
        check_same("run", digits, video)
    with pytest.raises(ConfigError, match=r"trained with world\.\w+=None, this run has"):
        check_same("run", video, digits)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.clips=8", r"data\.clips=\d+, this run has 8"),
        ("data.still_steps=7", r"data\.still_steps=\d+, this run has 7"),
        ("data.still_share=0.75", r"data\.still_share=[\d.]+, this run has 0\.75"),
        ("data.still_batch_size=48", r"data\.still_batch_size=\d+, this run has 48"),
        ("zero.precision=bfloat16", r"zero\.precision=float32 or autocast, this run has bfloat16"),
    ],
)
def test_other_digits_or_another_type_of_weights_is_refused(clips: LatentClips, word: str, said: str) -> None:
    began, now = identity(clips), identity(clips, word)
    with pytest.raises(ConfigError, match=f"run was trained with {said}$"):
        check_same("run", began, now)
    part, name = word.partition("=")[0].split(".")
    del began[part][name]  # as older checkpoints are
    check_same("run", began, now)
    check_same("run", identity(clips), identity(clips, "zero.precision=autocast"))


def test_a_lora_that_would_change_fewer_maps_than_before_does_not_go_on(
    clips: LatentClips, models: tuple[Path, Path], tmp_path: Path
) -> None:
    stdit3 = tiny_checkpoint(tmp_path)
    for model, target, less in ((stdit3, "fc1", True), (stdit3, "mlp.fc1", False), (models[0], "to_q", False)):
        words = [f"model.pretrained={model}", "model.lora.rank=2", f"model.lora.targets=[{target}]"]
        now = identity(clips, *words, "optimizer.name=adamw")
        check_same("run", now, now)
        older = json.loads(json.dumps(now))
        older["model"]["lora"].pop("maps", None)
        if not less:
            check_same("run", older, now)
            continue
        with pytest.raises(ConfigError, match=r"trained with model\.lora\.maps=None, this run has inside blocks$"):
            check_same("run", older, now)


@pytest.mark.parametrize(("name", "stage"), [("muon", 0), ("adamw", 0), ("adamw", 1)])
def test_settings_of_the_optimizer_are_those_of_the_run_that_goes_on(
    name: str, stage: int, clips: LatentClips, tmp_path: Path
) -> None:
    words = [*TINY, f"run_dir={tmp_path}", f"optimizer.name={name}", f"zero.stage={stage}", "optimizer.total_steps=1"]
    first = start(load_config(TrainConfig, None, words), clips)
    first.train_step()
    first.save()
    more = ["optimizer.weight_decay=0.5", "optimizer.betas=[0.5, 0.6]"]
    more += ["optimizer.matrix_ratio=3"] * (name == "muon")
    second = start(load_config(TrainConfig, None, [*words, *more]), clips)
    assert second.step == 1
    groups = second.engine.optimizer.param_groups
    assert all((group["weight_decay"], tuple(group["betas"])) == (0.5, (0.5, 0.6)) for group in groups)
    assert [group["ratio"] for group in groups if group.get("ratio")] == [3.0] * (name == "muon")


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeeds_own_optimizer_has_the_settings_of_the_run_that_goes_on(
    stage: int, clips: LatentClips, tmp_path: Path
) -> None:
    def words(kind: str, **params: Any) -> list[str]:
        block = json.dumps({"type": kind, "params": {"torch_adam": True, **params}})
        asked = ["optimizer.name=deepspeed", f"zero.stage={stage}", f"deepspeed.optimizer={block}"]
        return [*TINY, f"run_dir={tmp_path}", "optimizer.total_steps=1", *asked]

    first = start(load_config(TrainConfig, None, words("AdamW", weight_decay=0.25, eps=0.001)), clips)
    first.train_step()
    first.save()
    second = start(load_config(TrainConfig, None, words("adamw", weight_decay=0.5, betas=[0.5, 0.6])), clips)
    assert second.step == 1
    (group,) = second.engine.optimizer.param_groups
    assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.5, (0.5, 0.6), 1e-8)
    assert all("exp_avg" in state for state in second.engine.optimizer.state.values())
    with pytest.raises(ConfigError, match=r"was trained with optimizer\.type=adamw, this run has lion"):
        start(load_config(TrainConfig, None, words("Lion")), clips)
    # As checkpoints are that do not say it.
    began, now = (identity(clips, *words(kind)) for kind in ("AdamW", "Lion"))
    del began["optimizer"]["type"]
    check_same("run", began, now)


@pytest.mark.parametrize(
    ("words", "support"),
    [
        ([], "staircase-trained"),
        (["objective.pattern=random"], "mixed-trained"),
        (["objective.method=replacement"], "mixed-trained"),
        (["objective.method=replacement-noise"], "accepts"),
        (["objective.mixture=[{method: replacement}, {method: pavdm}]"], "staircase-trained"),
    ],
)
def test_a_model_says_what_levels_its_windows_had(words: list[str], support: str) -> None:
    assert levels_met(load_config(TrainConfig, None, [*TINY, *words])) == support
