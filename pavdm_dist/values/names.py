"""Names that are none: what was meant by a mistyped one, or by one that other tools use. Light to import."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection
from importlib.util import find_spec

from pavdm_dist.errors import ConfigError

# So alike are a word and its slips (widht, mdoe); words that are less so have other meanings (seconds and end).
_ALIKE = 0.7
# What manifests, HTTP and other tools call it, and what it is called here: the first that there is.
_OTHERWISE = {
    "size": ("height and width",),
    "resolution": ("height and width",),
    "duration": ("seconds", "num_frames"),
    "length": ("seconds", "num_frames"),
    "frames": ("num_frames",),
    "video_length": ("num_frames",),
    "frame_rate": ("fps",),
    "steps": ("num_inference_steps", "optimizer.total_steps"),
    "max_steps": ("optimizer.total_steps",),
    "cfg": ("guidance_scale",),
    "cfg_scale": ("guidance_scale",),
    "guidance": ("guidance_scale",),
    "shift": ("time_shift",),
    "flow_shift": ("time_shift",),
    "checkpoint": ("model",),
    "ckpt": ("model",),
    "model_path": ("model",),
    "output_dir": ("output", "run_dir"),
    "stages": ("num_stages",),
    "torch_dtype": ("dtype",),
    "learning_rate": ("optimizer.lr",),
    "batch_size": ("data.batch_size",),
}


class UnknownSettingError(ConfigError):
    """No setting has this name.

    Args:
        message: with what may be meant instead.
        name: as it was written.
        bare: the message without what may be meant; None where that is no guess by what looks alike, or where the name
            is of a part of a setting.
    """

    def __init__(self, message: str, name: str = "", bare: str | None = None) -> None:
        super().__init__(message)
        self.name, self.bare = name, bare


def same(name: str, legal: Collection[str]) -> str:
    """Legal names of what ``name`` says elsewhere, or in sections: ``height and width``; empty where there are none.

    Args:
        name: unknown.
        legal: names, those in sections with dots.
    """
    for names in _OTHERWISE.get(name, ()):
        if all(part in legal for part in names.split(" and ")):
            return names
    return " or ".join(known for known in legal if known.rpartition(".")[2] == name)


def alike(name: str, legal: Collection[str]) -> str:
    """The legal name that ``name`` is a slip of; empty where there is none."""
    return next(iter(difflib.get_close_matches(name.replace("-", "_"), legal, n=1, cutoff=_ALIKE)), "")


def own_names(module: str, cls: str) -> set[str]:
    """Names of the fields that a dataclass adds to its bases'; none where there is no source.

    They are read and not imported: what settings import may take seconds, which a slip of the finger is not worth.
    """
    spec = find_spec(module)
    get_source = getattr(spec and spec.loader, "get_source", None)
    source = get_source(module) if get_source is not None else None
    return {
        line.target.id
        for node in ast.parse(source or "").body
        if isinstance(node, ast.ClassDef) and node.name == cls
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
