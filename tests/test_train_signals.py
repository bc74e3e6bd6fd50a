"""What ends a training run: a closed terminal as a cancelled job does, and every signal reaches the processes once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pavdm_dist.errors import EngineError
from pavdm_dist.io.lock import FOLDER_LOCK
from pavdm_dist.train import endings, launch, ray_launch, run_folder
from pavdm_dist.train.ray_launch import _heeding
from pavdm_dist.train.train_run import _stopped_by_signals
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Writes down every signal, and goes on until it is let go.
CHILD = """
for name in INT TERM HUP; do trap "echo $name >> told" $name; done
echo > ready
while [ ! -e end ]; do sleep 0.02; done
exit 3
"""


@pytest.fixture
def usual() -> Iterator[None]:
    """Signals as a shell sets them, however these tests were started."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Stops:
    """A trainer that counts how often it is told to stop."""

    count = 0

    def stop(self) -> None:
        self.count += 1


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_ends_a_run_as_a_cancelled_job_does(number: int) -> None:
    trainer: Any = Stops()
    with _stopped_by_signals(trainer) as interrupted:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert trainer.count == 2 and not interrupted
    assert signal.getsignal(number) == signal.default_int_handler


@pytest.mark.usefixtures("usual")
def test_what_is_told_to_be_ignored_still_is() -> None:
    trainer: Any = Stops()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with _stopped_by_signals(trainer):
        os.kill(os.getpid(), signal.SIGHUP)
    assert trainer.count == 0


def appears(path: Path, lines: int = 0) -> None:
    end = time.monotonic() + 20
    while not path.exists() or len(path.read_text().split()) < lines:
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.01)


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize(
    ("sent", "at_once", "told"),
    [
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], 0.0, ["TERM"]),
        ([signal.SIGTERM, signal.SIGHUP], 0.0, ["TERM"]),
        ([signal.SIGINT, signal.SIGINT], 100.0, ["INT"]),
        ([signal.SIGINT, signal.SIGINT], 0.0, ["INT", "INT"]),
    ],
    ids=["a terminal that closes", "a job", "keys that repeat", "impatience"],
)
def test_a_signal_to_the_launcher_reaches_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[int], at_once: float, told: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endings, "AT_ONCE_S", at_once)
    main = threading.get_ident()

    def tell() -> None:
        try:
            appears(tmp_path / "ready")
            for count, number in enumerate(sent, 1):
                signal.pthread_kill(main, number)
                if len(told) == len(sent):  # two that wait to be taken are one
                    appears(tmp_path / "told", count)
                else:
                    time.sleep(0.1)
            appears(tmp_path / "told", len(told))
        finally:
            (tmp_path / "end").touch()

    teller = threading.Thread(target=tell)
    teller.start()
    assert launch._watched(["sh", "-c", CHILD], dict(os.environ)) == (3, sent[0])
    teller.join()
    assert (tmp_path / "told").read_text().split() == told
    assert signal.getsignal(signal.SIGHUP) == signal.default_int_handler


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("number", NUMBERS)
def test_workers_elsewhere_are_asked_to_end_and_waited_for(tmp_path: Path, number: int) -> None:
    main, threads = threading.get_ident(), []

    def work() -> None:
        threads.append(threading.get_ident())
        signal.pthread_kill(main, number)
        appears(tmp_path / f"{run_folder._STOP}me")

    assert _heeding(work, tmp_path, "me") == number
    assert threads != [main], "Ray Train takes Ctrl-C for itself where it runs in the main thread"
    assert signal.getsignal(number) == signal.default_int_handler
    assert _heeding(lambda: None, tmp_path, "me") is None


@pytest.mark.usefixtures("usual")
def test_one_who_interrupts_again_does_not_wait_for_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "AT_ONCE_S", 0.0)
    main, let_go = threading.get_ident(), threading.Event()

    def work() -> None:
        for _ in range(2):
            signal.pthread_kill(main, signal.SIGINT)
            appears(tmp_path / f"{run_folder._STOP}me")
        let_go.wait(20)

    with pytest.raises(KeyboardInterrupt, match="run again to go on from the last checkpoint"):
        _heeding(work, tmp_path, "me")
    let_go.set()


@pytest.mark.usefixtures("usual")
def test_what_fails_on_workers_fails_here(tmp_path: Path) -> None:
    def work() -> None:
        raise EngineError("training on Ray failed")

    with pytest.raises(EngineError, match="training on Ray failed"):
        _heeding(work, tmp_path, "me")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("ends", ["well", "badly", "by a signal"])
def test_the_folder_is_owned_until_the_cluster_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Else another run could begin where these workers still write."""
    locked: list[bool] = []

    class Member:
        def leave(self) -> None:
            locked.append((tmp_path / FOLDER_LOCK).exists())

    main = threading.get_ident()

    def fit(_: TrainConfig, __: Any, run: Path, owner: str) -> None:
        assert run_folder.guard_for(run, owner)() is None
        if ends == "badly":
            raise EngineError("training on Ray failed")
        if ends == "by a signal":
            signal.pthread_kill(main, signal.SIGTERM)
            appears(run / f"{run_folder._STOP}{owner}")

    monkeypatch.setattr(ray_launch, "connect", lambda *_, **__: Member())
    monkeypatch.setattr(ray_launch, "_wait_for_room", lambda _: None)
    monkeypatch.setattr(ray_launch, "_fit", fit)
    config: TrainConfig = load_config(TrainConfig, None, ["launch.ray_workers=1", f"run_dir={tmp_path}"])
    said = {"badly": "^training on Ray failed$", "by a signal": "^stopped by SIGTERM, before the first step; run again"}
    with pytest.raises(EngineError, match=said[ends]) if ends in said else nullcontext():
        ray_launch.launch_ray(config, lambda *_: None)
    assert locked[0] and not (tmp_path / FOLDER_LOCK).exists()
