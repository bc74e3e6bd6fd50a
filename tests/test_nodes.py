"""A cluster of several nodes, emulated on this machine: where gangs go, and what is left when a node really goes.

A process has one cluster at a time, and the tests' own has one node: these run in a process beside.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from farm_kills import ACTOR, BOTH, Nodes, Plan, Trial, node_of, process_beside
from helpers import reference_chunks, tiny_checkpoint, tiny_model, tiny_stream
from previews import light_frames

from pavdm_dist.cluster import room
from pavdm_dist.codecs.catalog import RGB, FrameMaker
from pavdm_dist.engine import restart
from pavdm_dist.engine.events import Place
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.placement import Placement, place, stage_order
from pavdm_dist.engine.ray_engine import RayEngine
from pavdm_dist.errors import ResourcesError
from pavdm_dist.models.source import Source

pytestmark = pytest.mark.timeout(180)
CUTS = {stages: [(i, i + 1) for i in range(stages - 1)] + [(stages - 1, 4)] for stages in (1, 2, 3, 4)}

Beside = Callable[..., Any]


@pytest.fixture(scope="module")
def beside() -> Iterator[Beside]:
    """Runs a function in a process that holds a cluster whose only node, the driver's, has no CPUs to give."""
    with process_beside(_start, _stop) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(150)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


_cluster: Any = None


def _start(folder: str, environment: dict[str, str]) -> None:
    global _cluster
    import ray
    from ray.cluster_utils import Cluster

    os.environ.clear()  # that of whoever was the first to fork
    os.environ.update(environment, RAY_TMPDIR=folder)
    # Hardly a worker of these nodes computes anything.
    os.environ.pop("RAY_preload_python_modules", None)
    torch.set_num_threads(1)
    # A dead node is told by its silence: by default after a quarter of a minute and more. Here it takes half a minute,
    # in which a gang is to be made anew without it. Every node that comes would start workers for all of its CPUs.
    settings = {
        "enable_worker_prestart": False,
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 60,
    }
    _cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": settings})
    ray.init(address=_cluster.address, log_to_driver=False, logging_level="ERROR")


def _stop() -> None:
    import ray

    ray.shutdown()
    _cluster.shutdown()


@contextmanager
def _nodes(*cpus: int) -> Iterator[list[Any]]:
    """Nodes with so many CPUs; others may come and go meanwhile."""
    import ray

    nodes = [_cluster.add_node(num_cpus=each) for each in cpus]
    try:
        yield nodes
    finally:
        for node in list(_cluster.worker_nodes):
            _cluster.remove_node(node)
        _until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.05)


@contextmanager
def _busy(node: Any, cpus: int) -> Iterator[None]:
    """Somebody else's actor on a node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=cpus, scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False))
    class Other:
        def is_here(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.is_here.remote(), timeout=60)
    yield
    ray.kill(other)


@contextmanager
def _standing_still(node: Any) -> Iterator[None]:
    """A node whose Ray is stopped, which nobody is told of: the cluster counts it for half a minute and more."""
    process = node.all_processes["raylet"][0].process
    usual, room.WORD_S = room.WORD_S, 2.0
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
        room.WORD_S = usual


@contextmanager
def _placed(meanwhile: Callable[[], None] | None = None, **options: Any) -> Iterator[list[str]]:
    """Nodes of the stages, in stage order, then the decoder's; something is done while a place is waited for."""
    from ray.util.placement_group import remove_placement_group

    asked: list[None] = []

    def given_up() -> bool:  # asked once a second
        asked.append(None)
        if len(asked) == 3 and meanwhile is not None:
            meanwhile()
        return False

    chosen = place(EngineOptions(**options), given_up)
    assert meanwhile is None or len(asked) >= 3
    nodes = _nodes_of(chosen)
    try:
        yield nodes
    finally:
        remove_placement_group(chosen.group)


def _nodes_of(chosen: Placement) -> list[str]:
    from ray.util.placement_group import placement_group_table

    of_bundle = placement_group_table(chosen.group)["bundles_to_node_id"]
    return [of_bundle[bundle] for bundle in (*chosen.stages, chosen.decoder)]


def test_stages_of_a_node_follow_each_other_and_the_decoders_node_is_last() -> None:
    assert stage_order(["a", "a", "b"], 3) == [0, 1, 2]
    assert stage_order(["a", "b", "a", "b"], 4) == [0, 2, 1, 3]
    assert stage_order(["a", "b", "a", "b", "a"], 4) == [1, 3, 0, 2]  # the last bundle is the decoder's
    assert stage_order(["a", "b", "c"], 2) == [0, 1]
    assert stage_order(["c", "a", "b", "a", "c", "b"], 6) == [0, 4, 1, 3, 2, 5]


def _takes_what_is_free() -> None:
    with _nodes(3, 2) as (first, second), _busy(first, 2):
        start = time.monotonic()
        with _placed(num_stages=2) as nodes:
            assert nodes == [second.node_id] * 3
            assert time.monotonic() - start < 20, "the limit is a minute"
            # What may be had is waited for, and then refused in words.
            start = time.monotonic()
            with pytest.raises(ResourcesError, match=r"needs 2 CPU, but only 1 CPU was free within .*=3: other jobs"):
                place(EngineOptions(2, placement_timeout_s=3))
            assert time.monotonic() - start > 2.5
        # One that does not answer is left out, however free it is, also where its kernel still takes connections.
        with _standing_still(second), pytest.raises(ResourcesError, match=r"needs 2 CPU, but only 1 CPU was free"):
            place(EngineOptions(2, placement_timeout_s=2))
        # Together they have what is asked for, and no node has it: each is named.
        with _busy(second, 1), pytest.raises(ResourcesError) as refused:
            place(EngineOptions(1, cpus_per_stage=2, placement_timeout_s=2))
        said = r"needs 2 CPU, 2 CPU on one node for every actor, .*=2: node \S+ has 1 CPU of . CPU free, node \S+ has 1"
        assert re.search(said, str(refused.value)), refused.value
        # Both together have room, neither alone, though one is large enough: that one is not waited for.
        with _placed(num_stages=2, cpus_per_decoder=1, placement_timeout_s=30) as nodes:
            assert set(nodes) == {first.node_id, second.node_id}


def test_a_host_that_is_free_is_taken_before_one_that_is_only_large(beside: Beside) -> None:
    beside(_takes_what_is_free)


def _shares_nodes() -> None:
    with _nodes(2, 2, 2), _placed(num_stages=5, cpus_per_decoder=1) as nodes:
        assert len(set(nodes)) == 3 and sum(a != b for a, b in pairwise(nodes)) == 2, nodes


@pytest.mark.slow
def test_neighbours_share_a_node(beside: Beside) -> None:
    beside(_shares_nodes)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What placement logs meanwhile; pytest hears only its own process."""
    handler, lines = logging.Handler(), list[str]()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    room.logger.addHandler(handler)
    yield lines
    room.logger.removeHandler(handler)


def _waits_for_a_node() -> None:
    room.TELL_S = 1.0
    with _nodes(2) as (first,), _busy(first, 1):
        grow = lambda: _cluster.add_node(num_cpus=1)  # noqa: E731
        with _heard() as lines, _placed(grow, num_stages=2) as nodes:
            assert len(set(nodes)) == 2
        assert "num_stages=2 needs 2 CPU; 1 CPU is free after " in lines[0]
        # What the nodes that there are can never hold is refused at once, but where an autoscaler counts its nodes.
        two = EngineOptions(2, cpus_per_stage=2, placement_timeout_s=1)
        with pytest.raises(ResourcesError, match=r"needs 4 CPU in 2 actors .* has 3 CPU on 3 node"):
            place(two)
        os.environ["RAY_NODE_TYPE_NAME"] = "small"  # as autoscalers do it for their nodes
        try:
            _cluster.add_node(num_cpus=1)
            with pytest.raises(ResourcesError, match=r"within placement_timeout_s=1: the cluster has not grown"):
                place(two)
            with _placed(lambda: _cluster.add_node(num_cpus=4), num_stages=2, cpus_per_stage=2) as nodes:
                assert len(set(nodes)) == 1
        finally:
            del os.environ["RAY_NODE_TYPE_NAME"]


def test_a_node_that_comes_while_it_is_waited_for_is_taken(beside: Beside) -> None:
    beside(_waits_for_a_node)


def _engine(model: Path, stages: int, **options: Any) -> RayEngine:
    chosen = EngineOptions(stages, restart_backoff_s=0.1, **options)
    return RayEngine(str(model / "transformer"), CUTS[stages], chosen, light_frames(model), CUTS.__getitem__)


def _outlives_a_node(model: Path, stages: int, comes_back: bool, options: dict[str, Any], left: int) -> None:
    stream, latents = tiny_stream(0, num_chunks=30, guidance_scale=1.0), list[torch.Tensor]()
    started = threading.Event()

    def consume(engine: RayEngine) -> None:
        for finished in engine.run([stream]):
            latents.append(finished.clean.latents)
            if len(latents) == 5:
                os.kill(_decoder(engine).pid, signal.SIGSTOP)
                started.set()

    # Nothing is begun while a chunk waits for its frames: a video of a quarter of a second would be over before its
    # node is gone.
    limits = {"node_wait_s": 60 if comes_back else 1, "backlog_bytes": 1, **options}
    restart.SETTLING_S = 60.0  # a busy machine takes its time to end what was lost
    with _nodes(2, 1) as nodes, _engine(model, stages, **limits) as engine, ThreadPoolExecutor() as pool:
        assert engine._gang._cast.placement is not None and engine._gang._cast.decoding is not None
        *_, last, decoder = _nodes_of(engine._gang._cast.placement)
        assert decoder == nodes[1].node_id and (last == decoder) == (not options)
        placed, make = list[Placement](), engine._gang._cast._new_decoder
        engine._gang._cast._new_decoder = lambda place: placed.append(place) or make(place)  # type: ignore[method-assign,func-returns-value]
        consumer = pool.submit(consume, engine)
        assert started.wait(60)
        process, waiting = _decoder(engine).pid, engine._gang._cast.decoding
        _until(lambda: bool(waiting.awaited))
        _cluster.remove_node(nodes[1], allow_graceful=False)  # its processes are killed
        os.kill(process, signal.SIGKILL)  # what is stopped does not end with its node
        if comes_back:
            time.sleep(3)
            _cluster.add_node(num_cpus=1)
        consumer.result()
        # One loss, one restart, and no other decoder before: what Ray still counts is not placed on.
        found = engine.generation, len(engine._gang._cast.places), len(placed)
        assert found == (2, left, 0), found  # said: this runs in a process beside
    expected = reference_chunks(tiny_model(), stream)
    assert all(torch.equal(mine, clean.latents) for mine, clean in zip(latents, expected, strict=True))


def _decoder(engine: RayEngine) -> Place:
    assert engine._gang._cast.decoding is not None and engine._gang._cast.decoding.place is not None
    return engine._gang._cast.decoding.place


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_video_outlives_a_node(beside: Beside, model: Path, comes_back: bool) -> None:
    beside(_outlives_a_node, model, 3, comes_back, {}, 3 if comes_back else 2)


@pytest.mark.slow
def test_a_decoder_that_is_lost_with_its_node_does_not_wait_there_for_another(beside: Beside, model: Path) -> None:
    beside(_outlives_a_node, model, 1, True, {"cpus_per_stage": 2, "cpus_per_decoder": 1}, 1)


def _begins(cache: str, *cpus: int) -> tuple[str, int]:
    """Nodes whose actors come up at once; where the cluster is, and this process."""
    more = {"RAY_preload_python_modules": "torch", "XDG_CACHE_HOME": cache}
    os.environ.update(more)
    try:
        for each in cpus:
            _cluster.add_node(num_cpus=each)
    finally:
        for name in more:
            del os.environ[name]
    return str(_cluster.address), os.getpid()


def _goes(processes: list[int]) -> None:
    _cluster.remove_node(node_of(list(_cluster.worker_nodes), processes), allow_graceful=False)


def test_a_few_shots_outlive_an_actor_a_node_and_the_farm(
    beside: Beside, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last, for Ray counts the lost node for half a minute. ``tests/test_farm_kill.py`` has it with a hundred shots.

    The farm goes on after the loss of the actor; the node, with the next gang, and the farm go together.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    FrameMaker(Source.of(model / "vae"), preview=RGB).load()  # else the first to decode loads a codec for it
    address, pid = beside(_begins, str(tmp_path / "cache"), 2, 2)
    nodes = Nodes(address, pid, lambda processes: beside(_goes, list(processes)))
    strikes = [(1, ACTOR), (3, BOTH)]
    # One after another, so that whole shots are left at each strike.
    plan = Plan(6, strikes, stages=1, streams=1, renderers=1, notices=True, eights=(12, 20), preview=RGB, limit_s=150)
    trial = Trial(model, tmp_path, plan, nodes)
    trial.run()
    assert trial.statuses == [-9, 101] and len(trial.struck) == 2, (trial.statuses, trial.struck)
