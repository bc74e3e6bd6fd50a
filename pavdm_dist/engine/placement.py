"""Where the actors of one gang run: one placement group, checked before it is asked for."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import EngineError, ResourcesError

logger = logging.getLogger(__name__)

# How long one host that could hold everything may take to have it free, before several are taken.
ONE_HOST_S = 2.0
# Between two words about a wait.
TELL_S = 60.0
# How long a node may take to accept a connection.
ANSWER_S = 1.0
# Ray's labels: the kind of node, which nodes have where an autoscaler counts them; the node itself.
_GROUP_LABEL, _NODE_LABEL = "ray.io/node-group", "ray.io/node-id"


@dataclass(frozen=True)
class Placement:
    """Where the actors of one gang run.

    Attributes:
        group: the placement group, ready.
        stages: bundle of every stage, in stage order: neighbours share a node wherever they can.
        decoder: bundle of the decode actor.
    """

    group: Any
    stages: list[int]
    decoder: int


def place(options: EngineOptions, given_up: Callable[[], bool] = lambda: False) -> Placement:
    """A place for the stages (and for the decoder, where it has resources of its own).

    On one host where one has room within a moment, else on as few as have room by then. Waits for what is busy, and for
    an autoscaler, up to ``placement_timeout_s``; says once a minute for what.

    Raises:
        ResourcesError: the cluster can never hold it (said at once), or what it needs stays busy.
        EngineError: ``given_up`` turned true.
    """
    import ray
    from ray.util.placement_group import placement_group_table, remove_placement_group

    bundles = options.bundles()
    alive = [node for node in ray.nodes() if node["Alive"]]
    # A driver behind Ray's client is outside of the cluster's network.
    is_client = (options.ray_address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://")
    silent = [] if is_client else _silent(alive)
    nodes = [node["Resources"] for node in alive if node["NodeID"] not in silent]
    grows = any(_GROUP_LABEL in node["Labels"] for node in alive)
    if not fits(bundles, nodes) and not grows:
        more = f", and {len(silent)} that do not answer" if silent else ""
        raise ResourcesError(
            f"{_asked(options)} in {len(bundles)} actors of {bundles[0]}; "
            f"the cluster has {_total(nodes)} on {len(nodes)} node(s){more}: use fewer stages, smaller cpus_per_stage "
            "or gpus_per_stage, or a larger cluster"
        )
    wait, group = _Wait(options, given_up, silent), None
    # Whether a host is free is Ray's to judge: the totals say only whether it is worth a try.
    if len(nodes) > 1 and any(fits(bundles, [node]) for node in nodes):
        group = wait.group("STRICT_PACK", min(ONE_HOST_S, options.placement_timeout_s / 2))
    group = group or wait.group("PACK", options.placement_timeout_s)
    if group is None:
        if given_up():
            raise EngineError("the engine is closed")
        why = "the cluster has not grown so far" if grows else "other jobs hold the rest of the cluster"
        raise ResourcesError(
            f"{_asked(options)}, but only {_free()} was free within placement_timeout_s="
            f"{options.placement_timeout_s:g}: {why}"
        )
    try:
        of_bundle = placement_group_table(group)["bundles_to_node_id"]
        stages = stage_order([of_bundle[bundle] for bundle in range(len(bundles))], options.num_stages)
    except BaseException:  # nobody else knows of it yet
        remove_placement_group(group)
        raise
    return Placement(group, stages, len(bundles) - 1 if len(bundles) > len(stages) else stages[-1])


def stage_order(nodes: Sequence[str], num_stages: int) -> list[int]:
    """Bundle of every stage, in stage order: those of a node follow each other, so that most links stay inside one.

    Args:
        nodes: of each bundle: the stages', then the decoder's if it has one. The decoder's node comes last: clean
            chunks are the last stage's.
        num_stages: P.
    """
    met = {node: place for place, node in enumerate(dict.fromkeys(nodes[:num_stages]))}
    decoders = nodes[num_stages:]
    return sorted(range(num_stages), key=lambda bundle: (nodes[bundle] in decoders, met[nodes[bundle]]))


def _silent(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Nodes that take no connection. Ray counts a machine that is gone without a word for up to a minute, and may place
    on it what nobody will ever hear of again.
    """

    def answers(node: dict[str, Any]) -> bool:
        try:
            address = node["NodeManagerAddress"], node["NodeManagerPort"]
            socket.create_connection(address, timeout=ANSWER_S).close()
            return True
        except OSError:
            return False

    with ThreadPoolExecutor(32) as pool:
        silent = [node["NodeID"] for node, there in zip(nodes, pool.map(answers, nodes), strict=True) if not there]
    # None at all answers a driver that is outside of the cluster's network.
    return silent if len(silent) < len(nodes) else []


class _Wait:
    """Waiting for placement groups, one after the other, against one clock."""

    def __init__(self, options: EngineOptions, given_up: Callable[[], bool], silent: Sequence[str]) -> None:
        self._options, self._given_up = options, given_up
        self._where = {_NODE_LABEL: f"!in({', '.join(silent)})"} if silent else None
        self._start = self._said = time.monotonic()

    def group(self, strategy: str, limit_s: float) -> Any | None:
        """A placement group that has its place before ``limit_s`` seconds since the first wait began; else None."""
        from ray.util.placement_group import placement_group, remove_placement_group

        bundles = self._options.bundles()
        where = [self._where] * len(bundles) if self._where else None
        group = placement_group(bundles, strategy=strategy, bundle_label_selector=where)
        try:
            placed = self._placed(group, self._start + min(limit_s, self._options.placement_timeout_s))
        except BaseException:  # Ctrl-C
            remove_placement_group(group)
            raise
        if placed:
            return group
        remove_placement_group(group)
        return None

    def _placed(self, group: Any, end: float) -> bool:
        # It counts whole seconds, and may answer no to a wait of none although the group has its place.
        while not group.wait(1):
            now = time.monotonic()
            if now >= end or self._given_up():
                return False
            if now - self._said >= TELL_S:
                self._said = now
                logger.warning("%s; %s is free after %.0f s", _asked(self._options), _free(), now - self._start)
        return True


def fits(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> bool:
    """Whether nodes with these *total* resources can hold the bundles, each bundle on one node.

    Exact when all bundles but the last (the decoder's) are equal: every node is tried for the last one.
    """
    *stages, last = bundles
    for position in range(len(nodes)):
        free = [dict(node) for node in nodes]
        if _take([free[position]], last) and all(_take(free, bundle) for bundle in stages):
            return True
    return False


def _take(nodes: list[dict[str, float]], bundle: dict[str, float]) -> bool:
    """Takes a bundle from the first node that holds it."""
    for node in nodes:
        if all(node.get(name, 0.0) >= amount for name, amount in bundle.items()):
            for name, amount in bundle.items():
                node[name] -= amount
            return True
    return False


def gpus_of_cluster() -> int:
    """GPUs of the cluster that this process is in, busy or free."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _asked(options: EngineOptions) -> str:
    return f"num_stages={options.num_stages} needs {_total(options.bundles())}"


def _free() -> str:
    import ray

    return _total([ray.available_resources()])


def _total(resources: list[dict[str, float]]) -> str:
    amounts = {name: sum(r.get(name, 0.0) for r in resources) for name in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount) or "nothing"
