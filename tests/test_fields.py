"""Wrong types and sizes in a model folder: one sentence with file, field, value and what is legal."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from test_stdit3_weights import equal_states

from pavdm_dist.checkpoint import Checkpoint, SamplingDefaults, _ModelIndex
from pavdm_dist.codecs.text import _TextConfig
from pavdm_dist.codecs.wan_config import WanVAEConfig
from pavdm_dist.errors import CheckpointError
from pavdm_dist.models.source import _ClassNames
from pavdm_dist.models.stdit3 import STDiT3Config
from pavdm_dist.values.fields import made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model_index.json", {"sampling": {"fps": "fast"}}, "sampling.fps=fast: must be a number"),
        ("model_index.json", {"sampling": {"fps": float("nan")}}, "sampling.fps=nan: must be a finite number"),
        (
            "model_index.json",
            {"sampling": {"height": 10**9}},
            "sampling.height=1000000000: must be above 0 and at most",
        ),
        ("model_index.json", {"sampling": {"pace": 3}}, "no such key sampling.pace; the keys are num_inference_steps"),
        ("model_index.json", {"vae": "wan"}, "vae=wan: must be a list of 2, each entry text"),
        ("transformer/config.json", {"depth": "two"}, "depth=two: must be a whole number"),
        ("transformer/config.json", {"depth": 10**9}, "depth=1000000000: must be 1 to 256"),
        (
            "transformer/config.json",
            {"patch_size": [1, 2]},
            "patch_size=[1, 2]: must be a list of 3, each entry a whole",
        ),
        ("transformer/config.json", {"_class_name": ["x"]}, "_class_name=['x']: must be text or null"),
        ("vae/config.json", {"dim_mult": 3}, "dim_mult=3: must be a list, each entry a whole number"),
        ("vae/config.json", {"latents_std": [1, 1, 0, 1]}, "latents_std[2]=0: must be 1e-06 to 1,000,000"),
        ("vae/config.json", {"in_channels": 3}, "in_channels=3: patch_size=2 makes 12 of a pixel's 3"),
        ("text_encoder/config.json", {"depth": True}, "depth=True: must be a whole number"),
        ("text_encoder/config.json", {"vocabulary": ["a", 3]}, "vocabulary[1]=3: must be text"),
    ],
)
def test_a_wrong_value_names_file_field_and_what_is_legal(
    model: Path, file: str, change: dict[str, Any], said: str
) -> None:
    path = model / file
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **change}))
    try:
        with pytest.raises(CheckpointError) as refused:
            _ = Checkpoint.open(model).text_encoder
    finally:
        path.write_text(before)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert str(path.parent) in str(refused.value)


@pytest.mark.parametrize("cls", [WanVAEConfig, STDiT3Config, _ClassNames, _ModelIndex, SamplingDefaults, _TextConfig])
def test_null_is_as_good_as_no_key_where_there_is_a_default(cls: type) -> None:
    required = {
        "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16, "transformer": ["a", "b"], "vae": ["a", "b"],
        "text_encoder": ["a", "b"], "vocabulary": ["a"],
    }  # fmt: skip
    names = [field.name for field in fields(cls)]
    given = {name: value for name, value in required.items() if name in names}
    for name in names:
        if name in given:
            with pytest.raises(CheckpointError, match=f"{name}=null: must be a list"):
                made(cls, {**given, name: None}, "file", error=CheckpointError)
        else:
            assert made(cls, {**given, name: None}, "file") == made(cls, given, "file"), name


def test_a_published_model_with_nulls_is_opened(model: Path, tmp_path: Path) -> None:
    """As other programs write their configurations: every key they know, null where it has no say."""
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    for part, nulls in (
        ("transformer", ["architectures", "_class_name", "qk_norm", "causal_trained", "level_support"]),
        ("vae", ["attn_scales", "_class_name", "decoder_base_dim", "dropout", "num_res_blocks_of_another_version"]),
        ("text_encoder", ["_class_name", "max_length"]),
    ):
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **dict.fromkeys(nulls)}))
    opened, plain = Checkpoint.open(folder), Checkpoint.open(model)
    latents = torch.randn(4, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(opened.codec.decoder().decode(latents), plain.codec.decoder().decode(latents))
    assert torch.equal(opened.text_encoder.encode("a red three"), plain.text_encoder.encode("a red three"))
    assert equal_states(opened.backbone, plain.backbone)
