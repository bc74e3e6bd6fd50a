"""How the process of a pretrained text encoder is started, and where what it gives is kept; none is loaded here."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from safetensors.torch import save_file

from pavdm_dist import cli
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder, TextOptions
from pavdm_dist.errors import CheckpointError
from pavdm_dist.models.source import Source

WIDTH = 12


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


@pytest.mark.parametrize("base", ["relative", None])
def test_without_a_home_embeddings_are_in_memory(
    model: Path, tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, base: str | None,
) -> None:  # fmt: skip
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", base or "")
    if base is None:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that the system does not know
    one = encoder(model, None)
    with caplog.at_level(logging.WARNING):
        one.prepare(["a red three", "a blue one"])
        found = one.encode("a red three")
    assert found.tolist() == [[11.0] * WIDTH] and one.encoded == 2 and len(commands) == 1
    (record,) = caplog.records
    said = "this user has no home for a cache; XDG_CACHE_HOME names a folder, or text_cache=FOLDER; "
    assert record.message == f"{said}embeddings are not kept"
    assert not list(Path.cwd().iterdir())
    (model / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights; text_cache=FOLDER names what was kept of it"):
        encoder(model, None).encode("a red three")


def test_a_cache_that_is_nowhere_cannot_be_filled(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cli.main(["text-cache", f"model={model}", "prompt=a red three"]) == 2
    assert "text_cache: must be given, this user has no home" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["text_device=cpu", "text_dtype=float32", "text_cache=kept"])
def test_settings_of_a_large_encoder_are_refused_where_there_is_none(
    word: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, output = tiny_checkpoint(tmp_path / "small"), tmp_path / "v.mp4"
    for words in (["plan"], ["sample", "a red three", f"output={output}"]):
        assert cli.main([*words, f"model={small}", word]) == 2
        said = f"{word}: is for a pretrained text encoder; that of model={small} is small and runs where it is needed"
        assert said in capsys.readouterr().err
    assert cli.main(["plan", f"model={model}", word]) == 0
    assert not list(tmp_path.glob("v.*"))
