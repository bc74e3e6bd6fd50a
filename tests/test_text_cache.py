"""How the process of a pretrained text encoder is started, and where what it gives is kept; none is loaded here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from safetensors.torch import save_file

from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder, TextOptions
from pavdm_dist.models.source import Source

WIDTH = 3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with a text encoder that is pretrained by name."""
    folder = tiny_checkpoint(tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    for part in ("text_encoder", "tokenizer"):
        (folder / part).mkdir()
    config = {"d_model": WIDTH, "architectures": ["UMT5EncoderModel"]}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    save_file({"shared.weight": torch.zeros(2, WIDTH)}, folder / "text_encoder" / "model.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was started; it gives one row per text that holds its length."""
    seen: list[list[str]] = []

    def run(command: list[str], *, input: str, **_: Any) -> Any:
        seen.append(command)
        order = json.loads(input)
        rows = {str(number): torch.full((1, WIDTH), float(len(text))) for number, text in enumerate(order["texts"])}
        save_file(rows, order["output"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def encoder(model: Path, cache: Path | None) -> PretrainedTextEncoder:
    return PretrainedTextEncoder(Source.of(model), 16, TextOptions(cache=cache and str(cache)))


@pytest.mark.parametrize("imports", [True, False])
def test_the_process_imports_from_here_only_where_this_one_does(
    model: Path, tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, imports: bool
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if imports:
        monkeypatch.syspath_prepend("")
    encoder(model, tmp_path / "cache").encode("a red three")
    assert commands[0][1:] == [*([] if imports else ["-P"]), "-m", "pavdm_dist.codecs.encode_texts"]
