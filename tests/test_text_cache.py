"""How the process of a pretrained text encoder is started, and where what it gives is kept; none is loaded here."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from pretrained import Asked, named_only, stand_in

from pavdm_dist import cli
from pavdm_dist.codecs import kept_embeddings
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder, TextOptions
from pavdm_dist.errors import CheckpointError
from pavdm_dist.models import devices
from pavdm_dist.models.source import Source
from pavdm_dist.values.fields import TextDtype


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return named_only(tmp_path / "model")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return stand_in(monkeypatch)


def encoder(model: Path, cache: Path | None) -> PretrainedTextEncoder:
    return PretrainedTextEncoder(Source.of(model), 16, TextOptions(cache=cache and str(cache)))


@pytest.mark.parametrize("imports", [True, False])
def test_the_process_imports_from_here_only_where_this_one_does(
    model: Path, tmp_path: Path, started: Asked, monkeypatch: pytest.MonkeyPatch, imports: bool
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if imports:
        monkeypatch.syspath_prepend("")
    encoder(model, tmp_path / "cache").encode("a red three")
    assert started[0][0][1:] == [*([] if imports else ["-P"]), "-m", "pavdm_dist.codecs.encode_texts"]


@pytest.mark.parametrize(("dtype", "told"), [("bfloat16", True), ("float32", False)])
def test_an_encoder_whose_type_the_cpu_emulates_is_told_of(
    model: Path, tmp_path: Path, started: Asked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    dtype: TextDtype, told: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: False)
    options = TextOptions("cpu", dtype, str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        PretrainedTextEncoder(Source.of(model), 16, options).encode("a red three")
    assert ("text_dtype=bfloat16: this CPU has no instructions for bfloat16" in caplog.text) == told


@pytest.mark.parametrize("base", ["relative", None])
def test_without_a_home_embeddings_go_with_the_process(
    model: Path, tmp_path: Path, started: Asked, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, base: str | None,
) -> None:  # fmt: skip
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept_embeddings._temporary.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", base or "")
    if base is None:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that the system does not know
    one = encoder(model, None)
    with caplog.at_level(logging.WARNING):
        one.prepare(["a red seven.", "a blue one"])
        found = one.encode("a red seven.")
    assert found.tolist() == [[4.0] * one.text_dim] and one.encoded == 2 and len(started) == 1
    (record,) = caplog.records
    said = "this user has no home for a cache; XDG_CACHE_HOME names a folder, or text_cache=FOLDER; "
    assert record.message == f"{said}embeddings go with this process"
    assert not list(Path.cwd().iterdir())
    kept_embeddings._temporary.cache_clear()
    assert not list(tmp_path.glob("pavdm-text-*"))
    (model / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights; text_cache=FOLDER names what was kept of it"):
        encoder(model, None).encode("a red three")


def test_a_cache_that_is_nowhere_cannot_be_filled(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cli.main(["text-cache", f"model={model}", "prompt=a red three"]) == 2
    assert "text_cache: must be given, this user has no home" in capsys.readouterr().err


def test_a_store_is_no_folder_of_texts(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["text-cache", "prompt=a red three"], ["sample", "a red three"], ["plan"]):
        assert cli.main([*words, f"model={model}", "text_cache=s3://me:word@bucket/texts"]) == 2
        assert "text_cache=s3://***@bucket/texts: must be a local folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("s3*"))


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


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("A cat\u2019s \u201ctoy\u201d\u2026  caf&eacute;", 'A cat\'s "toy"\u2026 caf\u00e9'),
        ("sch\u00c3\u00b6n \ufb01lm\uff0cslow", "sch\u00f6n film,slow"),  # read as Latin-1; a ligature; a wide comma
        ("&ldquo;a&rdquo; &amp;amp; b", '"a" & b'),
        ("  A plain\ttext ", "A plain text"),
    ],
)
def test_prompts_are_cleaned_as_by_the_models_own_programs(model: Path, tmp_path: Path, prompt: str, read: str) -> None:
    """Which run ftfy first: other quotes are other tokens, and so another video."""
    found = encoder(model, tmp_path)
    assert found.cleaned(prompt) in (read, read.lower())
    assert found.is_mended(prompt) == ("plain" not in prompt), "a video of before does not go on with other tokens"
