"""Bad input as Hypothesis makes it: settings, prompts, clips, model folders and what interrupted videos leave.

A *case* is plain data that a strategy draws; a category's function does it to real files and gives it to the code that
has to judge it. What comes back is ``taken`` or the sentence of a refusal; everything else is a fault.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
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
from pavdm_dist.io.metadata import is_complete
from pavdm_dist.io.parts import PARTS_SUFFIX
from pavdm_dist.io.storage import unstaged


@dataclass(frozen=True)
class Category:
    """A strategy of cases, what makes files and the words of a command of one, what judges it here, and how many the
    full run draws."""

    cases: st.SearchStrategy[Any]
    prepare: Callable[[Any, World], list[str]]
    judge: Callable[[list[str], Any, World], str]
    full: int


CATEGORIES = {
    "settings": Category(SETTINGS, settings, judge_command, 300),
    "files": Category(FILES, files, judge_file, 150),
    "prompts": Category(PROMPTS, prompts, judge_prompts, 120),
    "clips": Category(CLIPS, clips, judge_clip, 200),
    "configs": Category(CONFIGS, configs, judge_model, 250),
    "shards": Category(SHARDS, shards, judge_model, 200),
    "states": Category(STATES, states, judge_state, 150),
}
ANY = st.sampled_from([*CATEGORIES]).flatmap(lambda name: st.tuples(st.just(name), CATEGORIES[name].cases))


def check_nothing_partial(folder: Path, given: Collection[Path] = ()) -> None:
    """No final file that is not complete, and no staged one, anywhere in a folder, a batch's and parts included.

    Args:
        folder: that a command worked in.
        given: files and folders in it that it was given.
    """
    for path in folder.rglob("*"):
        assert unstaged(path.name) == path.name, f"{path} was staged and left"
        own = not any(path.is_relative_to(one) for one in given)
        in_parts = any(part.name.endswith(PARTS_SUFFIX) for part in path.parents)
        if own and not in_parts and path.is_file() and path.suffix in (".mp4", ".safetensors"):
            assert is_complete(path.with_suffix(".mp4")), f"{path} is not complete"


def as_process(name: str, case: Any, world: World) -> str:
    """The same as a command of its own: ends in time, with the status and the sentence, and leaves nothing partial."""
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
    given = {Path(word.partition("=")[2]) for word in words if word.startswith(("video=", "model="))}
    check_nothing_partial(folder, given)
    if done.returncode == 0:
        return "taken"
    return said if "usage: pavdm" in said else refusal(done.returncode, said)
