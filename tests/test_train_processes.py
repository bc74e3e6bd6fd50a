"""What launchers say in the environment, what settings of launchers mean, and numbers of processes that fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train_launch import LAUNCHER
from training import TINY

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.train import training_data
from pavdm_dist.errors import ConfigError
from pavdm_dist.train import launch as launch_module
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.effect import check_effect
from pavdm_dist.train.launch import check_gpus
from pavdm_dist.train.prepared import video_data
from pavdm_dist.train.ranks import World, check_alone, join_world, launched_size
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config

TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of somebody's shell: no launcher's variables."""
    for name in (*LAUNCHER, *TASKS):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def settings(*words: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*TINY, *words])


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "²"])
def test_a_variable_that_is_no_number_is_named(shell: pytest.MonkeyPatch, name: str, value: str) -> None:
    proper = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for other, text in {**proper, name: value}.items():
        shell.setenv(other, text)
    with pytest.raises(ConfigError, match=rf"{name}={value}: must be a whole number, . or more"):
        join_world()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "2"}, "RANK=2: must be 0 to 1 with WORLD_SIZE=2"),
        ({"MASTER_PORT": "77777"}, "MASTER_PORT=77777: must be 1 to 65535"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR=no.such.host.invalid: .* knows no such machine"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set although WORLD_SIZE=2"),
    ],
)
def test_variables_that_do_not_fit_are_named(shell: pytest.MonkeyPatch, given: dict[str, str], said: str) -> None:
    proper = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, text in {**proper, **given}.items():
        shell.setenv(name, text)
    with pytest.raises(ConfigError, match=said):
        join_world()


def test_an_empty_variable_is_none_and_one_process_needs_none(shell: pytest.MonkeyPatch) -> None:
    shell.setenv("WORLD_SIZE", "")
    assert launched_size() == 1
    # Those of some other job, whose head is gone.
    for name, text in {"WORLD_SIZE": "1", "RANK": "3", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1"}.items():
        shell.setenv(name, text)
    world = join_world()
    assert (world.rank, world.size) == (0, 1) and os.environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_know_nothing_of_each_other_are_refused(
    shell: pytest.MonkeyPatch, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.setenv(name, "2")
    assert cli.main(["train", *TINY, f"run_dir={tmp_path}"]) == 2
    assert f"pavdm: {name}=2, but WORLD_SIZE is not set" in (said := capsys.readouterr().err)
    assert "launch with torchrun, one per machine" in said and not list(tmp_path.iterdir())
    shell.setenv("WORLD_SIZE", "2")
    check_alone()


def test_two_processes_share_no_gpu(shell: pytest.MonkeyPatch) -> None:
    shell.setattr(torch.cuda, "device_count", lambda: 2)
    shell.setattr(torch.cuda, "is_available", lambda: True)
    check_gpus(2)
    with pytest.raises(ConfigError, match=r"launch\.processes=3: there are 2 GPUs here, .* at most 2, or CUDA_VISIBLE"):
        check_gpus(3)
    shell.setenv("LOCAL_RANK", "2")
    shell.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=2: there are 2 GPUs on .*; start at most 2 there"):
        join_world()


@pytest.mark.parametrize(
    "setting",
    ["ray_address=auto", "gpus_per_worker=1", "cpus_per_worker=2", "max_failures=1", "placement_timeout_s=600"],
)
def test_settings_of_workers_that_are_not_asked_for_are_refused(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *TINY, f"run_dir={tmp_path}", f"launch.{setting}"]) == 2
    said = capsys.readouterr().err
    assert f"launch.{setting.partition('=')[0]}=" in said and "there are none with launch.ray_workers=0" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "sampling={num_inference_steps: 5, window_chunks: 2}",
            "sampling.window_chunks=2 does not divide num_inference_steps=5",
        ),
        ("sampling={num_inference_steps: 5}", "pavdm: objective.window_chunks="),
        ("sampling={height: 17}", "sampling.height=17 cannot be divided by 8, the video codec's stride"),
        ("export=RUN/checkpoints", "run/checkpoints: is checkpoints in run_dir="),
        ("export=RUN/vae/model", "run/vae/model: lies in vae in run_dir="),
    ],
)
def test_a_model_that_could_not_be_exported_or_sampled_is_not_trained(
    given: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", *TINY, "max_seconds=0", f"run_dir={run}", given.replace("RUN", str(run))]) == 2
    assert said in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("train/opensora-240p.yaml", ["data.folder", "model.pretrained"]),
        ("train/wan2.1-t2v-1.3b.yaml", ["data.folder"]),
        ("train/wan2.2-ti2v-5b-lora.yaml", ["data.folder"]),
    ],
)
def test_a_recipe_for_real_video_trains_nothing_else(
    config: str, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it leaves to be given is asked for by name; it trained a toy on digits."""
    words = ["train", config, f"run_dir={tmp_path / 'run'}", "max_seconds=0"]
    for more in ([], ["--dry-run"]):
        assert cli.main([*words, *more]) == 2
        assert f"pavdm: {' and '.join(names)}: must be given ({names[0]}=..." in capsys.readouterr().err
    assert cli.main([*words, *(f"{name}=none" for name in names)]) == 2
    assert "pavdm: data.folder=none holds no data set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_no_data_set_is_named_before_a_model_is_asked_for(
    shell: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model may have to come from a hub."""
    shell.setattr(Checkpoint, "open", lambda *_, **__: pytest.fail("a model is asked for"))
    given = ["data.folder=nope", "model.pretrained=some/model", f"run_dir={tmp_path / 'run'}"]
    said = "data.folder=nope holds no data set: name a folder of `pavdm data prepare` (index.json is missing)"
    for more in ([], ["--dry-run"], ["sampling.fps=16"], ["data.text_dtype=float32"], ["data.pixels=true"]):
        assert cli.main(["train", *TINY, *given, *more]) == 2
        assert capsys.readouterr().err == f"pavdm: {said}\n"
    for worker in ([], ["data.pixels=true"]):
        with pytest.raises(ConfigError, match=re.escape(said)):
            video_data(settings(*given, *worker))


def test_a_run_says_what_it_is_trained_on(shell: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """First of all, and by the first process alone."""
    caplog.set_level("INFO")
    for name in ("digit_data", "video_data"):
        shell.setattr(f"pavdm_dist.commands.train.{name}", lambda *_: None)
    for rank in (0, 1):
        for words in ([], ["data.folder=[a, b]"]):
            training_data(settings(*words), World(rank, 2), 0)
    assert caplog.messages == ["data: moving digits, made here (data.folder is not set)", "data: a, b"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.pixels=true"], "data.pixels=True; it is of data.folder"),
        (["data.folder=set", "codec.base_dim=8"], "codec.base_dim=8.*; data.folder=set is trained on"),
        (["codec.folder=vae", "codec.base_dim=8"], "codec.base_dim=8; codec.folder=vae is trained already"),
        (["model.pretrained=m"], "model.depth=1, model.hidden_size=16, .*; the sizes of model.pretrained=m count"),
        (
            ["optimizer.name=adamw", "optimizer.matrix_ratio=3"],
            "optimizer.matrix_ratio=3.0; it is of optimizer.name=muon",
        ),
        (["zero.bucket_elements=5"], "zero.bucket_elements=5; it is of zero.stage=1, 2 and 3"),
        (["objective.variance_scale=0.3"], "objective.variance_scale=0.3; it is of objective.pattern=linear-variance"),
        (
            ["objective.pattern=linear", "objective.shift_scale=0.3"],
            "shift_scale=0.3; it is of objective.pattern=linear-s",
        ),
        (["objective.context_noise=0.3", "objective.context_chunks=0"], "context_noise=0.3; there is no clean context"),
        (["data.still_batch_size=5"], "data.still_batch_size=5; it is of data.still_steps and data.still_share"),
        (["validation.clips=3"], "validation.clips=3; it is of data.folder"),
        (["validation.batches=3"], "validation.batches=3; it is of validation.every_steps"),
        (
            ["model.lora.rank=2", "model.pretrained=m", "sampling={fps: 16}"],
            "sampling={'fps': 16}; it is kept with whole models, model.lora.rank=2 makes a LoRA",
        ),
        (["model.lora.targets=[to_q]"], r"model.lora.targets=\['to_q'\]; it is of model.lora.rank"),
    ],
)
def test_settings_that_are_not_read_are_told_of(given: list[str], said: str, caplog: pytest.LogCaptureFixture) -> None:
    check_effect(settings(*given), 1)
    assert re.search(f"no effect: .*{said}", caplog.text)


def test_clips_that_are_held_out_and_never_looked_at_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    check_effect(settings("data.folder=[set]", "validation.clips=3", "validation.every_steps=5"), 1)
    assert "validation" not in caplog.text
    check_effect(settings("data.folder=[set]", "validation.clips=3"), 1)
    assert "validation.clips=3 leaves clips out of training that are never looked at" in caplog.text


def test_gpus_that_one_process_leaves_idle_are_told_of(
    caplog: pytest.LogCaptureFixture, shell: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[TrainConfig] = []
    shell.setattr(launch_module, "_train_here", lambda config, _: trained.append(config))
    for count, told in ((0, 0), (1, 0), (4, 1)):
        shell.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        shell.setattr(torch.cuda, "device_count", lambda count=count: count)
        caplog.clear()
        launch_module.launch(settings(f"run_dir={tmp_path}"), training_data, ())
        assert len([record for record in caplog.records if "stay idle" in record.getMessage()]) == told
    assert "3 of 4 GPUs of this machine stay idle: launch.processes=1 trains on one; launch.processes=4" in caplog.text
    assert len(trained) == 3


def test_single_frames_that_are_not_drawn_need_not_divide() -> None:
    check_settings(settings("data.batch_size=3"), 3)
    with pytest.raises(
        ConfigError, match=r"data\.still_batch_size=128 does not divide among 3 processes: use 126 or 129"
    ):
        check_settings(settings("data.batch_size=3", "data.still_steps=1"), 3)


def test_what_is_read_is_not_told_of(caplog: pytest.LogCaptureFixture, shell: pytest.MonkeyPatch) -> None:
    check_effect(settings("data.still_share=0.1", "data.still_batch_size=5", "objective.shift_scale=0.3"), 1)
    mixed = "objective.mixture=[{pattern: linear}, {share: 1}]"
    check_effect(settings(mixed, "objective.shift_scale=0.3", "objective.context_noise=0.3"), 1)
    check_effect(settings("zero.stage=1", "optimizer.name=adamw", "zero.bucket_elements=5", "launch.processes=2"), 1)
    check_effect(settings("launch.ray_workers=2", "launch.max_failures=1"), 1)
    check_effect(settings("launch.processes=2"), 2)  # one of the two
    assert not caplog.records
    check_effect(settings("launch.processes=8"), 2)
    assert "launch.processes=8 has no effect: a launcher started 2 processes" in caplog.text
    caplog.clear()
    shell.setenv("RANK", "1")
    check_effect(settings("launch.processes=8"), 2)  # once
    assert not caplog.records


@pytest.mark.parametrize(
    ("words", "size", "counts"),
    [
        (["data.batch_size=2"], 3, "2"),
        (["data.batch_size=12"], 5, "4 or 6"),
        (["data.batch_size=12", "optimizer.accumulation=2"], 4, "3 or 6"),
        (["data.batch_size=4", "sequence_parallel=2"], 6, "4 or 8"),
    ],
)
def test_a_run_that_goes_on_keeps_its_batches(words: list[str], size: int, counts: str, tmp_path: Path) -> None:
    config = settings("data.still_batch_size=48", *words, f"run_dir={tmp_path}")
    with pytest.raises(ConfigError, match=r"does not divide among \d processes.*: use \d"):
        check_settings(config, size)
    (tmp_path / "checkpoints" / "step0000003").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"a run that is gone on with keeps it: use {counts} processes$"):
        check_settings(config, size)
    for count in counts.split(" or "):
        check_settings(config, int(count))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["launch.ray_workers=1", "launch.ray_address=127.0.0.1:1"],
            "ray_address='127.0.0.1:1': ",
        ),
        (["launch.ray_workers=1", "launch.gpus_per_worker=0.5"], "gpus_per_worker=0.5: a worker computes on one GPU"),
        (  # workers may have data that this machine has not
            ["launch.ray_workers=1", "launch.gpus_per_worker=0.5", "data.folder=theirs"],
            "gpus_per_worker=0.5: a worker computes on one GPU",
        ),
        (["launch.ray_workers=1", "launch.gpus_per_worker=2"], "gpus_per_worker=2: a worker computes on one GPU"),
    ],
)
def test_ray_is_asked_for_what_it_may_have(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *TINY, f"run_dir={tmp_path}", *words]) == 2
    assert said in capsys.readouterr().err


def test_workers_that_a_cluster_cannot_hold_are_refused_at_once(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, said in (
        (
            ["launch.ray_workers=16"],
            "launch.ray_workers=16 needs 16 CPU in 16 actors of .*; the cluster has 8 CPU on 1",
        ),
        (["launch.ray_workers=1", "launch.gpus_per_worker=1"], "launch.ray_workers=1 needs 1 CPU, 1 GPU in"),
    ):
        words = [*TINY, "data.batch_size=16", "data.still_batch_size=16", f"run_dir={tmp_path}", *more]
        assert cli.main(["train", *words]) == 2
        assert re.search(f"{said}.*: use fewer workers, smaller launch.cpus_per_worker", capsys.readouterr().err)


def test_busy_workers_are_waited_for_and_then_named(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    @ray.remote(num_cpus=7)
    class Other:
        def is_here(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.is_here.remote(), timeout=60)
    words = ["launch.ray_workers=2", "launch.placement_timeout_s=1", f"run_dir={tmp_path}"]
    try:
        assert cli.main(["train", *TINY, *words]) == 2
    finally:
        ray.kill(other)
    said = capsys.readouterr().err
    assert "needs 2 CPU, but only 1 CPU was free within launch.placement_timeout_s=1: other jobs hold the rest" in said


def test_processes_here_run_no_scripts_of_the_current_folder(tmp_path: Path) -> None:
    """``python -m`` would look there first, and torchrun imports much."""
    (tmp_path / "scipy.py").write_text("raise SystemExit('a script of somebody else')")
    (tmp_path / "torch.py").write_text("raise SystemExit('a script of somebody else')")
    program = "import sys\nfrom pavdm_dist.train.launch import _launch_here\n_launch_here(1, ['--print-config'])\n"
    (tmp_path / "in").mkdir()
    script = tmp_path / "in" / "script.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "run_dir: runs/embedded" in done.stdout, done.stderr
