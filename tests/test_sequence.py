"""Sequence parallelism: a window cut among processes gives the outputs, gradients and steps of a whole one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forking
from helpers import TINY, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from wan_models import tiny_wan

from pavdm_dist.errors import ConfigError
from pavdm_dist.models.base import FrameInfo, WindowSlice
from pavdm_dist.train.batch import Batch
from pavdm_dist.train.loss import velocity_loss
from pavdm_dist.train.model import Text
from pavdm_dist.train.ranks import World, free_port, join_world
from pavdm_dist.train.recompute import Recompute, recompute_blocks
from pavdm_dist.train.sequence import SequenceGroup, Ulysses, join_sequence

INFO = FrameInfo(48, 64, 24.0)
STEPS = 5
FOUR_HEADS = replace(TINY, num_heads=4)


def make_batch(frames: int, context: int, chunk_causal: int | None, samples: int = 4, seed: int = 0) -> Batch:
    """Levels rise along the window and differ from sample to sample; a sample's prompt is the seed of its text."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.arange(frames) / frames * (0.5 + 0.5 * torch.rand(samples, 1, generator=generator))
    levels[:, :context] = 0
    x, target = torch.randn(2, samples, 4, frames, 4, 6, generator=generator)
    names = [str(i) for i in range(samples)]
    return Batch(x, target, levels, Text(names), [False] * samples, context, chunk_causal, INFO, names)


class Velocity(nn.Module):
    """The model under the arguments of a batch."""

    def __init__(self, checkpointed: bool = False, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = (model or tiny_model(config=FOUR_HEADS)).requires_grad_(True)
        if checkpointed:
            recompute_blocks(self.model, Recompute(every=1))

    def forward(
        self, x: Tensor, levels: Tensor, prompts: list[str], chunk_causal: int | None, window: WindowSlice | None
    ) -> Tensor:
        seeds = [torch.Generator().manual_seed(int(prompt)) for prompt in prompts]
        text = torch.stack([torch.randn(5, TINY.caption_channels, generator=seed) for seed in seeds])
        text = text.to(next(self.parameters()).dtype)
        mask = torch.arange(5) < torch.tensor([3 + int(prompt) % 3 for prompt in prompts])[:, None]
        return self.model(x, levels, text, INFO, mask, chunk_causal, window)[:, :4]


def share(group: SequenceGroup, batch: Batch) -> Batch:
    """This process' part of a batch that every process drew alike."""
    return group.cut(batch.part(slice(group.data_rank, None, group.data_size)))


def loss_of(group: SequenceGroup, velocity: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return velocity_loss(velocity, batch.target, batch.levels, batch.context, batch.window, group.size)


def run(model: Any, batch: Batch) -> Tensor:
    return model(batch.x, batch.levels, batch.text.prompts, batch.chunk_causal, batch.window)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: object) -> None:
    difference = (got.double() - want.double()).norm() / want.double().norm()
    assert difference < tolerance, (difference.item(), what)


# --- what the processes do -------------------------------------------------------------------------------


def outputs_and_gradients(
    group: SequenceGroup,
    cases: Iterable[tuple[int, int, int | None, torch.dtype]],
    made: Callable[[], nn.Module] = lambda: tiny_model(config=FOUR_HEADS),
) -> None:
    """Of the model and the loss, against the whole window on one process."""
    for frames, context, chunk, dtype in cases:
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        batch = make_batch(frames, context, chunk)
        batch = replace(batch, x=batch.x.to(dtype), target=batch.target.to(dtype))
        model, case = Velocity(model=made()).to(dtype), (frames, context, chunk, dtype)
        velocity = run(model, batch)
        loss, bands, counts = velocity_loss(velocity, batch.target, batch.levels, context)
        loss.backward()
        expected = gradients(model)
        model.zero_grad()

        mine = share(group, batch)
        assert mine.window is not None
        part = run(model, mine)
        first = mine.window.first_frame
        samples = slice(group.data_rank, None, group.data_size)
        assert_close(part, velocity[samples, :, first : first + part.shape[2]], tolerance, case)
        mine_loss, *mine_bands = loss_of(group, part, mine)
        mine_loss.backward()
        total = gradients(model)
        torch.distributed.all_reduce(total)
        assert_close(total / group.world.size, expected, tolerance, case)
        sums = mine_loss.detach().clone()
        torch.distributed.all_reduce(sums)
        assert_close(sums / group.world.size, loss.detach(), tolerance, case)
        for got, want in zip(mine_bands, (bands, counts), strict=True):
            torch.distributed.all_reduce(got)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def joint_attention(group: SequenceGroup) -> None:
    """Video and text tokens in one sequence, the text cut unevenly, too: their order is the processes'."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 4, 12 + 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(17, 17, generator=generator) < 0.7
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    whole = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    expected = torch.autograd.grad((whole * weight).sum(), leaves)

    video = torch.arange(12).tensor_split(group.size)
    text = torch.arange(12, 17).tensor_split(group.size)
    tokens = [torch.cat(pair) for pair in zip(video, text, strict=True)]
    order, mine = torch.cat(tokens), tokens[group.rank]
    attend = Ulysses(group.group, [len(part) for part in tokens])
    out = attend(*(leaf[:, :, mine] for leaf in leaves), attn_mask=mask[order][:, order])
    assert_close(out, whole[:, :, mine], 1e-10, "joint")
    for got, want in zip(torch.autograd.grad((out * weight[:, :, mine]).sum(), leaves), expected, strict=True):
        assert_close(got[:, :, mine], want[:, :, mine], 1e-10, "joint")


def in_bfloat16(group: SequenceGroup) -> None:
    """The exchanges carry autocast's types."""
    batch, model = make_batch(6, 2, 2), Velocity()
    mine = share(group, batch)
    assert mine.window is not None
    with torch.autocast("cpu", torch.bfloat16):
        whole, part = run(model, batch), run(model, mine)
    first = mine.window.first_frame
    assert_close(part, whole[group.data_rank :: group.data_size, :, first : first + part.shape[2]], 0.02, "bfloat16")


def batches() -> list[Batch]:
    """Windows that are cut evenly and not, whose first process may have no noisy frame, and stills."""
    shapes = [(6, 2, 2), (7, 4, None), (1, 0, None), (5, 0, None), (8, 2, 2)]
    return [make_batch(*shape, seed=step) for step, shape in enumerate(shapes)]


@cache
def plain_training() -> tuple[list[float], list[float], Tensor]:
    """Losses, gradient norms and weights of one process without DeepSpeed."""
    model = Velocity()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses, norms = [], []
    for batch in batches():
        loss, *_ = velocity_loss(run(model, batch), batch.target, batch.levels, batch.context)
        optimizer.zero_grad()
        loss.backward()
        norms.append(gradients(model).norm().item())
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def zero_training(group: SequenceGroup, zero_stage: int, checkpointed: bool) -> None:
    """The same under ZeRO and sequence parallelism; gradients are clipped."""
    import deepspeed

    model = Velocity(checkpointed)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    losses, norms, weights = plain_training()
    for step, batch in enumerate(batches()):
        mine = share(group, batch)
        loss, *_ = loss_of(group, run(engine, mine), mine)
        engine.backward(loss)
        engine.step()
        sums, what = loss.detach().clone(), (zero_stage, checkpointed, step)
        torch.distributed.all_reduce(sums)
        assert_close(sums / group.world.size, torch.tensor(losses[step]), 1e-5, what)
        norm = engine.get_global_grad_norm()
        assert abs(float(norm) - norms[step]) < 1e-4 * norms[step], what
    moments = sum(state["exp_avg"].numel() for state in engine.optimizer.optimizer.state.values())
    assert moments < 1.1 * weights.numel() / group.world.size  # sharded over all processes, padding apart
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=zero_stage == 3):
        found = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert_close(found, weights, 1e-5, (zero_stage, checkpointed))
    engine.destroy()


def on_two(world: World) -> None:
    group = join_sequence(world, 2, FOUR_HEADS.num_heads, 2)
    cases = product(((6, 0), (6, 2), (7, 4), (8, 5), (2, 0)), (None, 2))
    outputs_and_gradients(
        group, [*((*shape, chunk, torch.float64) for shape, chunk in cases), (6, 2, 2, torch.float32)]
    )
    # Attention over all tokens: its blocks compute in float32 whatever the weights are.
    whole = [(6, 0, None), (7, 4, None), (6, 2, 2), (9, 3, 3), (2, 0, 1)]
    outputs_and_gradients(group, [(*shape, torch.float32) for shape in whole], tiny_wan)
    joint_attention(group)
    in_bfloat16(group)
    zero_training(group, zero_stage=1, checkpointed=False)
    zero_training(group, zero_stage=3, checkpointed=True)


def on_four(world: World) -> None:
    group = join_sequence(world, 2, FOUR_HEADS.num_heads, 2)
    assert (group.rank, group.data_rank, group.data_size) == (world.rank % 2, world.rank // 2, 2)
    assert torch.distributed.get_process_group_ranks(group.group) == [group.data_rank * 2, group.data_rank * 2 + 1]
    outputs_and_gradients(group, [(7, 4, 2, torch.float64)])
    zero_training(group, zero_stage=3, checkpointed=False)
    all_of_them = join_sequence(world, 4, FOUR_HEADS.num_heads, 4)
    outputs_and_gradients(all_of_them, [(7, 4, 2, torch.float64), (5, 0, None, torch.float64)])
    joint_attention(all_of_them)


def _process(rank: int, size: int, port: int, folder: Path, check: Callable[[World], None]) -> None:
    torch.set_num_threads(1)
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in address.items()}, TORCH_EXTENSIONS_DIR=str(folder))
    check(join_world())
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("size", "check"), [(2, on_two), pytest.param(4, on_four, marks=pytest.mark.slow)])
def test_a_window_cut_among_processes_is_the_whole_one(
    size: int, check: Callable[[World], None], tmp_path: Path
) -> None:
    forking()
    arguments = (size, free_port(), tmp_path, check)
    torch.multiprocessing.start_processes(_process, arguments, nprocs=size, start_method="forkserver")
    assert not list(tmp_path.iterdir())  # DeepSpeed compiled nothing


# --- on one process --------------------------------------------------------------------------------------


def test_one_process_cuts_nothing() -> None:
    batch = make_batch(6, 2, 2)
    assert join_sequence(World(0, 1), 1, 16, 5).cut(batch) is batch


def test_single_frames_are_shared_by_samples() -> None:
    parts = [SequenceGroup(World(rank, 4), 2).cut(make_batch(1, 0, None)) for rank in range(2)]
    assert [part.text.prompts for part in parts] == [["0", "2"], ["1", "3"]]
    assert all(part.window is None for part in parts)
    with pytest.raises(ConfigError, match="a batch of 6 single frames does not divide among 4 processes"):
        SequenceGroup(World(0, 4), 2).cut(make_batch(1, 0, None, samples=3))


def test_recomputed_activations_give_the_same_gradients() -> None:
    batch, plain, checkpointed = make_batch(6, 2, 2), Velocity(), Velocity(checkpointed=True)
    saved = []
    for model in (plain, checkpointed):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: (kept.append(x), x)[1], lambda x: x):
            loss = run(model, batch).square().mean()
        loss.backward()
        saved.append(sum(tensor.nbytes for tensor in kept))
    assert torch.equal(gradients(plain), gradients(checkpointed))
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize(
    ("size", "processes", "heads", "shortest", "nearest"),
    [(3, 4, 12, 5, "2 or 4"), (0, 4, 12, 5, "1"), (8, 4, 16, 5, "4"), (4, 8, 6, 5, "2"), (8, 8, 16, 5, "4")],
)
def test_what_cannot_be_cut_is_refused(size: int, processes: int, heads: int, shortest: int, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        join_sequence(World(0, processes), size, heads, shortest)
    assert str(caught.value) == (
        f"sequence_parallel={size} must divide the {processes} processes and the model's {heads} attention heads,"
        f" and the shortest window has {shortest} latent frames to cut: use {nearest}"
    )


def test_a_window_shorter_than_its_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="a window of 3 latent frames cannot be cut among 4 processes"):
        share(SequenceGroup(World(0, 4), 4, None), make_batch(3, 0, None))
