"""``pavdm convert``: published files become model folders; what could run code, or is no model, is refused."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint
from hub import REPOSITORY, serve
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_wan_loading import equal_states, original_names
from wan_models import WAN, tiny_wan

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.cli import main
from pavdm_dist.commands.convert import ConvertConfig, _index
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.models.catalog import backbone_shape
from pavdm_dist.models.source import Source
from pavdm_dist.models.wan import Wan


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder of the shape, with other weights."""
    folder = tiny_checkpoint(tmp_path / "base")
    for file in (folder / "transformer").iterdir():
        file.unlink()
    tiny_wan(seed=3).save_pretrained(folder / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def publish(file: Path, wrap: Callable[[dict], object] = lambda state: state, prefix: str = "model.") -> Path:
    """The tiny model by its authors' names."""
    torch.save(wrap(original_names(tiny_wan(seed=7).state_dict(), prefix)), file)
    return file


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_diffusers_names_may_have_prefixes_too(prefix: str, base: Path, tmp_path: Path) -> None:
    state = {f"{prefix}{name}": value for name, value in tiny_wan(seed=7).state_dict().items()}
    torch.save(state, tmp_path / "published.pt")
    folder = tmp_path / "out"
    words = ["level_support=staircase-trained", "license=terms of its own"]
    assert main(["convert", str(tmp_path / "published.pt"), f"base={base}", f"output={folder}", *words]) == 0
    assert equal_states(Checkpoint.open(folder).backbone, tiny_wan(seed=7))  # type: ignore[arg-type]


def test_two_sets_under_one_models_names_are_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = publish(tmp_path / "published.pt", lambda state: state | {"module." + name: state[name] for name in state})
    assert main(["convert", str(file), f"base={base}", f"output={tmp_path / 'out'}"]) == 2
    assert re.search(r"tensors (\S+) and module\.\1 are two of one model's name", capsys.readouterr().err)


@pytest.mark.parametrize("seed", range(8))
def test_bytes_that_are_no_file_are_refused(
    seed: int, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "published.pth"
    file.write_bytes(random.Random(seed).randbytes(60))
    assert main(["convert", str(file), f"base={base}", f"output={tmp_path / 'out'}"]) == 2
    assert "is not read: it is damaged" in capsys.readouterr().err


SETS = {
    "plain": (lambda state: state, "", []),
    "prefix": (lambda state: state, "model.", []),
    "averaged": (
        lambda state: {"critic": {}, "generator": {"x": torch.zeros(1)}, "generator_ema": state},
        "model._fsdp_wrapped_module.", [],
    ),
    "generator": (lambda state: {"generator": state, "critic": {"x": torch.zeros(1)}, "step": 3}, "model.", []),
    "chosen": (lambda state: {"generator": {"x": torch.zeros(1)}, "mine": state}, "model.", ["weights=mine"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_published_file_becomes_a_model(name: str, base: Path, tmp_path: Path) -> None:
    wrap, prefix, words = SETS[name]
    file, folder = publish(tmp_path / "published.pt", wrap, prefix), tmp_path / "out"
    said = ["level_support=staircase-trained", "license=terms of its own", "sampling.num_inference_steps=9"]
    assert main(["convert", str(file), f"base={base}", f"output={folder}", *said, *words]) == 0
    found = Checkpoint.open(folder)
    assert isinstance(found.backbone, Wan) and equal_states(found.backbone, tiny_wan(seed=7))
    assert found.shape.spec.level_support == "staircase-trained" and found.defaults.num_inference_steps == 9
    assert found.defaults.window_chunks == Checkpoint.open(base).defaults.window_chunks
    assert (found.vae.folder() / "config.json").read_bytes() == (base / "vae" / "config.json").read_bytes()
    assert found.text_encoder.encode("a red three").isfinite().all()
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_of_others_is_changed_or_removed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").touch()
    words = ["convert", str(publish(tmp_path / "published.pt")), f"base={base}", "--overwrite"]
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        full = SafetensorError("Error while serializing: No space left on device (os error 28)")
        patched.setattr("pavdm_dist.commands.convert.save_tensors", lambda *_: (_ for _ in ()).throw(full))
        assert main([*words, f"output={tmp_path / 'out'}"]) == 2
    assert re.search(r"output=\S+out: cannot be written \(.*No space left on device", capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before
    assert main([*words, f"output={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out.partial" / "notes").exists()
    same = {
        file.name: file.samefile(base / file.relative_to(tmp_path / "out"))
        for file in (tmp_path / "out" / "vae").iterdir()
    }
    assert same.pop("config.json") is False and same and all(same.values()), "weights are links, nothing else is"
    (tmp_path / "link").symlink_to("out")
    assert main([*words, f"output={tmp_path / 'link'}"]) == 2
    assert re.search(r"output=\S+link: is a link to out; name the folder itself", capsys.readouterr().err)
    monkeypatch.chdir(tmp_path / "out")
    (tmp_path / "out" / "mark").touch()
    assert main([*words, "output=."]) == 2
    assert "output=.: holds mark, which is no part of the model and would be gone" in capsys.readouterr().err
    (tmp_path / "out" / "mark").rename(tmp_path / "out" / ".DS_Store")
    assert main([*words, "output=."]) == 0
    assert not (tmp_path / "out" / ".DS_Store").exists() and Checkpoint.open(tmp_path / "out")
    assert main([*words, f"output={base / 'new'}"]) == 0, "in the base"
    assert not list(base.rglob("*.tmp")) and not (base / "new" / "new").exists()
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "link", tmp_path / "out"])


def test_types_are_kept_or_chosen(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def half(state: dict) -> dict:
        return {name: value.bfloat16() for name, value in state.items()}

    file = publish(tmp_path / "published.pt", half)
    assert main(["convert", str(file), f"base={base}", f"output={tmp_path / 'kept'}"]) == 0
    assert Checkpoint.open(tmp_path / "kept").dtype == torch.bfloat16
    words = ["convert", f"base={base}", f"output={tmp_path / 'kept'}", str(file), "dtype=float16", "--json"]
    capsys.readouterr()
    assert main(words) == 2 and "exists already; --overwrite replaces it" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = Checkpoint.open(tmp_path / "kept")
    assert model.dtype == torch.float16 and report["tensors"] == len(model.shape.state_dict())
    sizes = {name: value.numel() for name, value in model.shape.state_dict().items()}
    assert report["bytes"] == sum(size * (4 if model.shape.keeps_float32(name) else 2) for name, size in sizes.items())


class Program:
    """What a file could hold besides tensors."""

    def __reduce__(self) -> tuple:
        return print, ("run",)


@pytest.mark.parametrize(
    ("wrap", "words", "message"),
    [
        (lambda state: {**state, "model.head.head.weight": Program()}, [],
         "holds more than tensors, which could run code"),
        (lambda state: {"critic": state}, [], "holds critic, no set that samples"),
        (lambda state: {"critic": state, "generator": state}, ["weights=critic"],
         "weights=critic: .* holds critic, generator"),
        (lambda state: {"other": state}, [], "holds other; name one that samples with weights=NAME"),
        (lambda state: {"model.head.head.weight": torch.zeros(1), "epoch": 3}, [], "epoch is no tensor"),
        (lambda state: [1, 2], [], "holds a list, weights by name are expected"),
        (lambda state: {3: torch.zeros(1)}, [], "3 is no tensor"),
        (lambda state: {k: v for k, v in state.items() if "blocks.1.ffn.0.w" not in k}, [],
         r"lacks tensor blocks\.1\.ffn\.net\.0\.proj\.weight"),
        (lambda state: {**state, "model.blocks.3.ffn.0.bias": torch.zeros(40)}, [],
         r"tensor blocks\.3\.ffn\.net\.0\.proj\.bias \(1 in all\) is not part of this model"),
        (lambda state: {**state, "model.head.head.bias": torch.zeros(4)}, [], r"tensor proj_out\.bias is \[4\]"),
    ],
    ids=["code", "critic", "critic chosen", "unknown set", "no tensor", "list", "number", "missing", "unknown", "size"],
)  # fmt: skip
def test_other_files_are_refused(
    wrap: Callable, words: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = publish(tmp_path / "published.pt", wrap)
    assert main(["convert", str(file), f"base={base}", f"output={tmp_path / 'out'}", *words]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert "run" not in captured.out.split() and not (tmp_path / "out").exists()


def test_settings_that_are_missing_are_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(original_names(tiny_wan(seed=7).state_dict()), file)
    (empty := tmp_path / "empty").mkdir()
    for words, message in (
        ([], "source: must be given"),
        ([str(file)], "base: must be given"),
        ([str(file), f"base={base}"], "output: must be given"),
        ([str(file), f"base={tmp_path / 'gone'}", "output=x"], r"base=.*gone: no such folder"),
        ([str(tmp_path / "gone.pt"), f"base={base}", "output=x"], "gone.pt: no such file"),
        ([str(file), f"base={base}", "weights=ema", "output=x"], "weights=ema: .* holds one set of tensors"),
        ([str(file), f"base={base}", f"output={tmp_path}", "--overwrite"], r"holds source=\S+, which is read"),
        ([str(file), f"base={base}", f"output={base}", "--overwrite"], r"is base=\S+, which is read; name another"),
        ([str(file), f"base={base}", f"output={empty}", "--overwrite"], "holds no model that could be replaced"),
    ):
        assert main(["convert", *words]) == 2
        captured = capsys.readouterr()
        assert re.search(message, captured.err), captured.err
    assert main(["convert", str(file), f"base={base}", f"output={tmp_path / 'out'}"]) == 0
    assert Checkpoint.open(tmp_path / "out").shape.config == WAN


def test_a_folder_of_shards_becomes_a_model(base: Path, tmp_path: Path) -> None:
    state = list(original_names(tiny_wan(seed=7).state_dict()).items())
    (tmp_path / "shards").mkdir()
    for number in range(3):
        save_file(dict(state[number::3]), tmp_path / "shards" / f"part-{number}.safetensors")
    (tmp_path / "shards" / "._part-0.safetensors").write_bytes(bytes(4096))  # a Mac's, of a file on a share
    assert main(["convert", str(tmp_path / "shards"), f"base={base}", f"output={tmp_path / 'out'}"]) == 0
    found = Checkpoint.open(tmp_path / "out").backbone
    assert isinstance(found, Wan) and equal_states(found, tiny_wan(seed=7))


def test_of_several_sets_in_a_folder_none_is_taken_unasked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights in half precision, or averaged ones, lie beside others under the same names."""
    (folder := tmp_path / "both").mkdir()
    stem, words = "diffusion_pytorch_model", ["convert", str(folder), f"base={base}", f"output={tmp_path / 'out'}"]
    state, other = (original_names(tiny_wan(seed=seed).state_dict()) for seed in (7, 8))
    save_file(other, folder / f"{stem}.fp16.safetensors")
    save_file(state, folder / f"{stem}.safetensors")
    assert main(words) == 2
    first = rf"source=\S+both: {stem}\.fp16\.safetensors and {stem}\.safetensors both hold tensor \S+; name the file"
    assert re.search(first, capsys.readouterr().err) and not (tmp_path / "out").exists()
    index = folder / f"{stem}.safetensors.index.json"
    for placed, message in (
        ({"head.head.weight": "gone.safetensors"}, rf"gone\.safetensors is named by {stem}\.safetensors\.index\.json"),
        ({"x": f"{stem}.safetensors"}, r"lacks tensor x, which the index places there"),
        ({"x": "../both/x.safetensors"}, r"x is placed in '../both/x.safetensors', which is no name of a file beside"),
    ):
        index.write_text(json.dumps({"weight_map": placed}))
        assert main(words) == 2
        assert re.search(message, capsys.readouterr().err)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, f"{stem}.safetensors")}))
    assert main(words) == 0
    found = Checkpoint.open(tmp_path / "out").backbone
    assert isinstance(found, Wan) and equal_states(found, tiny_wan(seed=7))
    (folder / "ema.safetensors.index.json").write_text('{"weight_map": {}}')
    assert main([*words, "--overwrite"]) == 0  # a variant is named otherwise
    (folder / "model.safetensors.index.json").write_text(index.read_text())
    assert main([*words, "--overwrite"]) == 2
    assert "are two sets; leave one there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("{num_inference_step: 5}", r"sampling: no such key sampling\.num_inference_step; the keys are num_inf"),
        ("{fps: fast}", r"sampling: sampling\.fps=fast: must be"),
        ("{num_inference_steps: 5, window_chunks: 7}",
         r"sampling: window_chunks=7 does not divide num_inference_steps=5: use window_chunks 5"),
        ("{window_chunks: 7}", r"sampling: window_chunks=7 does not divide num_inference_steps=\d+: use"),
        ("{anchor_chunks: 1}", r"sampling: anchor_chunks=1: context=joint keeps none"),
    ],
)  # fmt: skip
def test_sampling_that_cannot_be_is_refused_before_anything_is_read(
    sampling: str, message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "published.pt").write_bytes(b"never read")
    words = [str(tmp_path / "published.pt"), f"base={base}", f"output={tmp_path / 'out'}", f"sampling={sampling}"]
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("{height: 20}", "height=20 cannot be divided by 8.*nearest legal: 16 or 24"),
        ("{latent_chunk_size: 0}", r"latent_chunk_size=0: must be"),
        ("{levels: [1.0, 2.0]}", r"levels"),
    ],
)  # fmt: skip
def test_what_its_own_defaults_cannot_sample_does_not_become_a_model(
    sampling: str, message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(publish(tmp_path / "published.pt")), f"base={base}", f"output={tmp_path / 'out'}"]
    assert main(["convert", *words, f"sampling={sampling}"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_class_that_the_base_names_otherwise_is_the_models(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "transformer" / "config.json").read_text())
    config["architectures"] = [config.pop("_class_name")]
    (base / "transformer" / "config.json").write_text(json.dumps(config))
    words = [str(publish(tmp_path / "published.pt")), f"base={base}", f"output={tmp_path / 'out'}"]
    assert main(["convert", *words]) == 0
    assert isinstance(Checkpoint.open(tmp_path / "out").backbone, Wan)


def test_which_public_model_of_a_shape_the_base_is_stays_known(tmp_path: Path) -> None:
    base = tmp_path / "SkyReels-14B-720P"
    shutil.copytree(shipped_models()["skyreels-v2-df-14b-720p"], base)
    index = json.loads((base / "model_index.json").read_text())
    said = {name: value for name, value in index.items() if name not in ("hub", "sampling")}
    (base / "model_index.json").write_text(json.dumps(said))
    source = Source(str(base))
    found = _index(ConvertConfig(), source, backbone_shape(source.part("transformer")), [])
    assert found == said | {"hub": index["hub"]}


def test_two_names_of_one_tensor_are_two(base: Path, tmp_path: Path) -> None:
    def tied(state: dict) -> dict:
        one, other = (f"model.blocks.1.self_attn.{name}.weight" for name in "qk")
        return state | {other: state[one]}

    words = [str(publish(tmp_path / "published.pt", tied)), f"base={base}", f"output={tmp_path / 'out'}"]
    assert main(["convert", *words]) == 0
    found = Checkpoint.open(tmp_path / "out").backbone.state_dict()
    expected = tiny_wan(seed=7).state_dict()["blocks.1.attn1.to_q.weight"]
    assert all(torch.equal(found[f"blocks.1.attn1.to_{name}.weight"], expected) for name in "qk")


def test_what_nothing_would_open_is_not_made(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, index = tmp_path / "out", json.loads((base / "model_index.json").read_text())
    words = ["convert", str(publish(tmp_path / "published.pt")), f"base={base}", f"output={folder}", "license=no ships"]
    (base / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKLOther"]}))
    assert main(words) == 2
    said = rf"output={folder}: would be no model that can be sampled: model={folder}: vae is AutoencoderKLOther"
    assert re.search(said, capsys.readouterr().err)
    (base / "model_index.json").write_text(json.dumps(index))
    weights = next((base / "text_encoder").glob("*.safetensors"))
    weights.rename(tmp_path / "aside")
    assert main(words) == 2
    assert re.search(rf"would be no model \S.*: {folder}/text_encoder has no weights", capsys.readouterr().err)
    assert not folder.exists() and not list(tmp_path.glob(".*"))
    (tmp_path / "aside").rename(weights)
    assert main(words) == 0
    assert "no ships" not in capsys.readouterr().err, "nothing is said of a folder that is under way"
    Checkpoint.open(folder)
    assert "its weights are under no ships" in capsys.readouterr().err


def test_a_base_on_the_hub_gives_all_but_the_transformer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publish(tmp_path / "published.pt")
    with serve(base, tmp_path / "cache", monkeypatch) as hub:
        assert main(["convert", str(file), f"base={REPOSITORY}", f"output={tmp_path / 'out'}"]) == 0
        fetched = hub.fetched()
    assert {name for name in fetched if name.startswith("transformer/")} == {"transformer/config.json"}
    found = Checkpoint.open(tmp_path / "out")
    assert isinstance(found.backbone, Wan) and equal_states(found.backbone, tiny_wan(seed=7))
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    found.require_weights()
