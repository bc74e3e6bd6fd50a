"""Tiny random text encoders in the layout of public checkpoints, for tests; needs the extra ``text``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

WORDS = ["a", "red", "blue", "three", "seven", "drifting", "up", "the", "and", "aesthetic", "score", "6.5."]


def tokenizer(folder: Path) -> None:
    """A Unigram ``tokenizer.json`` of some words and all letters, with T5's end of text and padding."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -8.0) for letter in letters]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def text_encoder(folder: Path, kind: str, width: int = 12) -> None:
    """``text_encoder/`` and ``tokenizer/`` of a UMT5 or T5 encoder with random weights."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 128, "d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    shape |= {"pad_token_id": 0, "eos_token_id": 1, "feed_forward_proj": "gated-gelu"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "umt5":
            model = transformers.UMT5EncoderModel(transformers.UMT5Config(**shape))
        else:
            model = transformers.T5EncoderModel(transformers.T5Config(**shape))
    model.save_pretrained(folder / "text_encoder")
    tokenizer(folder / "tokenizer")
