"""Low-rank changes: in the place of the maps they change, compiled or not, and read again under any backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import Tensor, nn
from wan_models import random, staircase, tiny_wan

from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.compiling import Compiler
from pavdm_dist.models.source import Adapter, Source
from pavdm_dist.train.lora_training import add_lora, ends_outside, save_lora
from pavdm_dist.train.train_settings import LowRankConfig

MADE = {"stdit3": tiny_model, "wan": tiny_wan}
# One map in what is compiled, of a block that is not the first of its kind.
LATER = {"stdit3": "spatial_blocks.1.mlp.fc1", "wan": "blocks.1.ffn.net.2"}
INFO = FrameInfo(32, 48, 24.0)


def loud(model: nn.Module) -> None:
    """Changes that have been trained."""
    torch.manual_seed(7)
    for name, value in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(value, std=0.3)


@torch.no_grad()
def shown(model: Any) -> Tensor:
    return model(random(1, 4, 4, 4, 4), staircase(4), random(1, 5, 12, seed=1), INFO)


@pytest.mark.parametrize("name", MADE)
def test_what_was_trained_is_read_again(name: str, tmp_path: Path) -> None:
    model, config = MADE[name](), LowRankConfig(rank=2, alpha=3.0)
    model.save_pretrained(tmp_path / "base" / "transformer")
    plain = shown(model)
    add_lora(model, config)
    assert torch.equal(shown(model), plain), "silent at first"
    loud(model)
    folder = tmp_path / "lora"
    folder.mkdir()
    save_lora(model.state_dict(), config, folder, torch.float32, 1)
    base = Source.of(tmp_path / "base").part("transformer")
    changed = load_backbone(replace(base, adapters=(Adapter(Source.of(folder)),)))
    torch.testing.assert_close(shown(changed), shown(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(shown(model), plain, atol=1e-2)


def test_changes_of_another_backbone_are_refused_by_name(tmp_path: Path) -> None:
    for name, made in MADE.items():
        made().save_pretrained(tmp_path / name / "transformer")
        model, config = made(), LowRankConfig(rank=2)
        add_lora(model, config)
        (tmp_path / f"{name}-lora").mkdir()
        save_lora(model.state_dict(), config, tmp_path / f"{name}-lora", torch.float32, 1)
    for name, other in (("stdit3", "wan"), ("wan", "stdit3")):
        base = Source.of(tmp_path / name).part("transformer")
        with pytest.raises(CheckpointError, match=r"the model has no \w+\.0\..*weight, which it would change"):
            load_backbone(replace(base, adapters=(Adapter(Source.of(tmp_path / f"{other}-lora")),)))


@pytest.mark.parametrize("name", MADE)
def test_a_change_of_one_later_map_is_not_lost_when_blocks_are_compiled(name: str) -> None:
    """One compiled function serves all blocks, of which the first, that it is compiled at, has no change."""
    eager, compiled, base = (MADE[name]() for _ in range(3))
    for model in (eager, compiled):
        add_lora(model, LowRankConfig(rank=2, targets=[LATER[name]]))
        loud(model)
    compiler = Compiler(backend="eager")
    compiled.compile_repeated_blocks(compiler)
    outputs, gradients = [], []
    for model in (eager, compiled):
        out = model(random(1, 4, 4, 4, 4), staircase(4), random(1, 5, 12, seed=1), INFO)
        out.square().mean().backward()
        outputs.append(out)
        gradients.append([value.grad for value in model.parameters() if value.requires_grad])
    assert compiler.num_versions > 0 and torch.equal(*outputs)
    assert not torch.allclose(outputs[0], shown(base), atol=1e-3)
    assert len(gradients[0]) == 2 and all(one.abs().max() > 0 for one in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_ends_of_names_are_of_maps_inside_blocks_and_whole_names_of_any() -> None:
    def changed(*targets: str) -> set[str]:
        model = tiny_model()
        add_lora(model, LowRankConfig(rank=2, targets=[*targets]))
        return {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}

    outside = "y_embedder.y_proj.fc1"
    ends, whole = changed("fc1"), changed("fc1", outside)
    assert whole == {*ends, outside} and all("blocks." in name for name in ends) and ends
    assert changed(outside) == {outside}
    with pytest.raises(ConfigError, match=r"no linear map is called y_proj\.fc1; there are"):
        changed("y_proj.fc1")
    # Older runs, which changed it for its end, do not go on.
    told = {targets: ends_outside(tiny_model(), LowRankConfig(rank=2, targets=[*targets])) for targets in (
        ("fc1",), ("fc1", outside), ("mlp.fc1",), (outside,), (),
    )}  # fmt: skip
    assert [targets for targets, outside_too in told.items() if outside_too] == [("fc1",)]


def test_a_changed_map_keeps_its_parameters_and_its_names() -> None:
    model = tiny_wan()
    before = dict(model.named_parameters())
    add_lora(model, LowRankConfig(rank=2, targets=["blocks.1.attn1.to_q"]))
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert [name for name in after if name not in before] == [
        "blocks.1.attn1.to_q.lora_A.weight", "blocks.1.attn1.to_q.lora_B.weight",
    ]  # fmt: skip
    assert {name for name, value in after.items() if value.requires_grad} == after.keys() - before.keys()
