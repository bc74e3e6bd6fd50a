"""What somebody may have meant who names a model that is not there."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from pavdm_dist.io.shipped import shipped_models


def near_name(place: str) -> str:
    """``; did you mean ...?`` with a folder, or a shipped model, of nearly that name; empty where there is none."""
    path = Path(place)
    there = next((parent for parent in path.parents if os.path.isdir(parent)), None)
    if there is None or there == path:
        return ""
    missing, *rest = path.relative_to(there).parts
    try:
        names = [entry.name for entry in os.scandir(there) if entry.is_dir()]
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
    found = [*sorted(folder.glob("*/model_index.json")), *sorted(folder.glob("snapshots/*/model_index.json"))]
    above = folder.parent / "model_index.json"
    found += [above] if os.path.isfile(above) else []
    return f"; did you mean {found[0].parent}?" if found else ""
