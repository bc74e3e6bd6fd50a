"""Overrides, config files and prompts."""

from __future__ import annotations

import json
import os
import string
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st

from fuzzing.values import JSON, RAW, TEXTS
from fuzzing.world import World, command, taken
from pavdm_dist.commands.sample import check_videos
from pavdm_dist.commands.words import run_config
from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.data.prepare import PrepareConfig
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config

_KEYS = [field.name for field in fields(SampleConfig) if field.name not in ("model", "balance")]
_SECTIONS = [f"displaced.{name}" for name in ("resync_every_steps", "adaptive")] + ["cluster.devices", "cluster.tflops"]
OVERRIDES = st.lists(
    st.tuples(st.sampled_from([*_KEYS, *_SECTIONS, "num_frame", "seed.x", "", "displaced"]), TEXTS).map("=".join)
    | st.text(string.printable, max_size=10),
    min_size=1,
    max_size=4,
)
SETTINGS = st.tuples(st.sampled_from([["plan"], ["sample", "a three", "--dry-run"], ["simulate"]]), OVERRIDES)


def settings(case: tuple[list[str], list[str]], world: World) -> list[str]:
    """Overrides of a verb that computes no video."""
    verb, overrides = case
    model = [] if verb == ["simulate"] else [f"model={world.model}"]
    return [*verb, *model, *overrides]


def judge_command(words: list[str], case: Any, world: World) -> str:
    return command(words)


FILES = st.tuples(
    st.sampled_from([SampleConfig, TrainConfig, PrepareConfig]),
    st.one_of(
        st.dictionaries(st.sampled_from([*_KEYS, "optimizer", "model", "source", "data"]), JSON, max_size=4).map(
            lambda values: json.dumps(values).encode()
        ),
        RAW,
        st.lists(TEXTS, max_size=4).map(lambda lines: "\n".join(lines).encode(errors="surrogatepass")),
    ),
)


def files(case: tuple[type, bytes], world: World) -> list[str]:
    """Config files."""
    path = world.fresh() / "c.yaml"
    path.write_bytes(case[1])
    return [*world.words(), str(path), "num_stages=0"]


def judge_file(words: list[str], case: tuple[type, bytes], world: World) -> str:
    cls, path = case[0], world.root / "case" / "c.yaml"

    def judge() -> None:
        config = load_config(cls, path)
        if isinstance(config, SampleConfig):
            config.prompt = "a three"
            validate_sample(config)

    return taken(judge)


PROMPTS = st.tuples(
    st.one_of(
        st.text(st.characters(), max_size=60),
        st.sampled_from(["a " * 100, "\ud800", "a\0b", "", " ", "${x}", "../..", "$(rm x)", "a\nb", "ÄÖÜ" * 200]),
    ),
    st.sampled_from(["prompt", "negative_prompt", "schedule", "file"]),
    st.integers(-1, 6),
)


def prompts(case: tuple[str, str, int], world: World) -> list[str]:
    """Texts, alone, from a file, or from a later chunk on."""
    text, where, start = case
    first, *rest = world.words(prompt=None, output="out")
    rest.append("guidance_scale=2")
    if where == "file":
        path = world.fresh() / "prompts.txt"
        path.write_bytes(text.encode(errors="surrogatepass"))
        return [first, *rest, f"prompts={path}"]
    if where == "schedule":
        word = json.dumps([{"from_chunk": start, "prompt": text}])
        return [first, "a three", *rest, f"prompt_schedule={word}"]
    return [first, *([] if where == "prompt" else ["a three"]), *rest, f"{where}={text}"]


def judge_prompts(words: list[str], case: Any, world: World) -> str:
    def judge() -> None:
        config = run_config(SampleConfig, words[1:], needs_prompt=True)
        for video in check_videos(config, overwrite=False).all:
            name = os.path.relpath(video.output, config.output)
            assert os.sep not in name and name.endswith(".mp4"), f"{video.output} is not in {config.output}"

    return taken(judge)
