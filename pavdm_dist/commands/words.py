"""The words behind a verb: prompt, config file and overrides, told apart by their form."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from pavdm_dist.errors import ConfigError
from pavdm_dist.io import shipped

if TYPE_CHECKING:
    from pavdm_dist.config import SampleConfig

    R = TypeVar("R", bound=SampleConfig)

_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def add_print_config(verb: argparse.ArgumentParser) -> None:
    """The flag of every verb that has settings."""
    about = "print all settings as YAML, merged, with what each means and what is legal, and stop"
    verb.add_argument("--print-config", action="store_true", help=about)


def is_override(word: str) -> bool:
    """Whether it is ``key=value``."""
    return _OVERRIDE.match(word) is not None


def run_config(cls: type[R], words: Sequence[str], needs_prompt: bool) -> R:
    """The checked configuration that a verb's words (prompt, config file, overrides) make."""
    from pavdm_dist.config import validate_sample
    from pavdm_dist.values.merging import load_config

    config = load_config(cls, *sort_settings(words))
    validate_sample(config, needs_prompt=needs_prompt)
    return config


def sort_settings(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config file and the overrides; a prompt is one of these."""
    prompt, config_file, overrides = sort_words(words)
    return config_file, overrides if prompt is None else [f"prompt={prompt}", *overrides]


def sort_words(words: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """Tell the prompt, the config file and the overrides apart by their form.

    The config file is one that is here or a shipped one (:func:`~pavdm_dist.io.shipped.config_file`).
    """
    prompt: str | None = None
    config_file: str | None = None
    overrides = []
    for word in words:
        if is_override(word):
            overrides.append(word)
        elif word.endswith((".yaml", ".yml")):
            if config_file is not None:
                raise ConfigError(f"two config files, {config_file} and {word}: give one")
            config_file = shipped.config_file(word)
        elif prompt is not None:
            raise ConfigError(f"two prompts, {prompt!r} and {word!r}: quote the prompt as one word")
        else:
            prompt = word
    return prompt, config_file, overrides
