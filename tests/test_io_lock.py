"""Locks of processes on other machines: in containers, stopped, or gone without a word."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pavdm_dist.errors import ConfigError
from pavdm_dist.io import lock, lockfile, processes, storage
from pavdm_dist.io.lock import OutputLock, Watch, clear_locks
from pavdm_dist.io.lockfile import read_lock, remove_stale

pytestmark = pytest.mark.timeout(60)
ALONE = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc"]


def can_unshare(words: list[str]) -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*words, "true"], capture_output=True).returncode == 0


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence that a test can wait for."""
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    monkeypatch.setattr(lock, "SILENCE_S", 1.5)


@pytest.fixture
def patient(soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence that no loaded machine mistakes a living owner's for; nobody waits for its end."""
    monkeypatch.setattr(lock, "SILENCE_S", 30)


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


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def beats(output: Path | str) -> int:
    """How often a lock was written again."""
    found = read_lock(lock._path(output))
    assert found is not None and found.owner is not None
    return found.owner.beats


def test_a_silent_lock_of_another_machine_is_taken_over(
    soon: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = [tmp_path / f"{number}.mp4" for number in range(4)]
    for output in outputs[:3]:
        foreign(output)
    began = time.monotonic()
    with caplog.at_level("INFO"):
        clear_locks(outputs)
    assert time.monotonic() - began >= 1.5
    said = ["waiting" in message for message in caplog.messages if "sign of life" in message]
    assert said == [True] * 3 + [False] * 3, "all are watched together"
    for output in outputs[:3]:
        assert f"output={output}: process 12 on elsewhere has given no sign of life for 2 s" in caplog.text
        assert not list(Path(f"{output}.parts").iterdir())
    foreign(outputs[0])
    held = OutputLock.acquire(outputs[0])
    held.check()
    assert json.loads(Path(lock._path(outputs[0])).read_text())["host"] == platform.node()
    held.release()


@pytest.mark.parametrize("skew_s", [-86400 * 3, 0, 86400 * 3])
def test_whatever_its_clock_says_a_lock_that_is_renewed_is_respected(
    patient: None, tmp_path: Path, skew_s: float
) -> None:
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


def test_a_lock_that_is_released_meanwhile_is_waited_for_no_longer(patient: None, tmp_path: Path) -> None:
    output = tmp_path / "v.mp4"
    foreign(output)
    timer = threading.Timer(0.3, lambda: os.unlink(lock._path(output)))
    timer.start()
    began = time.monotonic()
    OutputLock.acquire(output).release()
    assert time.monotonic() - began < 15


def test_in_a_remote_store_too(soon: None) -> None:
    output = "memory://locks/v.mp4"
    held = OutputLock.acquire(output)
    wait_for(lambda: beats(output) > 1)
    held.release()
    assert read_lock(lock._path(output)) is None
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
    wait_for(lambda: held.lost)
    with pytest.raises(OSError, match="took it over"):
        held.check()


def test_a_lock_that_another_has_in_its_hands_for_an_instant_is_not_lost(patient: None, tmp_path: Path) -> None:
    held = OutputLock.acquire(tmp_path / "v.mp4")
    path = lock._path(tmp_path / "v.mp4")
    os.rename(path, f"{path}.aside")
    timer = threading.Timer(0.2, lambda: os.link(f"{path}.aside", path))
    timer.start()
    assert not held.lost
    timer.join()
    held.release()


@pytest.mark.parametrize("refused", [True, False])
def test_where_the_time_of_a_file_cannot_be_moved_the_lock_is_written_again(
    patient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    def utime(path: str) -> None:
        if refused:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)

    monkeypatch.setattr(os, "utime", utime)
    output, machine = tmp_path / "v.mp4", processes.machine
    held = OutputLock.acquire(output)
    wait_for(lambda: beats(output) > 1)
    with monkeypatch.context() as patched:
        patched.setattr(processes, "machine", lambda: f"not {machine()}")  # as seen from another machine
        with pytest.raises(ConfigError, match=f"is being written by process {os.getpid()} on"):
            OutputLock.acquire(output)
    held.check()
    held.release()
    assert not list(Path(f"{output}.parts").iterdir())


def test_no_kind_of_error_ends_the_renewal(
    patient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class StoreError(Exception):
        """As remote stores have them."""

    def away(path: str) -> None:
        raise StoreError("slow down")

    held = OutputLock.acquire(tmp_path / "v.mp4")
    with monkeypatch.context() as patched:
        patched.setattr(lock, "read_lock", away)
        wait_for(lambda: caplog.text.count("cannot be renewed: StoreError: slow down") > 1)
        held.check()
        assert held.lost, "what is not known to be this process' is left alone"
        patched.setattr(lock, "SILENCE_S", 0.5)
        time.sleep(0.6)
        with pytest.raises(OSError, match="its lock could not be renewed for 0 s"):
            held.check()
    assert not held.lost
    held.check()
    held.release()


def test_a_lock_that_says_nothing_is_taken_over_when_it_stays_as_it_is(
    soon: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = [b"", b'{"pid": ', b"[]", b'{"pid": 1}', b"\xff", b'{"pid": ' + b"9" * 5000 + b"}"]
    outputs = [tmp_path / f"{number}.mp4" for number in range(len(contents))]
    for output, content in zip(outputs, contents, strict=True):
        assert storage.create_new(lock._path(output), content)
    clear_locks(outputs)
    for output in outputs:
        assert f"output={output}: a process that its lock does not name has given no sign of life" in caplog.text
        OutputLock.acquire(output).release()


def test_in_a_folder_of_others_what_is_no_lock_stays(soon: None, tmp_path: Path) -> None:
    foreign = tmp_path / "lock.json"  # of some package manager
    foreign.write_text('{"packages": {}}')
    OutputLock.acquire(tmp_path, "run_dir").release()
    named_alike = tmp_path / lock.FOLDER_LOCK
    named_alike.write_text('{"packages": {}}')
    with pytest.raises(ConfigError, match=f"run_dir={tmp_path}: {named_alike} is no lock of ours; move it away"):
        OutputLock.acquire(tmp_path, "run_dir")
    assert foreign.read_text() == named_alike.read_text() == '{"packages": {}}'
    named_alike.write_text("")  # a share without links shows it before it says anything
    OutputLock.acquire(tmp_path, "run_dir").release()
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_lock_that_says_nothing_but_changes_is_respected(patient: None, tmp_path: Path) -> None:
    path = Path(lock._path(tmp_path / "v.mp4"))
    path.parent.mkdir()
    path.touch()
    timer = threading.Timer(0.3, lambda: path.write_text("{"))
    timer.start()
    with pytest.raises(ConfigError, match="is being written by a process that its lock does not name"):
        OutputLock.acquire(tmp_path / "v.mp4")


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "broken"])
def test_a_lock_that_cannot_be_read_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    output = tmp_path / "v.mp4"
    path = Path(lock._path(output))
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":  # whoever opens one waits until somebody writes to it
        os.mkfifo(path)
    else:

        def broken(path: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

        path.touch()
        monkeypatch.setattr(storage, "open_read", broken)
    said = {
        "folder": "Is a directory",
        "link": "a link to nothing",
        "pipe": "is a pipe or a device",
        "broken": "Input/output error",
    }[kind]
    for refused in (lambda: OutputLock.acquire(output), lambda: clear_locks([output])):
        with pytest.raises(
            ConfigError, match=rf"output={output}: its lock {path} cannot be read \({said}\); remove it"
        ):
            refused()
    assert os.path.lexists(path)


def test_a_lock_that_cannot_be_removed_is_refused(soon: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    output = tmp_path / "v.mp4"
    foreign(output)
    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(ConfigError, match=r"of process 12 on elsewhere, which is gone, cannot be removed \(Permission"):
        OutputLock.acquire(output)


@pytest.mark.parametrize("links", [True, False])
def test_only_a_stale_lock_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refused(*_: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    output = tmp_path / "v.mp4"
    path = lock._path(output)
    foreign(output)
    stale = read_lock(path)
    assert stale is not None

    def there() -> list[tuple[str, str]]:
        return [(file.name, json.loads(file.read_text())["token"]) for file in Path(path).parent.iterdir()]

    os.unlink(path)
    remove_stale(path, stale)  # another process was faster
    foreign(output, token="second")
    remove_stale(path, stale)
    assert there() == [("lock.json", "second")], "put back"

    def third(aside: str) -> lockfile.Seen | None:
        foreign(output, token="third")
        return read_lock(aside)

    with monkeypatch.context() as patched:
        patched.setattr(lockfile, "read_lock", third)
        remove_stale(path, stale)
    assert there() == [("lock.json", "third")], "of the two that believe they own it, the second sees that it does not"

    def interrupted(aside: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(lockfile, "read_lock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove_stale(path, stale)
    assert there() == [("lock.json", "third")], "put back"
    found = read_lock(path)
    assert found is not None
    remove_stale(path, found)
    assert there() == []


@pytest.mark.skipif(not can_unshare(ALONE), reason="no right to make process namespaces here")
@pytest.mark.parametrize("killed", [True, False])
def test_containers_of_one_name_respect_each_other(
    patient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
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
    if killed:
        monkeypatch.setattr(lock, "SILENCE_S", 1.5)
    began = time.monotonic()
    OutputLock.acquire(output).release()
    assert not killed or time.monotonic() - began >= 1.5
    assert killed or time.monotonic() - began < 15, "a lock that was given back is waited for by nobody"


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


def test_locks_of_other_machines_are_watched_beside_other_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits: a lock that changes is alive, one that has not for long enough is taken away."""
    monkeypatch.setattr(lock, "SILENCE_S", 0.2)
    output, watch = tmp_path / "v.mp4", Watch()
    assert watch.is_free(output)
    path = tmp_path / "v.mp4.parts" / "lock.json"
    path.parent.mkdir()

    def write(beats: int) -> None:
        facts = {"host": "far", "machine": "another", "pid": 1, "started": 1, "token": "t", "beats": beats}
        path.write_text(json.dumps(facts))

    write(0)
    assert not watch.is_free(output)
    time.sleep(0.25)
    write(1)
    assert not watch.is_free(output), "it was renewed meanwhile"
    time.sleep(0.25)
    assert watch.is_free(output) and not path.exists()
    mine = OutputLock.acquire(output)
    assert not watch.is_free(output), "this process' own is held, too"
    mine.release()
    assert watch.is_free(output)
