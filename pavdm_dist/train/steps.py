"""One optimizer step: its batch, its passes, and what it shows, which is looked at when nothing need wait for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pavdm_dist.errors import EngineError
from pavdm_dist.train.batch import Batch, Batches
from pavdm_dist.train.interval import Shown, step_flop
from pavdm_dist.train.loss import velocity_loss
from pavdm_dist.train.ranks import World
from pavdm_dist.train.sequence import SequenceGroup
from pavdm_dist.train.zero import ZeroEngine


@dataclass(frozen=True)
class Loaded:
    """This process' part of a step's batch, or why there is none; how long it was waited for."""

    batch: Batch | None
    fault: Exception | None
    seconds: float


@dataclass(frozen=True)
class Pending:
    """What a step has shown and nobody has looked at yet.

    Attributes:
        step: its number.
        arrived: waits for ``[share of bad losses, gradient's norm, loss, sums, counts]``, means over the processes.
        own: whether this process' loss is no number.
        has_norm: whether the norm is one.
        ids: this process' clips.
        about: the rest of :class:`~pavdm_dist.train.interval.Shown`.
    """

    step: int
    arrived: Callable[[], Tensor]
    own: Tensor
    has_norm: bool
    ids: list[str]
    about: dict[str, Any]


def load(batches: Batches, step: int, sequence: SequenceGroup) -> Loaded:
    """This process' part of a batch; what keeps it from loading is for all processes to hear of."""
    began = time.monotonic()
    try:
        batch = batches.batch(step, sequence.data_rank, sequence.data_size)
    except Exception as error:  # whatever it is
        return Loaded(None, error, time.monotonic() - began)
    return Loaded(batch, None, time.monotonic() - began)


def refuse(loaded: Loaded, what: str, world: World) -> None:
    """Ends every process, where one cannot load its part of a batch, with a sentence.

    Args:
        loaded: of this process.
        what: was to be loaded, such as ``step 3``.
        world: all processes.

    Raises:
        EngineError: another process cannot.
        PAVDMError: this one cannot.
    """
    fault = loaded.fault
    if world.size > 1:
        reasons = world.gather(None if fault is None else f"{type(fault).__name__}: {fault}")
        first = next((rank, text) for rank, text in enumerate(reasons) if text is not None)
        if fault is None:
            raise EngineError(f"process {first[0]} cannot load {what} ({first[1]})")
    assert fault is not None
    raise fault


def advance(
    engine: ZeroEngine, loaded: Loaded, step: int, parts: int, world: World, sequence: SequenceGroup
) -> Pending:
    """Forward and backward passes of all parts of a batch, and the optimizer's step; nothing waits for the device.

    Args:
        engine: the model and its optimizer.
        loaded: this process' part of the batch.
        step: its number.
        parts: that the batch is worked off in.
        world: all processes.
        sequence: those that share windows.
    """
    whole = loaded.batch
    assert whole is not None
    batch = sequence.cut(whole)
    found = list[Tensor]()
    norm: Tensor | float | None = None
    for part in (part.to(world.device) for part in batch.parts(parts)):
        given = (part.text, part.dropped, part.info, part.chunk_causal, part.window)
        velocity = engine.forward(part.x, part.levels, *given)
        about = (part.levels, part.context, part.window, sequence.size)
        loss, sums, counts = velocity_loss(velocity.float(), part.target, *about)
        engine.backward(loss)
        found.append(torch.cat([loss.detach()[None] / parts, sums, counts]))
        norm = engine.step()
    values = torch.stack(found).sum(dim=0)
    own = ~values[:1].isfinite()
    # The norm is the same everywhere; by itself it could only be read when all that follows it is done.
    told = torch.as_tensor(0.0 if norm is None else norm, dtype=values.dtype, device=values.device).reshape(1)
    arrived = world.begin_mean(torch.cat([own.float(), told, values]))
    model, frames = engine.module.transformer, whole.levels.shape[1]
    samples = sequence.data_size * len(whole.dropped)
    shown = {
        "kind": whole.kind if whole.chunk_causal is None else f"{whole.kind} causal",
        "causal": whole.chunk_causal is not None,
        "frames": frames,
        "size": (whole.info.height, whole.info.width),
        "lr": engine.optimizer.param_groups[0]["lr"],
        "samples": samples,
        "tokens": samples * frames * model.grid(1, *whole.x.shape[3:]).tokens_per_frame,
        "flop": step_flop(model, batch, engine.trains_all),
        "loading_seconds": loaded.seconds,
    }
    return Pending(step, arrived, own, norm is not None, batch.ids, shown)


def settle(pending: Pending, world: World) -> Shown:
    """Looks at a step; every process must call it.

    Raises:
        EngineError: its loss, or its gradient, is no number; on every process.
    """
    arrived = pending.arrived()
    if arrived[0] > 0:
        mine = pending.ids if bool(pending.own) else []
        every = world.gather(mine) if world.size > 1 else [mine]
        ids = [name for part in every for name in part]  # type: ignore[attr-defined]
        raise EngineError(
            f"the loss is no number at step {pending.step}, in a batch with {ids}; the last checkpoint is kept: "
            "look at these clips, or lower optimizer.lr"
        )
    norm = float(arrived[1]) if pending.has_norm else None
    if norm is not None and not math.isfinite(norm):
        raise EngineError(
            f"the gradient is no number at step {pending.step} although the loss is one; the last checkpoint is kept: "
            "lower optimizer.lr, or set optimizer.grad_clip"
        )
    return Shown(values=arrived[2:], grad_norm=norm, **pending.about)
