"""What the sidecar beside a video says of how it was made, and what that cost.

Sidecars may be anybody's files of that name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import count, repeat
from pathlib import PurePosixPath
from typing import Any, Literal

from pavdm_dist.errors import MediaError, PAVDMError
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.planning.forecast import rows_of
from pavdm_dist.request.sampling import SamplingParams

# Of a video without a sidecar so many seconds are measured as one.
_STRETCH = 1.0
# Chunks whose cost is counted row by row; longer videos go on like that.
_COUNTED = 2000


def sidecar_of(path: str) -> dict[str, Any]:
    """What lies beside a video that was made here; of others nothing."""
    try:
        found = read_sidecar(path)
    except (MediaError, OSError):  # a folder of that name, or one that nobody may read
        return {}
    return found if isinstance(found, dict) and "versions" in found else {}


def text(value: object) -> str | None:
    """Sidecars may be anybody's files of that name."""
    return value if isinstance(value, str) and value else None


def chunk_lengths(sidecar: Mapping[str, Any], fps: float, seconds: float | None) -> Iterator[int]:
    """Frames of one chunk after another, without end.

    Of a video made here they are its own, unless its first frames are those of a film it goes on from.
    """
    said = within(sidecar, "extra", "chunk_frames")
    own = isinstance(said, list) and len(said) == 2 and all(type(part) is int and part > 0 for part in said)
    if seconds is None and own and not within(sidecar, "config", "include_input"):
        yield said[0]
        yield from repeat(said[1])
    length = Fraction(fps) * Fraction(_STRETCH if seconds is None else seconds)
    for number in count():
        yield max(1, round(length * (number + 1)) - round(length * number))


def within(values: Mapping[str, Any], *names: str) -> Any:
    """A value inside objects inside; None where one is lacking."""
    found: Any = values
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def group_of(path: str, sidecar: Mapping[str, Any], groups: Literal["method", "folder"]) -> str:
    """What a video is compared as: its method, with the mode where that is another than ``window``, or its folder."""
    if groups == "folder":
        return PurePosixPath(path).parent.name or "."
    method, mode = text(within(sidecar, "config", "method")), text(within(sidecar, "config", "mode"))
    if method is None:
        return "unknown"
    return method if mode in (None, "window") else f"{method}, {mode}"


def cost_of(sidecar: Mapping[str, Any]) -> dict[str, float | None]:
    """What a second of sampled video cost: micro-batches, latent frames that they held, seconds on the clock.

    Frames of a film that it goes on from were given and cost nothing. The first two follow from the settings that made
    it; guidance branches and clean context count. {} where the sidecar does not say.
    """
    said, lengths = within(sidecar, "extra", "sampling"), within(sidecar, "extra", "chunk_frames")
    try:
        displaced = Displaced(**said["displaced"])
        params = SamplingParams(**{**said, "displaced": displaced})
        first, other = lengths
        frames = _sampled(sidecar, first, other)
        chunks = min(_COUNTED, 1 + max(0, -(-(frames - first) // other)))
        rows = rows_of(params.plan(chunks), params.mode, displaced, params.chunks_per_unit)
        seconds = min(frames, first + (chunks - 1) * other) / params.fps
        branches = 1 if params.guidance_scale == 1 else 2
        calls = branches * sum(len(row.held) for row in rows) / seconds
        latents = branches * sum(sum(row.held) for row in rows) * params.latent_chunk_size / seconds
        wall = sum(sidecar["chunk_seconds"]) / (frames / params.fps) or None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, PAVDMError):
        return {}
    return {"calls_per_s": calls, "latents_per_s": latents, "seconds_per_s": wall}


def _sampled(sidecar: Mapping[str, Any], first: int, other: int) -> int:
    """Frames that were sampled: all of the file, unless it begins with those of a film that it goes on from."""
    if not within(sidecar, "config", "include_input"):
        return int(sidecar["num_frames"])
    whole = first + (len(sidecar["chunk_seconds"]) - 1) * other
    asked = within(sidecar, "identity", "num_frames")  # of the last chunk some may be cut off; none of an endless video
    return whole if asked is None else min(int(asked), whole)
