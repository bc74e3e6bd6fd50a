"""Where a model's files are: folders and hub ids travel as a few words, and each process reads what its part needs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint, tiny_model
from hub import COMMIT, REPOSITORY, Hub, serve
from test_stdit3_weights import WEIGHTS, by_block, equal_states, shard

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder
from pavdm_dist.commands.convert import ConvertConfig, convert_command
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io import shipped
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.loading import read_tensor, stored_dtype
from pavdm_dist.models.nearby import model_near, near_name
from pavdm_dist.models.source import Source
from pavdm_dist.planning.partition import layer_split
from pavdm_dist.request.sampling import SamplingParams

JSON = {
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    f"transformer/{WEIGHTS}.index.json",
}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model whose backbone has a file per block."""
    folder = tiny_checkpoint(tmp_path / "model")
    shard(folder / "transformer", by_block)
    return folder


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(sharded, tmp_path / "cache", monkeypatch) as hub:
        yield hub


def test_a_relative_folder_is_opened_from_anywhere(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sharded.parent)
    checkpoint = Checkpoint.open("./model")
    assert checkpoint.source == Source(str(sharded))
    travelled = pickle.dumps(checkpoint.transformer)
    assert len(travelled) < 400
    monkeypatch.chdir(tmp_path.parent)
    assert equal_states(load_backbone(pickle.loads(travelled)), tiny_model())
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    elsewhere = Source(str(tmp_path / "not" / "here"), component="transformer")
    with pytest.raises(CheckpointError, match="is not on node7: a model folder must have the same path on every node"):
        load_backbone(elsewhere)


def test_a_model_of_the_package_is_found_where_it_lies_on_each_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages lie in other folders elsewhere: the name travels, not the place."""
    checkpoint = Checkpoint.open("embedded")
    assert checkpoint.source == Source("embedded") and len(checkpoint.identity) == 64
    travelled = pickle.dumps(checkpoint.transformer)
    shutil.copytree(shipped.EMBEDDED, tmp_path / "site-packages" / "embedded")
    monkeypatch.setattr(shipped, "EMBEDDED", tmp_path / "site-packages" / "embedded")
    source = pickle.loads(travelled)
    assert source.file("config.json") == tmp_path / "site-packages" / "embedded" / "transformer" / "config.json"
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    with pytest.raises(CheckpointError, match=r"model=of-another-version is not in pavdm_dist .* on node7"):
        Source("of-another-version").find("model_index.json")


def test_a_hub_id_is_pinned_and_a_plan_reads_headers_only(hub: Hub) -> None:
    checkpoint = Checkpoint.open(REPOSITORY)
    assert checkpoint.source == Source(REPOSITORY, COMMIT)
    assert checkpoint.identity == f"{REPOSITORY}@{COMMIT}"
    params = SamplingParams.resolve(checkpoint)
    assert len(layer_split(checkpoint, params, EngineOptions(2))) == 2
    weights = {name for name in hub.fetched() if name.endswith(".safetensors")}
    assert weights, "shapes are checked"
    assert not list(Path(checkpoint.source.file("model_index.json").parent).rglob("*.safetensors"))
    checkpoint.require_weights()


def test_a_stage_fetches_the_shards_of_its_blocks(hub: Hub) -> None:
    source = Checkpoint.open(REPOSITORY, "v2").transformer
    assert source.revision == COMMIT
    hub.fetched()
    part = load_backbone(source, (1, 2))
    assert hub.fetched() <= JSON | {
        f"transformer/{name}.safetensors" for name in ("temporal_blocks-0", "y_embedder-y_proj", "y_embedder", "rope")
    }
    loaded = {name for name, value in part.state_dict().items() if not value.is_meta}
    assert all(torch.equal(part.state_dict()[name], tiny_model().state_dict()[name]) for name in loaded)
    # What is here already is not asked for again.
    load_backbone(source, (1, 2))
    assert not hub.fetched()


@pytest.mark.parametrize("whole", [False, True])
def test_the_null_text_is_fetched_alone(hub: Hub, whole: bool) -> None:
    if whole:  # one file of everything
        folder = hub.folder / "transformer"
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        tiny_model().save_pretrained(folder, torch.float16)
    checkpoint = Checkpoint.open(REPOSITORY)
    hub.asked.clear()
    assert torch.equal(checkpoint.null_text, tiny_model().null_text())
    bodies = [(name, size) for method, name, size in hub.asked if method == "GET" and name.endswith(".safetensors")]
    assert sum(size for _, size in bodies[-2:]) == 8 + 4 * 5 * 12
    assert not list(Path(checkpoint.source.file("model_index.json").parent).rglob("*.safetensors"))
    if whole:
        assert stored_dtype(checkpoint.transformer) == torch.float16
    with pytest.raises(CheckpointError, match=r"lacks tensor y_embedder\.nothing"):
        read_tensor(checkpoint.transformer, "y_embedder.nothing")


def test_a_component_can_be_had_as_a_folder(hub: Hub) -> None:
    folder = Checkpoint.open(REPOSITORY).vae.folder()
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", WEIGHTS]


def test_what_was_fetched_once_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(REPOSITORY)
    assert equal_states(load_backbone(checkpoint.transformer), tiny_model())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    again = Checkpoint.open(REPOSITORY)
    assert again.source == checkpoint.source and equal_states(load_backbone(again.transformer), tiny_model())
    assert not again.transformer.has("nothing.safetensors") and not hub.asked


def test_what_was_never_fetched_is_told_as_such_without_a_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = rf"is not in the hub's cache {tmp_path}/cache, and with HF_HUB_OFFLINE set nothing is fetched"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=rf"model={REPOSITORY}: {REPOSITORY}/model_index\.json {said}$"):
        Checkpoint.open(REPOSITORY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    source = Checkpoint.open(REPOSITORY).source
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    planned = Checkpoint.open(REPOSITORY)
    assert planned.source == source, "what planning needs was fetched"
    with pytest.raises(CheckpointError, match=rf"transformer.*{said}"):
        load_backbone(planned.transformer)
    with pytest.raises(CheckpointError, match=said):
        planned.require_weights()
    with pytest.raises(CheckpointError, match=said):
        planned.source.part("elsewhere").folder()
    with pytest.raises(CheckpointError, match=rf"elsewhere/config\.json {said}"):
        planned.source.part("elsewhere").file("config.json")


def test_hub_errors_are_one_sentence(hub: Hub, sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model='some one/x y' is no folder here and no hub id: Repo id must"):
        Checkpoint.open("some one/x y")
    with pytest.raises(CheckpointError, match=r"model='someone/else' is no folder here and no hub id: 404"):
        Checkpoint.open("someone/else")
    with pytest.raises(ConfigError, match=r"revision=v2: model=.*model is a folder, only hub ids have revisions"):
        Checkpoint.open(sharded, "v2")
    with pytest.raises(CheckpointError, match=r"model=/no/such/model: no such folder"):
        Checkpoint.open("/no/such/model")
    with pytest.raises(CheckpointError, match=r"model=mistyped: no such folder here, and hub ids are owner/name"):
        Checkpoint.open("mistyped")


def test_shapes_that_are_shipped_are_opened_by_name() -> None:
    assert {"embedded", "stdit3-xl"} < set(shipped_models())
    checkpoint = Checkpoint.open("stdit3-xl")
    spec = checkpoint.shape.spec
    assert (spec.num_blocks, spec.hidden_size, spec.text_dim) == (56, 1152, 4096)
    assert checkpoint.dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"stdit3-xl holds no weights: it can be planned, not sampled"):
        checkpoint.require_weights()
    assert isinstance(checkpoint.text_encoder, PretrainedTextEncoder)
    assert checkpoint.text_encoder.max_length == 300


def test_a_folder_that_a_shipped_shape_stands_before_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name means the same everywhere, whatever lies where a command is given."""
    (tmp_path / "stdit3-xl").mkdir()
    monkeypatch.chdir(tmp_path)
    shape = Checkpoint.open("stdit3-xl")
    with pytest.raises(CheckpointError, match=r"planned, not sampled$"):
        shape.require_weights()
    tiny_checkpoint(tmp_path / "stdit3-xl")
    with pytest.raises(CheckpointError, match=r"it can be planned, not sampled; did you mean \./stdit3-xl\?$"):
        shape.require_weights()
    with pytest.raises(ConfigError, match=r"base=stdit3-xl: holds no weights .*; did you mean \./stdit3-xl\?$"):
        convert_command(ConvertConfig(source="x.pt", base="stdit3-xl", output="out"), overwrite=False)
    Checkpoint.open("./stdit3-xl").require_weights()


def test_a_text_encoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = tiny_checkpoint(tmp_path) / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "CLIPTextModel"}))
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"text_encoder is CLIPTextModel, this .* WordTextEncoder, UMT5"):
        _ = checkpoint.text_encoder


def test_shapes_are_found_in_an_installed_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "pavdm_dist"
    shutil.copytree(shipped.configs_root(), package / "_configs")
    monkeypatch.setattr(shipped, "__file__", str(package / "io" / "shipped.py"))
    assert shipped_models()["stdit3-xl"] == package / "_configs" / "model" / "stdit3-xl"
    monkeypatch.chdir(tmp_path)
    assert Checkpoint.open("stdit3-xl").shape.spec.num_blocks == 56


def test_a_config_that_is_no_object_is_refused(sharded: Path) -> None:
    (sharded / "transformer" / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON of a model"):
        Checkpoint.open(sharded)


def test_hidden_folders_are_nobodys_models(tmp_path: Path) -> None:
    """What a file server, an editor or a trash can keeps is no answer to a slip of the finger."""
    for name in (".model", ".modl", "models/.old", "models/snapshots/.old", "models/snapshots/new"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model_index.json").touch()
    assert near_name(f"{tmp_path}/modl") == f"; did you mean {tmp_path}/models?"
    assert near_name(f"{tmp_path}/models/.olds") == ""
    assert model_near(tmp_path / "models") == f"; did you mean {tmp_path}/models/snapshots/new?"
    (tmp_path / "models/run").mkdir()
    (tmp_path / "models/run/model_index.json").touch()
    assert model_near(tmp_path / "models") == f"; did you mean {tmp_path}/models/run?"
    assert model_near(tmp_path / "models/run/vae") == f"; did you mean {tmp_path}/models/run?"
