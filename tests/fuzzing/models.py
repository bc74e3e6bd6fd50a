"""Model folders: their JSON files and their weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fuzzing.values import DAMAGE, JSON, RAW
from fuzzing.world import World, taken
from pavdm_dist.checkpoint import Checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


_CONFIGS = ["model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"]
_WEIGHTS = [f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"]
CONFIGS = st.tuples(
    st.sampled_from(_CONFIGS),
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 200), JSON),
        st.tuples(st.just("drop"), st.integers(0, 200), st.none()),
        st.tuples(st.just("raw"), st.just(0), RAW | JSON.map(lambda value: json.dumps(value).encode())),
        st.tuples(st.just("damage"), st.just(0), DAMAGE),
    ),
)


def configs(case: tuple[str, tuple[str, int, Any]], world: World) -> list[str]:
    """JSON files of a model folder."""
    name, (what, number, value) = case
    folder = world.model_copy()
    path = folder / name
    if what in ("set", "drop"):
        content = json.loads(path.read_text())
        places = list(_places(content))
        holder, key = places[number % len(places)]
        if what == "set":
            holder[key] = value
        else:
            del holder[key]
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(value if what == "raw" else value(path.read_bytes()))
    return [*world.words(), f"model={folder}"]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(pairs):
        yield value, key
        yield from _places(entry)


def judge_model(words: list[str], case: Any, world: World) -> str:
    def judge() -> None:
        checkpoint = Checkpoint.open(words[-1].partition("=")[2])
        checkpoint.require_weights()
        _ = checkpoint.backbone, checkpoint.codec, checkpoint.text_encoder, checkpoint.null_text, checkpoint.identity

    return taken(judge)


SHARDS = st.tuples(
    st.sampled_from(_WEIGHTS),
    st.booleans(),
    st.one_of(
        st.tuples(st.just("damage"), st.integers(0, 1000), DAMAGE),
        st.tuples(st.just("header"), st.integers(0, 1000), DAMAGE),
        st.tuples(st.just("lose a shard"), st.integers(0, 1000), st.none()),
        st.tuples(st.just("lose a tensor"), st.integers(0, 1000), st.none()),
        st.tuples(st.just("shape"), st.integers(0, 1000), st.sampled_from([[], [0], [1], [2, 3], [1] * 6])),
        st.tuples(st.just("dtype"), st.integers(0, 1000), st.sampled_from(["int64", "bool", "float64", "bfloat16"])),
        st.tuples(st.just("index"), st.integers(0, 1000), JSON),
        st.tuples(st.just("misplace"), st.integers(0, 1000), st.sampled_from(["no.safetensors", "../x", "/x"])),
        st.tuples(st.just("raw index"), st.just(0), RAW),
    ),
)  # fmt: skip


def shards(case: tuple[str, bool, tuple[str, int, Any]], world: World) -> list[str]:
    """Weights of a model folder, in one file or in shards with an index."""
    name, sharded, (what, number, value) = case
    folder = world.model_copy()
    path = folder / name
    names = sorted(load_file(path))
    name = names[number % len(names)]
    if what in ("lose a tensor", "shape", "dtype"):
        tensors = load_file(path)
        if what == "lose a tensor":
            del tensors[name]
        else:
            tensors[name] = torch.ones(value) if what == "shape" else tensors[name].to(getattr(torch, value))
        save_file(tensors, path)
    index = path.with_name(f"{path.name}.index.json")
    damaged = path
    if sharded or "index" in what or "shard" in what or what == "misplace":
        tensors = load_file(path)
        path.unlink()
        halves = {key: f"part-{position % 2}.safetensors" for position, key in enumerate(sorted(tensors))}
        for part in set(halves.values()):
            save_file({key: tensors[key] for key in tensors if halves[key] == part}, path.with_name(part))
        damaged = path.with_name(f"part-{number % 2}.safetensors")
        content: Any = {"weight_map": halves}
        if what == "index":
            content = {"weight_map": value} if number % 2 else {"weight_map": {**halves, name: value}}
        elif what == "misplace":
            halves[name] = value
        elif what == "lose a shard":
            damaged.unlink()
        index.write_bytes(value if what == "raw index" else json.dumps(content).encode())
    if what in ("damage", "header"):
        content = damaged.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        damaged.write_bytes(value(content, header if what == "header" else None))
    return [*world.words(), f"model={folder}"]
