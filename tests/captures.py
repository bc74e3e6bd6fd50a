"""Captures without a GPU, in place of those of :mod:`pavdm_dist.engine.graphs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], None]


class Read(TorchDispatchMode):
    """What operations read that none of them has made: storages, held weakly, and the operation that read it first."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, str]] = {}
        self._made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for given in tree_leaves((args, dict(kwargs or {}))):
            if isinstance(given, torch.Tensor) and given.untyped_storage()._cdata not in self._made:
                storage = given.untyped_storage()
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), str(function)))
        out = function(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in self.storages:
                self._made[made.untyped_storage()._cdata] = made
        return out

    def gone(self) -> list[str]:
        """Operations whose input is no longer there."""
        return [function for storage, function in self.storages.values() if storage.expired()]


class Repeated:
    """Computes again what it was given, with the objects that it was given; all that it read must still be there."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def make_ready(self) -> None:
        """Nothing is loaded."""

    def close(self) -> None:
        """Nothing is held."""

    def __call__(self, call: Call) -> Call:
        self.captured += 1
        with Read() as read:
            call()
        read._made.clear()

        def replay() -> None:
            self.replayed += 1
            assert not read.gone(), "a graph would read memory that has been given up"
            call()

        return replay


class Failing(Repeated):
    """There is no memory for it."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self._at, self.closed = at, False

    def make_ready(self) -> None:
        if self._at == "ready":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

    def close(self) -> None:
        self.closed = True

    def __call__(self, call: Call) -> Call:
        self.captured += 1
        if self._at == "capture":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

        def replay() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

        return replay
