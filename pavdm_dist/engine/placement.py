"""Where the actors of one gang run: one placement group, checked before it is asked for."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import EngineError, ResourcesError

logger = logging.getLogger(__name__)

# Object store of a cluster this process starts for itself: only finished chunks and frames pass through it.
LOCAL_OBJECT_STORE_BYTES = 400 * 2**20
REACH_TIMEOUT_S = 10.0


def connect(options: EngineOptions) -> bool:
    """Joins the Ray cluster of this process or of the options, else starts a local one.

    Returns:
        True when a local cluster was started here, which the caller must shut down.

    Raises:
        EngineError: the address does not answer.
    """
    import os

    import ray

    if ray.is_initialized():
        return False
    address = options.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if address:
            ray.init(address=address, logging_level=logging.ERROR)
            return False
        # Without "local", Ray would join a cluster that happens to run on this machine.
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        return True
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EngineError(f"ray_address={address!r}: no Ray cluster could be reached or started: {reason}") from error
    finally:
        # Ray ends the process at SIGTERM, with whatever is half done; who runs the process decides that here.
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def place(options: EngineOptions, given_up: Callable[[], bool] = lambda: False) -> Any:
    """A ready placement group for the stages (and the decoder, when it takes CPUs of its own).

    Packed on one host when a host can hold it, else on as few as possible.

    Raises:
        ResourcesError: the cluster can never hold it (said at once), or what it needs stays busy.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = options.bundles()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not fits(bundles, nodes):
        raise ResourcesError(
            f"num_stages={options.num_stages} needs {_total(bundles)} in {len(bundles)} actors of {bundles[0]}; "
            f"the cluster has {_total(nodes)} on {len(nodes)} node(s): use fewer stages, smaller cpus_per_stage or "
            "gpus_per_stage, or a larger cluster"
        )
    one_host = any(fits(bundles, [node]) for node in nodes)
    group = placement_group(bundles, strategy="STRICT_PACK" if one_host else "PACK")
    end = time.monotonic() + options.placement_timeout_s
    while not group.wait(min(1.0, options.placement_timeout_s)):
        if time.monotonic() < end and not given_up():
            continue
        remove_placement_group(group)
        raise ResourcesError(
            f"num_stages={options.num_stages} needs {_total(bundles)}, but only {_total([ray.available_resources()])} "
            f"was free within {options.placement_timeout_s:g} s: other jobs hold the rest of the cluster"
        )
    return group


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


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes for an address where nothing listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # auto, local
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"ray_address={address!r}: no Ray cluster could be reached: {error}") from error


def _total(resources: list[dict[str, float]]) -> str:
    amounts = {name: sum(r.get(name, 0.0) for r in resources) for name in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount) or "nothing"
