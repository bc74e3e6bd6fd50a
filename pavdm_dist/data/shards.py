"""The files of a prepared data set: settings, clip lists, shards of latents, and the index that completes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pavdm_dist.data.clips import ClipRef
from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.storage import atomic_path, atomic_write
from pavdm_dist.values.fields import json_value

T = TypeVar("T")

SETTINGS = "settings.json"
SIZES = "sizes.json"
INDEX = "index.json"
VERSION = 1
# What an index holds that others read, and of each bucket.
_KEYS = {"root": str, "shard_clips": int, "identities": dict, "buckets": list, "skipped": list}
_BUCKET_KEYS = {"bucket": str, "clips": int, "shards": list}
_A_FOLDER = "name a folder of `pavdm data prepare`"
# Shards that are missing are made again.
_AGAIN = "delete it and run `pavdm data prepare`"


def clips_file(folder: Path, bucket: int) -> Path:
    """The clips of a bucket, one JSON object a line; line i is sample i."""
    return folder / f"clips-{bucket}.jsonl"


def shard_file(folder: Path, bucket: int, number: int) -> Path:
    """Shard ``number`` of a bucket holds the samples from ``number * shard_clips`` on."""
    return folder / f"bucket-{bucket}-{number:05d}.safetensors"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file in one move; equal content gives equal bytes."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_index(folder: str | Path, setting: str = "data.folder") -> dict[str, Any]:
    """``index.json`` of a complete data set.

    Args:
        folder: of ``pavdm data prepare``.
        setting: that names it, for messages.

    Raises:
        ConfigError: no such folder, not complete, damaged, or written by another version.
    """
    path, named = Path(folder), f"{setting}={folder}"
    try:
        index = json_value((path / INDEX).read_bytes())
    except FileNotFoundError as error:
        begun = (path / SETTINGS).exists()
        state = "is not complete: run `pavdm data prepare` again" if begun else f"holds no data set: {_A_FOLDER}"
        raise ConfigError(f"{named} {state} ({INDEX} is missing)") from error
    except OSError as error:
        raise ConfigError(f"{named} cannot be read ({error.strerror}): {_A_FOLDER}") from error
    except ValueError as error:
        raise ConfigError(f"{named}: {INDEX} is not valid JSON: {error}") from error
    if not isinstance(index, dict):
        raise ConfigError(f"{named}: {INDEX} must hold names and values")
    if index.get("version") != VERSION:
        raise ConfigError(f"{named} has format version {index.get('version')}, this package reads {VERSION}")
    if missing := _missing(index):
        raise ConfigError(f"{named}: {INDEX} is damaged, it lacks {missing}: run `pavdm data prepare` again")
    return index


def _missing(index: dict[str, Any]) -> str | None:
    """The first thing that every index says and this one does not."""
    for name, kind in _KEYS.items():
        if not isinstance(index.get(name), kind):
            return name
    for number, bucket in enumerate(index["buckets"]):
        for name, kind in _BUCKET_KEYS.items():
            if not isinstance(bucket, dict) or not isinstance(bucket.get(name), kind):
                return f"buckets[{number}].{name}"
    return None


class ClipList:
    """A bucket's clips on disk: eight bytes of memory each.

    Attributes:
        path: of the list.

    Raises:
        ConfigError: the file is missing or cannot be read; when it is read, a line that is no clip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                ends = np.cumsum([0, *(len(line) for line in file)], dtype=np.int64)
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing: the data set is damaged") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}): the data set is damaged") from error
        self._starts = ends[:-1]

    def __len__(self) -> int:
        return len(self._starts)

    def videos(self) -> list[str]:
        """The video of every clip."""
        with open(self.path, "rb") as file:
            return [self._read(number, line, itemgetter("video")) for number, line in enumerate(file)]

    def read(self, numbers: Sequence[int]) -> list[ClipRef]:
        """Clips by number, in the order asked for."""
        found = []
        with open(self.path, "rb") as file:
            for number in numbers:
                file.seek(int(self._starts[number]))
                found.append(self._read(number, file.readline(), ClipRef.from_json))
        return found

    def _read(self, number: int, line: bytes, made: Callable[[dict[str, Any]], T]) -> T:
        try:
            return made(json_value(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path}: line {number + 1} is no clip ({type(error).__name__}: {error}): the data set is damaged;"
                " put the file back, or prepare another folder"
            ) from error


def write_clips(path: Path, clips: Iterable[ClipRef], same: bool = False) -> int:
    """Writes a clip list in one move; returns its length.

    Args:
        path: the list.
        clips: what it holds.
        same: shards were made from the list that is there, which must not change.

    Raises:
        ValueError: with ``same``, it would.
    """
    count, digest = 0, hashlib.sha256()
    with atomic_write(path, "w") as file:
        for clip in clips:
            line = json.dumps(clip.as_json(), ensure_ascii=False) + "\n"
            file.write(line)
            digest.update(line.encode())
            count += 1
        if same and (not path.exists() or digest.digest() != hashlib.sha256(path.read_bytes()).digest()):
            raise ValueError(f"{path.name} is not what its shards were made from")
    return count


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings ``[L_i, D]`` -> ``[b, L, D]`` with zeros behind each, and mask ``[b, L]``, True = a token."""
    padded = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def write_shard(
    path: Path, latents: Sequence[Tensor], texts: Sequence[Tensor], clips: Sequence[ClipRef], about: dict[str, str]
) -> None:
    """Writes a shard; it appears whole or not at all.

    Args:
        path: the file.
        latents: normalised ``[C, f, h, w]`` per clip; stored as fp16 ``latents [n, C, f, h, w]``.
        texts: ``[L_i, D]`` per clip; stored as fp16 ``text [n, L, D]`` and bool ``text_mask [n, L]``.
        clips: what they are.
        about: bucket and identities; stored in the header with the clips, as JSON under ``pavdm``.

    Raises:
        MediaError: naming the video whose numbers are none, or too large.
    """
    text, mask = pad_texts(texts)
    tensors = {"latents": torch.stack(list(latents)).half().cpu(), "text": text.half().cpu(), "text_mask": mask}
    for name in ("latents", "text"):
        for clip, values in zip(clips, tensors[name], strict=True):
            if not values.isfinite().all():
                raise MediaError(f"{clip.video}: its {name} cannot be held in float16: the model is damaged")
    # One entry: the order of several is random in safetensors, and equal data must give equal bytes.
    header = json.dumps({**about, "clips": [clip.as_json() for clip in clips]}, ensure_ascii=False)
    with atomic_path(path) as staged:
        save_file(tensors, staged, metadata={"pavdm": header})


def check_shard(path: Path, reader: Any, about: Mapping[str, str], clips: ClipList, first: int, count: int) -> None:
    """Compares what a shard's header says with what its data set has at that place.

    Args:
        path: the file.
        reader: of :func:`open_shard`.
        about: bucket and identities of the data set; what the header does not say is not compared.
        clips: the bucket's.
        first: number of the shard's first clip.
        count: clips of a whole shard.

    Raises:
        MediaError: it is another set's, or of another place.
        ConfigError: the list is damaged.
    """
    header = shard_header(path, reader)
    for name, value in about.items():
        if header.get(name, value) != value:
            raise MediaError(f"{path} was made with {name} {header[name]}, its data set with {value}; {_AGAIN}")
    listed = clips.read(range(first, min(first + count, len(clips))))
    if header["clips"] != [clip.as_json() for clip in listed]:
        raise MediaError(f"{path} holds other clips than {clips.path.name} lists there; {_AGAIN}")


def shard_header(path: Path, reader: Any) -> dict[str, Any]:
    """What :func:`write_shard` stored about a shard: ``clips``, bucket and identities.

    Raises:
        MediaError: it was not written by :func:`write_shard`.
    """
    try:
        header = json_value((reader.metadata() or {})["pavdm"])
        return {**header, "clips": list(header["clips"])}
    except (ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{path} has not the header of a shard; {_AGAIN}") from error


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """A reader of a shard's tensors and header.

    Raises:
        MediaError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            yield reader
    except (OSError, SafetensorError) as error:
        raise MediaError(f"{path} is missing or damaged ({error}); {_AGAIN}") from error
