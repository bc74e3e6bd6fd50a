"""What a training step keeps, computes again, waits for and compiles."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY as SHAPE
from helpers import tiny_model
from torch._dynamo.utils import counters
from training import TINY, start, write_clips
from wan_models import WAN, tiny_wan

from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import ConfigError, EngineError
from pavdm_dist.models.base import Backbone, FrameInfo
from pavdm_dist.train.average import Average
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.recompute import Recompute, recompute_blocks
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.trainer import Trainer
from pavdm_dist.train.zero_settings import engine_settings, pinning
from pavdm_dist.values.merging import load_config

INFO = FrameInfo(32, 48, 24.0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> LatentClips:
    return LatentClips(write_clips(tmp_path_factory.mktemp("clips"), 6))


def trainer_of(run_dir: Path, clips: LatentClips, *more: str) -> Trainer:
    return start(load_config(TrainConfig, None, [*TINY, "optimizer.name=adamw", f"run_dir={run_dir}", *more]), clips)


def gradients(model: Any, calls: list[int] | None = None) -> tuple[dict[str, torch.Tensor], int]:
    """Of one window, and the bytes that the forward pass kept for the backward one."""
    plain = model.block

    def counting(index: int, *given: Any) -> Any:
        if calls is not None:
            calls.append(index)
        return plain(index, *given)

    model.block = counting
    model.requires_grad_(True).zero_grad()
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 6, 4, 6), (2, 5, 12)))
    kept: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = model(x, torch.linspace(0, 1, 6).expand(2, -1), text, INFO)
    out.square().mean().backward()
    model.block = plain
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return found, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("made", [lambda: tiny_model(config=replace(SHAPE, depth=3)), tiny_wan], ids=["stdit3", "wan"])
def test_computing_again_keeps_less_and_changes_no_bit(made: Any) -> None:
    plain = made()
    expected, most = gradients(plain)
    blocks, before = plain.spec.num_blocks, most
    for every in (3, 2, 1):
        model = copy.deepcopy(plain)
        inner: list[int] = []
        _count(model, inner)
        recompute_blocks(model, Recompute.parse(f"every:{every}"))
        found, kept = gradients(model)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        again = [index for index in range(blocks) if index % every == 0]
        assert sorted(inner) == sorted([*range(blocks), *again])
        assert kept < before
        before = kept
    with torch.no_grad():
        model(torch.zeros(1, 4, 2, 4, 6), torch.zeros(1, 2), torch.zeros(1, 2, 12), INFO)


def _count(model: Any, calls: list[int]) -> None:
    plain = model.block

    def counting(index: int, *given: Any) -> Any:
        calls.append(index)
        return plain(index, *given)

    model.block = counting


def test_a_budget_keeps_the_insides_of_the_last_blocks_that_fit() -> None:
    plain = tiny_wan(config=replace(WAN, num_layers=5))
    expected, most = gradients(plain)
    least = copy.deepcopy(plain)
    recompute_blocks(least, Recompute.parse("every:1"))
    _, bottom = gradients(least)
    one = (most - bottom) / 5
    for wanted in (0, 2, 5):
        model, calls = copy.deepcopy(plain), list[int]()
        _count(model, calls)
        recompute_blocks(model, Recompute(budget=one * (wanted + 0.5)))
        gradients(model)
        calls.clear()  # the first time a block of each kind was measured
        found, _ = gradients(model)
        assert sorted(calls) == sorted([*range(5), *range(5 - wanted)])
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("text", ["all", "every:0", "every:", "budget:-1", "budget:inf", "budget:x", "every:1.5"])
def test_recompute_takes_three_forms(text: str) -> None:
    with pytest.raises(ConfigError, match="must be none, every:N"):
        Recompute.parse(text)


# What is compiled anew is seen before a backend gets it; with aot_eager backward passes are traced, too.
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_no_step_compiles_anew_once_its_windows_were_met(
    tmp_path: Path, clips: LatentClips, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    def without_code(function: Any = None, **given: Any) -> Any:
        return plain(function, **{**given, "backend": backend})

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", without_code)
    _forget_compiled()
    trainer = trainer_of(tmp_path, clips, "compile=true", "optimizer.total_steps=400", "zero.stage=1")
    alone = trainer_of(tmp_path / "plain", clips, "optimizer.total_steps=400", "zero.stage=1")
    before, seen, losses = counters["stats"]["unique_graphs"], set(), []
    for _ in range(16):
        shape = _window(trainer)
        losses.append((trainer.train_step()["loss"], alone.train_step()["loss"]))
        now = counters["stats"]["unique_graphs"]
        assert now == before or shape not in seen, f"compiled again for {shape}"
        seen.add(shape)
        before = now
    assert [one for one, _ in losses] == pytest.approx([other for _, other in losses], rel=1e-3)
    assert len(seen) < 16
    _forget_compiled()


def _window(trainer: Trainer) -> tuple[Any, ...]:
    batch = trainer.batches.batch(trainer.step, 0, 1)
    text = len(max(batch.text.prompts, key=len))
    return batch.x.shape, batch.chunk_causal, text


def _forget_compiled() -> None:
    from pavdm_dist.models import layers, wan_layers

    torch._dynamo.reset()
    for module in (layers, wan_layers):
        if hasattr(module, "_compiled"):
            module._compiled.cache_clear()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_no_number_in_bfloat16_is_never_saved(
    stage: int, tmp_path: Path, clips: LatentClips
) -> None:
    more = [f"zero.stage={stage}", "zero.precision=bfloat16"]
    trainer = trainer_of(tmp_path, clips, *more)
    settings = engine_settings(trainer.config, 1)
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    trainer.train_step()
    trainer.save()
    spoil = trainer.engine.module.transformer.final_layer.linear.weight.register_hook(lambda g: g * torch.inf)
    trainer.train_step(trainer.load())
    with pytest.raises(EngineError, match="the gradient is no number at step 1 although the loss is one"):
        trainer.save()
    spoil.remove()
    trainer.engine.destroy()
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step0000001"


def test_a_loss_that_is_no_number_is_said_a_step_later_and_names_its_clips(tmp_path: Path, clips: LatentClips) -> None:
    trainer = trainer_of(tmp_path, clips, "zero.stage=1")
    loaded = trainer.load()
    assert loaded.batch is not None
    loaded.batch.x[0, 0, -1] = torch.nan
    names = loaded.batch.ids
    assert trainer.train_step(loaded) == {}
    with pytest.raises(EngineError, match="the loss is no number at step 0, in a batch with") as caught:
        trainer.train_step(trainer.load())
    assert names[0] in str(caught.value)
    trainer.engine.destroy()


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))])
def test_gradients_are_added_up_in_float32_where_asked(stage: int, tmp_path: Path, clips: LatentClips) -> None:
    """Many parts of one batch: in bfloat16 small ones are lost beside the sum."""
    parts = ["data.batch_size=8", "optimizer.accumulation=8", "optimizer.total_steps=100", "optimizer.grad_clip=1e9"]
    found = {}
    for name, more in (
        ("exact", ["zero.stage=1"]),
        ("float32", [f"zero.stage={stage}", "zero.precision=bfloat16", "zero.gradients=float32"]),
        ("auto", [f"zero.stage={stage}", "zero.precision=bfloat16"]),
    ):
        trainer = trainer_of(tmp_path / name, clips, *parts, *more)
        found[name] = [trainer.train_step()["grad_norm"] for _ in range(2)]
        trainer.engine.destroy()
    assert found["float32"] != found["auto"]
    assert found["float32"] == pytest.approx(found["exact"], rel=0.05)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_clipped_as_deepspeed_would(stage: int, tmp_path: Path, clips: LatentClips) -> None:
    """Its norm and its clipping are replaced, but where it keeps moments in main memory, by whatever setting."""
    found = {}
    for name, more in (
        ("ours", []),
        ("its own", ["zero.offload=optimizer"]),
        ("its own, by an old name", ["deepspeed.zero_optimization.cpu_offload=true"]),
    ):
        trainer = trainer_of(tmp_path / name, clips, f"zero.stage={stage}", "optimizer.grad_clip=0.05", *more)
        lines = [trainer.train_step() for _ in range(3)]
        found[name] = [[line["loss"], line["grad_norm"]] for line in lines]
        assert all(line["grad_norm"] > 0.05 for line in lines)
        trainer.engine.destroy()
    for name in found:
        assert found[name] == [pytest.approx(one, rel=1e-5) for one in found["ours"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["zero.gradients=float32"], r"zero\.gradients=float32 with zero\.precision=float32: .* use auto"),
        (["zero.recompute=often"], r"zero\.recompute=often: must be none, every:N"),
        (
            ["zero.recompute=budget:4", "sequence_parallel=2"],
            r"zero\.recompute=budget:4 with sequence_parallel=2: .* use every:N",
        ),
        (
            ["zero.recompute=budget:4", "zero.stage=3"],
            r"zero\.recompute=budget:4 with zero\.stage=3 on 2 processes: .* use every:N, or zero\.stage=2",
        ),
        (
            [
                "zero.gradients=float32",
                "zero.precision=bfloat16",
                "zero.stage=2",
                "deepspeed.communication_data_type=bf16",
            ],
            "communication_data_type=bf16 contradicts this package, which makes it fp32",
        ),
    ],
)
def test_contradictions_are_named(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config(TrainConfig, None, [*TINY, "optimizer.name=adamw", *more]), 2)


def test_communication_overlaps_unless_somebody_says_otherwise() -> None:
    def settings(size: int, *more: str) -> dict[str, Any]:
        config = load_config(TrainConfig, None, [*TINY, "optimizer.name=adamw", "zero.stage=2", *more])
        return engine_settings(config, size)["zero_optimization"]

    assert settings(2)["overlap_comm"] is True
    assert settings(2, "deepspeed.zero_optimization.overlap_comm=false")["overlap_comm"] is False
    assert "overlap_comm" not in settings(1)


def test_the_average_of_all_at_once_has_the_bits_of_one_by_one() -> None:
    torch.manual_seed(0)
    module: Any = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    average = Average(module, 0.9)
    one_by_one = {name: part.clone() for name, (_, part) in average.parts.items()}
    for step in range(1, 5):
        with torch.no_grad():
            for value in module.parameters():
                value.normal_()
        average.update(module)
        for name, value in module.named_parameters():
            one_by_one[name].lerp_(value.detach().flatten(), 1 - min(0.9, (1 + step) / (10 + step)))
    assert all(torch.equal(one_by_one[name], part) for name, (_, part) in average.parts.items())


def test_a_backbone_is_what_recomputing_asks_for() -> None:
    model: Backbone = tiny_wan()
    plain = model.block
    recompute_blocks(model, Recompute())
    assert model.block == plain, "none changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_with_gradients_in_float32_resumes_to_the_bit(stage: int, tmp_path: Path, clips: LatentClips) -> None:
    """At stage 1 DeepSpeed has another optimizer for it, with files of its own."""
    more = [f"zero.stage={stage}", "zero.precision=bfloat16", "zero.gradients=float32", "optimizer.accumulation=2"]
    whole = trainer_of(tmp_path / "whole", clips, *more)
    losses = [whole.train_step()["loss"] for _ in range(4)]
    expected = whole.whole_weights()
    first = trainer_of(tmp_path / "run", clips, *more)
    halves = [first.train_step()["loss"] for _ in range(2)]
    first.save()
    second = trainer_of(tmp_path / "run", clips, *more, "resume=must")
    halves += [second.train_step()["loss"] for _ in range(2)]
    assert halves == losses
    found = second.whole_weights()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for trainer in (whole, first, second):
        trainer.engine.destroy()


def test_what_is_offloaded_is_pinned_for_a_gpu() -> None:
    config = load_config(TrainConfig, None, [*TINY, "optimizer.name=adamw", "zero.stage=3", "zero.offload=all"])
    plain = engine_settings(config, 2)
    assert "pin_memory" not in plain["zero_optimization"]["offload_param"]
    found = pinning(plain)["zero_optimization"]
    assert found["offload_param"] == found["offload_optimizer"] == {"pin_memory": True, "device": "cpu"}
    own = engine_settings(replace(config, deepspeed={"zero_optimization": {"offload_param": {"pin_memory": False}}}), 2)
    assert pinning(own)["zero_optimization"]["offload_param"]["pin_memory"] is False
