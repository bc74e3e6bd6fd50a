"""Locks of processes on other machines: in containers, stopped, or gone without a word."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pavdm_dist.errors import ConfigError
from pavdm_dist.io import lock, processes, storage
from pavdm_dist.io.lock import OutputLock, clear_locks

pytestmark = pytest.mark.timeout(60)
ALONE = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc"]


def can_unshare(words: list[str]) -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*words, "true"], capture_output=True).returncode == 0


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence that a test can wait for."""
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    monkeypatch.setattr(lock, "SILENCE_S", 1.5)


def foreign(output: Path | str, **changes: Any) -> dict[str, Any]:
    """Leaves the lock of a process on another machine."""
    owner = {"host": "elsewhere", "machine": "another", "pid": 12, "started": 3, "token": "theirs", **changes}
    assert storage.create_new(lock._path(output), json.dumps(owner).encode())
    return owner


def owner(output: Path, prefix: list[str], renew_s: float = 0.1) -> subprocess.Popen[str]:
    """Another process, perhaps in a container, that holds an output, and writes a file beside it when told to."""
    script = f"""
import os, sys
from pathlib import Path
from pavdm_dist.io import lock
lock.RENEW_S, lock.SILENCE_S = {renew_s}, 1.5
held = lock.OutputLock.acquire({str(output)!r})
print(os.getpid(), flush=True)
sys.stdin.readline()
try:
    held.check()
    print("writes", flush=True)
except OSError as error:
    print(error, flush=True)
held.release()
"""
    return subprocess.Popen([*prefix, sys.executable, "-c", script], stdin=-1, stdout=-1, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_silent_lock_of_another_machine_is_taken_over(
    soon: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = [tmp_path / f"{number}.mp4" for number in range(4)]
    for output in outputs[:3]:
        foreign(output)
    began = time.monotonic()
    with caplog.at_level("INFO"):
        clear_locks(outputs)
    assert 1.5 <= time.monotonic() - began < 3, "all are watched together"
    for output in outputs[:3]:
        assert f"output={output}: process 12 on elsewhere has given no sign of life for 2 s" in caplog.text
        assert not list(Path(f"{output}.parts").iterdir())
    foreign(outputs[0])
    held = OutputLock.acquire(outputs[0])
    held.check()
    assert json.loads(Path(lock._path(outputs[0])).read_text())["host"] == platform.node()
    held.release()


@pytest.mark.parametrize("skew_s", [-86400 * 3, 0, 86400 * 3])
def test_whatever_its_clock_says_a_lock_that_is_renewed_is_respected(soon: None, tmp_path: Path, skew_s: float) -> None:
    output = tmp_path / "v.mp4"
    foreign(output)
    path, over = lock._path(output), threading.Event()

    def renew() -> None:
        while not over.wait(0.3):
            os.utime(path, times=(time.time() + skew_s,) * 2)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"v\.mp4 is being written by process 12 on elsewhere$"):
            OutputLock.acquire(output)
    finally:
        over.set()
        thread.join()


def test_a_lock_that_is_released_meanwhile_is_waited_for_no_longer(soon: None, tmp_path: Path) -> None:
    output = tmp_path / "v.mp4"
    foreign(output)
    timer = threading.Timer(0.3, lambda: os.unlink(lock._path(output)))
    timer.start()
    began = time.monotonic()
    OutputLock.acquire(output).release()
    assert time.monotonic() - began < 1.2


def test_in_a_remote_store_too(soon: None) -> None:
    output = "memory://locks/v.mp4"
    held = OutputLock.acquire(output)
    first = lock._look(lock._path(output))
    time.sleep(0.5)
    assert lock._look(lock._path(output)) != first, "it is renewed"
    held.release()
    assert lock._look(lock._path(output)) is None
    foreign(output)
    began = time.monotonic()
    OutputLock.acquire(output).release()
    assert time.monotonic() - began >= 1.5


def test_an_owner_that_was_stopped_for_too_long_writes_no_more(soon: None, tmp_path: Path) -> None:
    output, machine = tmp_path / "v.mp4", processes.machine
    other = owner(output, [])
    assert int(said(other)) == other.pid
    os.kill(other.pid, signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(processes, "machine", lambda: f"not {machine()}")  # as seen from another machine
        held = OutputLock.acquire(output)
    os.kill(other.pid, signal.SIGCONT)
    answer, _ = other.communicate("\n", timeout=20)
    assert answer.strip() == "another process took it over while this one was silent, or its lock was removed"
    held.check()
    assert json.loads(Path(lock._path(output)).read_text())["pid"] == os.getpid(), "and it leaves the new lock alone"
    held.release()


def test_a_lock_that_was_removed_by_hand_is_lost(soon: None, tmp_path: Path) -> None:
    held = OutputLock.acquire(tmp_path / "v.mp4")
    os.unlink(lock._path(tmp_path / "v.mp4"))
    end = time.monotonic() + 10
    while not held.lost and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(OSError, match="took it over"):
        held.check()


@pytest.mark.skipif(not can_unshare(ALONE), reason="no right to make process namespaces here")
@pytest.mark.parametrize("killed", [True, False])
def test_containers_of_one_name_respect_each_other(soon: None, tmp_path: Path, killed: bool) -> None:
    output = tmp_path / "v.mp4"
    other = owner(output, ALONE)
    assert said(other) == "1", "its process numbers are its own"
    found = json.loads(Path(lock._path(output)).read_text())
    assert found["host"] == platform.node() and found["machine"] != processes.machine()
    with pytest.raises(ConfigError, match=r"is being written by process 1 on"):
        OutputLock.acquire(output)
    third = subprocess.run(
        [*ALONE, sys.executable, "-c", f"from pavdm_dist.io import lock; lock.OutputLock.acquire({str(output)!r})"],
        capture_output=True,
        text=True,
    )
    assert "is being written by process 1 on" in third.stderr, "to a process of that number, too"
    if killed:
        other.kill()
        other.wait(20)  # before its input ends, at which it would give the lock back
    other.communicate(None if killed else "\n", timeout=20)
    began = time.monotonic()
    OutputLock.acquire(output).release()
    assert (time.monotonic() - began >= 1.5) == killed, "a lock that was given back is waited for by nobody"


@pytest.mark.skipif(not can_unshare(ALONE[:-1]), reason="no right to make process namespaces here")
def test_where_proc_counts_other_processes_it_is_not_believed(tmp_path: Path) -> None:
    program = f"""
import os
from pavdm_dist.io import lock, processes
held = lock.OutputLock.acquire({str(tmp_path / "v.mp4")!r})
assert os.getpid() == 1 and processes.started(1) is None
try:
    lock.clear_locks([{str(tmp_path / "v.mp4")!r}])
except lock.ConfigError as error:
    print(error)
"""
    done = subprocess.run([*ALONE[:-1], sys.executable, "-c", program], capture_output=True, text=True)
    assert "is being written by process 1 on this machine" in done.stdout, done.stderr
