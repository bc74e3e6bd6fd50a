"""Prompts of a shot: the one that it begins with, and later ones. They are its own: settings of sampling do not follow
from them, so that a manifest may have others on every line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pavdm_dist.config import PromptChange, check_changes
from pavdm_dist.errors import ConfigError
from pavdm_dist.farm.shot import Shot
from pavdm_dist.values.fields import is_writable
from pavdm_dist.values.merging import merged
from pavdm_dist.values.timed import first_prompt

# Overrides that say nothing but prompts.
PROMPTS = ("prompt_schedule", "timed_prompts")
# Larger numbers of chunks are looked at as any other setting is.
_MOST_CHUNKS = 10**9


@dataclass
class LaterPrompts:
    """Settings of :class:`~pavdm_dist.config.SampleConfig`, which has them under the same names."""

    prompt_schedule: list[PromptChange] = field(default_factory=list)
    timed_prompts: dict[str, str] = field(default_factory=dict)


def prompt_of(shot: Shot, sidecar: Mapping[str, Any] | None = None) -> str:
    """The prompt that a shot's video begins with; empty where what is asked for has none that can be read.

    Args:
        shot: as it is asked for.
        sidecar: of a complete one; what it was made with counts, whatever a manifest says by now.
    """
    made_with = None if sidecar is None else sidecar.get("prompt")
    if isinstance(made_with, str) and made_with.strip():
        return made_with
    if shot.prompt.strip():
        return shot.prompt
    try:
        return first_prompt(later_prompts(shot.overrides).timed_prompts) or ""
    except ConfigError:  # in a folder that an earlier version has written
        return ""


def later_prompts(overrides: Mapping[str, Any]) -> LaterPrompts:
    """The later prompts among a shot's overrides, checked as far as no model is needed for it.

    Raises:
        ConfigError: naming the field, its value and what is legal.
    """
    given = {name: overrides[name] for name in PROMPTS if name in overrides}
    if not given:
        return LaterPrompts()
    # Merging costs milliseconds a line, and finds nothing to do where all is of its kind already.
    found = _plain(given) or merged(LaterPrompts, given, "overrides")
    check_changes(found.prompt_schedule, found.timed_prompts)
    return found


def _plain(given: Mapping[str, Any]) -> LaterPrompts | None:
    """What is written as it is meant; None where merging has something to read, to replace or to refuse."""
    schedule, by_time = given.get("prompt_schedule", []), given.get("timed_prompts", {})
    if not isinstance(schedule, list) or not isinstance(by_time, dict):
        return None
    changes = []
    for entry in schedule:
        if not isinstance(entry, dict) or entry.keys() != {"from_chunk", "prompt"}:
            return None
        first, prompt = entry["from_chunk"], entry["prompt"]
        if type(first) is not int or not 0 < first < _MOST_CHUNKS or not _is_plain(prompt):
            return None
        changes.append(PromptChange(first, prompt))
    if not all(_is_plain(time) and _is_plain(prompt) for time, prompt in by_time.items()):
        return None
    return LaterPrompts(changes, dict(by_time))


def _is_plain(text: Any) -> bool:
    """Whether a text stands for itself: no home folder, and nothing that OmegaConf would look up or miss."""
    return (
        type(text) is str and is_writable(text) and "${" not in text and "???" not in text and not text.startswith("~/")
    )
