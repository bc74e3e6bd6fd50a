"""Clusters that ask for a token: the one that is found here is shown without being asked, all else is a sentence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(180)

TOKEN = "b" * 40
# Joins, and says what an actor there says; with `reach` only whether it may.
CLIENT = """
import sys
from pavdm_dist.cluster import address, joining
from pavdm_dist.errors import EngineError
where, reach = sys.argv[1:]
try:
    if reach == "reach":
        address.check_reachable(where)
        print("reached")
    else:
        membership = joining.connect(None if where == "own" else where)
        import ray
        class Worker:
            def work(self):
                return "worked"
        print(ray.get(ray.remote(Worker).options(num_cpus=0).remote().work.remote()))
        membership.leave()
except EngineError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def homes() -> Iterator[dict[str, str]]:
    """By what is in them: a cluster's token, another one, none. Their names are short, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:
        found = {}
        for name, token in (("own", TOKEN), ("other", "c" * 40), ("none", None)):
            found[name] = str(home := Path(folder) / name)
            (home / ".ray").mkdir(parents=True)
            if token is not None:
                (home / ".ray" / "auth_token").write_text(token)
        yield found


def environment(home: str, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    return {**inherited, "HOME": home, "RAY_TMPDIR": home, "RAY_preload_python_modules": "", **more}


@pytest.fixture(scope="module")
def head(homes: dict[str, str]) -> Iterator[str]:
    """Address of a head that was started as the README has it, by a user who has a token."""
    with started(homes["own"]) as address:
        yield address


@contextmanager
def started(home: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(home) / "head.log"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
            "--object-store-memory=104857600", "--disable-usage-stats", "--include-dashboard=false",
            "--node-ip-address=127.0.0.1",
        ],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env=environment(home),
        start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def client(where: str, reach: str, variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, where, reach],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    )


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def test_the_token_that_is_here_is_shown(homes: dict[str, str], head: str) -> None:
    joined = client(head, "join", environment(homes["own"]))
    by_variable = client(head, "reach", environment(homes["none"], RAY_AUTH_TOKEN=TOKEN))
    assert said(joined) == "worked" and said(by_variable) == "reached"


def test_it_is_not_shown_to_a_cluster_that_asks_for_none(homes: dict[str, str]) -> None:
    """Whoever shows one asks all that call back for it, too: actors would never come up."""
    with started(homes["none"]) as address:
        assert said(client(address, "join", environment(homes["own"]))) == "worked"


PLACES = "into RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"


def test_what_is_wrong_with_a_token_is_said(homes: dict[str, str], head: str) -> None:
    asks = f"ray_address='{head}': the Ray cluster there asks for its token, and "
    cases = [
        (environment(homes["none"]), f"{asks}there is none here; put it {PLACES}"),
        (environment(homes["other"]), f"{asks}the one here is another; put it {PLACES}"),
        (
            environment(homes["own"], RAY_AUTH_MODE="disabled"),
            f"{asks}RAY_AUTH_MODE=disabled shows none; put it {PLACES}",
        ),
        (
            environment(homes["none"], RAY_AUTH_MODE="token"),
            f"RAY_AUTH_MODE=token: there is no token here; put the cluster's {PLACES}",
        ),
        (
            environment(homes["own"], RAY_AUTH_TOKEN_PATH="/nowhere"),
            "RAY_AUTH_TOKEN_PATH=/nowhere: no token can be read there; set it to the file of one",
        ),
    ]
    clients = [client(head, "reach", variables) for variables, _ in cases]
    assert [said(one) for one in clients] == [sentence for _, sentence in cases]


def test_a_token_that_cannot_be_read_is_a_sentence_for_a_ray_of_ones_own_too(homes: dict[str, str]) -> None:
    found = said(client("own", "join", environment(homes["none"], RAY_AUTH_TOKEN_PATH="/nowhere")))
    assert found.startswith("no Ray could be started on this machine: ") and "/nowhere" in found and "\n" not in found
