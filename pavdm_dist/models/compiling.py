"""Functions of tensors that torch compiles whole, each version for one shape."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.io.local_disk import cache_folder

# Torch 2.11 pads the strides of large tensors on GPUs, and then reads what is a view of another by strides that the
# other was not written by. Of queries and keys of 30 latent frames some were others', and some what lies behind a
# tensor's end, as the kernels that it makes show. Nothing here gains by padding.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"comprehensive_padding": False}


class Compiler:
    """Versions of functions, made at their first call and kept.

    For sampling a version has fixed sizes and is found by them, so that a call checks one version's conditions and
    nothing is compiled twice. In training, where sizes vary, there is one version of each kind: compiled for the first
    size and, when that changes, once more for all.

    Args:
        backend: of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._options = _OPTIONS if backend == "inductor" else None
        self._versions: dict[Hashable, Callable[..., Any]] = {}

    def of(self, function: Callable[..., Any], kind: Hashable, *shape: Hashable) -> Callable[..., Any]:
        """The version of ``function`` for a kind of call and a shape.

        Args:
            function: of tensors.
            kind: what it does otherwise in some calls than in others: which tensors are there, which sizes are 1. All
                that is left open without it is compiled again and again, until torch gives up.
            shape: all that its tensors' sizes and types follow from.
        """
        trained = torch.is_grad_enabled()
        key = (function, trained, kind, *(() if trained else shape), torch.is_inference_mode_enabled())
        if key not in self._versions:
            sizes = None if trained else False
            self._versions[key] = torch.compile(
                _alone(function), fullgraph=True, dynamic=sizes, backend=self.backend, options=self._options
            )
        return self._versions[key]

    @property
    def num_versions(self) -> int:
        """How many there are."""
        return len(self._versions)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own: torch counts recompilations by that, and gives up after a few.

    Whoever compiles for many sizes would soon be there.
    """
    assert isinstance(function, types.FunctionType), "what is compiled is a plain function of tensors"
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )


def any_length(tensor: Tensor, dim: int) -> Tensor:
    """Marks an axis of a tensor as one whose size compiled functions leave open: texts have many lengths."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def keep_on_disk() -> None:
    """Before anything is compiled: what is compiled is kept for later runs, in this user's cache folder.

    ``TORCHINDUCTOR_CACHE_DIR`` says otherwise; by itself torch keeps it where a machine's start removes it.
    """
    with suppress(OSError):  # a user without a home compiles every time
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
