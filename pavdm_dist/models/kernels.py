"""Attention of runs with compiled blocks: its fused kernel is chosen by shape.

Inside compiled functions it is an operation of its own: to torch's compiler one call, whichever kernel runs and however
many keys there are; so neither is a reason to compile again. On a GPU several kernels can do it and none is always the
fastest. Which one runs changes the last bits, so the choice is measured once, told to all stages and recorded, and
depends on shapes alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pavdm_dist.io.local_disk import cache_folder
from pavdm_dist.io.storage import atomic_write

logger = logging.getLogger(__name__)

# What is tried, in this order; the first of equals is taken.
CANDIDATES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_REPEATS, _WARM = 10, 3


class Choices:
    """Kernels by shape, of this process.

    Attributes:
        chosen: name of the kernel by :func:`shape_of`; where a shape has none, torch chooses.
        measuring: shapes without a kernel are timed when they are met.
        met: those that were, since measuring began.
    """

    def __init__(self) -> None:
        self.chosen: dict[str, str] = {}
        self.measuring = False
        self.met: set[str] = set()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Shapes that are met meanwhile are timed, on GPUs."""
        self.measuring, self.met = True, set()
        try:
            yield
        finally:
            self.measuring = False

    def forget_others(self) -> None:
        """Keeps what was met alone: a run's bits depend on its own shapes, not on what other runs have measured."""
        self.chosen = {shape: name for shape, name in self.chosen.items() if shape in self.met}

    def use(self, chosen: Mapping[str, str]) -> None:
        """Takes over what was measured elsewhere, in place of all there is."""
        self.chosen = dict(chosen)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[b, heads, n, d]`` each -> the shape of ``q``, by the kernel of the shape; ``mask [n, m]`` or broadcast to
        ``[b, heads, n, m]``, True where a key is read."""
        if not (self.measuring or (self.chosen and q.is_cuda)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        shape = shape_of(q, k, mask is not None)
        if self.measuring:
            self.met.add(shape)
            if q.is_cuda and shape not in self.chosen and (found := _fastest(q, k, v, mask)) is not None:
                self.chosen[shape] = found
        name = self.chosen.get(shape)
        if name is None or not q.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # The others behind it, for a tensor of this shape that lies in memory as this kernel does not read it.
        others = [kernel for other, kernel in CANDIDATES.items() if other != name]
        with sdpa_kernel([CANDIDATES[name], *others, SDPBackend.MATH], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def shape_of(q: Tensor, k: Tensor, masked: bool = False) -> str:
    """What a kernel is chosen by: sizes, type, whether there is a mask. Lengths of what is read count up to the next
    power of two, so that texts of any length have a kernel."""
    batch, heads, tokens, width = q.shape
    read = 1 << max(0, k.shape[-2] - 1).bit_length()
    what = f"{'masked ' if masked else ''}{str(q.dtype).removeprefix('torch.')}"
    return f"{batch}x{heads}x{tokens}x{width} reading {read}, {what}"


def _fastest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """The kernel with the shortest median time; None where none of them takes the shape."""
    seconds: dict[str, float] = {}
    for name, backend in CANDIDATES.items():
        try:
            seconds[name] = _time(q, k, v, mask, backend)
        except RuntimeError:  # not for this shape, type or device
            continue
    return min(seconds, key=seconds.__getitem__) if seconds else None


def _time(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: SDPBackend) -> float:
    marks = []
    with sdpa_kernel([backend]):
        for _ in range(_WARM + _REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            end.record()
            marks.append((begin, end))
    torch.cuda.synchronize(q.device)
    return statistics.median(begin.elapsed_time(end) for begin, end in marks[_WARM:])


CHOICES = Choices()


@torch.library.custom_op("pavdm::attention", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[b, heads, n, d]`` each -> ``[b, n, heads, d]``, contiguous: the order in which fused kernels write, and the
    projection behind them reads."""
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    return CHOICES.attend(q, k, v).transpose(1, 2).contiguous()


@fused_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1])


def kept_choices(device: torch.device) -> dict[str, str]:
    """What was measured on devices of this model before, by this user; nothing on CPUs."""
    place = _place(device)
    if place is None:
        return {}
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return {shape: name for shape, name in found.items() if name in CANDIDATES} if isinstance(found, dict) else {}


def keep_choices(device: torch.device) -> None:
    """Lets later runs, and this one when it goes on, choose as this process has."""
    place, found = _place(device), {**kept_choices(device), **CHOICES.chosen}
    if place is None or not found:
        return
    try:
        with atomic_write(place, "w") as file:
            json.dump(found, file)
    except OSError as error:
        logger.warning("the choice of attention kernels cannot be kept: %s", error)


def _place(device: torch.device) -> Path | None:
    if device.type != "cuda":
        return None
    facts = json.dumps([torch.cuda.get_device_name(device), torch.__version__])
    try:
        return cache_folder("kernels") / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}.json"
    except OSError:  # a user without a home
        return None
