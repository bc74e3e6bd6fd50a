"""The handwriting of the embedded model's world: scikit-learn's bundled 8x8 digits (1,797 images by 43 writers, BSD-3).

They are split once into training and held-out images.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pavdm_dist.errors import ConfigError

Split = Literal["train", "heldout"]
Floats = NDArray[np.float32]

HELDOUT_FRACTION = 0.2
SPLIT_SEED = 20
# Only the clearest handwriting is used: a tiny model shown all 43 hands learns strokes long before it learns digits.
CLEAREST_FRACTION = 0.12


@cache
def load_glyphs() -> tuple[Floats, NDArray[np.int64]]:
    """All handwritten digits: ink ``[1797, 8, 8]`` in 0..1 and classes ``[1797]``.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "Training data needs scikit-learn's handwritten digits: run `pip install 'pavdm-dist[train]'`."
        ) from None
    data = load_digits()
    return (data.images / 16.0).astype(np.float32), np.asarray(data.target, dtype=np.int64)


@cache
def split_indices(split: Split) -> NDArray[np.int64]:
    """Indices of the images that belong to ``split``: the same share of every class, fixed for ever.

    Raises:
        ConfigError: ``split`` is neither "train" nor "heldout".
    """
    if split not in ("train", "heldout"):
        raise ConfigError(f"split={split!r} does not exist: use 'train' or 'heldout'.")
    _, classes = load_glyphs()
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = []
    for number in range(10):
        members = rng.permutation(np.flatnonzero(classes == number))
        cut = round(len(members) * HELDOUT_FRACTION)
        chosen.append(members[:cut] if split == "heldout" else members[cut:])
    return np.sort(np.concatenate(chosen))


@cache
def clear_images(split: Split, fraction: float = CLEAREST_FRACTION) -> dict[int, NDArray[np.int64]]:
    """For every class the ``fraction`` of ``split``'s images that are least like any other class.

    Clearness is the squared distance to the nearest other class's mean minus that to the own class's mean, means
    taken over the training images. Images without any, which are more like another class, are left out.
    """
    glyphs, classes = load_glyphs()
    train, own = split_indices("train"), split_indices(split)
    flat = glyphs.reshape(len(glyphs), -1)
    means = np.stack([flat[train[classes[train] == number]].mean(0) for number in range(10)])
    distances = ((flat[own][:, None] - means) ** 2).sum(-1)
    to_own = distances[np.arange(len(own)), classes[own]]
    distances[np.arange(len(own)), classes[own]] = np.inf
    clearness = distances.min(1) - to_own
    best = {}
    for number in range(10):
        members = np.flatnonzero(classes[own] == number)
        count = max(1, round(len(members) * fraction))
        chosen = members[np.argsort(-clearness[members], kind="stable")[:count]]
        best[number] = np.sort(own[chosen[clearness[chosen] > 0]])
    return best
