"""Text encoders in the layout of public checkpoints, for tests: tiny random ones, which need the extra ``text``, and
one that is none but by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, tiny_checkpoint
from safetensors.torch import save_file

from pavdm_dist.cluster.starting import imports_from
from pavdm_dist.codecs.encode_texts import encode_texts
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder
from pavdm_dist.models import devices
from pavdm_dist.models.devices import DTYPES

Cached = list[list[str]]
Asked = list[tuple[list[str], dict[str, Any]]]
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


def named_only(folder: Path) -> Path:
    """A whole tiny model with a text encoder that is pretrained by name; it is never loaded."""
    tiny_checkpoint(folder)
    shutil.rmtree(folder / "text_encoder")
    for part in ("text_encoder", "tokenizer"):
        (folder / part).mkdir()
    config = {"d_model": TINY.caption_channels, "architectures": ["UMT5EncoderModel"]}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    save_file({"shared.weight": torch.zeros(2, 2)}, folder / "text_encoder" / "model.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Commands and orders of the processes that encode from now on, none of which is started.

    A text is one row that holds a third of its length, in the type that was asked for, and has a token for each word.
    CPUs are quick in every type, so that what is logged is the same everywhere.
    """
    seen: Asked = []

    def run(command: list[str], *, input: str, **_: Any) -> Any:
        order = json.loads(input)
        seen.append((command, order))
        width, dtype = TINY.caption_channels, DTYPES[order["dtype"]]
        texts = enumerate(order["texts"])
        rows = {str(number): torch.full((1, width), len(text) / 3, dtype=dtype) for number, text in texts}
        save_file(rows, order["output"])
        return subprocess.CompletedProcess(command, 0, "", "")

    def ends(_: PretrainedTextEncoder, text: str) -> list[int]:
        return [*(word.end() for word in re.finditer(r"\S+", text)), len(text)]

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(PretrainedTextEncoder, "_token_ends", ends)
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device: True)
    return seen
