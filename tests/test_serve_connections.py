"""Clients that connect and ask for nothing: they are let go of, and keep nothing from those who render."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from forked import Program
from helpers import tiny_checkpoint
from websockets.sync.client import connect

from pavdm_dist.serve.tokens import TOKEN

bounded = pytest.importorskip("pavdm_dist.serve.connections", reason="needs pavdm-dist[serve]").bounded


async def slow(scope: Any, receive: Any, send: Any) -> None:
    """Answers after a second, also a WebSocket."""
    is_http = scope["type"] == "http"
    if not is_http:
        await receive()
        await send({"type": "websocket.accept"})
    await anyio.sleep(1.0)
    if is_http:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
    else:
        await send({"type": "websocket.send", "text": "ok"})
        await send({"type": "websocket.close"})


@contextmanager
def listening(most: int, silence_s: float) -> Iterator[tuple[str, int]]:
    import uvicorn

    protocol = bounded(most, silence_s)
    server = uvicorn.Server(uvicorn.Config(slow, http=protocol, log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as own:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
        thread.start()
        try:
            yield own.getsockname()
        finally:
            server.should_exit = True
            thread.join(20)


def test_who_asks_for_nothing_is_let_go_of_and_who_waits_for_an_answer_is_not() -> None:
    with listening(most=10, silence_s=0.3) as address, ExitStack() as stack:
        silent, half = (stack.enter_context(socket.create_connection(address, 20)) for _ in range(2))
        asking = stack.enter_context(socket.create_connection(address, 20))
        half.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n")  # a head that has no end
        asking.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        viewer = stack.enter_context(connect(f"ws://{address[0]}:{address[1]}/"))
        assert _is_closed(silent) and _is_closed(half)
        assert asking.recv(1000).startswith(b"HTTP/1.1 200")
        assert viewer.recv(20) == "ok"
        began, rest = time.monotonic(), b"x"
        while rest:  # and once it is answered it is to ask again
            rest = asking.recv(1000)
        assert time.monotonic() - began < 4, "before uvicorn's own time for connections that are kept is over"


def test_no_more_are_held_than_may_be() -> None:
    with listening(most=2, silence_s=20.0) as address, ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address, 20)) for _ in range(2)]
        time.sleep(0.2)
        with socket.create_connection(address, 20) as third:
            assert _is_closed(third)
        held.pop().close()
        time.sleep(0.2)
        assert httpx.get(f"http://{address[0]}:{address[1]}/", timeout=20).text == "ok"


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other end closes it, or did so already."""
    try:
        return not connection.recv(10)
    except ConnectionError:
        return True


def test_three_hundred_silent_connections_take_no_files_from_who_renders(tmp_path: Path) -> None:
    """Of a server that may have 256 open, and of which they know no token."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 256));"
        "from pavdm_dist.cli import main; sys.exit(main())"
    )
    model, token = tiny_checkpoint(tmp_path / "model"), "x" * 20
    words = ["serve", f"model={model}", "guidance_scale=1", "http.port=0", "http.auth=token", "farm.retry_s=0.1"]
    started = Program(["-c", code, *words, "--out", str(tmp_path / "out")], {**os.environ, TOKEN: token})
    headers = {"Authorization": f"Bearer {token}"}
    try:
        address = next(filter(None, (re.search(r"listening on http://(\S+):(\d+)", line) for line in started.lines())))
        url = f"http://{address[1]}:{address[2]}"
        with httpx.Client(timeout=60, headers=headers) as client, ExitStack() as stack:
            assert client.get(f"{url}/v1/models").status_code == 200
            for _ in range(300):
                stack.enter_context(socket.create_connection((address[1], int(address[2])), 20))
            assert len(os.listdir(f"/proc/{started.pid}/fd")) < 200, "more than connections may have"
            end = time.monotonic() + 60
            while True:  # until those who came first are let go of
                id = _asked(client, url)
                if id is not None or time.monotonic() > end:
                    break
                time.sleep(0.2)
            assert id is not None
            while (found := client.get(f"{url}/v1/videos/{id}").json())["status"] != "completed":
                assert found["status"] != "failed" and time.monotonic() < end, found
                time.sleep(0.1)
    finally:
        started.kill()
    said, _ = started.communicate(20)
    assert "Too many open files" not in said, said


def _asked(client: httpx.Client, url: str) -> str | None:
    """Id of a video; None where the server has no room for a connection."""
    try:
        answer = client.post(f"{url}/v1/videos", json={"prompt": "a red three", "seconds": 1})
    except httpx.TransportError:
        return None
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])
