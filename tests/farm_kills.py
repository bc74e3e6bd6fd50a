"""A farm on an emulated cluster while nodes, actors and the farm itself are killed: none of its shots is lost, and none
is made twice.

The farm is the real command, in a process of its own, given again whenever it was killed. Ray's nodes are children of a
process beside: the tests' own has another cluster.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from farms import FRAMES, farm_config, latents_of, packets_of, run_farm, some_shots, write_manifest
from forked import Program, forking

from pavdm_dist.errors import FailedVideosError
from pavdm_dist.farm.tree import Tree

# Who is struck: an actor of a gang, a whole node with one on it, the farm itself, the last two together; and what is
# drawn from for the first two.
ACTOR, NODE, FARM, BOTH = "actor", "node", "farm", "both"
_KINDS = (ACTOR, NODE, ACTOR)
_ACTORS = ("ray::StageActor", "ray::DecodeActor")


@dataclass(frozen=True)
class Plan:
    """Where a farm runs, and who is struck once how many of its shots are done.

    Attributes:
        shots: how many; the one in the middle has no readable picture.
        strikes: shots that are done, and kind.
        seed: of lengths and victims.
        stages, streams, renderers: of a renderer, of the farm.
        notices: after an actor was struck, nothing else is before the farm has noticed.
        eights: fewest and most eights of frames more than the fewest: long enough to be struck in their middle.
        preview: what makes frames instead of the codec.
        limit_s: after which it has failed.
    """

    shots: int
    strikes: Sequence[tuple[float, str]]
    seed: int = 0
    stages: int = 2
    streams: int = 2
    renderers: int = 3
    notices: bool = False
    eights: tuple[int, int] = (8, 50)
    preview: str | None = None
    limit_s: float = 900


@dataclass(frozen=True)
class Nodes:
    """An emulated cluster.

    Attributes:
        address: of it.
        pid: the process of whose descendants are all of its own.
        remove: kills the node that has one of these processes.
    """

    address: str
    pid: int
    remove: Callable[[Sequence[int]], None]


def drawn(shots: int, kills: int, drivers: int, seed: int) -> list[tuple[float, str]]:
    """``kills`` actors and nodes, and ``drivers`` times the farm, at random over the shots."""
    rng = random.Random(seed + 1)
    moments = sorted(shots * rng.uniform(0.05, 0.85) for _ in range(kills + drivers))
    ends = set(rng.sample(range(kills + drivers), drivers))
    return [(moment, FARM if number in ends else rng.choice(_KINDS)) for number, moment in enumerate(moments)]


class Trial:
    """One farm and its misfortunes."""

    def __init__(self, model: Path, folder: Path, plan: Plan, nodes: Nodes) -> None:
        self._rng, self._model, self._folder, self._plan = random.Random(plan.seed), model, folder, plan
        self._nodes, self._beside = nodes, psutil.Process(nodes.pid)
        lengths = [FRAMES + 8 * self._rng.randrange(*plan.eights) for _ in range(plan.shots)]
        listed = [{**shot, "num_frames": frames} for shot, frames in zip(some_shots(plan.shots), lengths, strict=True)]
        (folder / "bad.png").write_bytes(b"no picture")
        listed[plan.shots // 2] |= {"image": "bad.png"}
        self._manifest = write_manifest(folder / "kills.jsonl", listed)
        self.struck: list[str] = []
        self.statuses: list[int | None] = []

    def run(self) -> None:
        """From the first command of the farm to the end of the last; nothing is lost, nothing is made twice."""
        self._until_over(time.monotonic() + self._plan.limit_s)
        self._check()

    def _until_over(self, end: float) -> None:
        farm = self._command()
        try:
            for done, kind in self._plan.strikes:
                while (self._done < done or not self._has_noticed()) and farm.returncode is None:
                    assert time.monotonic() < end, f"{self._done} of {self._plan.shots} are done"
                    time.sleep(0.05)
                if farm.returncode is not None:
                    break
                if kind in (FARM, BOTH):
                    above = self._victim(end)[1] if kind == BOTH else []
                    farm.kill()
                    self.struck.append("the farm" if kind == FARM else "a node and the farm")
                    self._ended(farm, end)
                    if above:
                        self._nodes.remove(above)
                    farm = self._command()
                else:
                    self._strike(kind, end)
            self._ended(farm, end)
        finally:
            farm.kill()

    def _command(self) -> Program:
        plan = self._plan
        settings = {
            "model": self._model, "num_frames": FRAMES, "guidance_scale": 1, "num_stages": plan.stages,
            "streams": plan.streams,
            "link_timeout_s": 10, "placement_timeout_s": 60, "node_wait_s": 2, "max_restarts": 1,
            "farm.renderers": plan.renderers, "farm.poll_s": 0.5, "farm.retry_s": 0.5, "farm.retries": 8,
            "save_latents": "true",
        }  # fmt: skip
        words = [f"{name}={value}" for name, value in settings.items()]
        words += [] if plan.preview is None else [f"preview_decoder={plan.preview}"]
        place = ["--out", str(self._folder / "out"), "--address", self._nodes.address]
        return Program(["-m", "pavdm_dist", "farm", "run", str(self._manifest), *place, *words])

    def _ended(self, farm: Program, end: float) -> None:
        said, _ = farm.communicate(max(1.0, end - time.monotonic()))
        self.statuses.append(farm.returncode)
        with (self._folder / "farm.log").open("a") as log:
            log.write(said)

    @property
    def _done(self) -> int:
        return len(list(self._folder.glob("out/shots/*/video.json")))

    def _has_noticed(self) -> bool:
        """Whether the farm knows of each actor that was struck, where that is asked for."""
        losses = self.struck.count("an actor") if self._plan.notices else 0
        logs = [log.read_text() for log in self._folder.glob("out/logs/*.jsonl")] if losses else []
        said = ("another takes over", "another may follow", "; restart ")
        return sum(log.count(words) for log in logs for words in said) >= losses

    def _strike(self, kind: str, end: float) -> None:
        while True:
            victim, above = self._victim(end)
            with suppress(psutil.NoSuchProcess):  # one that ends in this moment: another is drawn
                if kind == ACTOR:
                    victim.kill()
                else:
                    self._nodes.remove(above)
                break
        self.struck.append("an actor" if kind == ACTOR else "a node")

    def _victim(self, end: float) -> tuple[psutil.Process, list[int]]:
        """An actor, and the processes above it."""
        while True:
            assert time.monotonic() < end, "no gang comes up"
            with suppress(psutil.NoSuchProcess):  # one that ends in this moment
                below = self._beside.children(recursive=True)
                if actors := [process for process in below if process.name().startswith(_ACTORS)]:
                    victim = self._rng.choice(actors)
                    return victim, [parent.pid for parent in victim.parents()]
            time.sleep(0.05)  # a gang is coming up

    def _check(self) -> None:
        out, alone = self._folder / "out", self._folder / "alone"
        tree = Tree(str(out))
        asked = [shot.id for shot in tree.shots()]
        assert len(asked) == self._plan.shots
        states = {id: tree.state(id) for id in asked}
        failed = {id: state.failure for id, state in states.items() if state.standing == "failed"}
        assert {state.standing for state in states.values()} == {"done", "failed"}, self.statuses
        assert [failure.kind for failure in failed.values() if failure is not None] == ["input"], failed
        config = farm_config(self._model, save_latents=True, preview_decoder=self._plan.preview)
        with pytest.raises(FailedVideosError, match="1 of"):  # an undisturbed one, in one process
            run_farm(config, self._manifest, alone)
        assert latents_of(out) == latents_of(alone)
        for video in alone.glob("shots/*/video.mp4"):
            mine = out / video.relative_to(alone)
            assert packets_of(mine) == packets_of(video)
            assert not list(mine.parent.glob("*.parts"))
        made: Counter[str] = Counter()
        for log in (out / "logs").glob("*.jsonl"):
            for line in log.read_text().splitlines():
                entry = json.loads(line)
                made[entry.get("shot")] += entry["message"].endswith(": done")
        made.pop(None, None)  # type: ignore[call-overload]
        assert max(made.values()) == 1, "rendered twice"


@contextmanager
def cluster_of_nodes(nodes: int, cpus: int) -> Iterator[Nodes]:
    """One whose own node computes nothing; another node comes for each that is killed."""
    with process_beside(_start, _stop, nodes, cpus) as pool:
        address, pid = pool.submit(_facts).result(120)
        yield Nodes(address, pid, lambda above: pool.submit(_replace, list(above)).result(60))


@contextmanager
def process_beside(start: Callable[..., None], stop: Callable[[], None], *more: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of one process that holds a cluster.

    Args:
        start: called there first, with a folder for the cluster, the environment and ``more``.
        stop: called there last.
    """
    # A folder of its own: in the usual one clusters leave their address, for whoever starts Ray next.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        pool = ProcessPoolExecutor(1, forking(), start, (folder, dict(os.environ), *more))
        process = psutil.Process(pool.submit(os.getpid).result(120))
        try:
            yield pool
            pool.submit(stop).result(60)
        finally:  # also where it hangs
            for left in (*process.children(recursive=True), process):
                with suppress(psutil.NoSuchProcess):
                    left.kill()
            pool.shutdown()


# --- in the process beside ----------------------------------------------------------------------------------------

_cluster: Any = None
_nodes: list[Any] = []
_cpus = 0


def _start(folder: str, environment: dict[str, str], nodes: int, cpus: int) -> None:
    global _cluster, _cpus
    from ray.cluster_utils import Cluster

    os.environ.clear()  # that of whoever was the first to fork
    os.environ.update(environment, RAY_TMPDIR=folder)
    os.environ.pop("RAY_preload_python_modules", None)
    silence = {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 6,
    }
    _cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": silence})
    _cpus = cpus
    _nodes.extend(_cluster.add_node(num_cpus=cpus) for _ in range(nodes))


def _facts() -> tuple[str, int]:
    """Where the cluster is, and this process."""
    return str(_cluster.address), os.getpid()


def node_of(nodes: Sequence[Any], processes: Sequence[int]) -> Any:
    """The one of Ray's nodes that one of these processes belongs to."""
    return next(node for node in nodes if node.all_processes["raylet"][0].process.pid in processes)


def _replace(processes: Sequence[int]) -> None:
    node = node_of(_nodes, processes)
    _nodes.remove(node)
    _cluster.remove_node(node, allow_graceful=False)
    _nodes.append(_cluster.add_node(num_cpus=_cpus))


def _stop() -> None:
    _cluster.shutdown()
