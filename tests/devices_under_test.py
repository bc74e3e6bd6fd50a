"""What tests marked ``gpu`` share: they look at the fixture ``device``, a GPU with ``-m gpu``, the CPU in every other
run. So a fault that has nothing to do with a GPU is seen without one.

What only a GPU can be asked, whether somebody waits for it, is asked here, and is no question on a CPU.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from pavdm_dist.models.base import Backbone
from pavdm_dist.models.loading import convert

# Modes, one of which is in every run.
ONE_QUICK = ["window", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("causal", "displaced"))]
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def asks_for_gpus(markexpr: str) -> bool:
    """Whether ``-m`` selects tests marked ``gpu`` alone: it is ``gpu``, or ``gpu and`` what narrows it."""
    return re.fullmatch(r"\s*gpu\s*(\sand\s(?!.*\bor\b).*)?", markexpr) is not None


def chosen(markexpr: str) -> torch.device:
    """The device of a run; float32 products on it are float32's, as on the CPU that they are compared with."""
    if not asks_for_gpus(markexpr):
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


def built(build: Callable[[], Backbone], dtype: torch.dtype, device: torch.device) -> Backbone:
    """A model on a device, in a type."""
    model = build()
    assert isinstance(model, nn.Module)
    convert(model, dtype, device, model.keeps_float32)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of a difference from a tensor of main memory."""
    return float((found.cpu() - expected).norm() / expected.norm())


@contextmanager
def nobody_waits(device: torch.device) -> Iterator[None]:
    """To wait for a GPU is an error meanwhile."""
    with _asked(device, "error"):
        yield


@contextmanager
def waits(device: torch.device) -> Iterator[set[str]]:
    """Files with lines that waited for a GPU meanwhile; there once it is over."""
    places = set[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _asked(device, "warn"):
            yield places
    places |= {warning.filename for warning in caught if "synchroniz" in str(warning.message)}


@contextmanager
def _asked(device: torch.device, mode: str) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
