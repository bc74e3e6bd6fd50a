"""Joining a Ray cluster and starting one: odd addresses, folders and scripts that lie about, several users at once."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from helpers import tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.cluster import address, joining
from pavdm_dist.cluster.joining import connect
from pavdm_dist.cluster.starting import folder_of_own, imports_from
from pavdm_dist.errors import EngineError
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.io.video import read_clip

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def own_temporary(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable says where temporary files go."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name is short."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:
        yield Path(folder)


def _deep(folder: Path) -> Path:
    """As batch systems name the temporary folder of a job: longer than the name of a socket may be."""
    return folder / ("x" * 60) / "job" / "1355700" / "tmp.t0016"


def test_a_terminal_that_closes_does_not_end_a_ray_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds signals back is inherited by the processes that Ray starts; an address' are another's."""
    import ray

    held: list[set[int]] = []
    monkeypatch.setattr(ray, "init", lambda **_: held.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    joining._join(None, log_to_driver=False)
    joining._join("127.0.0.1:1", log_to_driver=False)
    assert held == [before | {signal.SIGHUP}, before] and signal.SIGHUP not in before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_ray_gets_a_folder_whose_sockets_have_names(own_temporary: pytest.MonkeyPatch, short: Path) -> None:
    own_temporary.setenv("TMPDIR", str(_deep(short)))
    assert folder_of_own() in ("/tmp/ray", f"/tmp/ray-{os.getuid()}")
    own_temporary.setenv("RAY_TMPDIR", "")  # as good as none
    assert folder_of_own().startswith("/tmp/ray")
    own_temporary.setenv("RAY_TMPDIR", str(short))
    assert folder_of_own() == f"{short}/ray"


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("{deep}", "its name is .* bytes too long for sockets"),
        ("{file}", "a part of .* is a file"),
        ("{taken}", "ray is a file"),
        ("relative", "it is no absolute path"),
        ("/proc", r"/proc/ray cannot be made \(.*\)"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_named(
    own_temporary: pytest.MonkeyPatch, short: Path, where: str, why: str
) -> None:
    (short / "file").write_text("")
    (short / "taken").mkdir()
    (short / "taken" / "ray").write_text("")
    chosen = where.format(deep=_deep(short), file=short / "file", taken=short / "taken")
    own_temporary.setenv("RAY_TMPDIR", chosen)
    with pytest.raises(EngineError, match=rf"RAY_TMPDIR={re.escape(chosen)}: .*{why}; set RAY_TMPDIR=/"):
        folder_of_own()
    own_temporary.delenv("RAY_TMPDIR")
    own_temporary.setenv("TMPDIR", chosen)  # nobody chose it for Ray
    assert folder_of_own().startswith("/tmp/ray")


OWN = """
import json, os, psutil, sys
from pathlib import Path
from pavdm_dist.cluster.joining import connect
first, second = connect(None), connect("auto")
import ray
assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ and ray.util.get_node_ip_address() == "127.0.0.1"

@ray.remote
class Actor:
    def pid(self):
        return os.getpid()

actor = Actor.remote()
mine = {os.getpid(), ray.get(actor.pid.remote()), *(child.pid for child in psutil.Process().children(recursive=True))}
listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.pid in mine and c.status == "LISTEN"}

@ray.remote(num_cpus=0)
def lookup():
    try:
        import pavdm_stray
    except ImportError:
        return "not found"

first.leave()
first.leave()  # harmless
assert ray.is_initialized(), "another uses it"
print(json.dumps([ray.get(lookup.remote()), ray._private.worker._global_node.get_temp_dir_path(), [*listening]]))
try:
    connect("127.0.0.1:1")
except Exception as error:
    print(error)
second.leave()
assert not ray.is_initialized()
"""


def test_a_cluster_of_this_process_own(tmp_path: Path) -> None:
    """In a short folder whatever TMPDIR says, on the loopback alone; its workers run no scripts of the current folder;
    all users share it."""
    (tmp_path / "pavdm_stray.py").write_text("")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(OWN)
    _deep(tmp_path).mkdir(parents=True)
    left_out = ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_preload_python_modules")  # nothing is computed here
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["TMPDIR"] = str(_deep(tmp_path))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    found, folder, addresses = json.loads(said[0])
    assert addresses and set(addresses) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert found == "not found"
    assert folder.startswith("/tmp/ray")
    assert re.match(r"ray_address='127.0.0.1:1': this process is in the Ray cluster at \S+, and can be in one", said[1])


FROM_A_REQUEST = """
import os, signal, threading, time
from pavdm_dist.cluster.joining import connect

def request(serve):
    thread = threading.Thread(target=serve, name="request")
    thread.start()
    thread.join()

members = []
request(lambda: members.append(connect(None)))
import ray
node = ray._private.worker._global_node
heads = [one.process for kind in node.all_processes.values() for one in kind]
time.sleep(1)
assert heads and not [one for one in heads if one.poll() is not None], "Ray ended with the thread that had asked for it"
request(lambda: members.append(connect(None)))
assert ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote(), timeout=60) != os.getpid()
members[0].leave()
assert ray.is_initialized() and any(one.name == "pavdm-ray" for one in threading.enumerate())
members[1].leave()
assert not ray.is_initialized()
for one in threading.enumerate():
    if one.name == "pavdm-ray":
        one.join(10)
        assert not one.is_alive()
print("well", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
members.append(connect(None))  # left to whatever ends the process
"""


def test_a_ray_of_ones_own_outlives_the_thread_that_asked_for_it() -> None:
    """A server's first request may come in a thread that ends with it; later ones come in others."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", FROM_A_REQUEST], env=environment, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "well True\n"), done.stderr
    assert "SIGTERM" not in done.stderr


class _Starting:
    """Ray's own start, as long as a test wants it to take."""

    def __init__(self, patch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
        self.begun, self.go_on, self.up, self.error = threading.Event(), threading.Event(), False, error
        self.threads = list[threading.Thread]()
        patch.setattr(joining, "_session", None)
        patch.setattr("ray.is_initialized", lambda: self.up)
        patch.setattr("ray.init", self._init)
        patch.setattr("ray.shutdown", lambda: setattr(self, "up", False))
        patch.delenv("RAY_ADDRESS", raising=False)

    def _init(self, **_: object) -> None:
        self.threads.append(threading.current_thread())
        self.begun.set()
        assert self.go_on.wait(60)
        if self.error is not None:
            raise self.error
        self.up = True


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RuntimeError("no\nroom"), EngineError, "no Ray could be started on this machine: no room"),
        (SystemExit(3), SystemExit, "3"),
    ],
)
def test_why_no_ray_could_be_started_reaches_whoever_asked(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: type[BaseException], said: str
) -> None:
    starting = _Starting(monkeypatch, error)
    starting.go_on.set()
    with pytest.raises(kind, match=said):
        connect(None)
    starting.threads[0].join(10)
    assert not starting.threads[0].is_alive() and joining._session is None
    starting.error = None  # and it may be tried again
    membership = connect(None)
    assert starting.up
    membership.leave()
    assert not starting.up


@pytest.mark.parametrize("waits", [True, False])
def test_ctrl_c_while_ray_is_started_leaves_none(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """Whoever waits gets it when Ray is up, and down again; where that takes too long, Ray ends by itself later."""
    starting = _Starting(monkeypatch)
    monkeypatch.setattr(joining, "GIVE_UP_S", 60.0 if waits else 0.0)

    def interrupt() -> None:
        assert starting.begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        if waits:
            time.sleep(0.2)
            starting.go_on.set()

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        connect(None)
    interrupting.join()
    assert not starting.up
    starting.go_on.set()
    starting.threads[0].join(10)
    assert not starting.threads[0].is_alive() and not starting.up and joining._session is None
    connect(None).leave()


def test_two_threads_that_ask_at_once_share_one_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    starting, members = _Starting(monkeypatch), list[joining.Membership]()
    asking = [threading.Thread(target=lambda: members.append(connect(None))) for _ in range(3)]
    for thread in asking:
        thread.start()
    assert starting.begun.wait(60)
    starting.go_on.set()
    for thread in asking:
        thread.join(60)
    assert len(starting.threads) == 1 and [one.others for one in members] == [2, 2, 2]
    for one in members:
        assert starting.up
        one.leave()
    assert not starting.up


def test_workers_import_from_the_current_folder_where_this_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not imports_from(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    assert imports_from(str(tmp_path))


@contextmanager
def _listening(http: bool) -> Iterator[int]:
    """A port at which something else listens."""

    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    if http:
        server = HTTPServer(("127.0.0.1", 0), Quiet)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
        server.server_close()
        return
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent.getsockname()[1]


@pytest.mark.parametrize("http", [True, False])
def test_a_port_where_something_else_listens_is_no_cluster(http: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "ANSWER_S", 1.0)
    # Ray takes loopback for the machine's own address, at which this server does not listen.
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda where: where)
    started = time.monotonic()
    with _listening(http) as port, pytest.raises(EngineError, match=rf"ray_address='127.0.0.1:{port}': .* 6379 is the"):
        address.check_reachable(f"127.0.0.1:{port}")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("127.0.0.1:1", r"no Ray cluster could be reached: .*refused"),
        ("http://127.0.0.1:8265", "must be auto, HOST:PORT or ray://HOST:PORT; .* 8265 that of its dashboard"),
        ("head", "must be auto, HOST:PORT or ray://HOST:PORT"),
        ("head:port", "must be auto, HOST:PORT or ray://HOST:PORT"),
        ("127.0.0.1:77777", "no Ray cluster could be reached"),
        ("no.such.host.invalid:6379", "no Ray cluster could be reached"),
        ("ray://127.0.0.1:1", "no Ray cluster could be reached: .*refused"),
    ],
)
def test_an_address_where_nothing_is_says_so_at_once(where: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(EngineError, match=rf"ray_address='{re.escape(where)}': .*{said}"):
        address.check_reachable(where)
    monkeypatch.setenv("RAY_ADDRESS", where)  # where the setting says nothing
    assert address.given(None) == address.given("auto") == where and address.given("other:1") == "other:1"


def test_auto_may_stand_for_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", list)
    with pytest.raises(EngineError, match=r"ray_address='auto': Could not find any running Ray instance"):
        address.check_reachable("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    with pytest.raises(
        EngineError, match=r"ray_address='auto', which stands for \S+:1: no Ray cluster could be reached"
    ):
        address.check_reachable("auto")


def test_a_process_is_in_one_cluster_at_a_time(ray_cluster: None) -> None:
    import ray

    here = ray.get_runtime_context().gcs_address
    for same in (None, "auto", here):
        connect(same).leave()
    assert ray.is_initialized(), "somebody else's"
    with pytest.raises(
        EngineError, match=rf"ray_address='10.0.0.1:6379': this process is in the Ray cluster at {here}"
    ):
        connect("10.0.0.1:6379")


def test_all_of_a_reason_is_said() -> None:
    error = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.11.7\nThis ")
    assert address.one_line(error).startswith(
        "Version mismatch: The cluster was started with: Ray: 2.50.0 Python: 3.11.7"
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_that_goes_with_the_driver_on_it_is_a_sentence_and_costs_no_frame(tmp_path: Path) -> None:
    """Without Ray's process on this machine no restart is possible; what Ray says of it is not an error of its own. The
    same command again starts another Ray, and finishes the video that an undisturbed one makes."""
    model, output = tiny_checkpoint(tmp_path / "model"), tmp_path / "video.mp4"
    words = ["a red three", f"model={model}", "num_frames=6005", "num_stages=1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "pavdm_dist", "sample", *words, f"output={output}"]
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "video.mp4.parts"
    while not list(parts.glob("segment-*.mp4")) and run.poll() is None:
        time.sleep(0.05)
    family = psutil.Process(run.pid).children(recursive=True)
    next(process for process in family if process.name() == "raylet").kill()
    assert run.stderr is not None
    said = run.stderr.read()
    assert run.wait(100) == 2, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("pavdm: ") and "are playable in" in last and "the same command again goes on" in last, said
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "goes on at chunk" in again.stderr, again.stderr
    whole = tmp_path / "whole.mp4"
    assert cli.main(["sample", *words[:-1], f"output={whole}"]) == 0
    assert read_sidecar(output)["latents_sha256"] == read_sidecar(whole)["latents_sha256"]
    assert len(read_clip(str(output))) == 6005


def test_the_thread_that_started_ray_ends_where_somebody_else_has_shut_it_down(monkeypatch: pytest.MonkeyPatch) -> None:
    session, another = joining._Session(), joining._Session()
    session.members, another.members = 1, 1
    monkeypatch.setattr(joining, "_session", another)
    joining.Membership(session).leave()
    assert session.over.is_set() and joining._session is another and not another.over.is_set()
