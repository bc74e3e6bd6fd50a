"""What a video was begun or made with, against what it is asked for with now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pavdm_dist.errors import ConfigError
from pavdm_dist.values.rates import as_rate

# A preview decoder that is a file, which another fact of an identity tells from others.
PREVIEW_FILE = "file"
# Facts of an identity that files of earlier versions lack, and some machines: compared where both sides have them.
_WHERE_BOTH_HAVE = frozenset(
    {
        "device", "decoder_device", "decoder_threads", "lora_settings", "preview_sha256",
        "versions.diffusers", "versions.transformers",
    }
)  # fmt: skip


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two identities, in words; empty when nothing does."""
    old, new, changed = _flat(before), _flat(now), differing(before, now)
    words = [f"{name}={_show(old, name)} (now {_show(new, name)})" for name in changed[:5]]
    return ", ".join(words) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the facts in which two identities differ; those of nested ones are dotted.

    A fact that one of them lacks is a difference, but for those that came later: where it was computed, how LoRAs were
    merged, and versions of what not every video needs.
    """
    old, new = _flat(before), _flat(now)
    lacking = {name for name in {**old, **new} if name not in old or name not in new}
    compared = [name for name in {**old, **new} if name not in lacking & _WHERE_BOTH_HAVE]
    return [name for name in compared if name in lacking or old[name] != new[name]]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names; a tuple is what a file has as a list."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    if not prefix and flat.get("preview_decoder") not in (None, "rgb"):  # earlier versions kept its path
        flat["preview_decoder"] = PREVIEW_FILE
    for name in () if prefix else ("fps", "sampling.fps"):  # they kept 29.97, too, where files have 30000/1001
        with suppress(ConfigError, TypeError, KeyError):
            flat[name] = float(as_rate(flat[name]))
    return flat


def _show(facts: Mapping[str, Any], name: str) -> str:
    text = json.dumps(facts[name], ensure_ascii=False) if name in facts else "absent"
    return text if len(text) <= 60 else text[:57] + "..."
