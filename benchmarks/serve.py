"""What a server gives how soon, whether any of many videos is lost, and whether its memory grows.

    python benchmarks/serve.py [--quick] [--json]

`pavdm serve` in a process of its own on the loopback.

* ``first_bytes``: the shipped model; from the POST to the first playable bytes of the live stream, ``seconds``; to the
  first chunk as the server counts it (``pavdm_serve_first_chunk_seconds``), ``first_chunk_s``; ``more_s`` is what the
  way through the server takes beside. The first request comes as soon as the server listens: it waits for the weights.
* ``storms``: a tiny untrained model, 20 clients at once (4 with --quick) that ask for 10 videos each (3), bad requests
  among them, until all are complete; four times (3). ``lost``: not complete in the end; ``own_mib``: memory that the
  server has asked for itself when all is done, ``most_mib`` the highest meanwhile (Linux; files that it maps are left
  out, as what is counted of them depends on who maps them, too).

It ends with what the server said last where a video fails, the server ends or is in trouble, or nothing gets further
for ten minutes.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import torch
from common import machine, machine_line, parser

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import tiny_checkpoint
from serving import storm

from pavdm_dist.farm.tree import Tree

# Nothing is waited for longer than this without getting further.
PATIENCE_S = 600.0
# Between two looks at the server's memory, each of which holds the server up for some milliseconds.
LOOK_S = 0.5
# One client for all questions, as each new one reads certificates; servers close connections when they like.
ask = httpx.Client(timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0))


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    quick, threads = arguments.quick, arguments.threads
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        folder = Path(name)
        report = {
            "machine": machine(),
            "first_bytes": first_bytes(folder / "first", threads, 2 if quick else 5),
            "storms": storms(folder, threads, 4 if quick else 20, 3 if quick else 10, 3 if quick else 4),
        }
    print(json.dumps(report) if arguments.json else _table(report))


@dataclass
class Server:
    """A server in a process of its own.

    Attributes:
        pid, url: its number and address.
        said: the last lines of its log.
    """

    pid: int
    url: str = ""
    said: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def fails(self, why: str) -> SystemExit:
        """The end of the measurement, with what the server said last."""
        return SystemExit(f"{why}; the server said last:\n{''.join(self.said)}")

    def get(self, path: str) -> Any:
        """What it answers, of JSON; its refusals and its trouble end the measurement."""
        answer = ask.get(f"{self.url}{path}")
        if answer.status_code != 200:
            raise self.fails(f"GET {path}: {answer.status_code} {answer.text}")
        return answer.json()

    def until(self, what: str, look: Callable[[], tuple[bool, object]]) -> None:
        """Waits until ``look`` says that it is over; how far it is, which ``look`` says too, must change meanwhile."""
        seen, since = object(), time.monotonic()
        while True:
            over, far = look()
            if over:
                return
            if far != seen:
                seen, since = far, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                raise self.fails(f"{what}: nothing has come for {PATIENCE_S:.0f} s, it stands at {far}")
            time.sleep(0.1)

    def complete(self, id: str) -> None:
        """Waits until a video is complete."""

        def look() -> tuple[bool, object]:
            video = self.get(f"/v1/videos/{id}")
            if video["status"] == "failed":
                raise self.fails(f"video {id} has failed: {video['error']['message']}")
            return video["status"] == "completed", video["progress"]

        self.until(f"video {id}", look)

    def idle(self) -> None:
        """Waits until no video waits or is under way."""

        def look() -> tuple[bool, object]:
            health = self.get("/health")
            left = health["queued"] + health["in_progress"]
            return not left, left

        self.until("videos that are left", look)


@contextmanager
def running(*words: str, threads: int = 1) -> Iterator[Server]:
    """A server that takes requests; it must end in order behind the block, and does end in any case."""
    command = [sys.executable, "-m", "pavdm_dist", "serve", "http.port=0", f"threads_per_stage={threads}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", env=environment
    )
    server, address = Server(process.pid), queue.Queue[str | None]()

    def listen() -> None:  # to the end, or a full pipe would stop the server
        assert process.stderr is not None
        for line in process.stderr:
            server.said.append(line)
            if (found := re.search(r"listening on (\S+)", line)) is not None:
                address.put(found[1])
        address.put(None)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        try:
            url = address.get(timeout=PATIENCE_S)
        except queue.Empty:
            url = None
        if url is None:
            raise server.fails("the server did not start")
        server.url = url
        yield server
        process.terminate()
        if status := process.wait(timeout=PATIENCE_S):
            raise server.fails(f"the server ended with status {status}")
    except (httpx.HTTPError, http.client.HTTPException, OSError) as error:
        raise server.fails(f"the server does not answer ({type(error).__name__}: {error})") from error
    except subprocess.TimeoutExpired as error:
        raise server.fails(f"the server did not end within {PATIENCE_S:.0f} s") from error
    finally:
        process.kill()
        process.wait()
        listener.join()


def first_bytes(out: Path, threads: int, requests: int) -> list[dict[str, float]]:
    """See above."""
    found = []
    with running("--out", str(out), threads=threads) as server:
        for number in range(1, requests + 1):
            began = time.monotonic()
            connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE_S)
            fields = json.dumps({"prompt": "a red three drifting up", "seconds": 2})
            connection.request("POST", "/v1/videos", fields, {"content-type": "application/json"})
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise server.fails(f"POST /v1/videos: {answer.status} {body!r}")
            id = json.loads(body)["id"]
            connection.request("GET", f"/v1/videos/{id}/live")
            answer, data = connection.getresponse(), b""
            while b"mdat" not in data:
                piece = answer.read1(1 << 16)
                if not piece:
                    raise server.fails("the stream ended before anything could be played")
                data += piece
            seconds = time.monotonic() - began
            connection.close()
            server.complete(id)
            first = _metric(server, "pavdm_serve_first_chunk_seconds")
            found.append(
                {
                    "request": number,
                    "seconds": round(seconds, 3),
                    "first_chunk_s": round(first, 3),
                    "more_s": round(seconds - first, 3),
                }
            )
    return found


def _metric(server: Server, name: str) -> float:
    text = ask.get(f"{server.url}/metrics").text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    if found is None:
        raise server.fails(f"/metrics has no {name}")
    return float(found[1])


def storms(folder: Path, threads: int, clients: int, each: int, times: int) -> list[dict[str, Any]]:
    """See above."""
    model, out = tiny_checkpoint(folder / "model"), folder / "storms"
    tree, found = Tree(str(out)), []
    with running(f"model={model}", "http.max_queue=1000", "--out", str(out), threads=threads) as server:
        for _ in range(times):
            start, most = time.monotonic(), list[float]()
            with _watched(server.pid, most):
                ids = storm(server.url, clients, each, PATIENCE_S)
                asked_s = time.monotonic() - start
                server.idle()
            seconds = time.monotonic() - start
            most.append(_own_mib(server.pid))
            found.append(
                {
                    "videos": len(ids),
                    "lost": sum(tree.state(id).standing != "done" for id in ids),
                    "asked_s": round(asked_s, 2),
                    "seconds": round(seconds, 2),
                    "own_mib": round(most[-1], 1),
                    "most_mib": round(max(most), 1),
                    "threads": psutil.Process(server.pid).num_threads(),
                }
            )
    return found


def _own_mib(pid: int) -> float:
    """Anonymous memory of a process."""
    facts = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Anonymous:\s+(\d+) kB$", facts, re.MULTILINE)) / 1024


@contextmanager
def _watched(pid: int, seen: list[float]) -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            try:
                seen.append(_own_mib(pid))
            except OSError:  # it has ended, which whoever asks it hears
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _table(report: dict[str, Any]) -> str:
    lines = [machine_line(report["machine"]), ""]
    for name in ("first_bytes", "storms"):
        lines += [f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()) for row in report[name]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
