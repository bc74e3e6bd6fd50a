"""``text_device``, ``text_dtype`` and ``text_cache`` of data preparation and training: handed on, kept where embeddings
depend on them, refused where nothing reads them. No encoder is loaded: one stands in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from prepared_sets import contents, forget_opened, write_captioned
from pretrained import Asked, named_only, stand_in
from training import TINY

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.pretrained_text import TextOptions
from pavdm_dist.data.dataset import CachedClips
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.identity import check_same, identity_of
from pavdm_dist.train.prepared import video_data
from pavdm_dist.train.ray_launch import _anywhere
from pavdm_dist.train.sheets import _frozen_encoder
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config

BUCKET = "32x32x8@24"
CAPTIONS = ["a red three", "a blue seven"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named_only(tmp_path_factory.mktemp("models") / "large")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("videos"), CAPTIONS, 32, 32, 32)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What processes are asked for; relative paths and this user's cache are in the test's own folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    forget_opened()
    return stand_in(monkeypatch)


@pytest.fixture
def config(model: Path, videos: Path, tmp_path: Path, started: Asked) -> PrepareConfig:
    return PrepareConfig([str(videos)], str(tmp_path / "set"), str(model), [BUCKET], scene_cuts=False)


def train_config(model: Path, folder: Path, *more: str) -> TrainConfig:
    width = Checkpoint.open(model).shape.spec.text_dim
    words = [*TINY, f"data.folder={folder}", f"data.model={model}", f"model.caption_channels={width}"]
    return load_config(TrainConfig, None, [*words, "data.prefetch=0", "data.batch_size=2", *more])


def test_preparing_hands_them_on_and_keeps_what_embeddings_depend_on(
    config: PrepareConfig, tmp_path: Path, started: Asked
) -> None:
    low = replace(config, output=str(tmp_path / "low"))
    prepare_command(low)
    ((_, order),) = started
    assert (order["device"], order["dtype"], order["texts"]) == ("auto", "bfloat16", CAPTIONS)
    assert len(list((tmp_path / "user").rglob("*.safetensors"))) == len(CAPTIONS)
    forget_opened()
    full = replace(config, text_device="cpu", text_dtype="float32", text_cache="kept")
    prepare_command(full)
    order = started[-1][1]
    assert len(started) == 2 and (order["device"], order["dtype"]) == ("cpu", "float32")
    assert len(list((tmp_path / "here" / "kept").glob("??/*.safetensors"))) == len(CAPTIONS)
    assert len(list((tmp_path / "user").rglob("*.safetensors"))) == len(CAPTIONS), "nothing but the folder was filled"
    texts = {}
    for name, dtype in (("low", torch.bfloat16), ("set", torch.float32)):
        loaded = CachedClips(tmp_path / name).load(0, [0, 1])
        assert loaded.text is not None
        texts[name] = [float(row[0, 0]) for row in loaded.text]
        # Shards are float16.
        expected = [torch.tensor(len(text) / 3, dtype=dtype).half().item() for text in loaded.captions]
        assert texts[name] == expected
    assert texts["low"] != texts["set"]
    settings = json.loads((tmp_path / "set" / "settings.json").read_text())
    assert settings["text_dtype"] == "float32" and not {"text_device", "text_cache"} & settings.keys()


def test_a_set_goes_on_with_its_own_type_wherever_texts_are_kept(
    config: PrepareConfig, tmp_path: Path, started: Asked
) -> None:
    full = replace(config, text_dtype="float32", text_cache=str(tmp_path / "kept"))
    prepare_command(full)
    output = Path(config.output)
    before = contents(output)
    (shard,) = output.glob("bucket-*.safetensors")
    for changed, processes in (({"text_device": "cpu"}, 0), ({"text_cache": None}, 1)):
        forget_opened()
        shard.unlink()
        asked = len(started)
        prepare_command(replace(full, **changed))  # type: ignore[arg-type]
        assert len(started) == asked + processes and contents(output) == before
    with pytest.raises(ConfigError, match="was made with text_dtype=float32, this run has bfloat16: name another"):
        prepare_command(config)
    # Sets that are older than the setting were made with its default.
    settings = output / "settings.json"
    settings.write_text(json.dumps({n: v for n, v in json.loads(settings.read_text()).items() if n != "text_dtype"}))
    with pytest.raises(ConfigError, match="was made with text_dtype=bfloat16, this run has float32: name another"):
        prepare_command(full)
    shutil.rmtree(output)
    prepare_command(config)
    settings.write_text(json.dumps({n: v for n, v in json.loads(settings.read_text()).items() if n != "text_dtype"}))
    assert prepare_command(config)["clips"] == {BUCKET: 2}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"text_dtype": "float32", "encode": False},
            "text_dtype=float32: is for captions that are encoded, encode=fal",
        ),
        (
            {"text_device": "cuda", "ray_address": "auto"},
            "text_device=cuda: on Ray tasks get a GPU with device=cuda al",
        ),
        (
            {"text_cache": "kept", "model": "embedded"},
            "text_cache=kept: is for a pretrained text encoder; that of mod",
        ),
        pytest.param(
            {"text_device": "cuda"},
            "text_device=cuda: there is no CUDA device here; nearest legal: cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_preparing_refuses_what_cannot_be_or_has_no_effect(
    config: PrepareConfig, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare_command(replace(config, **changed))
    assert not Path(config.output).exists() and not list(Path.cwd().iterdir())


def test_training_reads_what_was_prepared_with_the_same_type(
    config: PrepareConfig, model: Path, tmp_path: Path, started: Asked
) -> None:
    full = replace(config, text_dtype="float32", text_cache=str(tmp_path / "kept"))
    prepare_command(full)
    asked = len(started)
    with pytest.raises(
        ConfigError, match=r"prepared with text_dtype=float32, this run has bfloat16: use float32 \(to t"
    ):
        video_data(train_config(model, tmp_path / "set"))
    words = ["data.text_device=cpu", "data.text_dtype=float32", f"data.text_cache={tmp_path / 'kept'}"]
    cached, parts = video_data(train_config(model, tmp_path / "set", *words))
    pixels, _ = video_data(same := train_config(model, tmp_path / "set", *words, "data.pixels=true"))
    one, other = (batches.batch(0, 0, 1).text for batches in (cached, pixels))
    assert one.prompts == other.prompts and one.embeddings is not None and other.embeddings is not None
    assert torch.equal(one.embeddings, other.embeddings.half().float()) and len(started) == asked
    # What stands for no prompt is the one text of contact sheets that captions were not.
    assert _frozen_encoder(parts).encode("").shape[1] == Checkpoint.open(model).shape.spec.text_dim
    assert [(order["device"], order["dtype"], order["texts"]) for _, order in started[asked:]] == [
        ("cpu", "float32", [""])
    ]
    assert not list((tmp_path / "user").rglob("*.safetensors"))
    # A run goes on with its own type; one that is older than the setting had the default.
    theirs = json.loads(json.dumps(identity_of(same, pixels)))
    low, _ = video_data(other_type := train_config(model, tmp_path / "set", "data.pixels=true"))
    ours = json.loads(json.dumps(identity_of(other_type, low)))
    with pytest.raises(ConfigError, match=r"trained with data_set\.text_dtype=float32, this run has bfloat16"):
        check_same("run", theirs, ours)
    older = {**ours, "data_set": {name: value for name, value in ours["data_set"].items() if name != "text_dtype"}}
    check_same("run", older, ours)
    with pytest.raises(ConfigError, match=r"trained with data_set\.text_dtype=bfloat16, this run has float32"):
        check_same("run", older, theirs)


def test_training_refuses_them_for_a_model_without_such_an_encoder(
    tmp_path: Path, started: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    small, run = tiny_checkpoint(tmp_path / "small"), tmp_path / "run"
    index = {"version": 1, "root": "v", "shard_clips": 1, "identities": {}, "buckets": [], "skipped": []}
    (tmp_path / "index.json").write_text(json.dumps(index))
    for word in ("data.text_device=cpu", "data.text_dtype=float32", "data.text_cache=kept"):
        for words in ([f"data.folder={tmp_path}", f"model.pretrained={small}"], []):
            assert cli.main(["train", *words, f"run_dir={run}", word]) == 2
            said = f"{word}: is for a pretrained text encoder; that of model={small if words else 'embedded'} is small"
            assert said in capsys.readouterr().err
    assert not run.exists() and not started


def test_workers_on_ray_find_the_folder_of_texts_wherever_they_start(tmp_path: Path, started: Asked) -> None:
    config = load_config(TrainConfig, None, ["data.text_cache=kept", "data.text_dtype=float32"])
    found = _anywhere(config, tmp_path / "run").data
    assert TextOptions.of(found) == TextOptions("auto", "float32", str(tmp_path / "here" / "kept"))
    assert _anywhere(load_config(TrainConfig), tmp_path / "run").data.text_cache is None
