"""Bad input as Hypothesis makes it: settings, prompts, clips, model folders and what interrupted videos leave.

A *case* is plain data that a strategy draws; a category's function does it to real files and gives it to the code that
has to judge it. What comes back is ``taken`` or the sentence of a refusal; everything else is a fault.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from fuzzing.models import CONFIGS, SHARDS, configs, judge_model, shards
from fuzzing.settings import (
    FILES,
    PROMPTS,
    SETTINGS,
    files,
    judge_command,
    judge_file,
    judge_prompts,
    prompts,
    settings,
)
from fuzzing.videos import CLIPS, STATES, clips, judge_clip, judge_state, states
from fuzzing.world import World, refusal


@dataclass(frozen=True)
class Category:
    """A strategy of cases, what makes files and the words of a command of one, what judges it here, and how many the
    full run draws."""

    cases: st.SearchStrategy[Any]
    prepare: Callable[[Any, World], list[str]]
    judge: Callable[[list[str], Any, World], str]
    full: int


CATEGORIES = {
    "settings": Category(SETTINGS, settings, judge_command, 250),
    "files": Category(FILES, files, judge_file, 150),
    "prompts": Category(PROMPTS, prompts, judge_prompts, 120),
    "clips": Category(CLIPS, clips, judge_clip, 200),
    "configs": Category(CONFIGS, configs, judge_model, 250),
    "shards": Category(SHARDS, shards, judge_model, 200),
    "states": Category(STATES, states, judge_state, 150),
}
ANY = st.sampled_from([*CATEGORIES]).flatmap(lambda name: st.tuples(st.just(name), CATEGORIES[name].cases))


def as_process(name: str, case: Any, world: World) -> str:
    """The same as a command of its own: ends in time, with the status and the sentence, and no final file is there
    that is not complete."""
    folder = world.fresh()
    words = CATEGORIES[name].prepare(case, world)
    try:
        [word.encode() for word in words]
        assert not any("\0" in word for word in words)
    except (UnicodeEncodeError, AssertionError):
        return "not for a command line"
    done = subprocess.run(
        [sys.executable, "-m", "pavdm_dist", *words], capture_output=True, timeout=90, cwd=folder, check=False
    )
    said = done.stderr.decode(errors="replace")
    assert "Traceback" not in said, said
    for path in folder.glob("*.mp4"):
        assert path.with_suffix(".json").exists() or path.name.startswith("clip"), f"{path} is not complete"
    assert not list(folder.glob(".*.tmp")), "a staged file was left"
    if done.returncode == 0:
        return "taken"
    return said if "usage: pavdm" in said else refusal(done.returncode, said)
