"""The word-level text encoder: normalisation, unknown words, training face, saving."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder, TextOptions
from pavdm_dist.codecs.text import WordTextEncoder, split_words
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.models.source import Source

WORDS = ["a", "red", "blue", "three", "seven", "drifting", "up", "and", "to", "the", "left", "bouncing", "fast"]
PROMPT = "a red three drifting up and to the left, a blue seven bouncing fast"


@pytest.fixture
def encoder() -> WordTextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WordTextEncoder(WORDS, text_dim=16, num_heads=2).eval()


def test_normalisation() -> None:
    words = ["a", "red", "three", ",", "a", "blue", "seven"]
    for prompt in (
        "a red three, a blue seven",
        "A Red THREE , a blue seven.",
        ", a red (three),, a blue-seven!,",
        "  a red\nthree,a blue: seven ",
    ):
        assert split_words(prompt) == words
    assert split_words("don’t Größe 3") == ["don't", "größe", "3"]
    assert split_words(" .,; ") == []


def test_one_row_per_token_and_repeatable(encoder: WordTextEncoder) -> None:
    text = encoder.encode(PROMPT)
    assert text.shape == (15, 16) == (15, encoder.text_dim)
    assert text.dtype == torch.float32
    assert not text.requires_grad
    assert torch.equal(text, encoder.encode(PROMPT.upper() + "."))


def test_order_and_context_matter(encoder: WordTextEncoder) -> None:
    one, other = encoder.encode("a red three, a blue seven"), encoder.encode("a blue three, a red seven")
    assert one.shape == other.shape
    # "three" is the same word in the same place, but it has another colour before it.
    assert not torch.allclose(one[2], other[2], atol=1e-3)


def test_empty_prompt_is_one_token_of_its_own(encoder: WordTextEncoder) -> None:
    assert encoder.encode("").shape == (1, 16)
    assert torch.equal(encoder.encode(""), encoder.encode(" , . "))
    assert not torch.equal(encoder.encode(""), encoder.encode("snow"))


def test_unknown_words_warn_once_and_name_the_vocabulary(
    encoder: WordTextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "a red dragon, a blue Dragon on fire"
    assert encoder.unknown_words(prompt) == ["dragon", "on", "fire"]
    assert encoder.unknown_words(PROMPT) == []
    with caplog.at_level(logging.WARNING):
        encoder.check(prompt, 64)  # as a dry run does
        assert len(caplog.records) == 1
        encoder.encode(prompt)
        encoder.encode(prompt)
        encoder.encode(PROMPT)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "'dragon', 'on', 'fire' are not in this model's vocabulary" in message
    assert " ".join(sorted(WORDS)) in message
    # All of them are the same token.
    assert torch.equal(encoder.encode("a red dragon"), encoder.encode("a red house"))


def test_too_long(encoder: WordTextEncoder) -> None:
    assert encoder.encode("red " * 64).shape == (64, 16)
    with pytest.raises(ConfigError, match="the prompt has 65 words and commas, at most 64"):
        encoder.encode("red " * 65)


def test_padding_changes_nothing_and_gradients_flow(encoder: WordTextEncoder) -> None:
    prompts = ["a red three", PROMPT, ""]
    ids, mask = encoder.collate(prompts)
    assert ids.shape == mask.shape == (3, 15)
    assert mask.sum(1).tolist() == [3, 15, 1]
    batch = encoder(ids, mask)
    for row, keep, prompt in zip(batch, mask, prompts, strict=True):
        assert torch.allclose(row[keep], encoder.encode(prompt), atol=1e-5)
    (batch * mask[..., None]).square().sum().backward()
    missing = [name for name, value in encoder.named_parameters() if value.grad is None or not value.grad.any()]
    assert missing == []


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_save_and_load(encoder: WordTextEncoder, tmp_path: Path, dtype: torch.dtype | None) -> None:
    encoder.save_pretrained(tmp_path, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = WordTextEncoder.from_pretrained(tmp_path)
    assert loaded.vocabulary == encoder.vocabulary
    assert not loaded.training
    assert torch.allclose(loaded.encode(PROMPT), encoder.encode(PROMPT), atol=1e-6 if dtype is None else 2e-2)
    assert (loaded.identity == encoder.identity) == (dtype is None)
    assert loaded.identity == WordTextEncoder.from_pretrained(tmp_path).identity


def test_identity_depends_on_vocabulary_and_weights(encoder: WordTextEncoder) -> None:
    first = encoder.identity
    assert len(first) == 64
    with torch.no_grad():
        encoder.norm.bias[0] += 1e-3
    assert encoder.identity != first
    other = WordTextEncoder([*reversed(WORDS)], text_dim=16, num_heads=2)
    other.load_state_dict(encoder.state_dict())
    assert other.identity != encoder.identity


def test_bad_vocabularies_and_checkpoints(encoder: WordTextEncoder, tmp_path: Path) -> None:
    for words, message in ((["Red"], "'Red' is not one lower-case word"), (["a", "a"], "'a' occurs twice")):
        with pytest.raises(ConfigError, match=message):
            WordTextEncoder(words)
    encoder.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"red",', '"red", "green",'))
    with pytest.raises(CheckpointError, match=r"tensor embedding\.weight is \[17, 16\], the model needs \[18, 16\]"):
        WordTextEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"words": []}')
    with pytest.raises(CheckpointError, match=r"config.json: no such key words; the keys are vocabulary, text_dim"):
        WordTextEncoder.from_pretrained(tmp_path)


def test_what_a_large_encoder_does_not_read_of_a_prompt_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A token a word and one behind; the tokenizer, which is large, is read once."""
    opened: list[str] = []

    class Tokenizer:
        @classmethod
        def from_file(cls, file: str) -> Tokenizer:
            opened.append(file)
            return cls()

        def no_truncation(self) -> None:
            """As it is."""

        def encode(self, text: str) -> Any:
            words = [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
            return SimpleNamespace(offsets=[*words, (0, 0)])

    package = ModuleType("tokenizers")
    package.Tokenizer = Tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokenizers", package)
    for name, text in (("text_encoder/config.json", '{"d_model": 8}'), ("tokenizer/tokenizer.json", "{}")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    large = PretrainedTextEncoder(Source.of(tmp_path), 4, TextOptions(cache=str(tmp_path / "cache")))
    assert large.unread("one two three", 512) == ""
    assert large.unread("one two three four five", 512) == "four five"
    assert large.unread("one two three", 3) == "three"
    for _ in range(2):
        large.check("one two three four five", 512)
    assert caplog.text.count("has 6 tokens, the text encoder takes 4: 'four five' is not read") == 1
    assert len(opened) == 1
