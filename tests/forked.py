"""Programs in processes of their own that need not import torch and what is built on it: most of a short run's time."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = [
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "pavdm_dist.commands.sample",
]


def forking() -> ForkServerContext:
    """Where processes come from that have made their imports already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Program:
    """``python ARGUMENTS`` in a forked process, with what of :class:`subprocess.Popen` is needed.

    Args:
        arguments: a file, ``-c CODE`` or ``-m MODULE``, and what follows.
        environment: its own; None = this process'.
        folder: where it works; None = here.
    """

    def __init__(
        self, arguments: list[str], environment: dict[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115  # goes with this object
        given = (arguments, environment or dict(os.environ), str(folder or Path.cwd()), self._output.name)
        self._process = forking().Process(target=_run, args=given)
        self._process.start()
        # A test that fails leaves it running, and this process would wait for it at its end.
        weakref.finalize(self, self._process.kill)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def lines(self) -> Iterator[str]:
        """What it prints to either stream, line by line, until it has ended."""
        rest = ""
        with open(self._output.name) as file:
            while True:
                is_over = self.returncode is not None
                *whole, rest = (rest + file.read()).split("\n")
                yield from whole
                if is_over:
                    return
                time.sleep(0.01)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """All that it printed, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a program", timeout)
        return Path(self._output.name).read_text(), None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(arguments: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # As a shell starts it, whatever this process was told to ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    what, *rest = arguments
    if what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(what, run_name="__main__")
