"""What a server gives how soon, whether any of many videos is lost, and whether its memory grows.

    python benchmarks/serve.py [--quick] [--json]

`pavdm serve` in a process of its own on the loopback.

* ``first_bytes``: the shipped model; from the POST to the first playable bytes of the live stream, ``seconds``; to the
  first chunk as the server counts it (``pavdm_serve_first_chunk_seconds``), ``first_chunk_s``; ``more_s`` is what the
  way through the server takes beside. The first request comes as soon as the server listens: it waits for the weights.
* ``storms``: a tiny untrained model, 20 clients at once (4 with --quick) that ask for 10 videos each (3), bad requests
  among them, until all are complete; four times (3). ``lost``: not complete in the end; ``uss_mib``: the server's own
  memory when all is done, ``most_mib`` the highest meanwhile.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
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


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        folder = Path(name)
        report = {
            "machine": machine(),
            "first_bytes": _first_bytes(folder / "first", 2 if quick else 5),
            "storms": _storms(folder, 4 if quick else 20, 3 if quick else 10, 3 if quick else 4),
        }
    print(json.dumps(report) if arguments.json else _table(report))


@contextmanager
def _server(*words: str) -> Iterator[tuple[int, str]]:
    """Its process and address; ended in order behind the block."""
    command = [sys.executable, "-m", "pavdm_dist", "serve", "http.port=0", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as up:
        assert up.stderr is not None
        said = ""
        while (address := re.search(r"listening on (\S+)", said)) is None:
            line = up.stderr.readline()
            if not line:
                raise SystemExit(f"the server did not start: {said}")
            said += line
        drained = threading.Thread(target=up.stderr.read, daemon=True)  # or a full pipe stops it
        drained.start()
        try:
            yield up.pid, address[1]
        finally:
            up.terminate()
            up.wait(timeout=600)


def _first_bytes(out: Path, requests: int) -> list[dict[str, float]]:
    found = []
    with _server("--out", str(out)) as (_, url):
        for number in range(1, requests + 1):
            began = time.monotonic()
            # Not by a client that reads certificates first.
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
            fields = json.dumps({"prompt": "a red three drifting up", "seconds": 2})
            connection.request("POST", "/v1/videos", fields, {"content-type": "application/json"})
            id = json.loads(connection.getresponse().read())["id"]
            connection.request("GET", f"/v1/videos/{id}/live")
            answer, data = connection.getresponse(), b""
            while b"mdat" not in data:
                piece = answer.read1(1 << 16)
                if not piece:
                    raise SystemExit("the stream ended before anything could be played")
                data += piece
            seconds = time.monotonic() - began
            connection.close()
            while httpx.get(f"{url}/v1/videos/{id}").json()["status"] != "completed":
                time.sleep(0.1)
            first = _metric(url, "pavdm_serve_first_chunk_seconds")
            found.append(
                {
                    "request": number,
                    "seconds": round(seconds, 3),
                    "first_chunk_s": round(first, 3),
                    "more_s": round(seconds - first, 3),
                }
            )
    return found


def _metric(url: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def _storms(folder: Path, clients: int, each: int, times: int) -> list[dict[str, Any]]:
    model, out = tiny_checkpoint(folder / "model"), folder / "storms"
    tree, found = Tree(str(out)), []
    with _server(f"model={model}", "http.max_queue=1000", "--out", str(out)) as (pid, url):
        server = psutil.Process(pid)
        for _ in range(times):
            start, most = time.monotonic(), [0.0]
            with _watched(server, most):
                ids = storm(url, clients, each)
                asked_s = time.monotonic() - start
                while (health := httpx.get(f"{url}/health", timeout=60).json())["queued"] + health["in_progress"]:
                    time.sleep(0.1)
            found.append(
                {
                    "videos": len(ids),
                    "lost": sum(tree.state(id).standing != "done" for id in ids),
                    "asked_s": round(asked_s, 2),
                    "seconds": round(time.monotonic() - start, 2),
                    "uss_mib": round(server.memory_full_info().uss / 2**20, 1),
                    "most_mib": round(max(most), 1),
                    "threads": server.num_threads(),
                }
            )
    return found


@contextmanager
def _watched(server: psutil.Process, seen: list[float]) -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            seen.append(server.memory_full_info().uss / 2**20)

    watcher = threading.Thread(target=watch)
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
