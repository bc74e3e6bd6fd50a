"""Stages and decoders: where they are, what they share, what they import, and one that hangs."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path

import psutil
import pytest

from cases import PROMPT, Running, environment, model, pavdm, python, run, sentence, went_well

# The command line on a machine that seems to have GPUs.
GPUS = """
import sys, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 4
torch.cuda.get_device_name = lambda *_: "some GPU"
from pavdm_dist.cli import main
sys.exit(main(sys.argv[1:]))
"""


def gpus_that_stay_idle_are_told(folder: Path) -> None:
    """D1: or used."""
    given = environment()
    given.pop("CUDA_VISIBLE_DEVICES", None)
    words = ["sample", PROMPT, model(folder), "num_frames=9"]
    for stages in (0, 2):
        ended = python(folder, GPUS, *words, f"num_stages={stages}", f"output={stages}.mp4", env=given)
        assert "GPU" in ended.stderr or "cuda" in ended.stderr.lower(), ended.stderr
        if stages:  # those are not used unless it is said
            assert "device=cuda" in went_well(ended), ended.stderr


def the_decoder_has_a_place_and_a_part_in_plans(folder: Path) -> None:
    """D5: it can be put on a GPU, and a plan counts it and says where it is what bounds."""
    settings = pavdm(folder, "sample", "--print-config")
    went_well(settings)
    assert {"decoder:", "gpus_per_decoder:", "threads_per_decoder:"} <= {
        line.split()[0] for line in settings.stdout.splitlines()
    }
    # 72 chunks of 20 frames, each 0.015 TFLOP.
    words = ["plan", "seconds=60", "cluster.devices=8", "cluster.videos=8", "--json"]
    planned = {}
    for name, more in {"untold": [], "cpu": ["cluster.decoder_tflops=0.05"], "cuda": ["decoder=cuda"]}.items():
        ended = pavdm(folder, *words, *more)
        went_well(ended)
        planned[name] = json.loads(ended.stdout)["cluster"]
    assert "decoding on CPUs is not in these times" in planned["untold"]["why"]
    assert planned["cpu"]["choice"]["seconds"] > 10 > 5 > planned["cuda"]["choice"]["seconds"], planned
    assert "decod" in planned["cpu"]["why"], planned["cpu"]["why"]


CHOICE = """
from pavdm_dist.engine.options import EngineOptions
print(EngineOptions(2, gpus_per_stage=0.5).transport)
"""


def half_a_gpu_is_no_case_for_nccl(folder: Path) -> None:
    """F6: two stages on one GPU talk by gloo; NCCL, asked for, is refused."""
    ended = python(folder, CHOICE)
    went_well(ended)
    assert ended.stdout.split() == ["gloo"]
    words = ["num_stages=2", "gpus_per_stage=0.5", "backend=nccl", "output=video.mp4"]
    said = sentence(pavdm(folder, "sample", PROMPT, model(folder), *words))
    assert "backend=nccl needs gpus_per_stage of 1" in said and "use backend=gloo" in said, said


def files_of_the_current_folder_are_not_run(folder: Path) -> None:
    """K7: a script that is named like a library that stages look for."""
    for name in ("h2", "brotli", "socksio", "zstandard", "wandb"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'a').write('{name} ')\n")
    words = ["sample", PROMPT, model(folder), "num_frames=9", "num_stages=1", "output=video.mp4"]
    # As the installed command: the current folder is no place of imports.
    went_well(run(folder, [sys.executable, "-P", "-m", "pavdm_dist", *words]))
    assert not (folder / "ran").exists(), (folder / "ran").read_text()


def a_stage_that_hangs_is_noticed_and_replaced(folder: Path) -> None:
    """K3: its computing thread alone, as on a stuck GPU or share; it is the only stage."""
    seize, interrupt = 0x4206, 0x4207  # of ptrace
    libc = ctypes.CDLL(None)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    words = [model(folder), "num_frames=100000", "num_stages=1", "link_timeout_s=10", "output=video.mp4"]
    with Running(folder, "sample", PROMPT, *words) as command:
        command.until("chunk 2:")
        family = psutil.Process(command.process.pid).children(recursive=True)
        stage = next(one for one in family if " ".join(one.cmdline()).startswith("ray::StageActor"))
        thread = max(stage.threads(), key=lambda one: one.user_time).id
        if libc.ptrace(seize, thread, None, None) or libc.ptrace(interrupt, thread, None, None):
            pytest.skip("this machine lets nobody stop a thread")
        command.until("is up ")
        before = command.said
        assert "stage 0 of 1" in before and "restart 1 of 3" in before, before[-3000:]
        command.until(lambda: command.said.count(" chunk ") > before.count(" chunk ") + 3)
        sentence(command.end(signal.SIGTERM), 143)
