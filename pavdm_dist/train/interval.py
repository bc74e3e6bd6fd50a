"""What a run shows of itself: losses over an interval of steps and by kind of window, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.models.base import Backbone
from pavdm_dist.train.batch import Batch
from pavdm_dist.train.loss import BANDS

# Dense products in bfloat16, TFLOP/s, by what is in a GPU's name (its makers' data sheets).
PEAKS = {"B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0}


def peak_tflops(device: torch.device) -> float | None:
    """Of a device, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@dataclass(frozen=True)
class Shown:
    """One step.

    Attributes:
        values: ``[1 + 2 BANDS]``: the loss, the summed error of frames in each band of levels, and their numbers, as
            means over all processes.
        grad_norm: before clipping; None where DeepSpeed was told not to compute it.
        kind: of the windows, and of their mask.
        causal: whether the mask was chunk-causal.
        frames, size: latent frames of a window, and its height and width in pixels.
        lr: the rate.
        samples, tokens: of all processes.
        flop: of this process; recomputing is not counted.
        loading_seconds: until its batch was there.
    """

    values: Tensor
    grad_norm: float | None
    kind: str
    causal: bool
    frames: int
    size: tuple[int, int]
    lr: float
    samples: int
    tokens: int
    flop: float
    loading_seconds: float


class Interval:
    """Consecutive steps.

    Args:
        device: of this process.
        peak: its TFLOP/s; None = not known.
    """

    def __init__(self, device: torch.device, peak: float | None = None) -> None:
        self._device, self._peak, self._steps = device, peak, list[Shown]()
        self._began, self._apart = time.monotonic(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, such as a save, is no time of steps."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._apart += time.monotonic() - began

    def add(self, shown: Shown) -> None:
        """One more step."""
        self._steps.append(shown)

    @property
    def count(self) -> int:
        """How many steps it has."""
        return len(self._steps)

    def line(self) -> dict[str, Any]:
        """What the log says of them, at least one: means over the steps, rates until now."""
        steps, seconds = self._steps, max(time.monotonic() - self._began - self._apart, 1e-9)
        last, count = steps[-1], len(steps)
        norms = [step.grad_norm for step in steps if step.grad_norm is not None]
        tflops = sum(step.flop for step in steps) / seconds / 1e12
        found: dict[str, Any] = {
            "loss": sum(float(step.values[0]) for step in steps) / count,
            "per_level": per_level(torch.stack([step.values for step in steps]).sum(dim=0)),
            "kinds": by_kind((step.kind, float(step.values[0])) for step in steps),
            "causal": last.causal,
            "frames": last.frames,
            "size": list(last.size),
            "grad_norm": sum(norms) / len(norms) if norms else None,
            "lr": last.lr,
            "seconds_per_step": seconds / count,
            "samples_per_second": sum(step.samples for step in steps) / seconds,
            "tokens_per_second": sum(step.tokens for step in steps) / seconds,
            "tflops": tflops,
            "loading_seconds": sum(step.loading_seconds for step in steps) / count,
        }
        if self._peak is not None:
            found["share_of_peak"] = tflops / self._peak
        if self._device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return found


def by_kind(losses: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the losses of each kind."""
    found: dict[str, list[float]] = {}
    for kind, loss in losses:
        found.setdefault(kind, []).append(loss)
    return {kind: sum(of_kind) / len(of_kind) for kind, of_kind in sorted(found.items())}


def per_level(values: Tensor) -> list[float | None]:
    """The mean error in each band of levels, of ``[1 + 2 BANDS]`` as in :class:`Shown`; None where no frame fell."""
    return [None if count == 0 else total / count for total, count in values[1:].view(2, BANDS).T.tolist()]


def step_flop(model: Backbone, batch: Batch, trains_all: bool) -> float:
    """FLOP of a training step on a process' own part of a batch.

    A backward pass is two forward ones: by inputs and by weights. Where the weights are frozen, one is spared.
    """
    samples, _, frames, *cells = batch.x.shape
    read = None if batch.window is None else batch.window.window_frames
    lengths = batch.text.lengths  # no text that is read is longer, but where one is dropped or nobody knows
    text = model.spec.text_len if lengths is None or any(batch.dropped) else max(lengths)
    costs = model.costs(model.grid(frames, *cells), text, read)
    return samples * costs.stage(0, len(costs.blocks)) * (3.0 if trains_all else 2.0)
