"""What training reads: clips of one bucket a batch, from cached latents or from the videos, in an order that depends
on the seed and the step alone, so that a step number is the whole position of the sampler."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.base import TextEncoder, VideoCodec
from pavdm_dist.codecs.catalog import encoder_identity
from pavdm_dist.codecs.pretrained_text import PretrainedTextEncoder
from pavdm_dist.data.buckets import Bucket
from pavdm_dist.data.clips import read_frames
from pavdm_dist.data.index import locate
from pavdm_dist.data.shards import (
    ClipList,
    check_shard,
    clips_file,
    open_shard,
    pad_texts,
    read_index,
    shard_file,
    shard_header,
)
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.storage import sha256_file
from pavdm_dist.values.fields import TextDtype


@dataclass(frozen=True, eq=False)
class Clips:
    """One batch of clips of one bucket.

    Attributes:
        latents: normalised, float32, ``[b, C, f, h, w]``; every clip is encoded as the start of a video.
        captions: one per clip.
        text: embeddings, float32, ``[b, L, D]``, zeros behind each; L is the longest of the batch. None = not known.
        text_mask: ``[b, L]``, True = a token.
        ids: of the clips, ``path#first frame``.
    """

    latents: Tensor
    captions: list[str]
    text: Tensor | None
    text_mask: Tensor | None
    ids: list[str]


class CachedClips:
    """Latents and embeddings of a data set that was prepared with ``encode=true``, read as they are needed.

    Args:
        folder: of ``pavdm data prepare``.
        model: whose codec and text encoder the latents and embeddings must come from; None = not checked.

    Attributes:
        buckets: shapes of clips; empty ones included, so that positions are those of the settings.
        counts: clips per bucket.
        identity: hash of the list of clips, wherever the folder lies.
        root: folder that the videos lay in when they were prepared.

    Raises:
        ConfigError: not a complete data set, one without latents, or one of another codec or text encoder.
    """

    def __init__(self, folder: str | Path, model: Checkpoint | None = None) -> None:
        self._folder = Path(folder)
        index = read_index(folder)
        if not any(bucket["shards"] for bucket in index["buckets"]):
            raise ConfigError(
                f"data.folder={folder} was prepared with encode=false: read its pixels, or prepare it again"
            )
        if model is not None:
            _check_identities(folder, index["identities"], model)
        self.buckets, self.counts = _buckets(index)
        self.identity, self.root = _identity(self._folder, index), str(index["root"])
        self._shard_clips: int = index["shard_clips"]
        self._clips = _clip_lists(self._folder, self.counts)
        self._about = [{"bucket": entry["bucket"], **index["identities"]} for entry in index["buckets"]]
        self._checked: set[Path] = set()  # shards that are of this set

    def videos(self, bucket: int) -> list[str]:
        """The video of every clip of a bucket."""
        return self._clips[bucket].videos()

    def load(self, bucket: int, indices: Sequence[int]) -> Clips:
        """Reads clips by number, in the order asked for; only their part of a shard is read.

        Raises:
            MediaError: a shard is missing, damaged, or of another data set or place.
            IndexError: no such bucket or clip.
        """
        _check_numbers(self.counts, bucket, indices)
        found: dict[int, tuple[Tensor, Tensor, str, str]] = {}
        by_shard: dict[int, list[int]] = {}
        for number in indices:
            by_shard.setdefault(number // self._shard_clips, []).append(number)
        for shard, numbers in by_shard.items():
            path = shard_file(self._folder, bucket, shard)
            with open_shard(path) as reader:
                if path not in self._checked:
                    first = shard * self._shard_clips
                    check_shard(path, reader, self._about[bucket], self._clips[bucket], first, self._shard_clips)
                    self._checked.add(path)
                listed = shard_header(path, reader)["clips"]
                latents, text, mask = (reader.get_slice(name) for name in ("latents", "text", "text_mask"))
                for number in numbers:
                    row = number % self._shard_clips
                    entry = listed[row]
                    tokens = text[row : row + 1][0][mask[row : row + 1][0]].float()
                    name = f"{entry['video']}#{entry['first']}"
                    found[number] = latents[row : row + 1][0].float(), tokens, entry["caption"], name
        samples = [found[number] for number in indices]
        padded, token_mask = pad_texts([tokens for _, tokens, _, _ in samples])
        stacked = torch.stack([latents for latents, *_ in samples])
        return Clips(stacked, [s[2] for s in samples], padded, token_mask, [s[3] for s in samples])


class PixelClips:
    """As :class:`CachedClips`, decoded from the videos and encoded when a batch is asked for.

    Args:
        folder: of ``pavdm data prepare``, with or without latents.
        codec: encodes the frames.
        text_encoder: None = batches hold captions only.
        root: folder that the videos lie in; None = where they were when the data set was prepared.

    Raises:
        ConfigError: not a complete data set, or buckets that this codec cannot encode.
    """

    def __init__(
        self,
        folder: str | Path,
        codec: VideoCodec,
        text_encoder: TextEncoder | None = None,
        root: str | Path | None = None,
    ) -> None:
        index = read_index(folder)
        self.buckets, self.counts = _buckets(index)
        for bucket in self.buckets:
            bucket.check(codec.spec)
        self._codec, self._text_encoder = codec, text_encoder
        self.root = str(index["root"])
        self._root = self.root if root is None else str(root)
        self.identity = _identity(Path(folder), index)
        self._clips = _clip_lists(Path(folder), self.counts)

    def videos(self, bucket: int) -> list[str]:
        """The video of every clip of a bucket."""
        return self._clips[bucket].videos()

    def load(self, bucket: int, indices: Sequence[int]) -> Clips:
        """Reads and encodes clips by number, in the order asked for.

        Raises:
            MediaError: a video is missing, unreadable, or not the one that was prepared.
            IndexError: no such bucket or clip.
        """
        _check_numbers(self.counts, bucket, indices)
        clips = self._clips[bucket].read(indices)
        shape = self.buckets[bucket]
        latents = []
        for clip in clips:
            frames = read_frames(locate(self._root, clip.video), clip, shape, shape.num_frames(self._codec.spec))
            latents.append(self._codec.encode(torch.from_numpy(frames)).float())
        text = mask = None
        if self._text_encoder is not None:
            self._text_encoder.prepare(clip.caption for clip in clips)
            text, mask = pad_texts([self._text_encoder.encode(clip.caption) for clip in clips])
        return Clips(torch.stack(latents), [clip.caption for clip in clips], text, mask, [clip.id for clip in clips])


class BatchOrder:
    """Which clips batch ``step`` holds: a pure function of the seed and the step.

    Every bucket is an endless row of shuffled passes over its clips, cut into batches without a gap: a pass gives
    every clip once, and a batch at its end is filled from the next pass. The buckets take turns in shuffled rounds,
    each in proportion to its clips.

    Args:
        counts: clips per bucket.
        batch_sizes: clips per batch of each bucket; larger than the bucket is legal, the batch then holds clips twice.
        seed: 0 or more.

    Raises:
        ConfigError: no clips, a batch size below 1, or another number of sizes than of buckets.
    """

    def __init__(self, counts: Sequence[int], batch_sizes: Sequence[int], seed: int) -> None:
        if len(counts) != len(batch_sizes):
            raise ConfigError(f"batch_sizes={list(batch_sizes)}: {len(counts)} buckets need as many entries")
        if min(batch_sizes, default=1) < 1:
            raise ConfigError(f"batch_sizes={list(batch_sizes)}: must be at least 1 each")
        if not any(counts):
            raise ConfigError(f"counts={list(counts)}: there is no clip to train on")
        if seed < 0:
            raise ConfigError(f"seed={seed}: must be 0 or more")
        self._counts, self._sizes, self._seed = list(counts), list(batch_sizes), seed
        # Batches of each bucket in a round, which is one pass over everything; a part of one comes round now and then.
        self._share = [Fraction(n, size) for n, size in zip(counts, batch_sizes, strict=True)]
        # A batch touches the ends of two passes.
        self._permutation = lru_cache(maxsize=2 * len(self._share))(self._shuffle)
        self._round = lru_cache(maxsize=2)(self._draw_round)

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Bucket and clip numbers of batch ``step``, 0 or more; steps may be asked for in any order."""
        # The last round that begins at this step or before; rounds without a batch begin where the next one does.
        first_round, behind = int(step / sum(self._share)), int((step + len(self._share)) / sum(self._share)) + 2
        number = bisect_right(range(first_round, behind), step, key=self._begin) + first_round - 1
        buckets, turn = self._round(number)
        place = step - self._begin(number)
        bucket = int(buckets[place])
        size, count = self._sizes[bucket], self._counts[bucket]
        first = int(turn[place]) * size
        rows = (divmod(position, count) for position in range(first, first + size))
        return bucket, [int(self._permutation(bucket, epoch)[row]) for epoch, row in rows]

    def _shuffle(self, bucket: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, 1, bucket, epoch)).permutation(self._counts[bucket])

    def _begin(self, number: int) -> int:
        """The first step of a round."""
        return sum(int(number * share) for share in self._share)

    def _draw_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The buckets of a round's batches, and how many batches of the same bucket came before."""
        before, after = ([int(n * share) for share in self._share] for n in (number, number + 1))
        buckets = np.repeat(np.arange(len(self._share)), np.subtract(after, before))
        np.random.default_rng((self._seed, 2, number)).shuffle(buckets)
        turn = np.empty_like(buckets)
        for bucket, (first, behind) in enumerate(zip(before, after, strict=True)):
            turn[buckets == bucket] = np.arange(first, behind)
        return buckets, turn


def _buckets(index: dict) -> tuple[list[Bucket], list[int]]:
    entries = index["buckets"]
    return [Bucket.parse(entry["bucket"]) for entry in entries], [entry["clips"] for entry in entries]


def _clip_lists(folder: Path, counts: Sequence[int]) -> list[ClipList]:
    """The list of every bucket; raises ConfigError where one is not as long as the index says."""
    lists = [ClipList(clips_file(folder, number)) for number in range(len(counts))]
    for clips, count in zip(lists, counts, strict=True):
        if len(clips) != count:
            raise ConfigError(
                f"{clips.path} lists {len(clips)} clips, the index has {count}: the data set is damaged; put the file"
                " back, or prepare another folder"
            )
    return lists


def _identity(folder: Path, index: dict) -> str:
    digest = hashlib.sha256()
    for number, bucket in enumerate(index["buckets"]):
        digest.update(f"{bucket['bucket']} {sha256_file(clips_file(folder, number))}\n".encode())
    return digest.hexdigest()[:16]


def _check_numbers(counts: Sequence[int], bucket: int, indices: Sequence[int]) -> None:
    if not 0 <= bucket < len(counts) or not indices or not all(0 <= number < counts[bucket] for number in indices):
        raise IndexError(f"bucket {bucket}, clips {list(indices)}: the buckets hold {list(counts)} clips")


def _check_identities(folder: str | Path, found: dict[str, str], model: Checkpoint) -> None:
    wanted = {"codec": encoder_identity(model.vae), "text_encoder": model.text_encoder.identity}
    for name, identity in wanted.items():
        if found.get(name) != identity:
            dtype = _text_dtype(found.get(name), model) if name == "text_encoder" else None
            if dtype is not None:
                raise ConfigError(
                    f"data.folder={folder} was prepared with text_dtype={dtype}, this run has {model.text.dtype}: use"
                    f" {dtype} (to train, data.text_dtype), or prepare it again"
                )
            raise ConfigError(
                f"data.folder={folder} was prepared with {name} {found.get(name)}, model={model.source} has {identity}:"
                " prepare it again with that model"
            )


def _text_dtype(identity: str | None, model: Checkpoint) -> TextDtype | None:
    """The type in which this model's pretrained text encoder is the one with that identity; None in none."""
    if not isinstance(model.text_encoder, PretrainedTextEncoder):
        return None
    kinds: tuple[TextDtype, ...] = get_args(TextDtype)
    models = {dtype: replace(model, text=replace(model.text, dtype=dtype)) for dtype in kinds}
    return next((dtype for dtype, other in models.items() if other.text_encoder.identity == identity), None)
