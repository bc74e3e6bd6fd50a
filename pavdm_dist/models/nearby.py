"""What somebody may have meant who names a model that is not there. Hidden folders are nobody's models."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from pavdm_dist.io.folders import without_hidden
from pavdm_dist.io.shipped import shipped_models


def near_name(place: str) -> str:
    """``; did you mean ...?`` with a folder, or a shipped model, of nearly that name; empty where there is none."""
    path = Path(place)
    there = next((parent for parent in path.parents if os.path.isdir(parent)), None)
    if there is None or there == path:
        return ""
    missing, *rest = path.relative_to(there).parts
    try:
        names = [entry.name for entry in os.scandir(there) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        names = []
    if len(path.parts) == 1:
        names += shipped_models()
    for name in difflib.get_close_matches(missing, names, n=3, cutoff=0.6):
        found = there.joinpath(name, *rest)
        if os.path.isdir(found) or str(found) in shipped_models():
            return f"; did you mean {found}?"
    return ""


def model_near(folder: Path) -> str:
    """``; did you mean ...?`` with a model folder inside or around a folder that is none; empty where there is none."""
    # A run of training has its model in it, the hub's cache a snapshot; and a component lies in a model.
    inside = (file.parent for where in ("*", "snapshots/*") for file in folder.glob(f"{where}/model_index.json"))
    found = sorted(without_hidden(inside), key=lambda place: len(place.parts))
    found += [folder.parent] if os.path.isfile(folder.parent / "model_index.json") else []
    return f"; did you mean {found[0]}?" if found else ""


def hidden_folder(name: str) -> str:
    """``; did you mean ./NAME?`` with a model folder here that a shipped model of that name stands before; empty where
    there is none."""
    is_hidden = name in shipped_models() and os.path.isfile(os.path.join(name, "model_index.json"))
    return f"; did you mean ./{name}?" if is_hidden else ""
