"""Two hosts on this machine: network namespaces with an address each, joined by a cable that can be slowed and cut.

The cable is a thread that carries frames between two tap devices: it needs no kernel module for the delay, and what it
drops nobody is told of, as when a host loses its power.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from helpers import hear_signals

PORT = 6379


def why_not() -> str | None:
    """What this machine lacks for namespaces; None where nothing."""
    if os.geteuid() != 0:
        return "not root: no network namespaces"
    if missing := [tool for tool in ("ip", "unshare", "hostname") if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    if not os.path.exists("/dev/net/tun"):
        return "no /dev/net/tun"
    name = f"pavdm-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no rights: {made.stderr.strip()}"
    try:
        with ThreadPoolExecutor() as pool:
            os.close(pool.submit(_tap, name).result())
    except OSError as error:
        return f"no rights to make a network device: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Cable:
    """Carries frames between the devices ``net0`` of two namespaces.

    Attributes:
        delay_s: on the way, in each direction.
        is_cut: what is sent from now on is lost.
    """

    def __init__(self, ends: Sequence[str]) -> None:
        self.delay_s, self.is_cut = 0.0, False
        with ThreadPoolExecutor() as pool:
            self._taps = [pool.submit(_tap, name).result() for name in ends]
        self._closing = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        left, right = self._taps
        under_way: deque[tuple[float, int, bytes]] = deque()
        while not self._closing:
            wait = min(0.1, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.1
            for tap in select.select(self._taps, [], [], wait)[0]:
                frame = os.read(tap, 2**16)
                if not self.is_cut:
                    under_way.append((time.monotonic() + self.delay_s, right if tap == left else left, frame))
            while under_way and under_way[0][0] <= time.monotonic():
                _, tap, frame = under_way.popleft()
                with suppress(OSError):  # the device is not up yet, or its queue is full: a frame may be lost
                    os.write(tap, frame)

    def close(self) -> None:
        """Removes both devices."""
        self._closing = True
        self._thread.join()
        for tap in self._taps:
            os.close(tap)


def _tap(namespace: str) -> int:
    """A new device in a namespace, which lives as long as the file; must be called in a thread that then ends."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"net0", 0x0002 | 0x1000))  # TUNSETIFF: tap, bare frames
    return tap


class Host:
    """One of them.

    Attributes:
        name: of its namespace.
        address: the only one it has beside loopback.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self._folder = name, address, folder
        self.environment = {
            **os.environ,
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        }
        # A machine's name means one of its addresses to gloo; that of this one is on neither host.
        self.environment.pop("GLOO_SOCKET_IFNAME", None)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, prepare: str = "", **more: object
    ) -> subprocess.Popen[str]:
        """A process on this host.

        Args:
            command: with arguments.
            environment: beside that of all hosts.
            prepare: shell commands before it, that see mounts of their own.
            more: of Popen.
        """
        shell = f'hostname {self.name}\n{prepare}\nexec "$@"'
        inside = ["ip", "netns", "exec", self.name, "unshare", "--mount", "--uts", "sh", "-ec", shell, "sh", *command]
        settings = {"env": {**self.environment, **(environment or {})}, "text": True, "preexec_fn": hear_signals}
        return subprocess.Popen(inside, **{**settings, **more})  # type: ignore[call-overload, no-any-return]

    def ray(
        self, cpus: int, head: Host | None = None, environment: Mapping[str, str] | None = None, prepare: str = ""
    ) -> None:
        """Starts Ray; ``head`` is the host whose cluster is joined."""
        role = [f"--address={head.address}:{PORT}"] if head else ["--head", f"--port={PORT}"]
        own = [f"--node-ip-address={self.address}", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
        quiet = ["--disable-usage-stats", "--include-dashboard=false"] if head is None else ["--disable-usage-stats"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *own, *quiet]
        log = (self._folder / f"{self.name}.log").open("w+")
        process = self.start(command, environment, prepare, stdout=log, stderr=subprocess.STDOUT)
        if process.wait(120):
            log.seek(0)
            raise AssertionError(f"ray start on {self.name}: {log.read()}")

    def ip(self, *words: str) -> None:
        """A command of ``ip`` inside."""
        subprocess.run(["ip", "-n", self.name, *words], check=True)

    def end(self) -> None:
        """Kills every process on this host, and removes it."""
        for _ in range(50):
            found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
            if not found:
                break
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)
        subprocess.run(["ip", "netns", "del", self.name], check=False)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Cable]]:
    """Both, and what joins them; nothing of them is left."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        hosts = [Host(f"pavdm-{end}-{os.getpid()}", f"10.99.7.{1 + end}", Path(folder)) for end in (0, 1)]
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
            stack.callback(host.end)
        cable = Cable([host.name for host in hosts])
        stack.callback(cable.close)
        for host in hosts:
            host.ip("address", "add", f"{host.address}/24", "dev", "net0")
            host.ip("link", "set", "net0", "mtu", "9000", "up")
            host.ip("link", "set", "lo", "up")
        yield hosts[0], hosts[1], cable
