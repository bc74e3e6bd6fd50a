"""Data preparation and training of a tiny Wan with a tiny UMT5: texts come from the library's encoder, or its cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared_sets import forget_opened, write_captioned
from pretrained import encode_here, text_encoder
from test_train_backbones import settings
from wan_models import WAN, trainable_folder

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.data.dataset import CachedClips
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.train.prepared import video_data
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.values.merging import load_config

transformers = pytest.importorskip("transformers")
LENGTH = 16
LONG = "a red three drifting up and the blue seven drifting up and the red three drifting up"
CAPTIONS = ["A Red three &amp; a seven", "a blue seven", LONG]
BUCKET = "32x32x8@24"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of moving digits' latents, with UMT5 in place of the text encoder that needs no package."""
    folder = trainable_folder(tmp_path_factory.mktemp("model"), replace(WAN, text_len=LENGTH))
    shutil.rmtree(folder / "text_encoder")
    text_encoder(folder, "umt5")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("videos"), CAPTIONS, 36, 48, 48)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget_opened()  # it knows where texts were kept before
    return tmp_path / "cache" / "pavdm_dist" / "text"


def by_the_library(model: Path, text: str) -> torch.Tensor:
    theirs = transformers.UMT5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.bfloat16).eval()
    cut = transformers.AutoTokenizer.from_pretrained(model / "tokenizer")
    tokens = cut([text], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        rows = theirs(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state[0]
    return rows[: int(tokens["attention_mask"].sum())].float()


def trained(config: TrainConfig) -> tuple[Trainer, dict[str, float]]:
    batches, parts = video_data(config)
    trainer = Trainer(config, batches, parts)
    return trainer, trainer.train_step()


def test_from_videos_to_a_model_that_samples(
    model: Path, videos: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are the library's; once they are cached, nothing needs the encoder."""
    started = encode_here(monkeypatch)
    more: dict[str, Any] = {"scene_cuts": False, "shard_clips": 1}
    report = prepare_command(PrepareConfig([str(videos)], str(tmp_path / "set"), str(model), [BUCKET], **more))
    assert report["clips"] == {BUCKET: 3} and report["shards"] == 3
    assert started == [["A Red three & a seven", "a blue seven", LONG]], "all captions in one process"
    assert report["remarks"] == {"caption cut": 1}
    loaded = CachedClips(tmp_path / "set", Checkpoint.open(model)).load(0, [0, 1, 2])
    assert loaded.text is not None and loaded.text_mask is not None
    for caption, rows, mask in zip(loaded.captions, loaded.text, loaded.text_mask, strict=True):
        expected = by_the_library(model, caption.replace("&amp;", "&"))
        assert mask.sum() == len(expected) <= LENGTH
        torch.testing.assert_close(rows[mask].float(), expected, atol=2e-2, rtol=2e-2)
    words = settings(model, tmp_path / "run", f"data.folder={tmp_path / 'set'}", "objective.prompt_dropout=0.5")
    trainer, first = trained(load_config(TrainConfig, None, words))
    assert started[1:] == [[""]], "what stands for no prompt"
    assert np.isfinite(first["loss"])
    trainer.export(tmp_path / "out")
    trainer.engine.destroy()
    again, same = trained(load_config(TrainConfig, None, [*words, f"run_dir={tmp_path / 'again'}"]))
    again.engine.destroy()
    assert same["loss"] == first["loss"] and len(started) == 2
    made = Checkpoint.open(tmp_path / "out")
    assert made.text_encoder.identity == Checkpoint.open(model).text_encoder.identity
    with PAVDMPipeline(made) as pipeline:
        frames = pipeline("a blue seven", num_frames=5, height=32, width=32, guidance_scale=2.0).frames[0]
    assert np.isfinite(np.asarray(frames)).all() and len(started) == 2


@pytest.mark.slow  # starts the text encoder's process
def test_the_commands_with_a_process_of_its_own(
    model: Path, videos: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their workers and theirs alone keep texts in the folder that was given."""
    kept, text = tmp_path / "kept", ["text_device=cpu", "text_dtype=float32", f"text_cache={tmp_path / 'kept'}"]
    words = [str(videos), f"output={tmp_path / 'set'}", f"model={model}", f"buckets=[{BUCKET}]", "scene_cuts=false"]
    assert cli.main(["data", "prepare", *words, *text, "processes=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == {BUCKET: 3}
    assert len(list(kept.glob("??/*.safetensors"))) == 3
    chosen = settings(model, tmp_path / "run", f"data.folder={tmp_path / 'set'}", "optimizer.total_steps=2")
    assert cli.main(["train", *chosen, *(f"data.{word}" for word in text), f"export={tmp_path / 'out'}"]) == 0
    assert len(list(kept.glob("??/*.safetensors"))) == 4 and not list(cache.rglob("*.safetensors"))
    assert Checkpoint.open(tmp_path / "out").has_weights
