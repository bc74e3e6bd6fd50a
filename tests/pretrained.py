"""Tiny random text encoders in the layout of public checkpoints, for tests; needs the extra ``text``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pavdm_dist.cluster.starting import imports_from
from pavdm_dist.codecs.encode_texts import encode_texts

Cached = list[list[str]]
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


def encode_here(monkeypatch: pytest.MonkeyPatch, in_processes: bool = False) -> Cached:
    """What processes of text encoders are started with from now on. They take seconds, so that what they run is called
    here instead, unless that is wanted."""
    seen: Cached = []
    run = subprocess.run

    def here(command: Any, *more: Any, **options: Any) -> Any:
        if command[-1] != "pavdm_dist.codecs.encode_texts":  # somebody else's
            return run(command, *more, **options)
        # A script in the current folder that is named like some library is not run.
        safe = [] if imports_from(os.getcwd()) else ["-P"]
        assert command[1:] == [*safe, "-m", "pavdm_dist.codecs.encode_texts"]
        order = json.loads(options["input"])
        seen.append(order["texts"])
        if in_processes:
            return run(command, *more, **options)
        try:
            save_file(encode_texts(order), order["output"])
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"noise\n{str(error).splitlines()[0]}\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", here)
    return seen
