"""What a Ray cluster has room for: refused at once where it never can, waited for where it may."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pavdm_dist.cluster.address import one_line
from pavdm_dist.errors import EngineError, ResourcesError

logger = logging.getLogger(__name__)

Resources = dict[str, float]

# Between two words about a wait.
TELL_S = 60.0
# How long a node may take to accept a connection, and its Ray to say the first word on it, busy as it may be.
ANSWER_S, WORD_S = 1.0, 5.0
# How many nodes a message tells of.
NAMED = 6
# Ray's labels: the kind of node, which nodes have where an autoscaler counts them; the node itself.
_GROUP_LABEL, _NODE_LABEL = "ray.io/node-group", "ray.io/node-id"
# Of kinds of nodes that Ray makes up for its report where nobody counts them.
_NO_KIND = "node_"


@dataclass(frozen=True)
class Demand:
    """What is wanted of a cluster.

    Attributes:
        what: the setting and its value, for messages.
        bundles: resources of every process, each on one node; all but the last are equal.
        timeout_s: how long what others hold, or an autoscaler brings, is waited for.
        limit: the name of the setting that says so.
        smaller: what may be set to ask for less.
    """

    what: str
    bundles: list[Resources]
    timeout_s: float
    limit: str
    smaller: str

    def __str__(self) -> str:
        return f"{self.what} needs {total(self.bundles)}"


class Room:
    """Nodes of the cluster that this process is in, as they are when this is made; and waiting for a place on them.

    Args:
        demand: what for.
        address: of the cluster, as it was given.
        given_up: asked while waiting; true ends it.

    Attributes:
        nodes: resources of every node, free or not; without those that do not answer.

    Raises:
        ResourcesError: the cluster can never hold it.
    """

    def __init__(self, demand: Demand, address: str | None, given_up: Callable[[], bool] = lambda: False) -> None:
        import ray

        self._demand, self._given_up = demand, given_up
        alive = [node for node in ray.nodes() if node["Alive"]]
        self._is_client = _is_client(address)
        self._silent = [] if self._is_client else silent(alive)
        self._alive = [node for node in alive if node["NodeID"] not in self._silent]
        self.nodes: list[Resources] = [node["Resources"] for node in self._alive]
        self._start = self._said = time.monotonic()
        self._grows = may_grow()
        if fits(demand.bundles, self.nodes):
            return
        has = f"the cluster has {total(self.nodes)} on {len(self.nodes)} node(s)"
        if self._grows:
            logger.info("%s; %s: waiting up to %g s for it to grow", demand, has, demand.timeout_s)
            return
        more = f", and {len(self._silent)} that do not answer" if self._silent else ""
        raise ResourcesError(
            f"{demand} in {len(demand.bundles)} actors of {demand.bundles[0]}; {has}{more}: use {demand.smaller}, or a"
            " larger cluster"
        )

    def group(self, strategy: str, limit_s: float) -> Any | None:
        """A placement group that has its place before ``limit_s`` seconds since this was made; else None.

        Args:
            strategy: Ray's: ``PACK`` is few nodes, ``STRICT_PACK`` one.
            limit_s: never longer than the demand's own.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        bundles = self._demand.bundles
        where = [{_NODE_LABEL: f"!in({', '.join(self._silent)})"}] * len(bundles) if self._silent else None
        group = placement_group(bundles, strategy=strategy, bundle_label_selector=where)
        try:
            placed = self._placed(group, self._start + min(limit_s, self._demand.timeout_s))
        except BaseException:  # Ctrl-C
            remove_placement_group(group)
            raise
        if placed:
            return group
        remove_placement_group(group)
        return None

    def refusal(self) -> EngineError:
        """Why no group got its place."""
        if self._given_up():
            return EngineError("the engine is closed")
        demand, free = self._demand, self._free()
        within = f"within {demand.limit}={demand.timeout_s:g}"
        why = "the cluster has not grown so far" if self._grows else "other jobs hold the rest of the cluster"
        lacking = [name for name in demand.bundles[0] if _sum(free, name) < _sum(demand.bundles, name)]
        if lacking:
            return ResourcesError(f"{demand}, but only {total(free)} was free {within}: {why}")
        if fits(demand.bundles, free):
            return ResourcesError(f"{demand}, which was not free at one time {within}: {why}")
        each = " and ".join(dict.fromkeys(total([bundle]) for bundle in demand.bundles))
        return ResourcesError(
            f"{demand}, {each} on one node for every actor, which was not free {within}: {self._each_node(free)}; {why}"
        )

    def _placed(self, group: Any, end: float) -> bool:
        while not self._is_placed(group):
            now = time.monotonic()
            if now >= end or self._given_up():
                return False
            if now - self._said >= TELL_S:
                self._said = now
                logger.warning("%s; %s is free after %.0f s", self._demand, total(self._free()), now - self._start)
        return True

    def _is_placed(self, group: Any) -> bool:
        try:
            # It counts whole seconds, and may answer no to a wait of none although the group has its place.
            return bool(group.wait(1))
        except Exception as error:  # Ray has no finer type for a group that is no more
            raise EngineError(
                f"{self._demand}, but Ray waits no longer, as where the node of this process is gone: {one_line(error)}"
            ) from error

    def _free(self) -> list[Resources]:
        """What is free now, of every node in the order of ``nodes``; all in one where the driver is outside."""
        import ray

        if self._is_client:
            return [ray.available_resources()]
        of_node = ray._private.state.available_resources_per_node()
        return [of_node.get(node["NodeID"], {}) for node in self._alive]

    def _each_node(self, free: Sequence[Resources]) -> str:
        said = [
            f"node {node['NodeManagerAddress']} has {total([mine])} of {total([node['Resources']])} free"
            for node, mine in zip(self._alive, free, strict=False)
            if total([node["Resources"]]) != total([{}])
        ]
        more = f", {len(said) - NAMED} more" if len(said) > NAMED else ""
        return ", ".join(said[:NAMED]) + more


def silent(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Nodes that take no connection, or say nothing on it. Ray counts a machine that is gone without a word, or whose
    processes stand still, for a minute and more, and may place on it what nobody will ever hear of again.
    """
    with ThreadPoolExecutor(32) as pool:
        found = [node["NodeID"] for node, there in zip(nodes, pool.map(_answers, nodes), strict=True) if not there]
    # None at all answers a driver that is outside of the cluster's network.
    return found if len(found) < len(nodes) else []


def _answers(node: dict[str, Any]) -> bool:
    # An HTTP/2 server speaks first, and the kernel of a machine that stands still accepts connections all the same.
    # Behind TLS it is the client that does.
    speaks = os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true")
    try:
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        with socket.create_connection(address, timeout=ANSWER_S) as connection:
            connection.settimeout(WORD_S)
            return not speaks or bool(connection.recv(1))
    except OSError:
        return False


def is_gone(node_id: str, address: str | None) -> bool:
    """Whether the cluster counts a node no more, or will soon: it does not answer.

    Args:
        node_id: Ray's.
        address: of the cluster, as it was given.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    own = [node for node in alive if node["NodeID"] == node_id]
    if not own or _is_client(address):
        return not own
    # The others are asked where it is silent alone: none of them answers a driver outside of the cluster's network.
    return not _answers(own[0]) and node_id in silent(alive)


def _is_client(address: str | None) -> bool:
    """A driver behind Ray's client is outside of the cluster's network."""
    return (address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://")


def fits(bundles: list[Resources], nodes: list[Resources]) -> bool:
    """Whether nodes with these resources can hold the bundles, each bundle on one node.

    Exact when all bundles but the last (the decoder's) are equal: every node is tried for the last one.
    """
    *stages, last = bundles
    for position in range(len(nodes)):
        free = [dict(node) for node in nodes]
        if _take([free[position]], last) and all(_take(free, bundle) for bundle in stages):
            return True
    return False


def gangs(bundles: list[Resources], nodes: Sequence[Resources]) -> int:
    """How many times nodes with these resources hold the bundles, each bundle on one node."""
    free, count = [dict(node) for node in nodes], 0
    while all(_take(free, bundle) for bundle in bundles):
        count += 1
    return count


def gangs_of_cluster(bundles: list[Resources]) -> tuple[int, bool]:
    """How many times the cluster that this process is in holds the bundles, busy or free; and whether it may grow."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return gangs(bundles, [node["Resources"] for node in alive]), may_grow()


def total(resources: Sequence[Resources]) -> str:
    """CPUs and GPUs, in words."""
    amounts = {name: _sum(resources, name) for name in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount) or "nothing"


def _sum(resources: Sequence[Resources], name: str) -> float:
    return sum(each.get(name, 0.0) for each in resources)


def _take(nodes: list[Resources], bundle: Resources) -> bool:
    """Takes a bundle from the first node that holds it."""
    for node in nodes:
        if all(node.get(name, 0.0) >= amount for name, amount in bundle.items()):
            for name, amount in bundle.items():
                node[name] -= amount
            return True
    return False


def may_grow() -> bool:
    """Whether an autoscaler may add nodes to the cluster that this process is in.

    Nodes have a label where one counts them. Ray's older autoscaler sets none, but leaves a report every few seconds,
    which names kinds of nodes; without an autoscaler Ray makes up a kind for each node.
    """
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    if any(_GROUP_LABEL in node["Labels"] for node in ray.nodes() if node["Alive"]):
        return True
    report = json.loads(_internal_kv_get("__autoscaling_status") or b"{}").get("autoscaler_report") or {}
    kinds = [*report.get("active_nodes", {}), *(report.get("node_type_mapping") or {}).values()]
    return any(not str(kind).startswith(_NO_KIND) for kind in kinds)
