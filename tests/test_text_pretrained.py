"""Pretrained text encoders: what they give, where it is kept, what is cut, and who needs none."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint
from pretrained import Cached, encode_here, text_encoder
from safetensors.torch import load_file

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs import kept_embeddings, newest
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder, TextOptions
from pavdm_dist.codecs.text import WordTextEncoder
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.models.source import Source
from pavdm_dist.pipeline import PAVDMPipeline

transformers = pytest.importorskip("transformers")
PROMPT = "a Red three &amp;  a blue seven"
SAMPLING = {"num_frames": 9, "guidance_scale": 2.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def umt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umt5")
    text_encoder(folder, "umt5")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of the tiny backbone with a T5 encoder; the transformer takes 5 tokens."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    shutil.rmtree(folder / "text_encoder")
    text_encoder(folder, "t5")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def encoder(folder: Path, cache: Path, max_length: int = 16, **options: str) -> PretrainedTextEncoder:
    chosen = {"dtype": "float32", **options}
    return PretrainedTextEncoder(Source.of(folder), max_length, TextOptions(cache=str(cache), **chosen))  # type: ignore[arg-type]


@pytest.fixture
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cached:
    """What processes are started with; only slow tests start them."""
    return encode_here(monkeypatch, in_processes=request.node.get_closest_marker("slow") is not None)


def test_rows_are_the_librarys_trimmed_and_kept(umt5: Path, tmp_path: Path, started: Cached) -> None:
    one = encoder(umt5, tmp_path)
    one.prepare([PROMPT, "a red three", PROMPT])
    assert started == [["a Red three & a blue seven", "a red three"]]  # both in one process, cleaned
    found = one.encode(PROMPT)
    theirs = transformers.UMT5EncoderModel.from_pretrained(umt5 / "text_encoder").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(umt5 / "tokenizer")(
        ["a Red three & a blue seven"], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = theirs(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state[0]
    assert torch.allclose(found, expected[: int(tokens["attention_mask"].sum())], atol=1e-6)
    assert found.dtype == torch.float32 and found.shape[1] == one.text_dim == 12
    again = encoder(umt5, tmp_path)
    assert torch.equal(again.encode(PROMPT), found) and again.encoded == 0 and len(started) == 1
    # Other lengths and types are other texts.
    assert (
        len({one.identity, encoder(umt5, tmp_path, 8).identity, encoder(umt5, tmp_path, dtype="bfloat16").identity})
        == 3
    )


def test_kept_in_the_type_that_was_computed(
    umt5: Path, tmp_path: Path, started: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # from which nothing is imported
    low = encoder(umt5, tmp_path, dtype="bfloat16")
    found = low.encode("a red three")
    (file,) = tmp_path.glob("??/*.safetensors")
    assert load_file(file)["embedding"].dtype == torch.bfloat16 and found.dtype == torch.float32
    file.write_bytes(b"torn")
    assert torch.equal(low.encode("a red three"), found) and low.encoded == 2


def test_words_that_are_cut_are_said(umt5: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = encoder(umt5, tmp_path, max_length=6)
    with caplog.at_level(logging.WARNING):
        one.check("a red three drifting up", 512)
        assert not caplog.records
        for _ in range(2):
            one.check("a red three drifting up and the blue seven", 512)
    (record,) = caplog.records
    assert "'a red three drifting up and the blue seven' has 10 tokens, the text encoder takes 6" in record.message
    assert "'and the blue seven' is not read" in record.message


def test_what_finds_no_place_is_there_for_all_of_the_process(
    umt5: Path, tmp_path: Path, started: Cached, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of a long manifest would be gigabytes in memory; and who renders has encoders of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept_embeddings._temporary.cache_clear()
    (tmp_path / "file").write_text("no folder")
    one, other = encoder(umt5, tmp_path / "file"), encoder(umt5, tmp_path / "file")
    one.prepare(["a red three", "a blue seven"])
    found = [each.encode(said) for each in (one, other) for said in ("a red three", "a blue seven")]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3]) and len(started) == 1
    assert caplog.text.count("cannot be written") == 2, "once for each encoder, not for every text"
    (aside,) = tmp_path.glob("pavdm-text-*")
    assert len([*aside.rglob("*.safetensors")]) == 2
    kept_embeddings._temporary.cache_clear()  # as when the process ends
    assert not aside.exists()


def test_what_was_said_of_prompts_is_forgotten_in_time(
    umt5: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest has hundreds of thousands of them."""
    monkeypatch.setattr(newest, "REMEMBERED", 3)
    large, small = encoder(umt5, tmp_path, max_length=6), WordTextEncoder(["a", "red"], text_dim=8)
    for number in (*range(5), 4, 4):
        large.check(f"a red three drifting up and the blue {number}", 512)
        small.encode(f"a red {number}")
    assert len(large._checked) == len(small._warned) == 3
    assert caplog.text.count("is not read") == caplog.text.count("not in this model's vocabulary") == 5
    small.encode("a red 0")  # so long ago that it is news again
    assert caplog.text.count("not in this model's vocabulary") == 6


def test_machines_without_weights_read_what_is_kept(umt5: Path, tmp_path: Path, started: Cached) -> None:
    cache, bare = tmp_path / "cache", tmp_path / "bare"
    shutil.copytree(umt5, bare)
    for file in (bare / "text_encoder").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has no weights, and text_cache=\S+ holds nothing for it"):
        encoder(bare, cache).encode("a red three")
    found = encoder(umt5, cache).encode("a red three")
    assert torch.equal(encoder(bare, cache).encode("a red three"), found)
    with pytest.raises(CheckpointError, match=r"text encoder \S+text_encoder: "):
        encoder(bare, cache).encode("a blue seven")


def test_what_a_mac_leaves_beside_weights_makes_no_other_encoder(umt5: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    shutil.copytree(umt5, seen)
    (seen / "text_encoder" / "._model.safetensors").write_bytes(bytes(4096))
    assert encoder(seen, tmp_path).identity == encoder(umt5, tmp_path).identity


def test_a_damaged_encoder_is_one_sentence(umt5: Path, tmp_path: Path, started: Cached) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(umt5, broken)
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"text encoder \S+text_encoder: ") as caught:
        encoder(broken, tmp_path / "cache").encode("a red three")
    assert "\n" not in str(caught.value)
    (broken / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no tokenizer"):
        encoder(broken, tmp_path / "cache").check("a red three", 5)


@pytest.mark.slow
def test_a_video_from_the_cache_is_that_from_a_live_encoder(model: Path, tmp_path: Path, started: Cached) -> None:

    def rendered(cache: Path) -> torch.Tensor:
        checkpoint = replace(Checkpoint.open(model), text=TextOptions(dtype="float32", cache=str(cache)))
        with PAVDMPipeline(checkpoint) as pipeline:
            frames = pipeline(["A red three", "a blue seven"], prompt_suffix="up", **SAMPLING).frames
        return torch.stack([torch.as_tensor(video) for video in frames])

    live = rendered(tmp_path / "one")
    assert started == [["a red three up", "a blue seven up"]]  # T5 reads lower case; all prompts in one process
    assert torch.equal(rendered(tmp_path / "one"), live)
    assert len(started) == 1
    assert torch.equal(rendered(tmp_path / "two"), live)
    assert not torch.equal(live[0], live[1])


def test_text_cache_fills_it(model: Path, tmp_path: Path, started: Cached, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, cache = tmp_path / "prompts.txt", tmp_path / "cache"
    prompts.write_text("a red three\n\na blue seven\n")
    words = ["text-cache", str(prompts), f"model={model}", f"text_cache={cache}", "text_dtype=float32", "--json"]
    assert cli.main([*words, "negative_prompt=up"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompts"], report["encoded"], report["text_cache"]) == (2, 3, str(cache))
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["encoded"] == 0
    assert cli.main(["text-cache", f"model={model}"]) == 2
    assert "nothing to encode" in capsys.readouterr().err
    assert cli.main(["text-cache", str(prompts)]) == 2
    assert "its text encoder is small and needs no cache" in capsys.readouterr().err


def test_a_missing_package_is_said(umt5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"needs tokenizers: pip install 'pavdm-dist\[text\]'"):
        encoder(umt5, tmp_path).check("a red three", 5)
