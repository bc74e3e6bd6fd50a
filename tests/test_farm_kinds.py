"""Shots with settings of their own: what is settled, and encoded, once for many of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from farms import farm_config, write_manifest
from helpers import tiny_checkpoint

from pavdm_dist.commands.origin import _digests, _pixels
from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.intake import Intake
from pavdm_dist.farm.kinds import Kind, Kinds
from pavdm_dist.farm.manifest import ManifestError
from pavdm_dist.farm.prompts import later_prompts
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import Tree
from pavdm_dist.values.merging import merged


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def test_a_text_encoder_is_asked_once_for_shots_of_whatever_settings(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one is a process that is started, and loads gigabytes, each time."""
    kinds, asked = Kinds(farm_config(model)), list[list[str]]()

    def prepare(_: object, prompts: Iterable[str]) -> None:
        asked.append(list(prompts))

    monkeypatch.setattr(type(kinds.checkpoint.text_encoder), "prepare", prepare)
    shots = [Shot("plain", "a red three")]
    shots += [
        Shot(f"guided-{scale}", "a red three", negative_prompt="grey", overrides={"guidance_scale": scale})
        for scale in (2.0, 3.0)
    ]
    shots += [
        Shot(f"timed-{i}", "a", overrides={"timed_prompts": {"0s": "a", "0.4s": f"a blue {i}"}, "prompt_suffix": "too"})
        for i in range(3)
    ]
    kinds.prepare_texts(shots)
    (texts,) = asked
    later = [f"a blue {i} too" for i in range(3)]
    assert [text for text in texts if text] == ["a red three", "grey", "a too", *later]


def _by_time(number: int) -> dict[str, object]:
    return {"timed_prompts": {"0s": "a", "0.4s": f"a blue {number}"}}


def _by_chunk(number: int) -> dict[str, object]:
    return {"prompt_schedule": [{"from_chunk": 2, "prompt": f"a blue {number}"}], "guidance_scale": 2.0}


def test_prompts_of_its_own_make_no_shot_a_kind_of_its_own(model: Path, tmp_path: Path) -> None:
    """To settle one takes tens of milliseconds, a manifest may have a hundred thousand lines."""
    kinds, settled = Kinds(farm_config(model)), list[str]()
    settle = kinds._settle

    def counted(size: str | None, overrides: str, has_video: bool, has_image: bool) -> Kind:
        settled.append(overrides)
        return settle(size, overrides, has_video, has_image)

    kinds._settled = lru_cache(1)(counted)  # type: ignore[assignment]
    lines = [
        {"id": f"{own.__name__[1:]}-{i}", "prompt": "a", "num_frames": 20 + i, "overrides": own(i)}
        for own in (_by_time, _by_chunk)
        for i in range(3)
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", lines)
    found = Intake(str(manifest), Tree(str(tmp_path / "out")), kinds).first()
    assert settled == ["{}", '{"guidance_scale": 2.0}'], "once a kind, though only one is kept"
    assert len(found.left) == 6 and found.frames_left == 2 * (20 + 21 + 22)
    schedules = [kinds.asked(shot)["prompt_schedule"] for shot in found.left]
    assert schedules == 2 * [[[2, f"a blue {i}"]] for i in range(3)]
    for shot in found.left:  # and with prompts it is what it was
        config = kinds.config_of(shot, "-")
        said = [vars(change) for change in config.prompt_schedule]
        assert (said or config.timed_prompts) == next(iter(shot.overrides.values()))


@pytest.mark.parametrize(
    "given",
    [
        {"timed_prompts": {"0s": "a", "2s": "cost: ${x} \\${y}", "3s": "~/films", "4s": "??? ", "5s": "\ud83d\ude00"}},
        {"timed_prompts": {"2s": 7}},
        {"timed_prompts": None},
        {"timed_prompts": {"2s": "a\0"}},
        {"timed_prompts": ["a"]},
        {"timed_prompts": {"soon": "a"}},
        {"timed_prompts": {"1m": "a", "60s": "b"}},
        {"prompt_schedule": [{"from_chunk": "3", "prompt": "a"}]},
        {"prompt_schedule": [{"from_chunk": 10**400, "prompt": "a"}]},
        {"prompt_schedule": [{"from_chunk": True, "prompt": "a"}]},
        {"prompt_schedule": [{"from_chunk": 0, "prompt": "a"}]},
        {"prompt_schedule": [{"from_chunk": 2, "prompt": "a"}, {"from_chunk": 2, "prompt": "b"}]},
        {"prompt_schedule": [{"from_chunk": 1}]},
        {"prompt_schedule": [{"from_chunk": 1, "prompt": "a", "weight": 2}]},
        {"prompt_schedule": [{"from_chunk": 1, "prompt": "a"}], "timed_prompts": {"2s": "b"}},
    ],
    ids=str,
)
def test_later_prompts_are_what_sample_makes_of_them(given: dict[str, Any]) -> None:
    """Values and refusals are those of the settings of one video."""

    def outcome(read: Callable[[], Any]) -> Any:
        try:
            config = read()
        except ConfigError as error:
            return str(error)
        return config.prompt_schedule, list(config.timed_prompts.items())

    def alone() -> SampleConfig:
        config = merged(SampleConfig, given, "overrides")
        validate_sample(config, needs_prompt=False)
        return config

    assert outcome(lambda: later_prompts(given)) == outcome(alone)


def test_what_a_shot_begins_with_is_said_once(model: Path, tmp_path: Path) -> None:
    """As ``pavdm sample`` has it: of two first prompts one would be left out without a word."""
    by_time = {"timed_prompts": {"0s": "a blue seven", "0.4s": "a red three"}}
    lines = [
        {"id": "same", "prompt": "a blue seven", "overrides": by_time},
        {"id": "blank", "prompt": " ", "overrides": by_time},
        {"id": "other", "prompt": "a red three", "overrides": by_time},
        {"id": "none", "prompt": "", "overrides": {"timed_prompts": {"0.4s": "a red three"}}},
    ]
    lines = [{**line, "num_frames": 20} for line in lines]
    kinds, tree = Kinds(farm_config(model)), Tree(str(tmp_path / "out"))
    with pytest.raises(ManifestError) as refused:
        Intake(str(write_manifest(tmp_path / "m.jsonl", lines)), tree, kinds).first()
    said = str(refused.value)
    assert "2 line(s)" in said and "line 4: prompt='': must be text, or timed_prompts needs one for 0s" in said
    alone = merged(SampleConfig, {"prompt": "a red three", **by_time}, "overrides")
    with pytest.raises(ConfigError) as of_sample:
        validate_sample(alone)
    assert f"line 3: {of_sample.value}; " in said
    found = Intake(str(write_manifest(tmp_path / "m.jsonl", lines[:2])), tree, kinds).first()
    assert [kinds.config_of(shot, "-").prompt for shot in found.left] == 2 * ["a blue seven"]


def test_a_clip_is_summed_once_and_is_gone_with_its_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server lives for weeks, and a clip takes hundreds of megabytes."""
    frames, before = torch.arange(48, dtype=torch.uint8).reshape(1, 4, 4, 3), len(_digests)
    digest, held = _pixels(frames), weakref.ref(frames)
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.sha256", lambda _: pytest.fail("it was summed before"))
        assert _pixels(frames) == digest
    same, other = frames.clone(), frames + 1
    del frames
    gc.collect()
    assert held() is None and len(_digests) == before
    assert digest == _pixels(same) != _pixels(other)
