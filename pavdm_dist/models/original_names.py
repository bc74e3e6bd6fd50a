"""Tensors by diffusers' names, also where files hold them under those of the Wan models' own programs.

That is how Wan 2.1, SkyReels-V2, Rolling Forcing, Causal-Forcing and Self-Forcing were published; some have a wrapper's
prefixes besides. A name says all, so stages rename what they read and nothing else is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pavdm_dist.errors import CheckpointError

# In every file of that layout, and in no other; and in every one that has diffusers' names.
_MARK, _OWN_MARK = "head.modulation", "condition_embedder.time_proj.weight"
_SHARDED = "_fsdp_wrapped_module."
_WRAPPERS = re.compile(r"^(?:module\.)?(?:model\.)?(?:diffusion_model\.)?")
# What diffusers' converter does not know of: SkyReels-V2's frame rate.
_FPS = {"fps_projection.0.": "fps_projection.net.0.proj.", "fps_projection.2.": "fps_projection.net.2."}


def diffusers_names(stored: Iterable[str]) -> dict[str, str]:
    """Diffusers' name of each tensor -> the one it has in its file.

    Names that are of neither layout are kept.

    Raises:
        CheckpointError: two names differ by a wrapper's prefix alone, as averages beside the weights do.
    """
    names = list(stored)
    plain = {_WRAPPERS.sub("", name.replace(_SHARDED, "")): name for name in names}
    if _OWN_MARK not in plain and _MARK not in plain:
        return dict(zip(names, names, strict=True))
    if len(plain) < len(names):
        kept = set(plain.values())
        lost = next(name for name in names if name not in kept)
        other = plain[_WRAPPERS.sub("", lost.replace(_SHARDED, ""))]
        raise CheckpointError(f"tensors {lost} and {other} are two of one model's name; leave one set in the file")
    if _OWN_MARK in plain:
        return plain
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    renamed = convert_wan_transformer_to_diffusers(plain)
    return {_with_fps(name): original for name, original in renamed.items()}


def _with_fps(name: str) -> str:
    for before, after in _FPS.items():
        name = name.replace(before, after)
    return name
