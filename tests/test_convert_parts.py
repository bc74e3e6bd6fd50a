"""Models whose parts are published apart, as Open-Sora's are, put together by ``pavdm convert``; files on the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint, tiny_model
from hub import REPOSITORY, serve
from safetensors.torch import load_file, save_file

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.cli import main
from pavdm_dist.codecs.opensora import OpenSoraCodec, OpenSoraConfig, OpenSoraModules
from pavdm_dist.errors import CheckpointError
from pavdm_dist.models.source import Source

PROMPT = "a red three"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``: a shape without weights. ``stdit``, ``vae``, ``t5``, ``words``: repositories of one component each."""
    root = tmp_path_factory.mktemp("parts")
    whole = tiny_checkpoint(root / "whole")
    (root / "stdit").mkdir()
    state = {name: value for name, value in tiny_model().state_dict().items() if name != "rope.freqs"}
    save_file(state, root / "stdit" / "model.safetensors")
    for component in ("transformer", "text_encoder"):
        (root / "base" / component).mkdir(parents=True)
        config = (whole / component / "config.json").read_text()
        (root / "base" / component / "config.json").write_text(config)
    (root / "base" / "vae").mkdir()
    config = OpenSoraConfig(
        vae_2d={"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        vae_temporal={"filters": 8, "num_res_blocks": 1, "num_groups": 4},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        OpenSoraCodec(OpenSoraModules(config), config).save_pretrained(root / "vae")
    (root / "base" / "vae" / "config.json").write_text((root / "vae" / "config.json").read_text())
    index = json.loads((whole / "model_index.json").read_text())
    index["vae"] = ["opensora", "VideoAutoencoderPipeline"]
    index["sampling"] |= {"latent_chunk_size": 5, "guidance_scale": 1.0}
    (root / "base" / "model_index.json").write_text(json.dumps(index))
    (whole / "text_encoder").rename(root / "words")
    t5 = root / "t5"
    t5.mkdir()
    width = json.loads((root / "base" / "text_encoder" / "config.json").read_text())["text_dim"]
    (t5 / "config.json").write_text(json.dumps({"architectures": ["T5EncoderModel"], "d_model": width}))
    torch.save({"shared.weight": torch.zeros(4, width)}, t5 / "pytorch_model-00001-of-00001.bin")
    for name in ("spiece.model", "tokenizer_config.json", "README.md", "tf_model.h5", "._config.json"):
        (t5 / name).write_text(name)
    return root


def test_open_sora_from_its_repositories_to_a_video(parts: Path, tmp_path: Path) -> None:
    model, video = tmp_path / "model", tmp_path / "video.mp4"
    words = [f"base={parts / 'base'}", f"vae={parts / 'vae'}", f"text_encoder={parts / 'words'}"]
    assert main(["convert", str(parts / "stdit"), *words, f"output={model}"]) == 0
    found = Checkpoint.open(model)
    assert torch.equal(found.backbone.state_dict()["final_layer.linear.weight"], _published(parts))
    assert main(["sample", PROMPT, f"model={model}", "num_frames=34", f"output={video}"]) == 0
    assert json.loads(video.with_suffix(".json").read_text())["num_frames"] == 34


def _published(parts: Path) -> torch.Tensor:
    return load_file(parts / "stdit" / "model.safetensors")["final_layer.linear.weight"]


def test_a_tokenizer_among_the_files_of_its_encoder(parts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    words = [f"base={parts / 'base'}", f"vae={parts / 'vae'}", f"text_encoder={parts / 't5'}"]
    assert main(["convert", str(parts / "stdit"), *words, f"output={model}"]) == 0
    assert {file.name for file in (model / "tokenizer").iterdir()} == {"spiece.model", "tokenizer_config.json"}
    encoder = {file.name for file in (model / "text_encoder").iterdir()}
    assert encoder == {"config.json", "tokenizer_config.json", "pytorch_model-00001-of-00001.bin"}
    assert json.loads((model / "model_index.json").read_text())["text_encoder"][1] == "T5EncoderModel"
    assert Checkpoint.open(model).text_encoder.max_length == tiny_model().spec.text_len


def test_a_tokenizer_that_the_hub_does_not_deliver_is_not_lacking(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = Source.find

    def broken(source: Source, name: str) -> Path | None:
        if name == "spiece.model":
            raise CheckpointError("the hub does not answer")
        return find(source, name)

    monkeypatch.setattr(Source, "find", broken)
    words = [f"base={parts / 'base'}", f"vae={parts / 'vae'}", f"text_encoder={parts / 't5'}"]
    assert main(["convert", str(parts / "stdit"), *words, f"output={tmp_path / 'model'}"]) == 2
    assert "the hub does not answer" in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_a_model_gives_one_of_its_components(parts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    words = [f"base={parts / 'base'}", f"vae={parts / 'vae'}", f"text_encoder={parts / 'words'}"]
    assert main(["convert", str(parts / "stdit"), *words, f"output={other}"]) == 0
    words = [f"base={parts / 'base'}", f"vae={other}", f"text_encoder={other}", f"output={tmp_path / 'model'}"]
    assert main(["convert", str(parts / "stdit"), *words]) == 0
    for file in other.rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "model" / file.relative_to(other)).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"base=\S+base: holds no weights of a codec; vae=FOLDER or a hub id names them"),
        (["vae={parts}/t5"], r"t5/config\.json: latents_mean is missing"),
        (["vae={parts}/deep"], r"vae=\S+deep: has 16 latent channels, the transformer takes 4"),
        (["vae={parts}/nowhere"], r"vae=\S+nowhere: no such folder"),
        (["vae={parts}/stdit"], r"vae=\S+stdit: .*config\.json is missing"),
        (["vae={parts}/vae", "text_encoder={parts}/narrow"], r"text_encoder=\S+narrow: gives 7 channels"),
        (["vae={parts}/vae", "tokenizer={parts}/words"], r"tokenizer=\S+words: .*tokenizer\.json is missing"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    words: list[str], message: str, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    for name, config in (
        ("narrow", {"architectures": ["T5EncoderModel"], "d_model": 7}),
        ("deep", {"_class_name": "AutoencoderKLWan", "z_dim": 16, **scale}),
    ):
        (parts / name).mkdir(exist_ok=True)
        (parts / name / "config.json").write_text(json.dumps(config))
    given = [word.format(parts=parts) for word in words]
    said = [str(parts / "stdit"), f"base={parts / 'base'}", f"output={tmp_path / 'model'}", *given]
    assert main(["convert", *said]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["", "/model.safetensors", "@v2/model.safetensors"])
def test_published_files_on_the_hub(
    where: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{name}={parts / place}" for name, place in (("base", "base"), ("vae", "vae"), ("text_encoder", "words"))]
    words += [f"output={tmp_path / 'model'}"]
    with serve(parts / "stdit", tmp_path / "cache", monkeypatch):
        assert main(["convert", f"{REPOSITORY}{where}", *words]) == 0
        assert main(["convert", f"{REPOSITORY}/gone.pt", *words, "--overwrite"]) == 2
    assert "gone.pt is missing" in capsys.readouterr().err
    assert torch.equal(Checkpoint.open(tmp_path / "model").backbone.state_dict()["final_layer.linear.weight"],
                       _published(parts))  # fmt: skip
