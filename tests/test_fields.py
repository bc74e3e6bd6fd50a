"""Wrong types and sizes in a model folder: one sentence with file, field, value and what is legal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_checkpoint

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import CheckpointError


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
        ("model_index.json", {"sampling": {"step": 3}}, "no such key sampling.step; the keys are num_inference_steps"),
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
