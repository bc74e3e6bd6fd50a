"""Clusters that are busy, still growing, far away or too small, and what is sent to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from zipfile import ZipFile

from autoscaling import growing_cluster, scaler_environment
from training import TINY

from cases import PROMPT, Running, environment, model, pavdm, run, sentence, went_well

# A cluster with these CPUs on its nodes; so many of the first are taken until its input says that they are free.
HELD = """
import sys
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
folder, taken, first, *others = sys.argv[1:]
small = {"object_store_memory": 80 * 2**20}
head = {"num_cpus": int(first), "temp_dir": folder, "include_dashboard": False, **small}
cluster = Cluster(initialize_head=True, head_node_args=head)
for cpus in others:
    cluster.add_node(num_cpus=int(cpus), **small)
ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
on_head = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

@ray.remote(num_cpus=int(taken), scheduling_strategy=on_head)
class Busy:
    pass

busy = Busy.remote()
ray.get(busy.__ray_ready__.remote())
print("cluster at", cluster.address, flush=True)
if sys.stdin.readline():
    ray.kill(busy)
    sys.stdin.read()
ray.shutdown()
cluster.shutdown()
"""
NO_TOKENS = {"RAY_AUTH_MODE": "disabled"}


@contextmanager
def _held(folder: Path, taken: int, *cpus: int) -> Iterator[tuple[str, Running]]:
    """The address of a cluster, and the program that holds it."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        words = ["-c", HELD, short, str(taken), *map(str, cpus)]
        program = {"program": (sys.executable,), "stdin": subprocess.PIPE, "env": environment(**NO_TOKENS)}
        with Running(folder, *words, name="cluster", **program) as holder:
            holder.until("cluster at ")
            yield holder.said.partition("cluster at ")[2].split()[0], holder
            assert holder.process.stdin is not None
            holder.process.stdin.close()
            holder.end()


def a_long_temporary_folder_is_no_obstacle(folder: Path) -> None:
    """F1: batch systems give every job one; sockets need short names."""
    deep = folder / ("x" * 60) / "job" / "1355700" / "tmp.t0016"
    deep.mkdir(parents=True)
    words = ["sample", PROMPT, model(folder), "num_frames=9", "num_stages=1", "output=video.mp4"]
    ended = pavdm(folder, *words, env=environment(TMPDIR=str(deep)))
    if ended.returncode:
        assert "TMPDIR" in sentence(ended).replace(str(deep), "")
    else:
        went_well(ended)
        assert (folder / "video.json").exists()


def stages_take_the_room_that_is_free(folder: Path) -> None:
    """F3: also where the one node that could hold them all is partly busy."""
    words = ["sample", PROMPT, model(folder), "num_frames=9", "num_stages=2", "output=video.mp4"]
    with _held(folder, 1, 2, 1, 1) as (address, _):
        went_well(pavdm(folder, *words, f"ray_address={address}", env=environment(**NO_TOKENS)))
    assert (folder / "video.json").exists()


def nodes_that_come_on_demand_are_waited_for(folder: Path) -> None:
    """F4: an autoscaler's cluster has nothing now."""
    words = ["sample", PROMPT, model(folder), "num_frames=9", "num_stages=2", "output=video.mp4"]
    with growing_cluster() as address:
        more = [f"ray_address={address}", "placement_timeout_s=200"]
        said = went_well(pavdm(folder, *words, *more, env=scaler_environment()))
    assert (folder / "video.json").exists() and "waiting up to 200 s for it to grow" in said, said


def a_busy_cluster_is_waited_for(folder: Path) -> None:
    """F5: as long as a setting says, and it is said for what."""
    words = ["sample", PROMPT, model(folder), "num_frames=9", "num_stages=2", "output=video.mp4"]
    with _held(folder, 2, 2) as (address, holder):
        more = [f"ray_address={address}", "placement_timeout_s=300"]
        with Running(folder, *words, *more, env=environment(**NO_TOKENS)) as command:
            command.until("needs 2 CPU; nothing is free after")  # once a minute
            assert holder.process.stdin is not None
            holder.process.stdin.write(b"free\n")
            holder.process.stdin.flush()
            went_well(command.end())
    assert (folder / "video.json").exists()


def training_that_no_cluster_can_hold_ends_in_a_sentence(folder: Path) -> None:
    """F7: a dead address, more workers or more GPUs than there are."""
    many = 16 * (os.cpu_count() or 1)
    asked = {
        "address": (["launch.ray_workers=1", "launch.ray_address=127.0.0.1:1"], "127.0.0.1:1"),
        "workers": ([f"launch.ray_workers={many}", f"data.batch_size={many}"], f"launch.ray_workers={many}"),
        "gpus": (["launch.ray_workers=1", "launch.gpus_per_worker=999"], "999"),
    }
    with ExitStack() as stack:
        commands = {}
        for name, (words, _) in asked.items():
            given = ["train", *TINY, f"data.still_batch_size={many}", f"run_dir={name}", *words]
            commands[name] = stack.enter_context(Running(folder, *given, name=f"{name}-log"))
        for name, (_, named) in asked.items():
            said = sentence(commands[name].end())
            assert named in said, said


def a_job_sends_code_alone(folder: Path) -> None:
    """F8: what lies beside the code in a checkout, prepared data and videos, stays where it is."""
    from ray._private.runtime_env.packaging import create_package

    root = Path(__file__).parents[2]
    checkout = folder / "checkout"
    for name in ("pavdm_dist", "configs", "cluster"):
        shutil.copytree(root / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prepared/bucket-0-00000.safetensors", "holiday.mp4"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_bytes(os.urandom(1 << 20))
    # An interpreter that tells what it was asked to submit.
    recorder = folder / "python"
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$RECORDED"\n')
    recorder.chmod(0o755)
    given = environment(PYTHON=str(recorder), RECORDED=str(folder / "words"), OUTPUT=str(folder / "video.mp4"))
    ended = run(checkout, ["bash", checkout / "cluster/ray_job/submit.sh"], env=given)
    assert ended.returncode == 0, ended.stderr
    words = (folder / "words").read_text().splitlines()
    about = json.loads(words[words.index("--runtime-env-json") + 1])
    sent = folder / "sent.zip"
    create_package(words[words.index("--working-dir") + 1], sent, include_gitignore=True, excludes=about["excludes"])
    names = ZipFile(sent).namelist()
    assert "pavdm_dist/cli.py" in names
    assert not [name for name in names if "holiday" in name or "prepared/" in name]
