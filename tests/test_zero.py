"""DeepSpeed ZeRO over two processes takes the steps that plain torch takes in one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import TINY, launch, plain_torch, start, write_clips
from wan_models import WAN, trainable_folder

from pavdm_dist.digits.cache import LatentClips
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.train.zero_refusals import refusals
from pavdm_dist.train.zero_settings import engine_settings
from pavdm_dist.values.merging import load_config

STEPS, FEW = 10, 3
SETTINGS = [
    *TINY,
    "data.batch_size=4",
    "optimizer.name=adamw",
    "optimizer.lr=0.001",
    "optimizer.weight_decay=0.01",
    f"optimizer.total_steps={STEPS}",
    "zero.bucket_elements=20000",
]
# Small parameters would otherwise stay whole on every process, and nothing would be tested.
SHARD_ALL = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
PROGRAM = str(Path(__file__).parent / "zero_program.py")


def run(folder: Path, clips: Path, cases: dict[str, Any], size: int = 2) -> list[dict[str, Any]]:
    """What every process found in every case."""
    for name, case in cases.items():
        case["settings"] = [*SETTINGS, f"run_dir={folder / name}", *case["settings"]]
    built = folder / "extensions"
    built.mkdir()
    launch([PROGRAM, str(folder), str(clips), json.dumps(cases)], size, TORCH_EXTENSIONS_DIR=str(built))
    assert not list(built.iterdir()), "nothing is compiled"
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 6)


STAGES = {f"stage{stage}": {"settings": [f"zero.stage={stage}", SHARD_ALL], "steps": STEPS} for stage in range(4)}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("stages"), clips, STAGES)


@pytest.fixture(scope="module")
def plain(clips: Path) -> dict[str, Any]:
    return plain_torch(LatentClips(clips), SETTINGS, STEPS)


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - value).detach().abs().max()) for name, value in expected.items())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_trains_as_plain_torch(stages: list[dict[str, Any]], plain: dict[str, Any], name: str) -> None:
    found = stages[0][name]
    assert found["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert stages[1][name]["loss"] == found["loss"], "the mean over all processes, on every process"
    assert found["grad_norm"] == pytest.approx(plain["grad_norm"], abs=1e-4)
    assert apart(found["weights"], plain["weights"]) < 1e-4
    assert apart(found["average"], plain["average"]) < 1e-4
    assert stages[1][name]["weights"] == {} == stages[1][name]["average"], "whole tensors on the first process only"


def test_each_process_holds_its_share(stages: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    numbers = sum(value.numel() for value in plain["weights"].values())
    assert all(rank["stage0"]["optimizer_bytes"] == 8 * numbers for rank in stages)
    for name in ("stage1", "stage2", "stage3"):
        # Padding makes the shards of all processes equal: per group (1, 2) or per parameter (3).
        padding = len(plain["weights"]) if name == "stage3" else 8
        for rank in stages:
            assert 0 <= rank[name]["optimizer_bytes"] - 8 * numbers / 2 <= 8 * padding
        assert sum(rank[name]["average_numbers"] for rank in stages) == numbers, "of the average, without padding"
    for rank in stages:
        assert rank["stage2"]["shard_numbers"] == numbers
        assert 0 <= rank["stage3"]["shard_numbers"] - numbers / 2 <= len(plain["weights"])


@pytest.mark.timeout(240)
def test_accumulation_clipping_precision_and_sharded_building(tmp_path: Path, clips: Path) -> None:
    bite = ["optimizer.accumulation=2", "optimizer.grad_clip=0.05"]
    cases: dict[str, Any] = {
        "parts0": {"settings": ["zero.stage=0", *bite], "steps": FEW},
        "parts1": {"settings": ["zero.stage=1", *bite], "steps": FEW},
        "parts2": {"settings": ["zero.stage=2", *bite], "steps": FEW},
        "parts3": {"settings": ["zero.stage=3", SHARD_ALL, *bite], "steps": FEW},
        "init": {"settings": ["zero.stage=3", SHARD_ALL, "zero.init=true"], "steps": FEW},
        "bf16": {"settings": ["zero.stage=1", "zero.precision=bfloat16"], "steps": FEW},
        "bf16_3": {"settings": ["zero.stage=3", SHARD_ALL, "zero.precision=bfloat16"], "steps": FEW},
        "autocast": {"settings": ["zero.stage=2", "zero.precision=autocast"], "steps": FEW},
        "offload2": {"settings": ["zero.stage=2", "zero.offload=optimizer"], "steps": FEW},
        "offload3": {"settings": ["zero.stage=3", SHARD_ALL, "zero.offload=all"], "steps": FEW},
        "theirs": {
            "settings": [
                "zero.stage=2",
                "optimizer.name=deepspeed",
                "optimizer.weight_decay=0",
                "deepspeed.optimizer={type: AdamW, params: {torch_adam: true, lr: 0.001, betas: [0.9, 0.99], "
                "weight_decay: 0.01}}",
            ],
            "steps": FEW,
        },
    }
    found, _ = run(tmp_path, clips, cases)
    cached = LatentClips(clips)
    clipped = plain_torch(cached, [*SETTINGS, *bite], FEW)
    assert max(clipped["grad_norm"]) > 0.05
    usual = plain_torch(cached, SETTINGS, FEW)
    for name in ("parts0", "parts1", "parts2", "parts3"):
        assert found[name]["loss"] == pytest.approx(clipped["loss"], abs=1e-5)
        assert apart(found[name]["weights"], clipped["weights"]) < 1e-4
    for name in ("init", "offload2", "offload3", "theirs"):
        assert found[name]["loss"] == pytest.approx(usual["loss"], abs=1e-5), name
        assert apart(found[name]["average"], usual["average"]) < 1e-4
    for name in ("bf16", "bf16_3"):
        assert found[name]["tables"].keys() == found["init"]["tables"].keys()
        for table, value in found[name]["tables"].items():
            assert torch.equal(value, found["init"]["tables"][table]), f"{table} is rounded"
    for name in ("bf16", "bf16_3", "autocast"):
        assert found[name]["loss"] == pytest.approx(usual["loss"], rel=0.05)
        assert found[name]["loss"] != pytest.approx(usual["loss"], rel=1e-6)


# Chunks of five frames divide among neither two nor four processes.
ODD = ["objective.latent_chunk_size=5", "objective.text_share=0.5", "model.num_heads=4", "data.still_share=0.2"]
SHARED_STEPS = 4


@pytest.fixture(scope="module")
def plain_odd(clips: Path) -> dict[str, Any]:
    return plain_torch(LatentClips(clips), [*SETTINGS, *ODD], SHARED_STEPS)


@pytest.mark.parametrize("stages", [(1, 3), pytest.param((0, 2), marks=pytest.mark.slow)])
@pytest.mark.timeout(240)
def test_two_processes_share_windows(
    clips: Path, plain_odd: dict[str, Any], tmp_path: Path, stages: tuple[int, int]
) -> None:
    shared = [*ODD, "sequence_parallel=2", SHARD_ALL]
    cases: dict[str, Any] = {
        f"stage{stage}": {"settings": [*shared, f"zero.stage={stage}"], "steps": SHARED_STEPS} for stage in stages
    }
    again = ["zero.stage=3", "zero.recompute=every:1"]
    if 3 in stages:
        cases["recomputed"] = {"settings": [*shared, *again], "steps": SHARED_STEPS}
        tokens = [(3, 2, "wan"), (2, 1, "low")]
    else:
        cases["recomputed alone"] = {"settings": [*ODD, SHARD_ALL, *again], "steps": SHARED_STEPS}
        tokens = [(1, 2, "wan")]
    more, plain = over_all_tokens(tmp_path, clips, tokens)
    found, _ = run(tmp_path, clips, {**cases, **more})
    for name, case in found.items():
        expected = plain.get(name.split()[0], plain_odd)
        assert case["loss"] == pytest.approx(expected["loss"], abs=1e-5), name
        assert apart(case["weights"], expected["weights"]) < 1e-4, name
        assert case["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-4), name
    numbers = sum(value.numel() for value in plain_odd["weights"].values())
    sharded = found["stage1" if 1 in stages else "stage2"]
    assert sharded["optimizer_bytes"] < 8 * numbers * 0.51, "ZeRO shards over all processes"


def over_all_tokens(
    folder: Path, clips: Path, chosen: list[tuple[int, int, str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cases of a pretrained model whose attention mixes all tokens, and what plain torch makes of them.

    Args:
        folder: the model is made in there.
        clips: to train on.
        chosen: stage, processes that share a window, and whether weights or changes beside them are trained.
    """
    model = trainable_folder(folder / "wan", replace(WAN, text_len=16))
    trained = {"wan": [f"model.pretrained={model}"]}
    trained["low"] = [*trained["wan"], "model.lora.rank=2", "model.lora.targets=[to_q, to_out.0, ffn.net.2]"]
    cases = {
        f"{what} {stage}": {
            "settings": [*ODD, *trained[what], SHARD_ALL, f"sequence_parallel={shared}", f"zero.stage={stage}"],
            "steps": SHARED_STEPS,
        }
        for stage, shared, what in chosen
    }
    cached = LatentClips(clips)
    plain = {what: plain_torch(cached, [*SETTINGS, *ODD, *more], SHARED_STEPS) for what, more in trained.items()}
    return cases, plain


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_train_attention_over_all_tokens_at_every_stage(clips: Path, tmp_path: Path) -> None:
    chosen = [(0, 1, "wan"), (2, 1, "wan"), (0, 1, "low"), (1, 2, "low"), (3, 2, "low")]
    cases, plain = over_all_tokens(tmp_path, clips, chosen)
    for name, case in run(tmp_path, clips, cases)[0].items():
        expected = plain[name.split()[0]]
        assert case["loss"] == pytest.approx(expected["loss"], abs=1e-5), name
        assert apart(case["weights"], expected["weights"]) < 1e-4, name
        assert apart(case["average"], expected["average"]) < 1e-4, name
        assert case["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-4), name


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_four_processes_share_windows_by_twos_and_by_fours(
    clips: Path, plain_odd: dict[str, Any], tmp_path: Path
) -> None:
    cases: dict[str, Any] = {
        f"shared{size}": {"settings": [*ODD, f"sequence_parallel={size}", "zero.stage=2"], "steps": SHARED_STEPS}
        for size in (2, 4)
    }
    found = run(tmp_path, clips, cases, size=4)[0]
    for case in found.values():
        assert case["loss"] == pytest.approx(plain_odd["loss"], abs=1e-5)
        assert apart(case["weights"], plain_odd["weights"]) < 1e-4


REFUSED = [
    (["zero.stage=4"], r"zero\.stage=4: must be 0, 1, 2 or 3"),
    (["zero.precision=bfloat16"], r"zero\.precision=bfloat16 with zero\.stage=0: .* use zero\.stage=1"),
    (["optimizer.name=muon", "zero.stage=2"], r"optimizer\.name=muon with zero\.stage=2: .* optimizer\.name=adamw"),
    (["optimizer.name=deepspeed"], 'no "optimizer" block'),
    (["zero.offload=optimizer"], r"zero\.offload=optimizer with zero\.stage=0"),
    (["zero.stage=2", "zero.offload=all"], r"zero\.offload=all with zero\.stage=2"),
    (["zero.stage=1", "zero.init=true"], r"zero\.init=true with zero\.stage=1"),
    (["data.batch_sizes={64x64x5@23.976: 3}"], r"^data\.batch_sizes={64x64x5@23\.976: 3} does not divide among 2 .* 4"),
    (["data.batch_size=5"], r"data\.batch_size=5 does not divide among 2 processes: use 4 or 6"),
    (
        ["optimizer.accumulation=4"],
        r"data\.batch_size=4 does not divide among 2 processes x 4 accumulated parts: use 8",
    ),
    (["sequence_parallel=3"], r"sequence_parallel=3 does not divide the 2 processes: use 1 or 2"),
    (["deepspeed.train_batch_size=32"], r"train_batch_size=32 contradicts data\.batch_size, which makes it 4"),
    (["deepspeed.zero_optimization.stage=3"], r"zero_optimization\.stage=3 contradicts zero\.stage, which makes it 0"),
    (["deepspeed.bf16.enabled=true"], r"bf16\.enabled=True contradicts zero\.precision"),
    (
        ["deepspeed.torch_autocast={enabled: true, dtype: float16}"],
        r"torch_autocast\.enabled=True contradicts zero\.prec",
    ),
    (["deepspeed.gradient_allreduce_op=sum"], r"gradient_allreduce_op=sum contradicts this package, .* makes it mean"),
    (
        ["deepspeed.managed_gradient_accumulation=false", "optimizer.accumulation=2"],
        r"managed_gradient_accumulation=False contradicts this package",
    ),
    (
        ["deepspeed.sequence_parallel_size=2"],
        r"sequence_parallel_size=2 contradicts sequence_parallel, which makes it 1",
    ),
    (
        ["deepspeed.activation_checkpointing.partition_activations=true"],
        r"activation_checkpointing={'partition_activations': True}: has no effect here, zero\.recompute says .* out",
    ),
    (["deepspeed.weight_quantization.bits=8"], r"deepspeed\.weight_quantization={'bits': 8}: has no effect here"),
    (["deepspeed.data_efficiency.enabled=true"], r"deepspeed\.data_efficiency={'enabled': True}: has no effect here"),
    (["deepspeed.pipeline.stages=2"], r"deepspeed\.pipeline={'stages': 2}: has no effect here"),
    (["deepspeed.scheduler={type: WarmupLR}"], '"scheduler" is not used'),
    (["deepspeed.optimizer={type: Adam}"], r"contradicts optimizer\.name=adamw"),
    (
        ["optimizer.name=deepspeed", "deepspeed.optimizer={type: AdamW, params: {lr: 1.0e-5}}"],
        r"optimizer\.params\.lr=1e-05 contradicts optimizer\.lr=0\.001",
    ),
    (
        ["optimizer.name=deepspeed", "deepspeed.optimizer={type: AdamW}", "optimizer.weight_decay=0.7"],
        r"optimizer\.weight_decay=0\.7 with optimizer\.name=deepspeed: is not read",
    ),
    (["deepspeed.steps_per_print=5"], r"steps_per_print=5 contradicts this package"),
    (
        ["sequence_parallel=2", "optimizer.accumulation=2", "data.still_batch_size=2", "data.still_share=0.1"],
        r"data\.still_batch_size=2 does not divide among 2 processes x 2 accumulated parts: use 4",
    ),
    (["log_every_steps=0"], r"log_every_steps=0: must be 1 or more"),
    (["optimizer.lr=.nan"], r"optimizer\.lr=nan: must be a finite number"),
    (["optimizer.grad_clip=-1"], r"optimizer\.grad_clip=-1\.0: must be 0 or more"),
    (["optimizer.ema_decay=7"], r"optimizer\.ema_decay=7\.0: must be 0 to 1"),
    (["optimizer.betas=[0.9]"], r"optimizer\.betas=\[0\.9\]: must have 2 entries"),
    (["optimizer.betas=[0.9, 1]"], r"betas=\[0\.9, 1\.0\]: must be from 0 to below 1"),
    (["seed=-1"], r"seed=-1: must be 0 to 18446744073709551615$"),
    (["launch.timeout_seconds=1e15"], r"timeout_seconds=1000000000000000\.0: must be above 0, at most 31536000$"),
    (["threads=0"], r"threads=0: must be 1 or more"),
    (["objective.full_share=0.9", "objective.growing_share=0.45"], "together at most 1"),
    (["deepspeed.zero_optimization=3"], r"deepspeed\.zero_optimization=3: must be an object, .* as deepspeed\.zero_op"),
    (["deepspeed.zero_optimization=null"], r"deepspeed\.zero_optimization=None: must be an object"),
    (["deepspeed.bf16=true"], r"deepspeed\.bf16=True: must be an object, of values such as deepspeed\.bf16\.enabled$"),
    (["deepspeed.fp16=true"], r"deepspeed\.fp16=True: must be an object"),
    (
        ["deepspeed.optimizer=Adam", "optimizer.name=deepspeed"],
        r"deepspeed\.optimizer=Adam: must be an object, of .*type",
    ),
    (
        ["deepspeed.optimizer={type: Adam, params: 3}", "optimizer.name=deepspeed"],
        r"deepspeed\.optimizer\.params=3: must be an object",
    ),
    (["deepspeed.optimizer.type=3", "optimizer.name=deepspeed"], r"deepspeed\.optimizer\.type=3: must name one of"),
    (["deepspeed.optimizer=null", "optimizer.name=deepspeed"], r"deepspeed\.optimizer\.type=None: must name one of"),
    (["deepspeed.optimizer=auto", "optimizer.name=deepspeed"], r"deepspeed\.optimizer\.type=None: must name one of"),
    (["deepspeed.gradient_clipping={a: 1}"], r"gradient_clipping={'a': 1}: must be a value, .* optimizer\.grad_clip$"),
    (["deepspeed_config=nowhere.json"], r"deepspeed_config=nowhere\.json: cannot be read"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_train_is_refused_by_name(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config(TrainConfig, None, [*SETTINGS, *settings]), 2)


OWN = ["optimizer.name=deepspeed", "optimizer.weight_decay=0", "zero.stage=1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["deepspeed.zero_optimization.overlap_comm=maybe"], r"^deepspeed\.zero_optimization\.overlap_comm=maybe: "),
        (["deepspeed.zero_optimization.foo=3"], r"^deepspeed\.zero_optimization\.foo=3: .* not permitted$"),
        (["deepspeed.flops_profiler={enabled: perhaps}"], r"^deepspeed\.flops_profiler\.enabled=perhaps: "),
        (["deepspeed.compression_training={a: 1}"], r"^deepspeed\.compression_training\.a=1: DeepSpeed .* removed"),
        (
            ["deepspeed.zero_optimization.mics_shard_size=2"],
            r"^deepspeed\.zero_optimization\.mics_shard_size=2: .*removed",
        ),
        ([*OWN, "deepspeed.optimizer.type=Adamm"], r"^deepspeed\.optimizer\.type=Adamm: .*Adamm is not a supported"),
        ([*OWN, "deepspeed.optimizer={type: Adam, params: {foo: 3}}"], r"^deepspeed\.optimizer\.params\.foo=3: "),
        (
            [*OWN, "deepspeed.optimizer={type: Adam, params: {torch_adam: true, betas: 3}}"],
            r"params\.betas=3: DeepSpeed",
        ),
        (["deepspeed.data_types.grad_accum_dtype=bf16"], r"^deepspeed\.data_types\.grad_accum_dtype=bf16: DeepSpeed"),
        (
            ["zero.stage=2", "deepspeed.prescale_gradients=true", "deepspeed.dump_state=false"],
            r"^deepspeed\.prescale_gradients=True, deepspeed\.dump_state=False: DeepSpeed",
        ),
        (["zero.stage=2", "deepspeed.gradient_predivide_factor=2.0"], r"^deepspeed\.gradient_predivide_factor=2\.0: "),
        (["deepspeed.tensor_parallel.autotp_size=2"], r"^deepspeed\.tensor_parallel\.autotp_size=2: DeepSpeed"),
    ],
)
def test_what_deepspeed_does_not_take_is_a_sentence(settings: list[str], message: str, tmp_path: Path) -> None:
    clips = LatentClips(write_clips(tmp_path / "clips", 4))
    with pytest.raises(ConfigError, match=message) as raised:
        start(load_config(TrainConfig, None, [*SETTINGS, f"run_dir={tmp_path / 'run'}", *settings]), clips)
    assert "\n" not in str(raised.value) and raised.value.__cause__ is not None


def test_names_that_deepspeed_does_not_know_are_refused_with_the_nearest_and_no_others(tmp_path: Path) -> None:
    clips = LatentClips(write_clips(tmp_path / "clips", 4))
    unknown = ["deepspeed.wal_clock_breakdown=true"]
    known = ["activation_checkpointing", "aio", "autotuning", "checkpoint", "comms_logger"]
    known += ["csv_monitor", "data_efficiency", "flops_profiler", "tensorboard", "wandb"]
    settings = [*SETTINGS, f"run_dir={tmp_path / 'run'}", *(f"deepspeed.{name}={{}}" for name in known)]
    said = r"^deepspeed\.wal_clock_breakdown=True: DeepSpeed has no setting of .* did you mean wall_clock_breakdown\?$"
    with pytest.raises(ConfigError, match=said):
        start(load_config(TrainConfig, None, [*settings, *unknown]), clips)
    start(load_config(TrainConfig, None, [*settings, "deepspeed.dump_state=false"]), clips)


def test_faults_that_are_not_of_deepspeeds_settings_stay_what_they_are() -> None:
    config = load_config(TrainConfig, None, [*SETTINGS, "deepspeed.wall_clock_breakdown=true"])
    with pytest.raises(TypeError, match="elsewhere"), refusals(config):
        raise TypeError("a fault elsewhere")


def test_a_deepspeed_file_adds_to_the_settings_and_auto_means_ours(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    own = {
        "weight_quantization": None,
        "activation_checkpointing": {"cpu_checkpointing": False, "number_checkpoints": None},
    }
    own |= {"pipeline": "auto", "data_efficiency": {"enabled": False, "seed": 3}, "sequence_parallel_size": 1}
    zero = {"stage": "auto", "overlap_comm": True}
    file.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": 4, **own}))
    config = load_config(TrainConfig, None, [*SETTINGS, "zero.stage=2", f"deepspeed_config={file}"])
    settings = engine_settings(config, 2)
    assert settings["zero_optimization"]["stage"] == 2 and settings["zero_optimization"]["overlap_comm"] is True
    assert settings["train_micro_batch_size_per_gpu"] == 2 and "train_batch_size" not in settings
    assert "sequence_parallel_size" not in settings
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        check_settings(config, 2)
