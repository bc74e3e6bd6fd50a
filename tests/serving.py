"""A server of a tiny model for tests: in this process, on a port of its own, with a gate that holds videos up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
from needs import needs

from pavdm_dist.farm.kinds import Kinds
from pavdm_dist.farm.shot import Shot
from pavdm_dist.farm.tree import Tree
from pavdm_dist.request.outputs import VideoChunk
from pavdm_dist.serve.front import Front
from pavdm_dist.serve.front_desk import FrontDesk
from pavdm_dist.serve.settings import HttpConfig, ServeConfig

needs("needs pavdm-dist[serve]", "fastapi", "multipart", "prometheus_client", "uvicorn", "websockets")


# Asks servers. A busy machine keeps an answer, and what it waits for on a disk, longer than the five seconds that are
# httpx's own; no connection is kept, as servers close them when they like.
ask = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


class GatedDesk(FrontDesk):
    """A desk whose videos stand still behind a chunk until a test lets them go on."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self._written, self._most = 0, float("inf")
        self._gate = threading.Condition()

    def hold(self, chunks: int) -> None:
        """Stand still once so many more are written. A video is complete a moment before its last chunk is told of."""
        while self.unfinished:
            time.sleep(0.01)
        with self._gate:
            self._most = self._written + chunks

    def let(self, chunks: float = float("inf")) -> None:
        """Go on, for so many more."""
        with self._gate:
            self._most = self._written + chunks
            self._gate.notify_all()

    def has(self, id: str, chunks: int) -> bool:
        """Whether so many chunks of a video that is being rendered are written."""
        progress = self.progress(id)
        return progress is not None and progress.chunks >= chunks

    def grew(self, shot: Shot, chunk: VideoChunk) -> None:
        super().grew(shot, chunk)
        with self._gate:
            self._written += 1
            self._gate.wait_for(lambda: self._written < self._most or self.closing)


@dataclass
class Served:
    """A running server.

    Attributes:
        url: of it.
        desk, front: behind it.
        faults: what its threads raised.
    """

    url: str
    desk: GatedDesk
    front: Front
    faults: list[BaseException] = field(default_factory=list)

    def wait(self, id: str, status: str = "completed", seconds: float = 60) -> dict[str, Any]:
        """The video object once it has a status."""
        end = time.monotonic() + seconds
        while (found := self.front.get(id))["status"] != status:
            assert time.monotonic() < end and found["status"] not in ("completed", "failed"), found
            time.sleep(0.02)
        return found


def settings(model: Path | str, **values: Any) -> ServeConfig:
    """Settings of a server; ``http`` is a dictionary."""
    http = HttpConfig(**{"port": 0, **values.pop("http", {})})
    return ServeConfig(model=str(model), http=http, **values)


@contextmanager
def served(config: ServeConfig, out: Path, token: str | None = None) -> Iterator[Served]:
    """A server on the loopback, ended in order behind the block."""
    import uvicorn

    from pavdm_dist.serve.app import make_app

    desk = GatedDesk(config, Kinds(config), Tree(str(out)))
    front = Front(desk)
    server = uvicorn.Server(uvicorn.Config(make_app(front, token), log_config=None, access_log=False, lifespan="off"))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    desk.open()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", desk, front)
    finally:
        desk.closing = True
        desk._pool.drain()  # before the gate opens: what stands still there must not be finished
        desk.let()
        server.should_exit = True
        thread.join(timeout=30)
        desk.close()
        listening.close()
    assert not thread.is_alive()


def storm(url: str, clients: int, each: int, patience_s: float = 60) -> list[str]:
    """Many clients at once, bad requests among the good ones; ids of what was taken."""
    ids: list[str] = []

    def client(number: int) -> None:
        with httpx.Client(timeout=patience_s) as session:
            for turn in range(each):
                kind = (number + turn) % 5
                if kind == 3:
                    answer = session.post(f"{url}/v1/videos", json={"prompt": "a", "size": "50x32"})
                    assert answer.status_code == 400, answer.text
                elif kind == 4:
                    assert session.get(f"{url}/v1/videos/video_{number}").status_code == 404
                answer = session.post(f"{url}/v1/videos", data={"prompt": "a red three", "num_frames": "9"})
                assert answer.status_code == 200, answer.text
                ids.append(answer.json()["id"])
                assert session.get(f"{url}/v1/videos/{ids[-1]}").status_code == 200

    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client, number) for number in range(clients)]:
            done.result()
    return ids
