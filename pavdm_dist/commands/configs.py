"""The config files that come with the package: ``configs/`` of a checkout, or their copy in an installed wheel."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pavdm_dist.errors import ConfigError
from pavdm_dist.io.shipped import configs_root


def describe_configs() -> list[tuple[str, str]]:
    """(name, first comment line) of each shipped file, the name relative to the folder, e.g. ``sample/quick.yaml``."""
    root = configs_root()
    return [(path.relative_to(root).as_posix(), _first_comment(path)) for path in sorted(root.rglob("*.yaml"))]


def copy_config(name: str, target: str | None = None, overwrite: bool = False) -> Path:
    """Copy a shipped file to ``target`` (file or existing folder; default: here, under its own name).

    Args:
        name: as :func:`describe_configs` has it, or its last part where no other file has the same.

    Raises:
        ConfigError: no such file, or the target exists and ``overwrite`` is False.
    """
    names = [known for known, _ in describe_configs()]
    wanted = name.removeprefix("configs/")
    wanted = wanted if wanted.endswith(".yaml") else f"{wanted}.yaml"
    if wanted not in names:
        of_this_name = [known for known in names if Path(known).name == wanted]
        if len(of_this_name) != 1:
            raise ConfigError(f"{name}: {_nearest(wanted, names, of_this_name)}")
        (wanted,) = of_this_name
    place = Path(target or ".")
    place = place / Path(wanted).name if os.path.isdir(place) else place
    if os.path.lexists(place) and not overwrite:
        raise ConfigError(f"{place}: exists already; --overwrite replaces it")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(configs_root() / wanted, place)
    except OSError as error:
        raise ConfigError(f"{place}: cannot be written ({error.strerror})") from error
    return place


def _nearest(wanted: str, names: Sequence[str], of_this_name: Sequence[str]) -> str:
    if of_this_name:
        return f"there are {' and '.join(of_this_name)}, say which"
    # A slip in the last part is a small share of the whole, and so is another file's folder.
    last_parts = [Path(known).name for known in names]
    near = difflib.get_close_matches(Path(wanted).name, last_parts, n=1, cutoff=0.7)
    meant = " or ".join(known for known, part in zip(names, last_parts, strict=True) if part in near)
    return f"no such config; {f'did you mean {meant}?' if meant else '`pavdm configs ls` lists them'}"


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
