"""``pavdm serve``: opens a folder, listens, and ends in order."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pavdm_dist.errors import ConfigError, PAVDMError
from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.serve.asked import folder_errors, tree_at
from pavdm_dist.serve.front import Front
from pavdm_dist.serve.front_desk import FrontDesk
from pavdm_dist.serve.settings import ServeConfig, asks_for_token
from pavdm_dist.serve.tokens import token_of

logger = logging.getLogger(__name__)

# After the signal that ends it: how long answers that are under way may take.
_GRACE_S = 10
# Clients that wait to be connected.
_BACKLOG = 2048
# Of asyncio's loop, at each of which it accepts so many before those of the first are looked at: all together as many
# as there may be connections.
_TURNS = 3


def serve_command(config: ServeConfig, out: str, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serves until a signal ends it; what is under way is saved then, and the same command goes on with it.

    Args:
        config: checked.
        out: folder of the videos, a farm's.
        ready: called with the address once clients can come.

    Raises:
        PAVDMError: settings, a model, a folder or an address that cannot be used.
    """
    try:
        import uvicorn

        from pavdm_dist.serve.app import make_app
        from pavdm_dist.serve.connections import bounded, most_connections
    except ImportError as error:
        raise PAVDMError(f"pavdm serve needs {error.name}: pip install 'pavdm-dist[serve]'") from error

    tree, http = tree_at(out), config.http
    with folder_errors(tree):
        token = token_of(tree) if asks_for_token(http) else None
    most = most_connections()
    with _listen(http.host, http.port) as listening:
        desk = FrontDesk(config, Kinds(config), tree)
        try:
            with folder_errors(tree):
                waiting = desk.open()
            if waiting:
                logger.info("%d unfinished videos in %s go on", waiting, out)
            address = _address(http.host, listening)
            logger.info("listening on %s", address)
            ready(address)
            server = uvicorn.Server(
                uvicorn.Config(
                    make_app(Front(desk), token),
                    http=bounded(most),
                    backlog=min(_BACKLOG, max(1, most // _TURNS)),
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    timeout_graceful_shutdown=_GRACE_S,
                    lifespan="off",
                )
            )
            _tell(server, desk)
            # It answers a signal by ending in order, and gives it on when it has: that is no interruption here.
            with suppress(KeyboardInterrupt):
                server.run(sockets=[listening])
        finally:
            logger.info("ending: what is under way is saved")
            desk.close()


def _tell(server: Any, desk: FrontDesk) -> None:
    """Lets the desk know of a signal before the server waits for answers that are under way: live streams end then."""
    handle = server.handle_exit

    def handle_exit(number: int, frame: Any) -> None:
        desk.closing = True
        handle(number, frame)

    server.handle_exit = handle_exit


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that an address that cannot be used is one sentence before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        said = error.strerror or error
        raise ConfigError(f"http.host={host} http.port={port}: cannot be listened on: {said}") from error
    return listening


def _address(host: str, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"
