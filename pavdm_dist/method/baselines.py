"""What PA-VDM is compared with (paper section 2), as plans and rules of the one loop: nothing else differs."""

from __future__ import annotations

from typing import Any, Literal

from pavdm_dist.errors import ConfigError
from pavdm_dist.method.legal import check_whole

# How long videos are made. ``pavdm``: the published window. ``replacement``: a block of W chunks, all at one level,
# behind clean chunks; after T steps the next block. ``replacement-noise``: the same, the clean chunks being noised to
# the block's level at every step. ``fifo``: partitions and lookahead. ``autoregressive``: chunk after chunk, W = 1.
Method = Literal["pavdm", "replacement", "replacement-noise", "fifo", "autoregressive"]
# Those of which a chunk knows of the ones before by clean context alone.
CONTINUES: tuple[Method, ...] = ("replacement", "replacement-noise", "autoregressive")
# Partitions of FIFO-Diffusion's published setting.
FIFO_PARTITIONS = 4


def block_chunks(method: Method, window_chunks: int) -> int:
    """G of a method's plan."""
    return window_chunks if method in ("replacement", "replacement-noise") else 1


def context_follows(method: Method) -> bool:
    """Whether clean context is noised to the level of the chunks behind it, at every step."""
    return method == "replacement-noise"


def settings_of(method: Method, window_chunks: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """Settings of a plan that follow from the method.

    Args:
        method: which.
        window_chunks: W, as it is without the method.
        chosen: ``window_chunks``, ``partitions`` and ``lookahead`` where they were chosen, else None.

    Raises:
        ConfigError: a choice that makes it another method.
    """
    if method == "autoregressive":
        if chosen["window_chunks"] not in (None, 1):
            raise ConfigError(
                f"window_chunks={chosen['window_chunks']}: method=autoregressive makes one chunk after another; use"
                " window_chunks=1, or method=replacement for blocks"
            )
        return {"window_chunks": 1}
    if method != "fifo":
        return {}
    check_whole("window_chunks", window_chunks)
    lookahead = True if chosen["lookahead"] is None else chosen["lookahead"]
    partitions = chosen["partitions"]
    if chosen["lookahead"] is None and window_chunks % 2:
        raise ConfigError(
            f"window_chunks={window_chunks}: method=fifo looks at halves, and it has none; use"
            f" window_chunks={max(2, window_chunks - 1)} or {window_chunks + 1}, or lookahead=false"
        )
    if partitions is None:
        parts = [n for n in range(1, FIFO_PARTITIONS + 1) if window_chunks % (2 * n if lookahead else n) == 0]
        partitions = max(parts, default=1)
    if partitions == 1 and not lookahead:
        raise ConfigError(
            "method=fifo: partitions=1 and lookahead=false are method=pavdm; use partitions=2 or more, or"
            " lookahead=true"
        )
    return {"partitions": partitions, "lookahead": lookahead}
