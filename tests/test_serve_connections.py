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
from types import SimpleNamespace
from typing import Any

import anyio
import httpx2 as httpx
import psutil
import pytest
from forked import Program
from helpers import tiny_checkpoint
from websockets.sync.client import connect

from pavdm_dist.serve.tokens import TOKEN

ADMIT = pytest.importorskip("pavdm_dist.serve.guard", reason="needs pavdm-dist[serve]").ADMIT
bounded = pytest.importorskip("pavdm_dist.serve.connections", reason="needs pavdm-dist[serve]").bounded


async def slow(scope: Any, receive: Any, send: Any) -> None:
    """Answers after a second, also a WebSocket. It knows those who ask for that, and gives much to those."""
    is_http = scope["type"] == "http"
    if scope["path"] == "/known":
        scope["state"][ADMIT]()
    if not is_http:
        await receive()
        await send({"type": "websocket.accept"})
    while scope.get("method") == "POST" and (await receive()).get("more_body"):
        pass
    await anyio.sleep(1.0)
    if scope["query_string"] == b"large":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
    elif is_http:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
    else:
        await send({"type": "websocket.send", "text": "ok"})
        await send({"type": "websocket.close"})


@contextmanager
def listening(most: int, silence_s: float, pause_s: float = 20.0, asked: Any = slow) -> Iterator[tuple[str, int]]:
    import uvicorn

    protocol = bounded(most, silence_s, pause_s)
    server = uvicorn.Server(uvicorn.Config(asked, http=protocol, log_config=None, lifespan="off"))
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


def test_no_more_are_held_than_may_be_and_the_oldest_of_whom_nobody_knows_go_first() -> None:
    with listening(most=2, silence_s=60.0) as address, ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address, 20)) for _ in range(2)]
        for one in held:  # who may come in
            one.sendall(b"GET /known HTTP/1.1\r\nhost: x\r\n\r\n")
        assert all(one.recv(1000).startswith(b"HTTP/1.1 200") for one in held)
        with socket.create_connection(address, 20) as third:
            assert _is_closed(third)
        assert not any(_is_closed(one, within_s=0.1) for one in held)
        held.pop(0).close()
        time.sleep(0.2)
        stranger, newest = (stack.enter_context(socket.create_connection(address, 20)) for _ in range(2))
        assert _is_closed(stranger) and not _is_closed(newest, within_s=0.1)


@pytest.mark.parametrize("path", ["/", "/known"])
def test_who_keeps_it_waiting_in_mid_request_is_let_go_of(path: str) -> None:
    """With a body that does not come on, or with reading; whoever goes on, though slowly, is waited for."""
    with listening(most=10, silence_s=1.0, pause_s=5.0) as address, ExitStack() as stack:
        stuck, slow_one = (stack.enter_context(socket.create_connection(address, 20)) for _ in range(2))
        deaf = stack.enter_context(socket.socket())
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(address)
        deaf.sendall(f"GET {path}?large HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        for one in (stuck, slow_one):
            one.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n".encode())
        for _ in range(10):
            slow_one.sendall(b"x")
            time.sleep(0.15)
        assert slow_one.recv(1000).startswith(b"HTTP/1.1 200")
        assert _is_closed(stuck, within_s=0.1), "before the slow one had sent all"
        # A person who may come in may pause a video.
        assert _is_held(deaf) == (path == "/known")
        deadline = time.monotonic() + 20
        while _is_held(deaf):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_login_has_ten_seconds_however_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its body is of anybody, who could send a byte of it now and then."""
    from pavdm_dist.serve import app

    monkeypatch.setattr(app, "_LOGIN_S", 0.5)
    routes = app.FastAPI()
    app._handle_errors(routes)
    app._add_page(routes, SimpleNamespace(), "x" * 20)
    with listening(most=10, silence_s=20.0, asked=routes) as address, socket.create_connection(address, 20) as one:
        one.sendall(b"POST /login HTTP/1.1\r\nhost: x\r\ncontent-length: 4000\r\n\r\n{")
        said = b""
        while b"within" not in said and (more := one.recv(1000)):
            said += more
        assert said.startswith(b"HTTP/1.1 408") and b"must come within 0.5 s" in said
        assert _is_closed(one)


def _is_closed(connection: socket.socket, within_s: float | None = None) -> bool:
    """Whether the other end closes it, or did so already."""
    if within_s is not None:
        connection.settimeout(within_s)
    try:
        while connection.recv(1000):
            pass
        return True
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def _is_held(connection: socket.socket) -> bool:
    """Whether the other end, which is of this process, has it open, of one that reads nothing."""
    return any(
        held.laddr == connection.getpeername() and held.raddr == connection.getsockname() and held.fd != -1
        for held in psutil.net_connections("tcp4")
    )


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
            before, most = len(os.listdir(f"/proc/{started.pid}/fd")), 256 // 4  # its share of them
            for _ in range(300):
                stack.enter_context(socket.create_connection((address[1], int(address[2])), 20))
            # As many again may be accepted before the first is looked at; and the desk looks at files meanwhile.
            assert len(os.listdir(f"/proc/{started.pid}/fd")) <= before + 2 * most + 8, "more than connections may have"
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
