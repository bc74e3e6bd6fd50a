"""STDiT3's weights: the public checkpoint's names, files in the Hugging Face layout, stages that read their share."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from helpers import TINY, reference_cases, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_stdit3 import INFO, random, run_blocks, staircase

from pavdm_dist.errors import CheckpointError
from pavdm_dist.models.base import Activation, BlockContext
from pavdm_dist.models.stdit3 import STDiT3, STDiT3Config
from pavdm_dist.models.text_cache import TextRun

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


# --- names -----------------------------------------------------------------------------------------------


def public_names(depth: int) -> set[str]:
    """Tensor names of the public Open-Sora v1.2 checkpoint."""
    linear = (
        [f"{name}.mlp.{i}" for name in ("t_embedder", "fps_embedder") for i in (0, 2)]
        + ["x_embedder.proj", "t_block.1", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "final_layer.linear"]
    )  # fmt: skip
    names = {"rope.freqs", "y_embedder.y_embedding", "final_layer.scale_shift_table"}
    for block in (f"{kind}_blocks.{i}" for kind in ("spatial", "temporal") for i in range(depth)):
        names |= {f"{block}.scale_shift_table", f"{block}.attn.q_norm.weight", f"{block}.attn.k_norm.weight"}
        parts = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
        linear += [f"{block}.{part}" for part in (*parts, "mlp.fc1", "mlp.fc2")]
    return names | {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}


def test_names_are_the_public_checkpoints() -> None:
    assert set(tiny_model().state_dict()) == public_names(TINY.depth)
    with torch.device("meta"):
        published = STDiT3(STDiT3Config())
    state = published.state_dict()
    assert set(state) == public_names(28)
    assert state["temporal_blocks.27.attn.qkv.weight"].shape == (3456, 1152)
    assert state["x_embedder.proj.weight"].shape == (1152, 4, 1, 2, 2)
    assert state["y_embedder.y_embedding"].shape == (300, 4096)
    assert state["final_layer.linear.weight"].shape == (32, 1152)
    assert published.spec.num_blocks == 56


def test_names_are_those_of_the_reference_tensors() -> None:
    for case in reference_cases():
        file = case / "golden.json"
        with torch.device("meta"):
            model = STDiT3(STDiT3Config.from_dict(json.loads(file.read_text())["model"]))
        shapes = {f"model.{name}": list(value.shape) for name, value in model.state_dict().items()}
        with safe_open(file.with_suffix(".safetensors"), "pt") as reader:
            stored = {key: reader.get_slice(key).get_shape() for key in reader.keys() if key.startswith("model.")}  # noqa: SIM118
        assert stored == shapes


# --- weights on disk -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def shard(folder: Path, place: Callable[[str], str]) -> None:
    """Replaces the folder's one weight file by shards and an index, as the hub stores large models."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for file in {place(name) for name in state}:
        save_file({name: value for name, value in state.items() if place(name) == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {name: place(name) for name in state}}))


def by_block(name: str) -> str:
    """A shard per half-block, one for what is in front of them, one for what is behind."""
    parts = name.split(".")
    return "-".join(parts[:2] if "blocks" in parts[0] else parts[:1]) + ".safetensors"


def equal_states(one: STDiT3, two: STDiT3) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sharded", [False, True])
def test_save_and_load_round_trip(folder: Path, sharded: bool) -> None:
    if sharded:
        shard(folder, by_block)
    model = STDiT3.load(folder)
    assert model.config == TINY and equal_states(model, tiny_model())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    # Weights live in torch's own aligned memory, not in the mapped file.
    assert all(value.data_ptr() % 64 == 0 for value in model.state_dict().values())
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert equal_states(model, tiny_model())


def test_half_precision_files_load_as_float32(folder: Path) -> None:
    tiny_model().save_pretrained(folder, dtype=torch.float16)
    stored, model = load_file(folder / WEIGHTS), STDiT3.load(folder)
    assert {stored[name].dtype for name, _ in model.named_parameters()} == {torch.float16}
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, stored[name].float())


def test_a_checkpoint_without_the_rotary_table_gets_it_computed(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    expected = state.pop("rope.freqs")
    save_file(state, folder / WEIGHTS)
    assert torch.equal(STDiT3.load(folder).rope.freqs, expected)


def test_training_switches_in_the_config_are_ignored(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "class_dropout_prob": 0.1, "enable_flash_attn": True}))
    assert STDiT3.load(folder).config == TINY


CUTS = [cut for count in range(4) for cut in combinations(range(1, 4), count)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_stages_in_sequence_equal_the_whole_model(folder: Path, cut: tuple[int, ...]) -> None:
    """Every contiguous split of the four half-blocks, each stage loaded from files it alone needs."""
    shard(folder, by_block)
    whole, grid = tiny_model(), tiny_model().grid(6, 5, 6)
    x, text, levels = random(1, 4, 6, 5, 6), random(1, 5, TINY.caption_channels, seed=1), staircase(6)
    activation = None
    for first, last in pairwise((0, *cut, 4)):
        stage = STDiT3.load(folder, blocks=(first, last))
        context = BlockContext(grid, [TextRun(0, 6, stage.project_text(text))], chunk_causal=None)
        if activation is None:
            activation = stage.embed(x, levels, INFO)
        activation = run_blocks(stage, range(first, last), activation, context)
        # What crosses a link: contiguous copies of the same values.
        parts = (activation.hidden, activation.modulation, activation.time)
        activation = Activation(*(part.contiguous().clone() for part in parts))
    assert activation is not None
    assert torch.equal(stage.head(activation, grid), whole(x, levels, text, INFO))


@pytest.mark.parametrize(("blocks", "ends"), [((0, 1), "first"), ((1, 3), ""), ((3, 4), "last"), ((0, 4), "both")])
def test_a_stage_reads_only_its_own_tensors(folder: Path, blocks: tuple[int, int], ends: str) -> None:
    shard(folder, by_block)
    kinds = [f"{('spatial', 'temporal')[i % 2]}_blocks.{i // 2}." for i in range(*blocks)]
    needed = ["y_embedder.y_proj.", "rope.", *kinds]
    needed += ["x_embedder.", "t_embedder.", "fps_embedder.", "t_block."] if ends in ("first", "both") else []
    needed += ["final_layer."] if ends in ("last", "both") else []
    expected = {name for name in public_names(TINY.depth) if name.startswith(tuple(needed))}
    # Files that hold nothing of this stage are not even opened: they may be broken.
    for file in {by_block(name) for name in public_names(TINY.depth)} - {by_block(name) for name in expected}:
        (folder / file).write_bytes(b"not a safetensors file")
    stage = STDiT3.load(folder, blocks=blocks)
    loaded = {name for name, value in stage.state_dict().items() if not value.is_meta}
    assert loaded == expected
    assert all(torch.equal(stage.state_dict()[name], tiny_model().state_dict()[name]) for name in expected)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda state: state.pop("temporal_blocks.1.attn.qkv.weight"),
         r"lacks tensor temporal_blocks\.1\.attn\.qkv\.weight of shape \[96, 32\]"),
        (lambda state: state.update({"x_embedder.proj.weight": torch.zeros(32, 16, 1, 2, 2)}),
         r"tensor x_embedder\.proj\.weight is \[32, 16, 1, 2, 2\], the model needs \[32, 4, 1, 2, 2\]"),
        (lambda state: state.update({"spatial_blocks.2.mlp.fc1.bias": torch.zeros(3)}),
         r"tensor spatial_blocks\.2\.mlp\.fc1\.bias \(1 in all\) is not part of this model"),
    ],
    ids=["missing", "size", "unknown"],
)  # fmt: skip
def test_wrong_checkpoints_name_the_tensor(folder: Path, break_it: Callable, message: str, sharded: bool) -> None:
    state = load_file(folder / WEIGHTS)
    break_it(state)
    save_file(state, folder / WEIGHTS)
    if sharded:
        shard(folder, by_block)
    with pytest.raises(CheckpointError, match=message):
        STDiT3.load(folder)


def lose_a_shard(folder: Path) -> None:
    shard(folder, by_block)
    (folder / "t_block.safetensors").unlink()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no weights: expected diffusion_pytorch_model.safetensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]), "not a readable"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "not a readable"),
        (lose_a_shard, "t_block.safetensors is named by"),
    ],
    ids=["no config", "broken config", "no weights", "truncated", "empty", "no shard"],
)
def test_broken_folders_say_what_is_wrong(folder: Path, break_it: Callable, message: str) -> None:
    break_it(folder)
    with pytest.raises(CheckpointError, match=message):
        STDiT3.load(folder)
