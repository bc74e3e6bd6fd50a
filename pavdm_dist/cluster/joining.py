"""Joining a Ray cluster, or starting one that nobody else can reach."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pavdm_dist.errors import EngineError

# Object store of a cluster this process starts for itself: only finished chunks and frames pass through it.
LOCAL_OBJECT_STORE_BYTES = 400 * 2**20
REACH_TIMEOUT_S = 10.0


def connect(address: str | None, log_to_driver: bool = False) -> bool:
    """Joins the Ray cluster that this process is in, or that of the address, else starts a local one.

    Args:
        address: None = that of ``RAY_ADDRESS``.
        log_to_driver: what workers print, tracebacks too, comes out of this process; else it stays in their logs.

    Returns:
        True when a local cluster was started here, which the caller must shut down.

    Raises:
        EngineError: the address does not answer.
    """
    import ray

    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    if address == "local":  # Ray's word for one of this process' own
        address = None
    if address:
        _check_reachable(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if address:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=log_to_driver)
            return False
        # Without "local", Ray would join a cluster that happens to run on this machine.
        with _on_loopback():
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=log_to_driver,
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


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray started inside listens on loopback only, and not on all addresses of the machine.

    Ray has this for machines whose firewall asks about every open port, and maps any address of loopback that it is
    given to the machine's own. Its processes read the variable; this one has read it when Ray was imported.
    """
    import ray

    name, constants = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray._private.ray_constants
    before, cluster = os.environ.get(name), constants.ENABLE_RAY_CLUSTER
    os.environ[name], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = cluster
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes for an address where nothing listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # auto, local
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"ray_address={address!r}: no Ray cluster could be reached: {error}") from error
