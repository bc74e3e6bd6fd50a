"""Signals that end a command, one or a whole barrage: saved once, said once, with the status that a shell would say."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import hear_signals, tiny_checkpoint

from pavdm_dist import cli
from pavdm_dist.commands import signals
from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.signals import ENDING, Signals, Stopped, signal_of

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def tell(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """As a shell starts a program, whatever this process was told to ignore (``nohup``, a job in the background)."""
    handlers = {number: signal.getsignal(number) for number in ENDING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_any_verb_ends_with_a_line_and_the_signals_status(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(one) for one in ENDING]

    def plan_report(*_: Any, **__: Any) -> None:
        try:
            tell(number)
        except KeyboardInterrupt as interrupt:  # as `data prepare` does
            raise KeyboardInterrupt("what is done is in prepared") from interrupt

    monkeypatch.setattr("pavdm_dist.commands.plan.plan_report", plan_report)
    assert cli.main(["plan"]) == 128 + number
    assert capsys.readouterr().err == "pavdm: interrupted: what is done is in prepared\n"
    assert [signal.getsignal(one) for one in ENDING] == before


def test_within_a_command_one_keeps_the_count() -> None:
    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        with Signals(of_process=True) as outer, Signals() as inner:
            assert inner is outer
            with pytest.raises(Stopped) as stopped, inner.shield():
                [tell(number) for number in (signal.SIGTERM, signal.SIGHUP)]
            assert stopped.value.number == signal.SIGTERM
        for number in ENDING:
            tell(number)  # nothing more until the process ends
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_whoever_waits_and_tells_again_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AT_ONCE_S", 100.0)
    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        with Signals(of_process=True):
            with pytest.raises(Stopped):
                tell(signal.SIGINT)
            tell(signal.SIGINT)
            monkeypatch.setattr(signals, "AT_ONCE_S", 0.0)
            with pytest.raises(Stopped) as again:
                tell(signal.SIGHUP)
            assert signal_of(again.value) == signal.SIGHUP
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.slow  # above is what it is made of
def test_a_barrage_changes_nothing(model: Path, tmp_path: Path) -> None:
    words = ["a red three", f"model={model}", "num_frames=100000", "guidance_scale=1", "output=v.mp4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pavdm_dist", "sample", *words],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals,
    )  # fmt: skip
    assert process.stderr is not None
    told = [next(line for line in process.stderr if "chunk 9:" in line)]
    while process.poll() is None:
        for number in ENDING:
            process.send_signal(number)
        time.sleep(0.003)
    told += process.stderr.readlines()
    assert process.returncode in [128 + number for number in ENDING], "".join(told)
    assert "Traceback" not in "".join(told) and "Exception ignored" not in "".join(told)
    assert told[-1].startswith("pavdm: interrupted: ") and "frames of v.mp4 are playable in v.mp4.parts" in told[-1]
    assert not list((tmp_path / "v.mp4.parts").glob("*.tmp"))


def test_a_terminal_that_closes_ends_no_video() -> None:
    ours, theirs = pty.openpty()
    with suppress(OSError), open(theirs, "w") as terminal:
        progress = ChunkProgress(48, fps=24, file=terminal)
        progress.chunk(0, 0, 5)
        os.close(ours)
        for index in range(1, 4):
            progress.chunk(0, index, 8)
        progress.close()
        given = progress._done
    assert given == 29
