"""A farm on an emulated cluster of three nodes while nodes, actors and the farm itself are killed at random.

    python tests/farm_kills.py MODEL FOLDER [--shots N] [--kills N] [--drivers N] [--seed S]

Prints what happened as one JSON object. The farm is the real command, in a process of its own, given again whenever it
was killed. Run in a process of its own, too: Ray's nodes are children of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from farms import FRAMES, some_shots, write_manifest

NODES, CPUS = 3, 2
# Victims: an actor of a gang, a whole node; where the farm itself is one, that is told apart.
KINDS = ("actor", "node", "actor")
LIMIT_S = 900


class Trial:
    """One farm and its misfortunes."""

    def __init__(self, model: Path, folder: Path, shots: int, seed: int) -> None:
        from ray.cluster_utils import Cluster

        self._rng, self._model, self._out = random.Random(seed), model, folder / "out"
        # Long enough to be struck in their middle.
        lengths = [FRAMES + 8 * self._rng.randrange(8, 50) for _ in range(shots)]
        listed = [{**shot, "num_frames": frames} for shot, frames in zip(some_shots(shots), lengths, strict=True)]
        (folder / "bad.png").write_bytes(b"no picture")
        listed[shots // 2] |= {"image": "bad.png"}
        self._manifest = write_manifest(folder / "kills.jsonl", listed)
        silence = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 6,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": silence})
        self._nodes = [self._cluster.add_node(num_cpus=CPUS) for _ in range(NODES)]
        self._log = (folder / "farm.log").open("a")
        self.struck: list[dict[str, Any]] = []

    def start(self) -> subprocess.Popen[str]:
        """The farm's command."""
        settings = {
            "model": self._model, "num_frames": FRAMES, "guidance_scale": 1, "num_stages": 2, "streams": 2,
            "link_timeout_s": 10, "placement_timeout_s": 60, "node_wait_s": 2, "max_restarts": 1,
            "farm.renderers": NODES, "farm.poll_s": 0.5, "farm.retry_s": 0.5, "farm.retries": 8, "save_latents": "true",
        }  # fmt: skip
        words = [f"{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "pavdm_dist", "farm", "run", str(self._manifest), "--out", str(self._out)]
        command += ["--address", self._cluster.address, "--json", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)

    @property
    def done(self) -> int:
        return len(list(self._out.glob("shots/*/video.json")))

    def strike(self) -> None:
        """Kills a random actor, or a random node, which another one takes the place of."""
        kind = self._rng.choice(KINDS)
        if kind == "node":
            node = self._nodes.pop(self._rng.randrange(len(self._nodes)))
            self._cluster.remove_node(node, allow_graceful=False)
            self._nodes.append(self._cluster.add_node(num_cpus=CPUS))
            what = "a node"
        else:
            names = ("ray::StageActor", "ray::DecodeActor")
            while not (actors := [one for one in _children() if _name(one).startswith(names)]):
                time.sleep(0.1)  # a gang is coming up
            victim = self._rng.choice(actors)
            what = _name(victim)
            victim.kill()
        self.struck.append({"what": what, "done": self.done})

    def close(self) -> None:
        self._cluster.shutdown()
        self._log.close()


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


def trial(model: Path, folder: Path, shots: int, kills: int, drivers: int, seed: int) -> dict[str, Any]:
    """Kills ``kills`` actors and nodes, and the farm ``drivers`` times, spread over the shots.

    Returns:
        ``struck``, the exit ``statuses`` of the farm's commands, and ``seconds``.
    """
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray")
    started, run = time.monotonic(), Trial(model, folder, shots, seed)
    rng = random.Random(seed + 1)
    moments = sorted(rng.uniform(0.05, 0.85) for _ in range(kills + drivers))
    ends = set(rng.sample(range(kills + drivers), drivers))
    statuses: list[int] = []
    farm = run.start()
    try:
        for number, moment in enumerate(moments):
            while run.done < moment * shots and farm.poll() is None:
                if time.monotonic() - started > LIMIT_S:
                    raise TimeoutError(f"{run.done} of {shots} are done")
                time.sleep(0.1)
            if farm.poll() is not None:
                break
            if number in ends:
                farm.send_signal(signal.SIGKILL)
                statuses.append(farm.wait())
                run.struck.append({"what": "the farm", "done": run.done})
                farm = run.start()
            else:
                run.strike()
        farm.communicate(timeout=max(1.0, LIMIT_S - (time.monotonic() - started)))
        statuses.append(farm.returncode)
    finally:
        farm.kill()
        farm.wait()
        run.close()
    return {"struck": run.struck, "statuses": statuses, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", type=Path)
    options.add_argument("folder", type=Path)
    for name, default in (("shots", 100), ("kills", 6), ("drivers", 2), ("seed", 0)):
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    print(json.dumps(trial(given.model, given.folder, given.shots, given.kills, given.drivers, given.seed)))


if __name__ == "__main__":
    main()
