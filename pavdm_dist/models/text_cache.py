"""Text on one device: projected once per text, its cross-attention keys and values once per block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pavdm_dist.models.devices import to_device


@dataclass(frozen=True)
class TextRun:
    """Consecutive latent frames ``start .. stop - 1`` that share one text.

    Attributes:
        tokens: the text projected to the model's width, ``[b, L, D]``.
        mask: ``[b, L]`` bool, True = a real token; None when all are.
        key: identity of the text for the key/value cache; None in training, where nothing is cached.
    """

    start: int
    stop: int
    tokens: Tensor
    mask: Tensor | None = None
    key: str | None = None


class TextCache:
    """Cross-attention keys and values by text key and block; dropped with the text's last chunk."""

    def __init__(self) -> None:
        self._pairs: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}

    def pair(self, key: str, block: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The (key, value) pair of one text in one block, computed on first use."""
        pairs = self._pairs.setdefault(key, {})
        if block not in pairs:
            pairs[block] = make()
        return pairs[block]

    def held(self, key: str) -> dict[int, tuple[Tensor, Tensor]]:
        """All pairs of one text, by block; whoever keeps them has them when the text is dropped."""
        return self._pairs.get(key, {})

    def drop(self, key: str) -> None:
        """Forgets everything computed for one text; unknown keys are ignored."""
        self._pairs.pop(key, None)


class TextBank:
    """Texts of several owners (streams) on one device; a text that two of them use is there once.

    Texts are projected at first use, by the thread that runs the blocks: the number of threads that a product
    is computed with can change its last bits.

    Args:
        project: encoder output ``[b, L, text_dim]`` -> ``[b, L, D]``, a backbone's ``project_text``.
        device: where the texts are kept.

    Attributes:
        cache: what blocks computed from them.
    """

    def __init__(self, project: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> None:
        self.cache = TextCache()
        self._project = project
        self._device = device
        self._raw: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._users: dict[str, set[int]] = {}
        # Owners are added by a control thread while the stage's loop forgets finished ones.
        self._lock = threading.Lock()

    def add(self, owner: int, texts: Mapping[str, Tensor]) -> None:
        """Registers an owner's texts, key -> encoder output ``[L, text_dim]``; nothing is computed yet."""
        with self._lock:
            for key, text in texts.items():
                self._raw.setdefault(key, text)
                self._users.setdefault(key, set()).add(owner)

    def runs(self, keys: Sequence[str], frames: int) -> list[TextRun]:
        """Runs of equal text over consecutive chunks: ``keys`` of each, ``frames`` latent frames long each."""
        runs = list[TextRun]()
        for position, key in enumerate(keys):
            start = position * frames
            if runs and runs[-1].key == key:
                start = runs.pop().start
            runs.append(TextRun(start, (position + 1) * frames, self._projected(key), key=key))
        return runs

    def release(self, owner: int, keys: Iterable[str]) -> None:
        """The owner reads these texts no more; they are forgotten unless another one does."""
        with self._lock:
            for key in keys:
                users = self._users.get(key, set())
                users.discard(owner)
                if not users:
                    for table in (self._raw, self._tokens, self._users):
                        table.pop(key, None)
                    self.cache.drop(key)

    def _projected(self, key: str) -> Tensor:
        if key not in self._tokens:
            self._tokens[key] = self._project(to_device(self._raw[key], self._device).unsqueeze(0))
        return self._tokens[key]
