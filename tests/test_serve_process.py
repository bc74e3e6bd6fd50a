"""``pavdm serve`` as a person starts it: a process that a signal ends in order, and many clients of it at once."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
from forked import Program
from helpers import tiny_checkpoint
from serving import storm

from pavdm_dist.farm.tree import Tree
from pavdm_dist.serve.tokens import TOKEN


@contextmanager
def process(*words: str, **environment: str) -> Iterator[tuple[Program, str]]:
    """A server in a process of its own, and its address; ended if a test leaves it."""
    inherited = {name: value for name, value in os.environ.items() if name != TOKEN}
    started = Program(["-m", "pavdm_dist", "serve", "http.port=0", *words], {**inherited, **environment})
    try:
        addresses = (re.search(r"listening on (\S+)", line) for line in started.lines())
        address = next(filter(None, addresses), None)
        assert address is not None, started.communicate(timeout=1)
        yield started, address[1]
    finally:
        started.kill()


def left(started: Program, number: int = signal.SIGTERM) -> str:
    """All that a server says, to its end by a signal; its status must be 0."""
    started.send_signal(number)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 0 and "Traceback" not in said, said
    return said


def test_a_signal_ends_it_in_order(tmp_path: Path) -> None:
    words = (f"model={tiny_checkpoint(tmp_path / 'model')}", "--out", str(tmp_path / "out"))
    tree = Tree(str(tmp_path / "out"))
    with process(*words) as (first, url):
        id = httpx.post(f"{url}/v1/videos", json={"prompt": "a red three", "seconds": 60}, timeout=60).json()["id"]
        with httpx.stream("GET", f"{url}/v1/videos/{id}/live", timeout=60) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            said = left(first)  # viewers are let go of
    assert "what is under way is saved" in said
    assert tree.state(id).standing == "begun" and 0 < tree.seconds_rendered(id) < 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_videos_of_twenty_clients_at_flat_memory(tmp_path: Path) -> None:
    """None is lost, each is answered as it should be, and the server does not grow."""
    words = (f"model={tiny_checkpoint(tmp_path / 'model')}", "http.max_queue=1000", "--out", str(tmp_path / "out"))
    with process(*words) as (started, url):
        memory = [_storm(url, started.pid, ids := [], each) for each in (10, 10)]
        assert len(set(ids)) == 200
        tree = Tree(str(tmp_path / "out"))
        assert {tree.state(id).standing for id in ids} == {"done"}
        left(started)
    print(f"MiB, highest of each storm: {memory}")
    # Threads that come and go leave holes in what the C library holds; what is Python's is counted in test_serve.py.
    assert memory[1] - memory[0] < 64


def _storm(url: str, pid: int, ids: list[str], each: int) -> float:
    """Twenty clients at once until all that they asked for is complete; the server's largest memory, in MiB."""
    server, over, seen = psutil.Process(pid), threading.Event(), [0.0]

    def watch() -> None:
        while not over.wait(0.1):
            seen.append(server.memory_full_info().uss / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ids[:] = storm(url, 20, each)
        while (health := httpx.get(f"{url}/health", timeout=60).json())["queued"] + health["in_progress"]:
            time.sleep(0.2)
    finally:
        over.set()
        watcher.join()
    return round(max(seen), 1)


@pytest.mark.slow
def test_beyond_the_loopback_it_makes_a_token_and_keeps_it(tmp_path: Path) -> None:
    words = (f"model={tiny_checkpoint(tmp_path / 'model')}", "http.auth=token", "--out", str(tmp_path / "out"))
    kept = tmp_path / "out" / "serve.token"
    with process(*words) as (started, url):
        assert httpx.get(f"{url}/v1/videos", timeout=60).status_code == 401
        assert kept.stat().st_mode & 0o777 == 0o600
        token = kept.read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx.get(f"{url}/v1/videos", headers=headers, timeout=60).status_code == 200 and token not in left(
            started
        )
    with process(*words, **{TOKEN: "x" * 20}) as (started, url):
        assert httpx.get(f"{url}/v1/videos", headers=headers, timeout=60).status_code == 401
        assert (
            httpx.get(f"{url}/v1/videos", headers={"Authorization": "Bearer " + "x" * 20}, timeout=60).status_code
            == 200
        )
        left(started)
