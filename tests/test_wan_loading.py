"""Weights of the Wan family: diffusers' names and their authors' own, one file or shards, LoRA, conversion."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import REPOSITORY, serve
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_models import INFO, SKYREELS, WAN, random, staircase, tiny_wan

from pavdm_dist.errors import CheckpointError
from pavdm_dist.models import loading
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.source import Adapter, Source
from pavdm_dist.models.wan import Wan, WanConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Diffusers' name -> the authors', in order; what a published file is called by.
ORIGINAL = {
    r"^condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"^condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"^condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"^condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"^condition_embedder\.time_proj": "time_projection.1",
    r"^scale_shift_table": "head.modulation", r"\.scale_shift_table": ".modulation", r"^proj_out": "head.head",
    r"\.attn1\.": ".self_attn.", r"\.attn2\.": ".cross_attn.", r"\.to_out\.0\.": ".o.", r"\.to_([qkv])\.": r".\1.",
    r"\.ffn\.net\.0\.proj\.": ".ffn.0.", r"\.ffn\.net\.2\.": ".ffn.2.", r"(blocks\.\d+)\.norm2\.": r"\1.norm3.",
    r"^fps_projection\.net\.0\.proj": "fps_projection.0", r"^fps_projection\.net\.2": "fps_projection.2",
}  # fmt: skip


def original_names(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    def name(key: str) -> str:
        for pattern, replacement in ORIGINAL.items():
            key = re.sub(pattern, replacement, key)
        return prefix + key

    return {name(key): value for key, value in state.items()}


def equal_states(one: Wan, two: Wan) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shard(folder: Path, place: Callable[[str], str]) -> None:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for file in {place(name) for name in state}:
        save_file({name: value for name, value in state.items() if place(name) == file}, folder / file)
    index = {"metadata": {}, "weight_map": {name: place(name) for name in state}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def by_block(name: str) -> str:
    found = re.search(r"blocks\.\d+", name)
    return f"{found[0] if found else name.replace('.', '-')}.safetensors"


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model.", "model._fsdp_wrapped_module.", "own"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("config", [WAN, SKYREELS], ids=["wan", "skyreels"])
def test_any_published_names_load(config: WanConfig, sharded: bool, prefix: str, tmp_path: Path) -> None:
    model = tiny_wan(config=config)
    model.save_pretrained(tmp_path)
    if prefix != "own":
        save_file(original_names(load_file(tmp_path / WEIGHTS), prefix), tmp_path / WEIGHTS)
    if sharded:
        shard(tmp_path, by_block)
    loaded = load_backbone(tmp_path)
    assert isinstance(loaded, Wan) and equal_states(loaded, model) and loaded.config == config
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("blocks", [(0, 1), (1, 2), (2, 3), (0, 3)])
def test_a_stage_opens_only_the_files_it_needs(
    blocks: tuple[int, int], original: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_wan()
    model.save_pretrained(tmp_path)
    if original:
        save_file(original_names(load_file(tmp_path / WEIGHTS), "model."), tmp_path / WEIGHTS)
    shard(tmp_path, by_block)
    opened: set[str] = set()
    read = 0

    class Counting:
        """A reader that counts what is taken from it."""

        def __init__(self, file: Path, **options: Any) -> None:
            opened.add(Path(file).name)
            self._reader = safe_open(file, **options)

        def __enter__(self) -> Counting:
            self._reader.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._reader.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._reader, name)

        def get_tensor(self, name: str) -> Tensor:
            nonlocal read
            tensor = self._reader.get_tensor(name)
            read += tensor.nbytes
            return tensor

    monkeypatch.setattr(loading, "safe_open", Counting)
    stage = load_backbone(tmp_path, blocks)
    want = model.keys(*blocks, first=blocks[0] == 0, last=blocks[1] == 3)
    loaded = {name for name, value in stage.state_dict().items() if not value.is_meta}
    assert loaded == {name for name in model.state_dict() if want(name)}
    assert all(torch.equal(stage.state_dict()[name], model.state_dict()[name]) for name in loaded)
    assert read == sum(stage.state_dict()[name].nbytes for name in loaded), "each once"
    of_blocks = {f"blocks.{index}.safetensors" for index in range(*blocks)}
    assert {file for file in opened if file.startswith("blocks")} == of_blocks
    names = original_names(model.state_dict(), "model.") if original else model.state_dict()
    own = {by_block(stored) for key, stored in zip(model.state_dict(), names, strict=True) if want(key)}
    assert opened == own


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda state: state.pop("blocks.1.attn1.to_q.weight"),
         r"lacks tensor blocks\.1\.attn1\.to_q\.weight of shape \[24, 24\]"),
        (lambda state: state.update({"proj_out.weight": torch.zeros(3, 24)}),
         r"tensor proj_out\.weight is \[3, 24\], the model needs \[16, 24\]"),
        (lambda state: state.update({"blocks.7.attn1.to_q.weight": torch.zeros(3)}),
         r"tensor blocks\.7\.attn1\.to_q\.weight \(1 in all\) is not part of this model"),
        (lambda state: state.update({"proj_out.bias": torch.zeros(16, dtype=torch.float8_e4m3fn)}),
         r"tensor proj_out\.bias is F8_E4M3, it must be one of F32, F16, BF16"),
    ],
    ids=["missing", "size", "unknown", "type"],
)  # fmt: skip
def test_wrong_tensors_are_named(break_it: Callable, message: str, original: bool, tmp_path: Path) -> None:
    tiny_wan().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    break_it(state)
    save_file(original_names(state, "model.") if original else state, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path)


def test_a_stage_fetches_only_the_files_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub, by the authors' names; so is a LoRA."""
    model, folder = tiny_wan(), tmp_path / "model"
    model.save_pretrained(folder / "transformer")
    save_file(original_names(load_file(folder / "transformer" / WEIGHTS), "model."), folder / "transformer" / WEIGHTS)
    shard(folder / "transformer", by_block)
    (folder / "lora").mkdir()
    as_peft(low_rank(model), folder / "lora")
    source = Source(REPOSITORY, component="transformer")
    changed = replace(source, adapters=(Adapter(replace(source, component="lora")),))
    with serve(folder, tmp_path / "cache", monkeypatch) as hub:
        stage = load_backbone(source, (1, 2)).state_dict()
        fetched = {name.removeprefix("transformer/") for name in hub.fetched() if name.endswith(".safetensors")}
        other = load_backbone(changed, (1, 2)).state_dict()
    assert "blocks.1.safetensors" in fetched and len([name for name in fetched if "blocks" in name]) == 1
    assert len(fetched) < 7, "and the text's projection"
    different = {name for name, value in stage.items() if not (value.is_meta or torch.equal(value, other[name]))}
    assert different == {"blocks.1.ffn.net.0.proj.weight"}


# --- LoRA ------------------------------------------------------------------------------------------------

MODULES = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj", "blocks.2.attn2.to_out.0", "proj_out")
RANK, ALPHA = 2, 3.0


def low_rank(model: Wan) -> dict[str, tuple[Tensor, Tensor]]:
    """A pair of matrices for some modules."""
    shapes = {name: model.state_dict()[f"{name}.weight"].shape for name in MODULES}
    return {
        name: (random(RANK, inside, seed=number), random(outside, RANK, seed=number + 9))
        for number, (name, (outside, inside)) in enumerate(shapes.items())
    }


def as_diffusers_lora(pairs: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})}
    save_file(matrices(pairs, "transformer."), folder / "pytorch_lora_weights.safetensors", metadata)


def as_peft(pairs: Mapping[str, tuple[Tensor, Tensor]], folder: Path, **settings: object) -> None:
    save_file(matrices(pairs, "base_model.model."), folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(values))


def matrices(pairs: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.lora_{part}.weight": matrix.clone()
        for name, pair in pairs.items()
        for part, matrix in zip("AB", pair, strict=True)
    }


def as_trainers(pairs: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    """By the authors' names, the strength in a tensor beside each pair."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        (stem,) = (key.removesuffix(".weight") for key in original_names({f"{name}.weight": down}))
        state |= {f"diffusion_model.{stem}.lora_down.weight": down, f"diffusion_model.{stem}.lora_up.weight": up}
        if "blocks" in name:  # diffusers' converter looks for it there alone
            state[f"diffusion_model.{stem}.alpha"] = torch.tensor(ALPHA)
    save_file(state, folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("write", [as_diffusers_lora, as_peft, as_trainers])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_lora_is_added_to_the_weights_of_any_stage(write: Callable, scale: float, tmp_path: Path) -> None:
    model, pairs = tiny_wan(), low_rank(tiny_wan())
    if write is as_trainers:
        del pairs["proj_out"]
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "lora").mkdir()
    write(pairs, tmp_path / "lora")
    source = Source(str(tmp_path / "model"), adapters=(Adapter(Source(str(tmp_path / "lora")), scale),))
    whole = load_backbone(source).state_dict()
    for name, value in model.state_dict().items():
        pair = pairs.get(name.removesuffix(".weight"))
        expected = value if pair is None else value + scale * ALPHA / RANK * (pair[1] @ pair[0])
        torch.testing.assert_close(whole[name], expected, atol=1e-6, rtol=1e-6)
        assert pair is not None or torch.equal(whole[name], value)
    for blocks in ((0, 1), (1, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            stage, all_of_it = load_backbone(source, blocks, dtype).state_dict(), load_backbone(source, None, dtype)
            for name, value in stage.items():
                assert value.is_meta or torch.equal(value, all_of_it.state_dict()[name])


@pytest.mark.parametrize("pattern", ["ffn.net.0.proj", r"^blocks\.\d+\.ffn.*", r"blocks\.[0-9]\.ffn\..*proj"])
def test_peft_strengths_by_module(pattern: str, tmp_path: Path) -> None:
    model, pairs = tiny_wan(), low_rank(tiny_wan())
    pairs = {name: pair for name, pair in pairs.items() if "ffn" not in name or name.endswith("ffn.net.0.proj")}
    model.save_pretrained(tmp_path)
    as_peft(pairs, tmp_path, use_rslora=True, alpha_pattern={pattern: 8.0})
    found = load_backbone(Source(str(tmp_path), adapters=(Adapter(Source(str(tmp_path))),))).state_dict()
    for name, (down, up) in pairs.items():
        strength = (8.0 if "ffn" in name else ALPHA) / RANK**0.5
        expected = model.state_dict()[f"{name}.weight"] + strength * (up @ down)
        torch.testing.assert_close(found[f"{name}.weight"], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prefix", ["base_model.model.", "diffusion_model.", "pipe.dit.", ""])
@pytest.mark.parametrize("middle", ["", ".default"])
def test_peft_strengths_by_the_authors_names(prefix: str, middle: str, tmp_path: Path) -> None:
    """The expressions are of the names in the file, whatever the model calls these modules."""
    model, state = tiny_wan(), dict[str, Tensor]()
    pairs = {name: pair for name, pair in low_rank(model).items() if name != "proj_out"}
    for name, pair in pairs.items():
        (stem,) = (key.removesuffix(".weight") for key in original_names({f"{name}.weight": pair[0]}))
        state |= {f"{prefix}{stem}.lora_{part}{middle}.weight": one for part, one in zip("AB", pair, strict=True)}
    state[f"{prefix}blocks.0.self_attn.q.diff_b"] = random(24)
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {"self_attn.q": 16.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = load_backbone(Source(str(tmp_path), adapters=(Adapter(Source(str(tmp_path))),))).state_dict()
    for name, (down, up) in pairs.items():
        strength = (16.0 if name.endswith("to_q") else ALPHA) / RANK
        expected = model.state_dict()[f"{name}.weight"] + strength * (up @ down)
        torch.testing.assert_close(found[f"{name}.weight"], expected, atol=1e-6, rtol=1e-6)


def test_what_is_left_out_of_a_trainers_file_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Diffusers leaves differences of norms out, which are zero in most files."""
    model, down, up = tiny_wan(), random(RANK, 24), random(24, RANK)
    model.save_pretrained(tmp_path)
    pair = {f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight": one for part, one in (("A", down), ("B", up))}
    for value in (0.0, 1.0):
        caplog.clear()
        more = {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.full((24,), value)}
        save_file(pair | more, tmp_path / "adapter_model.safetensors")
        load_backbone(Source(str(tmp_path), adapters=(Adapter(Source(str(tmp_path))),)))
        said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        assert bool(said) == bool(value)
    assert "1 changes of whole tensors are left out" in said[0] and said[0].endswith("blocks.0.self_attn.norm_q.diff")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"base_model.model.blocks.0.attn1.to_q.lora_B.bias": torch.ones(5)},
         r"adds \[5\] to blocks\.0\.attn1\.to_q\.bias, which is \[24\]"),
        ({"lora_unet_head_head.lora_down.weight": torch.ones(2, 24)}, "its names are not those of a Wan LoRA"),
    ],
    ids=["bias", "musubi"],
)  # fmt: skip
def test_parts_that_cannot_be_added_are_refused(more: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    tiny_wan().save_pretrained(tmp_path)
    save_file(matrices(low_rank(tiny_wan()), "base_model.model.") | more, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_backbone(Source(str(tmp_path), adapters=(Adapter(Source(str(tmp_path))),)), (0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs.update({"blocks.9.attn1.to_q": pairs["proj_out"]}), r"the model has no blocks\.9"),
        (lambda pairs: pairs.update({"blocks.1.attn1.to_q": pairs["blocks.1.ffn.net.0.proj"]}),
         r"changes blocks\.1\.attn1\.to_q\.weight by \[40, 2\] times \[2, 24\], it is \[24, 24\]"),
        (lambda pairs: pairs.clear(), "lacks tensor of a LoRA"),
    ],
    ids=["unknown", "size", "nothing"],
)  # fmt: skip
def test_lora_that_does_not_fit_is_refused(change: Callable, message: str, tmp_path: Path) -> None:
    pairs = low_rank(tiny_wan())
    change(pairs)
    tiny_wan().save_pretrained(tmp_path)
    as_peft(pairs, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(Source(str(tmp_path), adapters=(Adapter(Source(str(tmp_path))),)), (0, 1))


def test_other_kinds_of_change_are_refused(tmp_path: Path) -> None:
    source = Source(str(tmp_path), adapters=(Adapter(Source(str(tmp_path))),))
    tiny_wan().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lora=.*: has neither pytorch_lora_weights"):
        load_backbone(source)
    as_peft(low_rank(tiny_wan()), tmp_path, use_dora=True)
    with pytest.raises(CheckpointError, match="is a DoRA"):
        load_backbone(source)
    save_file({"blocks.0.attn1.to_q.weight": torch.zeros(24, 24)}, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tensor blocks\.0\.attn1\.to_q\.weight is no part of a LoRA"):
        load_backbone(source)
    x, text = random(1, 4, 2, 4, 6), random(1, 5, 12)
    assert load_backbone(tmp_path)(x, staircase(2), text, INFO).isfinite().all()  # type: ignore[operator]


# --- memory ----------------------------------------------------------------------------------------------

# A stage in a process of its own: prints its private memory before and after a forward, in bytes, and bytes asked of
# its files.
STAGE = """
import sys, torch
torch.set_num_threads(1)
from pavdm_dist.models import loading
from pavdm_dist.models.base import Activation, BlockContext
from pavdm_dist.models.catalog import backbone_shape, load_backbone
from pavdm_dist.models.text_cache import TextRun

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024

def forward(model, blocks):
    grid = model.grid(2, 4, 6)
    dim = model.config.width
    run = [TextRun(0, 2, model.project_text(torch.zeros(1, 3, 12)))]
    activation = Activation(torch.zeros(1, 2, 6, dim), torch.zeros(1, 2, 6 * dim), torch.zeros(1, 2, dim))
    for index in range(*blocks):
        activation = model.block(index, activation, BlockContext(grid, run))

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
backbone_shape(folder), forward(load_backbone(sys.argv[4], (0, 1)), (0, 1))
before, model = private(), load_backbone(folder, (first, last))
forward(model, (first, last))
print(private() - before, sum(value.nbytes for value in model.state_dict().values() if not value.is_meta))
"""


@pytest.mark.slow
def test_a_stage_holds_its_share_of_the_weights(tmp_path: Path) -> None:
    """A third of 200 MB, also where all are in one file."""
    config = replace(WAN, num_attention_heads=16, attention_head_dim=32, ffn_dim=2800, num_layers=9)
    tiny_wan(config=config).save_pretrained(tmp_path / "model")
    tiny_wan().save_pretrained(tmp_path / "small")
    arguments = [str(tmp_path / "model"), "3", "6", str(tmp_path / "small")]
    done = subprocess.run([sys.executable, "-c", STAGE, *arguments], capture_output=True, text=True, check=True)
    held, share = map(int, done.stdout.split()[-2:])
    whole = (tmp_path / "model" / WEIGHTS).stat().st_size
    assert share < 0.35 * whole
    assert held < 1.3 * share
