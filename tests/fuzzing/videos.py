"""Conditioning clips, and what an interrupted video left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fuzzing.values import DAMAGE, JSON, RAW, Damage
from fuzzing.world import Silent, World, taken
from pavdm_dist.commands.resume import configs_to_resume
from pavdm_dist.commands.sample import render_command
from pavdm_dist.commands.words import run_config
from pavdm_dist.config import SampleConfig
from pavdm_dist.io.video import probe, read_clip

CLIPS = st.tuples(st.integers(0, 4), st.lists(DAMAGE, max_size=2), st.sampled_from([None, 64, 400]), st.booleans())


def clips(case: tuple[int, list[Damage], int | None, bool], world: World) -> list[str]:
    """Conditioning clips: truncated, flipped, of other codecs, of sound only, empty, with lies in their headers."""
    number, damages, header, renamed = case
    whole = world.clips[number]
    content = whole.read_bytes()
    for damage in damages:
        content = damage(content, header)
    path = world.fresh() / ("clip.mp4" if renamed else f"clip{whole.suffix}")
    path.write_bytes(content)
    return [*world.words(), "start=chunk", f"video={path}"]


def judge_clip(words: list[str], case: Any, world: World) -> str:
    path = words[-1].partition("=")[2]

    def judge() -> None:
        probe(path)
        frames = read_clip(path, None, 32, 48, 24, "last", 4)
        assert frames.dtype == np.uint8 and frames.shape[1:] == (32, 48, 3) and len(frames) % 4 == 1

    return taken(judge)


_PARTS = [
    "state.safetensors", "state.previous.safetensors", "settings.yaml", "segment-000000-000001.mp4",
    "segment-000002-000003.mp4", "latents-000000-000001.safetensors", "playlist.ffconcat",
]  # fmt: skip
STATES = st.tuples(
    st.lists(
        st.tuples(st.sampled_from(_PARTS), st.one_of(DAMAGE, RAW, st.none(), st.just("folder"))),
        min_size=1,
        max_size=3,
        unique_by=lambda one: one[0],
    ),
    st.none() | JSON | RAW,
)


def states(case: tuple[list[tuple[str, Any]], Any], world: World) -> list[str]:
    """What an interrupted video left: state, settings, segments, latents; and a sidecar that is not one."""
    damages, sidecar = case
    folder = world.fresh()
    shutil.copytree(world.begun.parent, folder, dirs_exist_ok=True)
    output = folder / "v.mp4"
    parts = Path(f"{output}.parts")
    for name, damage in damages:
        path = parts / name
        content = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if damage == "folder":
            path.mkdir()
        elif damage is not None:
            path.write_bytes(damage(content) if isinstance(damage, Damage) else damage)
    if sidecar is not None:
        content = sidecar if isinstance(sidecar, bytes) else json.dumps(sidecar).encode()
        output.with_suffix(".json").write_bytes(content)
    return world.words(output="v.mp4")


def judge_state(words: list[str], case: Any, world: World) -> str:
    output = world.root / "case" / "v.mp4"
    taken(lambda: configs_to_resume(f"{output}.parts"))
    whole = json.loads((world.root / "whole" / "v.json").read_text())

    def judge() -> None:
        (made,) = render_command(run_config(SampleConfig, words[1:], needs_prompt=True), False, Silent)["videos"]
        assert (made["num_frames"], made["latents_sha256"]) == (whole["num_frames"], whole["latents_sha256"])

    said = taken(judge)
    assert output.exists() == (said == "taken"), "the final file of a video that is not finished"
    return said
