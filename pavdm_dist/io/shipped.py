"""Files that come with the package: ``configs/`` of a checkout, or their copy in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

# The small model that ships inside the package.
EMBEDDED = Path(__file__).parent.parent / "embedded"


def configs_root() -> Path:
    """The folder of the shipped config files."""
    package = Path(__file__).parent.parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_file(name: str) -> str:
    """The config file that a word of the command line names: a file here, else a shipped one under the name that
    ``pavdm configs ls`` prints, with or without ``configs/`` before it; else the word itself, which is no file."""
    shipped = configs_root() / name.removeprefix("configs/")
    is_inside = shipped.resolve().is_relative_to(configs_root().resolve())
    return str(shipped) if is_inside and shipped.is_file() and not os.path.exists(name) else name


def shipped_models() -> dict[str, Path]:
    """Model folders by name: ``embedded``, with weights, and those of ``configs/model``, shapes to plan with."""
    shapes = {folder.name: folder for folder in sorted((configs_root() / "model").glob("*/"))}
    return {"embedded": EMBEDDED, **shapes}


def place_of(name: str) -> Path:
    """Where on this machine what a setting names would lie: the folder of a shipped model, else a path."""
    return shipped_models().get(name, Path(os.path.expanduser(name)))
