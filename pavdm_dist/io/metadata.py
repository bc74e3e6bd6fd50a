"""The JSON sidecar beside every finished video: how it was made. *Sidecar exists <=> video complete*."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import pavdm_dist
from pavdm_dist.errors import MediaError
from pavdm_dist.io.checksums import kept_sha256
from pavdm_dist.io.storage import atomic_write, exists, open_read, sha256_file
from pavdm_dist.values.fields import json_value

_PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "av", "numpy", "safetensors", "omegaconf")
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")


def sidecar_path(output: str | Path) -> str:
    """``clip.mp4`` -> ``clip.json``, in the same folder."""
    text = str(output)
    folder, slash, name = text.rpartition("/")
    stem = name.rpartition(".")[0] or name
    return f"{folder}{slash}{stem}.json"


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and those it stands on; None = not installed. Imports none of them."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "pavdm_dist": pavdm_dist.__version__}
    for name in _PACKAGES:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """Name of this machine's CPU type; the architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def weights_identity(folder: str | Path, names: Iterable[str]) -> str:
    """SHA-256 over the names and bytes of a checkpoint's files, in order of name.

    Large files in the hub's cache are not read for it: the cache names them by their SHA-256. Others are read once and
    known again (:func:`~pavdm_dist.io.checksums.kept_sha256`).

    Args:
        folder: of the checkpoint.
        names: of the files in it that make it what it is, relative, with slashes.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder, name) for name in names):
        digest.update(f"{path.relative_to(folder).as_posix()} {_file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    blob = path.resolve()
    known = blob.parent.name == "blobs" and _HUB_BLOB.fullmatch(blob.name)
    return blob.name if known else kept_sha256(path)


@dataclass
class Sidecar:
    """All that is needed to make the same video again, and to tell whether it is the same.

    Attributes:
        config: the resolved settings.
        prompt, negative_prompt: text of the first chunk; a prompt schedule is in ``config``.
        seed: noise of chunk k is a function of (seed, k).
        num_frames, fps, height, width: of the video file.
        device, threads: what the bits depend on besides ``versions``: device model, intra-op threads.
        chunk_seconds: wall-clock seconds from one finished chunk to the next, first to last.
        video_sha256: of the file's bytes.
        latents_sha256: of the clean new latents (see :class:`~pavdm_dist.io.latents.LatentsHash`).
        weights: identity of the checkpoint.
        identity: what must be equal for a command to take the video for its own (JSON-compatible).
        extra: anything more, JSON-compatible.
        versions: of the packages used.
        created: when, UTC, ISO 8601.
    """

    config: Mapping[str, Any]
    prompt: str
    negative_prompt: str | None
    seed: int
    num_frames: int
    fps: float
    height: int
    width: int
    device: str
    threads: int
    chunk_seconds: list[float] = field(default_factory=list)
    video_sha256: str | None = None
    latents_sha256: str | None = None
    weights: str | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=versions)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def write(self, output: str | Path) -> str:
        """Writes the sidecar of the finished video ``output`` in one move; call it last.

        The video's checksum is computed here when it is not set.

        Returns:
            The sidecar's path.
        """
        if self.video_sha256 is None:
            self.video_sha256 = sha256_file(output)
        # Serialised before the file is opened: a value JSON cannot hold must not leave a half-written file.
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        path = sidecar_path(output)
        with atomic_write(path, "w") as file:
            file.write(text + "\n")
        return path


def is_complete(output: str | Path) -> bool:
    """Whether the video was finished, that is, has a sidecar, and no other file of that name."""
    try:
        found = read_sidecar(output)
    except (MediaError, OSError):
        return False
    of = found.get("versions") if isinstance(found, Mapping) else None
    return isinstance(of, Mapping) and "pavdm_dist" in of


def read_sidecar(output: str | Path) -> dict[str, Any]:
    """The sidecar of a video.

    Raises:
        MediaError: none there, or not JSON.
    """
    path = sidecar_path(output)
    if not exists(path):
        raise MediaError(f"{path}: no such file, so {output} is not complete")
    with open_read(path) as file:
        try:
            return json_value(file.read())
        except ValueError as error:
            raise MediaError(f"{path} is not valid JSON: {error}") from error
