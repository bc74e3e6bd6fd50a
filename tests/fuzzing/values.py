"""Values, texts and bytes that no file should hold, and damage to files that are whole."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 1000, 2**31, 2**63, 10**30]),
    st.sampled_from([0.5, -1.0, 1e-30, 1e308, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "fast", "two", "3", "null", "STDiT3", "ü", "a\0b", "../../etc/passwd", "x" * 5000]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "0", "é"]), inner, max_size=2),
    max_leaves=6,
)
TEXTS = st.one_of(
    SCALARS.map(str),
    st.text(max_size=12),
    st.sampled_from(
        [
            "[", "{", "[1", "{a: b}", "[1, 2]", "[x]", "1e999", ".nan", ".inf", "-.inf", "9" * 30, "9" * 5000, "~",
            "1_0", "0x" + "f" * 5000, "2001-99-99", "&a [*a]", "*a", "!!python/object:os.system {}", "[" * 3000,
            "{from_chunk: 1}", "[{from_chunk: 99, prompt: y}]", "[{from_chunk: -1, prompt: y}]", "- 1", "a: b: c",
            "\t", "${x}", "\\",
        ]
    ),
)  # fmt: skip
# Ten anchors, each ten times the one before.
BOMB = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 11)
)
RAW = st.binary(max_size=200) | st.sampled_from(
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 6000, b"&a [*a]", BOMB]
)


@dataclass(frozen=True)
class Damage:
    """What is done to a file's bytes: ``cut`` to ``at``, a bit ``flip``, eight bytes (``length``), or ``noise``."""

    kind: str
    at: float
    value: int

    def __call__(self, content: bytes, header: int | None = None) -> bytes:
        """``header``: damage falls within so many first bytes."""
        place = int(self.at * max(1, min(len(content), header or len(content)) - 1))
        if self.kind == "cut":
            return content[:place]
        if self.kind == "flip" and content:
            return content[:place] + bytes([content[place] ^ (1 << self.value % 8)]) + content[place + 1 :]
        if self.kind == "length":
            return struct.pack("<Q", self.value) + content[8:]
        return content[:place] + np.random.default_rng(self.value).bytes(64) + content[place + 64 :]


DAMAGE = st.builds(
    Damage,
    st.sampled_from(["cut", "flip", "flip", "length", "noise"]),
    st.floats(0, 1, width=32),
    st.sampled_from([0, 1, 7, 100, 2**31, 2**40, 2**63]) | st.integers(0, 10**6),
)
