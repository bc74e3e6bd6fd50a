"""A stage's blocks on all sizes of micro-batch that a full window has, before any link is used.

Kernels are loaded, and compiled where they are: a GPU that loads one while a link waits on it may stand still for ever,
and a link must not wait for minutes of compiling. What compiled blocks compute is compared with what plain ones do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import EngineError, first_line
from pavdm_dist.method.denoiser import memories_of, unit_context
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.microbatches import WHOLE
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.models.base import Activation, Backbone, FrameInfo
from pavdm_dist.models.devices import to_device
from pavdm_dist.models.kernels import CHOICES, keep_choices, kept_choices
from pavdm_dist.models.text_cache import TextBank

# Relative L2 between a compiled block and the plain one beyond which something is wrong: other orders of sums give a
# fraction. Of single blocks, given the same input: over many of them, and under modulations that amplify, the same
# rounding grows to any size.
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found.

    Attributes:
        relative_error: largest relative L2 of a compiled block against the plain one; None where none are compiled.
        kernels: of attention, by shape (:mod:`pavdm_dist.models.kernels`).
        seconds: it took.
    """

    relative_error: float | None
    kernels: Mapping[str, str]
    seconds: float


def rehearsal(
    shape: Backbone,
    plan: WindowPlan,
    latent_shape: tuple[int, int, int],
    info: FrameInfo,
    **more: object,
) -> Stream:
    """A stream of noise with a text of the longest kind, whose micro-batches are those of a run.

    Args:
        shape: the model; no weights are needed.
        plan: of the run.
        latent_shape: ``(C, h, w)``.
        info: of the run.
        more: further fields of the stream: its mode and how its rows are cut.
    """
    full = plan.window_chunks + plan.context_chunks + plan.anchor_chunks + plan.block_chunks
    plan = replace(plan, start="noise", end="drain", num_chunks=full)
    text = torch.randn(shape.spec.text_len, shape.spec.text_dim, generator=torch.Generator().manual_seed(0))
    return Stream(
        id=0, plan=plan, schedule=NoiseSchedule(plan.num_inference_steps), seed=0, latent_shape=latent_shape,
        conditioning=Conditioning.build([(0, text)], None), info=info, **more,  # type: ignore[arg-type]
    )  # fmt: skip


@torch.inference_mode()
def rehearse(stage: Stage, stream: Stream, compiled: bool) -> Rehearsed:
    """Runs a stage's blocks on the stream's micro-batches of a full window, as :func:`rehearsal` makes it.

    Args:
        stage: as it will run.
        stream: none of its tensors stay.
        compiled: its blocks are compiled.

    Raises:
        EngineError: compiled blocks compute something else than plain ones.
    """
    began, error = time.monotonic(), None
    stage.make_ready()
    if not compiled:
        _run(stage, stream, compiled=False)
    else:
        CHOICES.use({**kept_choices(stage.device), **CHOICES.chosen})
        error = _checked(stage, stream)
        keep_choices(stage.device)
        CHOICES.forget_others()
    return Rehearsed(error, dict(CHOICES.chosen), time.monotonic() - began)


def _checked(stage: Stage, stream: Stream) -> float:
    """The largest error of a compiled block; their kernels of attention are chosen meanwhile.

    Raises:
        EngineError: torch's compiler failed, or a block computes something else.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        with CHOICES.measured():
            errors = _run(stage, stream, compiled=True)
    except TorchDynamoException as error:  # no compiler on the machine, above all
        reason = first_line(error)
        raise EngineError(f"blocks could not be compiled ({reason}); use compile=false") from error
    for block, found in errors.items():
        if not found < _LIMITS[stage.dtype]:
            raise EngineError(
                f"compiled block {block} differs from the plain one by {found:.2g} (relative L2, where"
                f" {_LIMITS[stage.dtype]:g} is allowed); use compile=false, and tell with which versions of torch and"
                " which device"
            )
    return max(errors.values())


def _run(stage: Stage, stream: Stream, compiled: bool) -> dict[int, float]:
    """Runs the stage's micro-batches by plain blocks; the largest error of each compiled one, given the same input."""
    model, blocks = stage.model, range(*stage.blocks)
    # Compiled blocks read what compiled ones left.
    (plain, *_), (own, *_) = (memories_of(stream, model, blocks, stage.device) for _ in range(2))
    texts = TextBank(model.project_text, stage.device)
    texts.add(stream.id, stream.conditioning.texts)
    generator = torch.Generator().manual_seed(0)
    errors: dict[int, list[Tensor]] = {block: [] for block in blocks}

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return to_device(torch.randn(shape, generator=generator), stage.device).to(dtype)

    for row, chunk in _units(stream):
        context = replace(unit_context(model, stream, row, chunk, 0, texts, plain), steady=False)
        steady = unit_context(model, stream, row, chunk, 0, texts, own)
        grid = context.grid
        shapes = model.activation_shapes(grid)
        activation = Activation(*(random(shape, stage.dtype) for shape in shapes))
        x = random((1, stream.latent_shape[0], grid.frames, *stream.latent_shape[1:]), torch.float32)
        levels = torch.linspace(1, 0, grid.frames, device=stage.device)[None]
        if stage.first:
            activation = model.embed(x, levels, stream.info)
        for block in blocks:
            following = model.block(block, activation, context)
            if compiled:
                found = model.block(block, activation, steady)
                errors[block].append(_difference(found.hidden, following.hidden))
            activation = following
        if stage.last:
            model.to_velocity(model.head(activation, grid), x, levels)
    return {block: float(torch.stack(found).max()) for block, found in errors.items() if found}


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    """Relative L2, on its device; no number where one of them is none."""
    return (found.float() - expected.float()).norm() / expected.float().norm()


def _units(stream: Stream) -> Iterator[tuple[PlanRow, int]]:
    """Micro-batches that meet all steady sizes, each behind those that leave what it reads."""
    plan = stream.plan
    held = plan.window_chunks, plan.joint_context
    full = next(row for row in plan.rows() if (len(row.chunks), len(row.context)) == held)
    if plan.context == "cached":
        for index in range(0, full.index + 1, plan.steps_per_shift):
            for chunk in plan.row(index).context:
                yield plan.row(index), chunk
    if stream.mode == "window":
        yield from ((full, chunk) for chunk, is_context in stream.batches.parts(full.index) if not is_context)
        return
    if stream.mode == "displaced":
        yield full, WHOLE
    for chunk in (*full.context, *full.chunks[:: stream.chunks_per_unit]):
        yield full, chunk
