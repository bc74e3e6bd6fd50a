"""Several prepared folders as one data set: a set grows by a folder for what is new."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch

from pavdm_dist.data.buckets import Bucket
from pavdm_dist.data.dataset import CachedClips, Clips, PixelClips
from pavdm_dist.data.index import locate
from pavdm_dist.data.shards import pad_texts
from pavdm_dist.errors import ConfigError


class SeveralClips:
    """The clips of several sets, each bucket's one set after the other.

    Args:
        sets: one or more, of one codec and text encoder.

    Attributes:
        buckets: of all sets, each once, in the order in which they come.
        counts: clips per bucket, of all sets together.
        identity: of the sets, in their order.

    Raises:
        ConfigError: no set, or one twice.
    """

    def __init__(self, sets: Sequence[CachedClips | PixelClips]) -> None:
        if not sets:
            raise ConfigError("data.folder=[]: name a folder of `pavdm data prepare`")
        self.buckets: list[Bucket] = []
        # Of each bucket (set, its number for the bucket, clips).
        self._parts: list[list[tuple[CachedClips | PixelClips, int, int]]] = []
        for one in sets:
            for number, (bucket, count) in enumerate(zip(one.buckets, one.counts, strict=True)):
                place = next((n for n, known in enumerate(self.buckets) if known.same(bucket)), len(self.buckets))
                if place == len(self.buckets):
                    self.buckets.append(bucket)
                    self._parts.append([])
                self._parts[place].append((one, number, count))
        identities = [one.identity for one in sets]
        if len(set(identities)) < len(identities):
            raise ConfigError("data.folder: two of the folders hold the same clips; name each once")
        self._roots = {one.identity: one.root for one in sets}
        self.counts = [sum(count for *_, count in parts) for parts in self._parts]
        self._begins = [[0, *accumulate(count for *_, count in parts)] for parts in self._parts]
        self.identity = (
            identities[0] if len(sets) == 1 else hashlib.sha256(" ".join(identities).encode()).hexdigest()[:16]
        )

    def videos(self, bucket: int) -> list[tuple[str, str]]:
        """Of every clip of a bucket: which set's, and which video there."""
        return [(one.identity, name) for one, own, _ in self._parts[bucket] for name in one.videos(own)]

    def place(self, video: tuple[str, str]) -> str:
        """Where one of :meth:`videos` lay when it was prepared: the same for a video that several sets hold.

        By what the sets say alone: machines that train may have their videos elsewhere, or not at all.
        """
        identity, name = video
        return os.path.normpath(locate(self._roots[identity], name))

    def load(self, bucket: int, indices: Sequence[int]) -> Clips:
        """As the sets' own ``load``: clips by number, in the order asked for."""
        if not 0 <= bucket < len(self.counts) or not indices or not all(0 <= n < self.counts[bucket] for n in indices):
            raise IndexError(f"bucket {bucket}, clips {list(indices)}: the buckets hold {self.counts} clips")
        begins = self._begins[bucket]
        rows: dict[int, list[int]] = {}  # of each set that is asked, places in the batch
        for row, number in enumerate(indices):
            rows.setdefault(bisect_right(begins, number) - 1, []).append(row)
        found = {}
        for part, places in rows.items():
            one, own, _ = self._parts[bucket][part]
            found[part] = one.load(own, [indices[row] - begins[part] for row in places])
        return _joined([(found[part], places) for part, places in rows.items()], len(indices))


class SomeClips:
    """Some clips of every bucket of a set.

    Args:
        clips: the set.
        numbers: of each bucket, the numbers of its clips.

    Attributes:
        buckets, counts, identity: as of the set.
    """

    def __init__(self, clips: SeveralClips, numbers: Sequence[Sequence[int]]) -> None:
        self._clips, self._numbers = clips, numbers
        self.buckets, self.counts, self.identity = clips.buckets, [len(some) for some in numbers], clips.identity

    def load(self, bucket: int, indices: Sequence[int]) -> Clips:
        """As the set's own ``load``."""
        return self._clips.load(bucket, [self._numbers[bucket][number] for number in indices])


def _joined(parts: Sequence[tuple[Clips, Sequence[int]]], size: int) -> Clips:
    """One batch of several; each comes with its places in it."""
    if len(parts) == 1:
        return parts[0][0]
    entries = [(row, clips, number) for clips, rows in parts for number, row in enumerate(rows)]
    by_row = sorted(entries, key=lambda entry: entry[0])
    assert len(by_row) == size
    text = mask = None
    if all(clips.text is not None for clips, _ in parts):
        text, mask = pad_texts([clips.text[n][clips.text_mask[n]] for _, clips, n in by_row])  # type: ignore[index]
    return Clips(
        torch.stack([clips.latents[number] for _, clips, number in by_row]),
        [clips.captions[number] for _, clips, number in by_row],
        text,
        mask,
        [clips.ids[number] for _, clips, number in by_row],
    )
