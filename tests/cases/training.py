"""Folders of training runs: shared or not, written by two, on a full disk, gone on with by more processes."""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from training import TINY, tiny_codec

from cases import Running, environment, pavdm, sentence, went_well
from pavdm_dist.digits.cache import cache_clips
from pavdm_dist.train.ranks import free_port

TRAIN = ("train", *TINY, "data.still_batch_size=4", "sheet_every_seconds=0", "run_dir=run", "codec.folder=run/vae")


def _prepared(folder: Path) -> None:
    """What a run makes first, and takes long to make."""
    tiny_codec(folder / "run/vae")
    cache_clips(folder / "run/vae", folder / "run/clips", 32, 10, max_seconds=200)


def a_folder_that_nodes_do_not_share_is_refused(folder: Path) -> None:
    """G1: in the first seconds, not when it is to be gone on with."""
    _prepared(folder / "one")
    shutil.copytree(folder / "one", folder / "other")
    words = ["data.batch_size=4", "optimizer.name=adamw", "zero.stage=1", "optimizer.total_steps=4"]
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    with ExitStack() as stack:
        nodes = []
        for rank, name in enumerate(("one", "other")):
            there = [*launcher, f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
            program = [*there, "-m", "pavdm_dist"]
            nodes.append(stack.enter_context(Running(folder / name, *TRAIN, *words, program=program)))
        ended = [node.end() for node in nodes]
    said = "".join(one.stderr for one in ended)
    assert all(one.returncode for one in ended) and re.search(r"pavdm: run_dir=run: .*must be a folder that all", said)
    assert not list(folder.glob("*/run/checkpoints/*")) and not list(folder.glob("*/run/log.jsonl"))


def a_run_has_one_writer(folder: Path) -> None:
    """G2: the same command again is refused while the first lives; several tasks of a batch system need a launcher."""
    _prepared(folder)
    words = [*TRAIN, "optimizer.total_steps=100000", "checkpoint_every_seconds=0.3"]
    with Running(folder, *words) as first:
        first.until((folder / "run/log.jsonl").exists)
        said = sentence(pavdm(folder, *words))
        assert "run_dir=run" in said and f"process {first.process.pid}" in said, said
        said = sentence(pavdm(folder, *words, env=environment(SLURM_NTASKS="2", SLURM_PROCID="1")))
        assert "torchrun" in said, said
        assert "Traceback" not in first.end(15).stderr
    steps = [json.loads(line)["step"] for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def a_checkpoint_without_room_is_a_sentence(folder: Path) -> None:
    """G4: with the reason, and no half of it stays; with room the same command goes on."""
    _prepared(folder)
    words = [*TRAIN, "optimizer.total_steps=3"]

    def quota() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    said = sentence(pavdm(folder, *words, preexec_fn=quota))
    assert "cannot be written" in said and "File too large" in said and "free" in said, said
    assert not list((folder / "run/checkpoints").glob("*.partial"))
    went_well(pavdm(folder, *words))


def another_number_of_processes_goes_on_or_is_told_which_can(folder: Path) -> None:
    """G5: what is advised is then accepted."""
    _prepared(folder)
    words = [*TRAIN, "data.batch_size=2", "data.still_batch_size=6", "optimizer.name=adamw", "zero.stage=1"]
    went_well(pavdm(folder, *words, "launch.processes=2", "optimizer.total_steps=2"))
    ended = pavdm(folder, *words, "launch.processes=3", "optimizer.total_steps=4")
    if ended.returncode:
        advised = re.search(r"use (?:\d+ or )?(\d+) process", sentence(ended))
        assert advised is not None, ended.stderr
        ended = pavdm(folder, *words, f"launch.processes={advised[1]}", "optimizer.total_steps=4")
    said = went_well(ended)
    assert "all steps done" in said, said
