"""Shots with settings of their own: what is settled, and encoded, once for many of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from farms import farm_config
from helpers import tiny_checkpoint

from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.shot import Shot


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
